"""Convert wrong answers, their reasoning and misconceptions to chat format.

    python recipes/misconceptions.py traces.jsonl --out out/misconceptions

Records are {"question", "correct", "incorrect", "cot", "misconception"}, and may have
"example_cots", a list of {"question", "incorrect", "reason"} for the prompt. The answer is
<COT_START>{cot}<COT_END>{misconception}; --extend_tokens turns the two marks into tokens.
"""

import re
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, number
from common import UserError, report_user_errors
from dataset.jsonl import read_records
from dataset.prepare import assign_parts, write_parts

MARKS = ("<COT_START>", "<COT_END>")
FIELDS = ("question", "correct", "incorrect", "cot", "misconception")


def prepare(args):
    """Write train and valid conversations, tokens.txt with the two marks, and a manifest."""
    try:
        forms = tomllib.loads(args.templates.read_text(encoding="utf-8-sig"))
        templates, example = forms["templates"], forms["example"]
        if not templates or not all(isinstance(text, str) for text in [*templates, example]):
            raise ValueError("templates must be texts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        needs = "it needs templates, a list of texts, and example"
        raise UserError(f"--templates {args.templates}: {error!r}; {needs}") from None
    records = []
    for line, record in read_records(args.file):
        try:
            if isinstance(record, ValueError):
                raise record
            template = templates[len(records) % len(templates)]
            records.append(conversation(record, template, example))
        except (ValueError, TypeError, AttributeError) as error:  # example_cots may be anything
            raise UserError(f"{args.file}, line {line}: {error}") from None
    part_indices = assign_parts([""] * len(records), [9, 1], args.seed)
    names = ("train.jsonl", "valid.jsonl")
    files = {
        name: [record for record, part in zip(records, part_indices, strict=True) if part == index]
        for index, name in enumerate(names)
    }
    manifest = {"task": "cot", "source": str(args.file), "seed": args.seed}
    marks = "".join(f"{mark}\n" for mark in MARKS)
    write_parts(args.out, files, manifest, [args.file, args.templates], {"tokens.txt": marks})
    return 0


def conversation(record, template, example):
    """Convert a record to a conversation. Raises ValueError if a field is missing."""
    missing = [name for name in FIELDS if not isinstance(record.get(name), str)]
    if missing:
        raise ValueError(f"it has no text under {', '.join(missing)}")
    examples = "".join(fill(example, item) for item in record.get("example_cots") or [])
    prompt = fill(template, {**record, "examples": examples})
    answer = f"{MARKS[0]}{record['cot']}{MARKS[1]}{record['misconception']}"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"conversations": turns, "source": "cot"}


def fill(template, values):
    """Fill in a template in one pass, so that inserted text isn't interpreted."""
    names = "question|correct|incorrect|reason|examples"
    return re.sub(rf"\{{({names})\}}", lambda match: str(values.get(match[1], "")), template)


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("file", type=Path)
    add("--out", type=Path, required=True, help="folder to write to")
    add("--seed", type=number(int, 0), default=1, help="of the split (%(default)s)")
    templates = Path(__file__).with_suffix(".toml")
    add("--templates", type=Path, default=templates, help="TOML; default: %(default)s")
    return prepare(parser.parse_args(argv))


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
