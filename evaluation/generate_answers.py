"""Generate answers to problems, score them, and store results."""

import dataclasses
import json
import time

import numpy as np
from tqdm import tqdm

from common import UserError, atomic_write
from evaluation.tasks import decoding_constraint, is_right, judge, make_problem, read_problems
from model.chat_template import parse_answer, render
from model.generation import SamplingParams, generate_batch

TEXT = ("task", "run", "command", "weights", "weights_sha256", "data", "data_sha256")
RESULT_TYPES = dict.fromkeys(TEXT, str) | {"params": int, "seconds": int | float, "totals": dict}
ROW_TYPES = {"problem": int, "sample": int, "tokens": int, "truncated": bool, "prompt": list}
ROW_TYPES |= {"output": str, "verdict": str | None, "level": str | None, "type": str | None}
MAY_DIFFER = ("run", "command", "weights", "data", "params", "settings")  # don't identify a run


def answer_all(
    problems, model, tokenizer, params, *, num_samples, batch_size, seed, part=None, **options
):
    """Answer each problem num_samples times, in batches. Returns one row per answer: {"problem",
    "sample", "output", "reasoning"?, "truncated", "tokens", "seconds"} and the fields of the
    problem. seconds is the time of a batch divided by its size.

    params   SamplingParams; each batch has a seed of its own, which follows from seed
    part     PartialResults, which stores intermediate rows
    options  stop_ids, allowed_ids and use_compile of `generate`
    """
    prompts = render_prompts(problems, tokenizer, model.config.max_position_embeddings)
    # Batch prompts of similar length: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    samples = [(index, sample) for index in order for sample in range(num_samples)]
    rows = list(part.rows) if part else []
    bar = tqdm(total=len(samples), initial=len(rows), unit="answer", leave=False, disable=None)
    for first in range(len(rows), len(samples), batch_size):
        batch = samples[first : first + batch_size]
        batch_seed = int(np.random.SeedSequence([seed, first]).generate_state(1)[0])
        batch_params = dataclasses.replace(params, seed=batch_seed)
        began = time.perf_counter()
        batch_prompts = [prompts[index] for index, _ in batch]
        answers = generate_batch(model, batch_prompts, batch_params, **options)
        seconds = round((time.perf_counter() - began) / len(batch), 3)
        new_rows = []
        for (index, sample), (ids, has_stopped) in zip(batch, answers, strict=True):
            message = parse_answer(ids, tokenizer)
            row = {"problem": index, "sample": sample, "output": message["content"]}
            if "reasoning_content" in message:
                row["reasoning"] = message["reasoning_content"]
            row |= {"truncated": not has_stopped, "tokens": len(ids), "seconds": seconds}
            new_rows.append(row)
        rows += new_rows
        bar.update(len(new_rows))
        if part:
            part.add(new_rows)
    bar.close()
    rows = sorted(rows, key=lambda row: (row["problem"], row["sample"]))
    return [{**problems[row["problem"]], **row} for row in rows]


def render_prompts(problems, tokenizer, context):
    """Return the ids of each problem's prompt. Raises UserError if one fills the context."""
    prompts = []
    for index, problem in enumerate(problems):
        ids, _ = render(problem["prompt"], add_generation_prompt=True, tokenizer=tokenizer)
        if len(ids) >= context:
            raise UserError(
                f"problem {index} has {len(ids)} tokens, and the model's context is {context}; "
                "remove it, or show fewer examples"
            )
        prompts.append(ids)
    return prompts


class TaskScore:
    """Scores a model on a task during training: on all problems of Tiny World, or on the first 200
    of a file. Raises UserError if the file is missing.
    """

    def __init__(self, task, path):
        self.task, self.path = task, path
        if task == "tiny_world":
            self.problems = read_problems(task)
            self.params = SamplingParams(max_new_tokens=120, temperature=0.0)
        else:
            self.problems = read_problems(task, path)[:200]
            self.params = SamplingParams(max_new_tokens=256, temperature=0.0)

    def count_solved(self, model, tokenizer, rank=0, world_size=1):
        """Return how many of this rank's problems the model solves."""
        problems = self.problems[rank::world_size]
        options = {"num_samples": 1, "batch_size": 50, "seed": 1}
        options["allowed_ids"] = decoding_constraint(self.task, self.path, tokenizer)
        rows = answer_all(problems, model, tokenizer, self.params, **options)
        verdicts = [judge(self.task, row["output"], row["gold"], row["truncated"]) for row in rows]
        return sum(map(is_right, verdicts))


def read_result(path):
    """Load a stored result. Raises UserError, naming the field, if the file isn't one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        require_types(result, RESULT_TYPES)
        result["totals"]["accuracy"]  # raises KeyError if it is missing
        require_types(result["totals"], {"accuracy": int | float | None})
        for row in [*result["problems"]] or [{}]:
            require_types(row, ROW_TYPES)
            make_problem(result["task"], row["prompt"], row["gold"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} isn't a result of run_eval.py: {error}") from None
    return result


def require_types(values, types):
    """Raise ValueError unless values is a dict with fields of these types."""
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {values!r}")
    for name, expected in types.items():
        if not isinstance(values.get(name), expected):
            raise ValueError(f"its {name} is {values.get(name)!r}")


def require_same_run(path, head, run, flag):
    """Raise UserError, naming the differences, unless a file with the JSON text head belongs to
    this run: the same problems, settings and weights.
    """
    try:
        stored = json.loads(head)
        stored = {**stored, **stored.get("settings", {}), **stored.get("source", {})}
    except (ValueError, TypeError, RecursionError):
        stored = {}
    differences = [
        f"{name} was {str(stored.get(name)):.12} and is {str(value):.12}"
        for name, value in {**run, **run.get("settings", {})}.items()
        if name not in MAY_DIFFER and stored.get(name, value) != value
    ]
    if differences or "weights_sha256" not in stored:
        differ = "; ".join(differences) or "it doesn't say which"
        raise UserError(f"{path} is from another run: {differ}. Give {flag}, or remove that file")


class PartialResults:
    """The answers of an unfinished run, one per line, next to its result.

    Only complete batches are reused, because a batch is sampled together. Raises UserError, naming
    flag, if the file belongs to another run.
    """

    def __init__(self, path, run, batch_size, flag):
        self.path, self.rows = path, []
        text = path.read_text("utf-8", "replace") if path.exists() else ""
        head, _, lines = text.partition("\n")
        if lines:
            require_same_run(path, head, run, flag)
        for line in lines.split("\n")[:-1]:
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                break  # truncated by a crash
        self.rows = self.rows[: len(self.rows) // batch_size * batch_size]
        header = {key: value for key, value in run.items() if key != "command"}
        with atomic_write(path) as file:
            file.write(as_lines([header, *self.rows]))

    def add(self, rows):
        """Append rows to the file."""
        try:
            with self.path.open("ab") as file:
                file.write(as_lines(rows))
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. Free some space, and run the "
                "same command again: it continues"
            ) from None


def as_lines(values):
    """Encode values as JSONL."""
    return "".join(json.dumps(value) + "\n" for value in values).encode()
