"""GSM8K and MATH, from their official files to conversations with the fields that a judge needs.

    {"conversations", "question", "rationale", "final_answer", "level", "type", "source"}

GSM8K names no level; here it is the number of steps of the solution.
"""

import re

from dataset.errors import UserError
from dataset.formats import is_folder, read_json, read_records
from dataset.split import shares, write_parts
from evaluation.competition_math import extract_answer


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
    final = extract_answer(solution, strict=True)
    if final is None:
        raise ValueError("there is no \\boxed{} in its solution")
    level, kind = (record.get(key) and str(record[key]) for key in ("level", "type"))
    return in_form(question, solution, solution, final, level, kind, "math")


def text_of(record, key):
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'there is no text under "{key}" in it')
    return text.strip()


def in_form(question, rationale, solution, final, level, kind, source):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
    fields = {"question": question, "rationale": rationale, "final_answer": final}
    return {"conversations": turns} | fields | {"level": level, "type": kind, "source": source}


RECORD_OF = {"gsm8k": gsm8k_record, "math": math_record}


def official_files(folder):
    """{"train": [files], "test": [files]}: a folder or a file of that name. Where nothing is called
    train, all others are; GSM8K's folder has test_socratic.jsonl, too, which is neither.
    """
    if not is_folder(folder):
        raise UserError(f"--raw {folder}: there is no such folder")
    files, others = {"train": [], "test": []}, []
    paths = [path for path in folder.rglob("*.json*") if path.suffix in (".json", ".jsonl")]
    for path in sorted(paths, key=lambda path: (path.parent, len(path.name), path)):
        names = [part.lower() for part in path.relative_to(folder).with_suffix("").parts]
        part = next((name for name in files if name in names), None)
        if part:
            files[part].append(path)
        elif names[-1] != "manifest" and not names[-1].startswith("test"):
            others.append(path)
    files["train"] = files["train"] or others
    if not any(files.values()):
        raise UserError(f"--raw {folder}: there is no .json or .jsonl file in it")
    return files


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


def prepare(args):
    """Writes train, valid and test files of a task, train as plain text, and a manifest.

    The official test set stays the test set; the rest becomes train and valid, or train, valid
    and test where there is no official one. Returns 0.
    """
    files = official_files(args.raw)
    sources = sum(files.values(), [])
    parts = {name: read_task(args.task, paths, args.calculator) for name, paths in files.items()}
    rest, ratios = parts.pop("train"), {"train": 8, "valid": 1}
    if not parts["test"]:
        ratios["test"] = 1
    groups = [f"{r['level']} {r['type']}" if args.stratify else "" for r in rest]
    part_of = shares(groups, list(ratios.values()), args.seed)
    for place, name in enumerate(ratios):
        chosen = [record for record, part in zip(rest, part_of, strict=True) if part == place]
        parts[name] = chosen or parts.get(name, [])
    files = {f"{name}.jsonl": part for name, part in parts.items() if part}
    if parts["train"]:
        files["text.jsonl"] = [{"text": f"{r['question']}\n{answer_of(r)}"} for r in parts["train"]]
    how = {"task": args.task, "source": str(args.raw), "seed": args.seed}
    how |= {"calculator": args.calculator, "stratify": bool(args.stratify)}
    write_parts(args.out, files, how, sources)
    return 0


def answer_of(record):
    return record["conversations"][-1]["content"]
