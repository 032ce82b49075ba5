"""The problems of each task, and their graders."""

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from common import IM_END, UserError
from dataset.jsonl import list_hint, read_records
from dataset.tiny_world import EVAL, write_missing
from evaluation import competition_math, gsm8k
from model.chat_template import pieces


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
            problems.append(make_problem(task, *TASKS[task].read_fields(record)))
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
    level = None if level is None else str(level)
    kind = None if kind is None else str(kind)
    return {"prompt": prompt, "gold": gold, "level": level, "type": kind}


def math_fields(record):
    """Return the fields of a problem of GSM8K or MATH, as recipes/prepare_math.py writes them."""
    prompt = record.get("prompt") or [{"role": "user", "content": record["question"]}]
    return prompt, record["final_answer"], record.get("level"), record.get("type")


def tiny_world_fields(record):
    level = record.get("group")
    if "depth" in record:
        level = f"after {record['depth']} exchanges"
    return record["conversations"], record["expected"], level, record["category"]


def sid_fields(record):
    """Return the fields of a conversation whose last turn is an item's id: see recipes/sid.py."""
    *prompt, answer = record["conversations"]
    return prompt, answer["content"], None, record["task"]


class TokenTrie:
    """Restricts answers to a list of texts: called with the ids generated so far, it returns the
    ids that may follow.
    """

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


def judge_text(output, gold):
    """Judge an answer of Tiny World or a semantic id; see `Task.judge`."""
    is_match = matches_expected(output, gold)
    return output.strip(), is_match, is_match


def judge_gsm8k(output, gold):
    """Judge an answer of GSM8K; see `Task.judge`."""
    is_strictly_right = gsm8k.is_correct(output, gold, strict=True)
    return gsm8k.extract_answer(output), is_strictly_right, gsm8k.is_correct(output, gold)


def judge_math(output, gold):
    """Judge an answer of MATH; see `Task.judge`."""
    extracted = competition_math.extract_answer(output)
    official = competition_math.extract_answer(output, strict=True)
    is_strictly_right = competition_math.is_equiv(official, gold, strict=True)
    if not competition_math.lenient_judge():
        return extracted, is_strictly_right, None
    return extracted, is_strictly_right, competition_math.is_equiv(extracted, gold)


@dataclass(frozen=True)
class Task:
    """How the problems of a task are read, and how its answers are judged.

    read_fields  record -> (prompt as messages, gold answer, level or None, type or None)
    judge        (output, gold) -> (extracted answer, whether it is right by the strict judge, and
                 by the lenient judge, None if that isn't installed)
    same_answer  whether two extracted answers are equal, for majority voting
    """

    read_fields: Callable
    judge: Callable
    same_answer: Callable = operator.eq


TASKS = {
    "tiny_world": Task(tiny_world_fields, judge_text),
    "gsm8k": Task(math_fields, judge_gsm8k, gsm8k.is_correct),
    "math": Task(math_fields, judge_math, competition_math.is_equiv),
    "sid": Task(sid_fields, judge_text),
}
VERDICTS = {True: "correct", False: "wrong", None: None}  # as stored in results


def judge(task, output, gold, truncated):
    """Judge an output; returns {"extracted", "verdict", "strict_verdict", "error"}.

    verdict is the lenient one, None if its judge isn't installed. error: no_answer, truncated (no
    stop token within max_new_tokens), wrong, or None for a correct answer.
    """
    extracted, strict, lenient = TASKS[task].judge(output, gold)
    row = {"extracted": extracted, "verdict": VERDICTS[lenient], "strict_verdict": VERDICTS[strict]}
    if is_right(row):
        error = None
    elif truncated:
        error = "truncated"
    else:
        error = "wrong" if extracted else "no_answer"
    return row | {"error": error}


def is_right(row):
    """Return whether a judged answer is right, by the lenient judge if available."""
    verdict = row["strict_verdict"] if row["verdict"] is None else row["verdict"]
    return verdict == "correct"


def matches_expected(answer, expected):
    """Return whether an answer equals the expected text, or, for a list, contains all its entries
    as whole words.
    """
    answer = answer.strip()
    if isinstance(expected, str):
        return answer == expected
    return all(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer) for words in expected)
