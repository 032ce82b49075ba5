"""The problems of each task, and who judges their answers."""

import random
import tomllib
from pathlib import Path

from dataset.errors import UserError
from dataset.formats import read_records
from dataset.tasks import read_task
from dataset.tiny_world import EVAL, write_missing
from evaluation import competition_math, gsm8k, tiny_world

PROMPTS = Path(__file__).parent / "prompts.toml"
TASKS = ("tiny_world", "gsm8k", "math")


def read_problems(task, path=None, style="zero_shot", shots_path=None):
    """The problems of a task: {"prompt", "gold", "level", "type"} each, prompt being messages.

    Raises UserError, naming the line, if path or shots_path cannot be used.
    """
    if task == "tiny_world":
        return tiny_world_problems(write_missing(path or EVAL))
    if path is None:
        raise UserError(f"--data_path is missing: give a test file of {task}, as prepare.py writes")
    styles = tomllib.loads(PROMPTS.read_text(encoding="utf-8"))
    if style not in styles:
        raise UserError(f"--prompt_style {style}: {PROMPTS.name} has {', '.join(styles)}")
    pattern, examples = styles[style][task], []

    def asked(record):
        content = pattern.replace("{question}", record["question"])
        return {"role": "user", "content": content}

    if "shots" in styles[style]:
        if shots_path is None:
            raise UserError(f"--prompt_style {style} shows solved problems: give --shots_path")
        solved, shots = read_task(task, [shots_path]), styles[style]["shots"]
        if len(solved) < shots:
            raise UserError(f"--shots_path {shots_path} has {len(solved)} problems, not {shots}")
        for record in random.Random(styles[style]["seed"]).sample(solved, shots):
            examples += [asked(record), record["conversations"][-1]]
    problems = [
        {
            "prompt": [*examples, asked(record)],
            "gold": record["final_answer"],
            "level": record.get("level"),
            "type": record.get("type"),
        }
        for record in read_task(task, [path])
    ]
    if not problems:
        raise UserError(f"--data_path {path} is empty")
    return problems


def tiny_world_problems(path):
    problems = []
    for number, record in read_records(path):
        if isinstance(record, ValueError):
            raise UserError(f"--data_path {path}, line {number}: {record}")
        missing = {"category", "conversations", "expected"} - set(record)
        if missing:
            raise UserError(f"{path}, line {number}: {', '.join(sorted(missing))} is missing")
        problems.append({"prompt": record["conversations"], "gold": record["expected"]})
        problems[-1] |= {"level": None, "type": record["category"]}
    if not problems:
        raise UserError(f"--data_path {path} is empty")
    return problems


def judge(task, output, gold, truncated):
    """What is said of an output: {"extracted", "verdict", "strict_verdict", "error"}.

    error: no_answer, truncated (no end within max_new_tokens), parse_error (an answer that is
    neither number, expression nor words), wrong; None of a correct one.
    """
    if task == "tiny_world":
        extracted = output.strip()
        strict = lenient = tiny_world.is_correct(output, gold)
        malformed = False
    elif task == "gsm8k":
        extracted, malformed = gsm8k.extract_answer(output), False
        strict, lenient = (gsm8k.is_correct(output, gold, s) for s in (True, False))
    else:
        extracted = competition_math.extract_answer(output)
        lenient = competition_math.is_equiv(extracted, gold)
        official = competition_math.extract_answer(output, strict=True)
        strict = competition_math.is_equiv(official, gold, strict=True)
        malformed = bool(extracted) and competition_math.is_malformed(extracted)
    error = "parse_error" if malformed else "wrong"
    error = "truncated" if truncated else "no_answer" if not extracted else error
    words = {True: "correct", False: "wrong"}
    verdicts = {"verdict": words[bool(lenient)], "strict_verdict": words[bool(strict)]}
    return {"extracted": extracted, **verdicts, "error": None if lenient else error}


def same_answer(task, a, b):
    """Whether two extracted answers vote for the same."""
    same = {"gsm8k": gsm8k.is_correct, "math": competition_math.is_equiv}.get(task)
    return same(a, b) if same else a == b
