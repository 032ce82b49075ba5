"""The problems of each task, and who judges their answers."""

import json
import random
import re
import tomllib
from pathlib import Path

from common import IM_END, UserError, read_json
from dataset.formats import format_of
from dataset.jsonl import list_hint, read_records
from dataset.tiny_world import EVAL, write_missing
from evaluation import competition_math, gsm8k
from model.chat_template import pieces

PROMPTS = Path(__file__).parent / "prompts.toml"
TASKS = ("tiny_world", "gsm8k", "math", "sid")


def gsm8k_record(record, calculator="strip"):
    """A record of GSM8K, {"question", "answer"}, in the project's form.

    calculator: what happens to notes like <<3*4=12>>: strip or keep.
    Raises ValueError if it is none.
    """
    question, answer = (text_of(record, key) for key in ("question", "answer"))
    rationale, mark, final = answer.rpartition("####")
    if not mark:
        raise ValueError('there is no "####" before the final number in its answer')
    if calculator == "strip":
        rationale = re.sub(r"<<[^<>]*>>", "", rationale)
    rationale, final = rationale.strip(), final.strip().replace(",", "")
    level = f"{len(rationale.splitlines())} steps"
    solution = f"{rationale}\n#### {final}"
    return in_form(question, rationale, solution, final, level, "arithmetic", "gsm8k")


def math_record(record, calculator="strip"):
    """A record of MATH, {"problem", "solution", "level", "type"}, in the project's form.

    Raises ValueError if it is none.
    """
    question, solution = (text_of(record, key) for key in ("problem", "solution"))
    final = competition_math.extract_answer(solution, strict=True)
    if final is None:
        raise ValueError("there is no \\boxed{} in its solution")
    level, kind = (record.get(key) and str(record[key]) for key in ("level", "type"))
    return in_form(question, solution, solution, final, level, kind, "math")


def text_of(record, key):
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'there is no text under "{key}" in it{list_hint(record)}')
    return text.strip()


def in_form(question, rationale, solution, final, level, kind, source):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
    fields = {"question": question, "rationale": rationale, "final_answer": final}
    return {"conversations": turns} | fields | {"level": level, "type": kind, "source": source}


RECORD_OF = {"gsm8k": gsm8k_record, "math": math_record}


def records_of(path):
    """(line, record) of a JSONL file, or of a .json file, which holds one record or a list."""
    if path.suffix != ".json":
        return read_records(path)
    content = read_json(path)
    return [(1, record) for record in (content if isinstance(content, list) else [content])]


def read_task(task, paths, calculator="strip"):
    """The records of a task's files, official or prepared. Raises UserError at a bad one."""
    found = []
    for path in paths:
        for number, record in records_of(path):
            try:
                if not isinstance(record, dict):
                    raise record if isinstance(record, ValueError) else ValueError("no record")
                if "final_answer" not in record:
                    record = RECORD_OF[task](record, calculator)
                if record.get("source", task) != task:
                    raise ValueError(f"its source is {record['source']}")
                text_of(record, "question"), text_of(record, "final_answer")
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}; it is no {task} record") from None
            found.append(record)
    return found


