"""The answers of a model: written, scored while it is trained, and kept on disk, where another run
never replaces them.
"""

import json
import time

import numpy as np
from tqdm import tqdm

from common import STOP, UserError, atomic_write
from evaluation.tasks import allowed_ids, is_right, judge, problem, read_problems
from model.chat_template import parse_answer, render
from model.generation import generate

TEXT = "task run command weights weights_sha256 data data_sha256".split()
OF_RESULT = dict.fromkeys(TEXT, str) | {"params": int, "seconds": int | float, "totals": dict}
OF_ROW = {"problem": int, "sample": int, "tokens": int, "truncated": bool, "prompt": list}
OF_ROW |= {"output": str, "verdict": str | None, "level": str | None, "type": str | None}
MAY_DIFFER = "run command weights data params settings".split()  # names, places, what follows


def answer_all(problems, model, tokenizer, options, part=None):
    """A row for each sample of each problem: {"problem", "sample", "output", "reasoning"?,
    "truncated", "tokens", "seconds"} and what the problem holds.

    options  {"num_samples", "batch_size", "seed"}, and what `generate` takes
    part     a Part, which keeps the rows on the way
    seconds  an even share of its batch's
    """
    prompts = [
        render(problem["prompt"], add_generation_prompt=True, tokenizer=tokenizer)[0]
        for problem in problems
    ]
    room = model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if len(prompt) >= room:
            raise UserError(
                f"problem {index} has {len(prompt)} tokens, and the model's context is {room}; "
                "leave it out, or show fewer examples"
            )
    options = dict(options)
    num_samples, batch_size, seed = map(options.pop, ("num_samples", "batch_size", "seed"))
    # Prompts of similar length go together: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    asked = [(index, sample) for index in order for sample in range(num_samples)]
    rows = list(part.rows) if part else []
    bar = tqdm(total=len(asked), initial=len(rows), unit="answer", leave=False, disable=None)
    for first in range(len(rows), len(asked), batch_size):
        chosen, began = asked[first : first + batch_size], time.perf_counter()
        options["seed"] = int(np.random.SeedSequence([seed, first]).generate_state(1)[0])
        answers = write_answers(model, [prompts[index] for index, _ in chosen], **options)
        seconds = round((time.perf_counter() - began) / len(chosen), 3)
        new = []
        for (index, sample), (ids, ended) in zip(chosen, answers, strict=True):
            message = parse_answer(ids, tokenizer)
            row = {"problem": index, "sample": sample, "output": message["content"]}
            if "reasoning_content" in message:
                row["reasoning"] = message["reasoning_content"]
            new.append(row | {"truncated": not ended, "tokens": len(ids), "seconds": seconds})
        rows += new
        bar.update(len(new))
        if part:
            part.add(new)
    bar.close()
    rows = sorted(rows, key=lambda row: (row["problem"], row["sample"]))
    return [{**problems[row["problem"]], **row} for row in rows]


def write_answers(model, prompts, **options):
    """(ids, whether a stop token ended them) of each answer; options are those of `generate`."""
    answers, ended = [[] for _ in prompts], [False] * len(prompts)
    for step in generate(model, prompts, **options):
        for place, token in enumerate(step):
            if token in STOP:
                ended[place] = True
            elif token is not None:
                answers[place].append(token)
    return list(zip(answers, ended, strict=True))


class TaskScore:
    """A task's problems, to score a model on while it is trained: all of Tiny World's, else the
    first 200 of a file. Raises UserError if there is no such file.
    """

    def __init__(self, task, path):
        self.task, self.path, tiny = task, path, task == "tiny_world"
        self.problems = read_problems(task, None if tiny else path)[: None if tiny else 200]
        self.options = {"num_samples": 1, "batch_size": 50, "seed": 1, "temperature": 0.0}
        self.options["max_new_tokens"] = 120 if tiny else 256

    def count_solved(self, model, tokenizer, rank=0, world_size=1):
        """Return how many of the problems a model solves, of those that are this process's."""
        options = self.options | {"allowed": allowed_ids(self.task, self.path, tokenizer)}
        rows = answer_all(self.problems[rank::world_size], model, tokenizer, options)
        verdicts = [judge(self.task, r["output"], r["gold"], r["truncated"]) for r in rows]
        return sum(map(is_right, verdicts))


def read_result(path):
    """A stored result. Raises UserError, naming the field, if path holds none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        require_kinds(result, OF_RESULT)
        require_kinds(result["totals"], {"accuracy": int | float})
        for row in [*result["problems"]] or [{}]:
            require_kinds(row, OF_ROW)
            problem(result["task"], row["prompt"], row["gold"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no result of run_eval.py: {error}") from None
    return result


def require_kinds(values, kinds):
    if not isinstance(values, dict):
        raise ValueError(f"it holds {values!r} and no record")
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"its {name} is {values.get(name)!r}")


def require_same_run(path, head, run, flag):
    """Raises UserError, naming what differs, unless the run that a file describes in its JSON text
    head is this one: the same question with the same weights.
    """
    try:
        before = json.loads(head)
        before = {**before, **before.get("settings", {}), **before.get("source", {})}
    except (ValueError, TypeError, RecursionError):
        before = {}
    other = [
        f"{name} was {str(before.get(name)):.12} and is {str(value):.12}"
        for name, value in {**run, **run.get("settings", {})}.items()
        if name not in MAY_DIFFER and before.get(name, value) != value
    ]
    if other or "weights_sha256" not in before:
        differ = "; ".join(other) or "it does not say which"
        raise UserError(f"{path} is of another run: {differ}. Give {flag}, or remove that file")


class Part:
    """The answers of a run so far, a line each, kept beside where its result will be.

    Its whole batches are taken: a batch is drawn together, so it is repeated together. Raises
    UserError, naming flag, if another run left answers there.
    """

    def __init__(self, path, run, batch_size, flag):
        self.path, self.rows = path, []
        text = path.read_text("utf-8", "replace") if path.exists() else ""
        head, _, rest = text.partition("\n")
        if rest:  # else it holds no answer
            require_same_run(path, head, run, flag)
        for line in rest.split("\n")[:-1]:
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                break  # a machine that went off left it in pieces
        self.rows = self.rows[: len(self.rows) // batch_size * batch_size]
        first = {key: value for key, value in run.items() if key != "command"}
        with atomic_write(path) as file:
            file.write(as_lines([first, *self.rows]))

    def add(self, rows):
        try:
            with self.path.open("ab") as file:
                file.write(as_lines(rows))
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. Make room, and give the same "
                "command again: it continues"
            ) from None


def as_lines(values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()
