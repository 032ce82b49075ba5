"""Writes the official files of GSM8K or MATH as conversations with the fields that a judge needs.

    python recipes/prepare_math.py gsm8k --raw FOLDER --out out/gsm8k
    python recipes/prepare_math.py math --raw FOLDER --out out/math

    {"conversations", "question", "rationale", "final_answer", "level", "type", "source"}

GSM8K names no level; here it is the number of steps of the solution.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, number
from common import UserError, is_folder, report_user_errors
from dataset.prepare import shares, write_parts
from evaluation.tasks import RECORD_OF, read_task


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


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("task", choices=list(RECORD_OF))
    add("--raw", type=Path, required=True, help="folder of the official files")
    add("--out", type=Path, required=True, help="folder to write train, valid and test files to")
    add("--seed", type=number(int, 0), default=1, help="of the split (%(default)s)")
    notes = "of notes like <<3*4=12>> (%(default)s)"
    add("--calculator", choices=["strip", "keep"], default="strip", help=notes)
    levels = "1: the shares of level and type stay (%(default)s)"
    add("--stratify", type=int, choices=[0, 1], default=1, help=levels)
    return prepare(parser.parse_args(argv))


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