def read_problems(task, path=None, style="zero_shot", shots_path=None):
    """The problems of a task: {"prompt", "gold", "level", "type"} each, prompt being messages.

    Raises UserError, naming the line, if path or shots_path cannot be used.
    """
    path = write_missing(path or EVAL) if task == "tiny_world" else path
    if path is None:
        raise UserError(f"--data_path is missing: give a test file of {task}, as prepare.py writes")
    if task in ("tiny_world", "sid"):
        place, records = "line", read_records(path)
        parts = tiny_world_parts if task == "tiny_world" else sid_parts
    else:
        place, records = "record", enumerate(read_task(task, [path]), 1)
        parts = question_parts(task, style, shots_path)
    problems = []
    for number, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            problems.append(problem(task, *parts(record)))
        except (LookupError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            if meant := guess_task(record, task):
                reason = f"{reason}; it looks like a record of {meant}: give --task {meant}"
            raise UserError(f"--data_path {path}, {place} {number}: {reason}") from None
    if not problems:
        raise UserError(f"--data_path {path} is empty")
    return problems


def guess_task(record, task):
    """Return the task that a record is of, if it is not the given one and the keys say so."""
    by_keys = {"qa": "gsm8k", "math": "math"}
    try:
        name = record.get("source") or by_keys.get(format_of(record))
    except (ValueError, AttributeError):  # in no known format, or not a record
        return None
    return name if name in TASKS and name != task else None


def problem(task, prompt, gold, level=None, kind=None):
    """A problem. Raises ValueError for a prompt that is no conversation, and a gold answer that no
    judge reads.
    """
    pieces(prompt)
    texts = gold if task == "tiny_world" and isinstance(gold, list) else [gold]
    if task not in TASKS or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{gold!r} is no expected answer of {task}")
    level, kind = (value if value is None else str(value) for value in (level, kind))
    return {"prompt": prompt, "gold": gold, "level": level, "type": kind}


def question_parts(task, style, shots_path):
    """A function from a record of GSM8K or MATH to the parts of a problem, put as a table of
    prompts.toml says.
    """
    styles = tomllib.loads(PROMPTS.read_text(encoding="utf-8-sig"))
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
            try:
                examples += [asked(record), record["conversations"][-1]]
                pieces(examples)
            except (LookupError, TypeError, ValueError) as error:
                raise UserError(
                    f"--shots_path {shots_path}: a record is no solved problem: {error}"
                ) from None

    def parts(record):
        prompt = [*examples, asked(record)]
        return prompt, record["final_answer"], record.get("level"), record.get("type")

    return parts


def tiny_world_parts(record):
    level = f"after {record['depth']} exchanges" if "depth" in record else None
    return record["conversations"], record["expected"], level, record["category"]


def sid_parts(record):
    """Of a conversation whose last turn is the id of an item, as prepare.py sid writes."""
    if record["source"] != "sid":
        raise ValueError(f"its source is {record['source']}")
    *prompt, answer = record["conversations"]
    return prompt, answer["content"], None, record["task"]


class Allowed:
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


def allowed_ids(task, path, tokenizer):
    """The constraint on the answers of a task for `generate`: in sid, ids that exist; else None."""
    if task != "sid":
        return None
    place = path.with_name("sids.json")
    try:
        return Allowed(json.loads(place.read_text(encoding="utf-8-sig")), tokenizer)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{place} says which ids exist, and cannot be read: {error}") from None


def judge(task, output, gold, truncated):
    """The verdict on an output: {"extracted", "verdict", "strict_verdict", "error"}.

    verdict is the lenient one, None where its judge is not installed. error: no_answer, truncated
    (no end within max_new_tokens), wrong; None of a correct answer.
    """
    if task in ("tiny_world", "sid"):
        extracted = output.strip()
        strict = lenient = tiny_world_is_correct(output, gold)
    elif task == "gsm8k":
        extracted = gsm8k.extract_answer(output)
        strict, lenient = (gsm8k.is_correct(output, gold, s) for s in (True, False))
    else:
        extracted = competition_math.extract_answer(output)
        official = competition_math.extract_answer(output, strict=True)
        strict = competition_math.is_equiv(official, gold, strict=True)
        lenient = None
        if competition_math.lenient_judge():
            lenient = competition_math.is_equiv(extracted, gold)
    words = {True: "correct", False: "wrong", None: None}
    verdicts = {"verdict": words[lenient], "strict_verdict": words[strict]}
    error = "truncated" if truncated else "wrong" if extracted else "no_answer"
    return {"extracted": extracted, **verdicts, "error": None if is_right(verdicts) else error}


def is_right(row):
    """Whether a judged answer is right: by the lenient judge, or by the strict one without it."""
    return (row["verdict"] or row["strict_verdict"]) == "correct"


def same_answer(task, a, b):
    """Whether two extracted answers vote for the same."""
    same = {"gsm8k": gsm8k.is_correct, "math": competition_math.is_equiv}.get(task)
    return same(a, b) if same else a == b


def tiny_world_is_correct(answer, expected):
    """Whether an answer is right: equal to the expected text, or, where that is a list, holding
    each of its entries as whole words.
    """
    answer = answer.strip()
    if isinstance(expected, str):
        return answer == expected
    return all(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer) for words in expected)
