"""The problems of each task, and their graders."""

import json
import re

from common import IM_END, UserError
from dataset.jsonl import list_hint, read_records
from dataset.tiny_world import EVAL, write_missing
from evaluation import competition_math, gsm8k
from model.chat_template import pieces

TASKS = ("tiny_world", "gsm8k", "math", "sid")


def read_problems(task, path=None):
    """Return the problems of a task: a list of {"prompt", "gold", "level", "type"}, prompt being
    messages. Raises UserError, naming the line, if the file can't be used.
    """
    path = write_missing(path or EVAL) if task == "tiny_world" else path
    if path is None:
        raise UserError(f"--data_path is missing: give a test file for {task}, written by a recipe")
    problems = []
    for number, record in read_records(path):
        try:
            if isinstance(record, ValueError):
                raise record
            if record.get("source", task) != task:
                raise ValueError(f"record is from {record['source']}, not {task}")
            problems.append(make_problem(task, *READERS[task](record)))
        except (LookupError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"--data_path {path}, line {number}: {reason}{hint(record)}") from None
    if not problems:
        raise UserError(f"--data_path {path} is empty")
    return problems


def hint(record):
    """Return a hint for a record that isn't a problem of the task, or ""."""
    if not isinstance(record, dict):
        return ""
    if record.get("source") in TASKS:
        return f"; give --task {record['source']}"
    if {"expected", "category"} <= set(record):
        return "; give --task tiny_world"
    if {"question", "answer"} <= set(record) or {"problem", "solution"} <= set(record):
        return "; official files are converted by recipes/prepare_math.py"
    return list_hint(record)


def make_problem(task, prompt, gold, level=None, kind=None):
    """Return a problem. Raises ValueError for an invalid prompt or gold answer."""
    pieces(prompt)  # raises ValueError for invalid messages
    texts = gold if task == "tiny_world" and isinstance(gold, list) else [gold]
    if task not in TASKS or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{gold!r} isn't a valid gold answer for {task}")
    level, kind = (value if value is None else str(value) for value in (level, kind))
    return {"prompt": prompt, "gold": gold, "level": level, "type": kind}


def math_fields(record):
    """Return the fields of a problem of GSM8K or MATH, as recipes/prepare_math.py writes them."""
    prompt = record.get("prompt") or [{"role": "user", "content": record["question"]}]
    return prompt, record["final_answer"], record.get("level"), record.get("type")


def tiny_world_fields(record):
    level = f"after {record['depth']} exchanges" if "depth" in record else None
    return record["conversations"], record["expected"], level, record["category"]


def sid_fields(record):
    """Return the fields of a conversation whose last turn is an item's id: see recipes/sid.py."""
    *prompt, answer = record["conversations"]
    return prompt, answer["content"], None, record["task"]


READERS = {"tiny_world": tiny_world_fields, "sid": sid_fields}
READERS |= {"gsm8k": math_fields, "math": math_fields}


class TokenTrie:
    """Which tokens may come next, so that an answer is one of some texts: a tree of their ids."""

    def __init__(self, texts, tokenizer):
        self.tree = {}
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            node = self.tree
            for token in encoding.ids:
                node = node.setdefault(token, {})
            node[IM_END] = {}

    def __call__(self, ids):
        node = self.tree
        for token in ids:
            node = node.get(token, {})
        return list(node) or [IM_END]


def decoding_constraint(task, path, tokenizer):
    """Return the constraint of `generate` for a task: for sid, ids that exist; otherwise None."""
    if task != "sid":
        return None
    sids_path = path.with_name("sids.json")
    try:
        return TokenTrie(json.loads(sids_path.read_text(encoding="utf-8-sig")), tokenizer)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{sids_path}, the list of ids, cannot be read: {error}") from None


def judge(task, output, gold, truncated):
    """Judge an output; returns {"extracted", "verdict", "strict_verdict", "error"}.

    verdict is the lenient one, None if its judge isn't installed. error: no_answer, truncated (no
    stop token within max_new_tokens), wrong, or None for a correct answer.
    """
    if task in ("tiny_world", "sid"):
        extracted = output.strip()
        strict = lenient = matches_expected(output, gold)
    elif task == "gsm8k":
        extracted = gsm8k.extract_answer(output)
        strict = gsm8k.is_correct(output, gold, strict=True)
        lenient = gsm8k.is_correct(output, gold)
    else:
        extracted = competition_math.extract_answer(output)
        official = competition_math.extract_answer(output, strict=True)
        strict = competition_math.is_equiv(official, gold, strict=True)
        lenient = None
        if competition_math.lenient_judge():
            lenient = competition_math.is_equiv(extracted, gold)
    verdict_names = {True: "correct", False: "wrong", None: None}
    verdicts = {"verdict": verdict_names[lenient], "strict_verdict": verdict_names[strict]}
    if is_right(verdicts):
        error = None
    elif truncated:
        error = "truncated"
    else:
        error = "wrong" if extracted else "no_answer"
    return {"extracted": extracted, **verdicts, "error": error}


def is_right(row):
    """Return whether a judged answer is right, by the lenient judge if available."""
    return (row["verdict"] or row["strict_verdict"]) == "correct"


def same_answer(task, a, b):
    """Return whether two extracted answers are equal, for majority voting."""
    same = {"gsm8k": gsm8k.is_correct, "math": competition_math.is_equiv}.get(task)
    return same(a, b) if same else a == b


def matches_expected(answer, expected):
    """Return whether an answer equals the expected text, or, for a list, contains all its entries
    as whole words.
    """
    answer = answer.strip()
    if isinstance(expected, str):
        return answer == expected
    return all(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer) for words in expected)
