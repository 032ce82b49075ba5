"""Convert the official files of GSM8K or MATH to chat format, with the fields that the judge needs.

    python recipes/prepare_math.py gsm8k --raw FOLDER --out out/gsm8k
    python recipes/prepare_math.py math --raw FOLDER --out out/math

    {"conversations", "question", "rationale", "final_answer", "level", "type", "source"}

GSM8K has no levels; here the level is the number of solution steps. The test problems are written
three times: test.jsonl has the plain questions, test_chain_of_thought.jsonl also asks for the
steps, and test_few_shot.jsonl shows four solved problems first.
"""

import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, number
from common import UserError, is_folder, read_json, report_user_errors
from dataset.jsonl import list_hint, read_records
from dataset.prepare import assign_parts, write_parts
from evaluation import competition_math

SHOTS = 4  # solved problems of a few-shot prompt, the same before every question
STEPS = {
    "gsm8k": "Think step by step. Then write #### and the number.",
    "math": "Think step by step. Put the final answer in \\boxed{}.",
}


def gsm8k_record(record, calculator):
    """Convert a record of GSM8K, {"question", "answer"}.

    calculator: strip or keep annotations like <<3*4=12>>. Raises ValueError for other records.
    """
    question, answer = (text_field(record, key) for key in ("question", "answer"))
    rationale, mark, final = answer.rpartition("####")
    if not mark:
        raise ValueError('there is no "####" before the final number in its answer')
    if calculator == "strip":
        rationale = re.sub(r"<<[^<>]*>>", "", rationale)
    rationale, final = rationale.strip(), final.strip().replace(",", "")
    level = f"{len(rationale.splitlines())} steps"
    solution = f"{rationale}\n#### {final}"
    return to_record(question, rationale, solution, final, level, "arithmetic", "gsm8k")


def math_record(record, calculator):
    """Convert a record of MATH, {"problem", "solution", "level", "type"}. calculator has no effect.
    Raises ValueError for other records.
    """
    question, solution = (text_field(record, key) for key in ("problem", "solution"))
    final = competition_math.extract_answer(solution, strict=True)
    if final is None:
        raise ValueError("there is no \\boxed{} in its solution")
    level, kind = (record.get(key) and str(record[key]) for key in ("level", "type"))
    return to_record(question, solution, solution, final, level, kind, "math")


CONVERTERS = {"gsm8k": gsm8k_record, "math": math_record}


def text_field(record, key):
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'it has no text under "{key}"{list_hint(record)}')
    return text.strip()


def to_record(question, rationale, solution, final, level, kind, source):
    turns = [user(question), {"role": "assistant", "content": solution}]
    fields = {"question": question, "rationale": rationale, "final_answer": final}
    return {"conversations": turns} | fields | {"level": level, "type": kind, "source": source}


def user(content):
    return {"role": "user", "content": content}


def read_official(task, paths, calculator="strip"):
    """Return the records of a task's official files, in the project's form. A .json file holds one
    record or a list. Raises UserError, naming the line, at a bad one.
    """
    records = []
    for path in paths:
        if path.suffix == ".json":
            content = read_json(path)
            lines = [(1, item) for item in (content if isinstance(content, list) else [content])]
        else:
            lines = read_records(path)
        for line, record in lines:
            try:
                if not isinstance(record, dict):
                    raise record if isinstance(record, ValueError) else ValueError("no record")
                records.append(CONVERTERS[task](record, calculator))
            except ValueError as error:
                raise UserError(f"{path}, line {line}: {error}; it is no {task} record") from None
    return records


def with_prompts(problems, task, solved):
    """Return {file name: problems}: the problems with two other prompts; solved are problems to
    show before each question.
    """
    examples = [message for record in solved for message in record["conversations"]]
    chain_of_thought, few_shot = [], []
    for record in problems:
        question = record["question"]
        chain_of_thought.append(record | {"prompt": [user(f"{question}\n{STEPS[task]}")]})
        few_shot.append(record | {"prompt": [*examples, user(question)]})
    return {"test_chain_of_thought.jsonl": chain_of_thought, "test_few_shot.jsonl": few_shot}


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


def prepare(args):
    """Writes train, valid and test files of a task, train as plain text, and a manifest.

    The official test set stays the test set; the rest becomes train and valid, or train, valid
    and test where there is no official one. The test files with other prompts need SHOTS training
    problems. Returns 0.
    """
    files = official_files(args.raw)
    sources = sum(files.values(), [])
    parts = {
        name: read_official(args.task, paths, args.calculator) for name, paths in files.items()
    }
    rest, ratios = parts.pop("train"), {"train": 8, "valid": 1}
    if not parts["test"]:
        ratios["test"] = 1
    groups = [f"{r['level']} {r['type']}" if args.stratify else "" for r in rest]
    part_indices = assign_parts(groups, list(ratios.values()), args.seed)
    for place, name in enumerate(ratios):
        chosen = [record for record, part in zip(rest, part_indices, strict=True) if part == place]
        parts[name] = chosen or parts.get(name, [])
    files = {f"{name}.jsonl": part for name, part in parts.items() if part}
    if parts["test"] and len(parts["train"]) >= SHOTS:
        solved = random.Random(args.seed).sample(parts["train"], SHOTS)
        files |= with_prompts(parts["test"], args.task, solved)
    if parts["train"]:
        files["text.jsonl"] = [
            {"text": f"{r['question']}\n{written_answer(r)}"} for r in parts["train"]
        ]
    manifest = {"task": args.task, "source": str(args.raw), "seed": args.seed}
    manifest |= {"calculator": args.calculator, "stratify": bool(args.stratify)}
    write_parts(args.out, files, manifest, sources)
    return 0


def written_answer(record):
    return record["conversations"][-1]["content"]


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("task", choices=list(CONVERTERS))
    add("--raw", type=Path, required=True, help="folder of the official files")
    add("--out", type=Path, required=True, help="folder to write train, valid and test files to")
    add("--seed", type=number(int, 0), default=1, help="seed of the split (%(default)s)")
    notes = "annotations like <<3*4=12>> (%(default)s)"
    add("--calculator", choices=["strip", "keep"], default="strip", help=notes)
    levels = "1: keep the proportions of level and type (%(default)s)"
    add("--stratify", type=int, choices=[0, 1], default=1, help=levels)
    return prepare(parser.parse_args(argv))


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
