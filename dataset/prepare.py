"""Inspect data before training, and split a file into parts.

python dataset/prepare.py check --data_path mine.jsonl          # formats, bad records, lengths
python dataset/prepare.py show --data_path mine.jsonl -n 3      # the tokens, in colour
python dataset/prepare.py split --ratios 8:1:1 --out parts mine.jsonl
"""

import argparse
import hashlib
import html
import json
import math
import os
import sys
from collections import Counter
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import cli
from common import UserError, atomic_write, is_folder, report_user_errors
from dataset import formats
from dataset.jsonl import read_records
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import best_fit_decreasing, row_length
from dataset.preference_pairs import PairDataset
from dataset.step_plan import flatten
from model.tokenizer import NAMED_CONTROL_TOKENS, SHIPPED_TOKENIZER, load_tokenizer
from model.weights import load_tensors

STYLES = {  # kind of token: terminal codes (before, after); control tokens are underlined
    "supervised": ("\033[32m", "\033[0m"),
    "plain": ("\033[90m", "\033[0m"),
    "supervised control": ("\033[32m\033[4m", "\033[0m"),
    "control": ("\033[35m\033[4m", "\033[0m"),
}
PLAIN = dict.fromkeys(STYLES, ("", ""))
PLAIN |= dict.fromkeys(("supervised", "supervised control"), ("[", "]"))


def open_data(path, tokenizer, max_seq_len, overlong="truncate"):
    """Open a file as documents, pairs or conversations, depending on its first known record."""
    for _, record in read_records(path):
        if isinstance(record, ValueError):  # a bad record; the dataset counts it
            continue
        try:
            name = formats.detect_format(record)
        except ValueError:
            continue
        if kind := {"text": PretrainDataset, "preference": PairDataset}.get(name):
            return kind(path, tokenizer, max_seq_len)
        break
    return SFTDataset(path, tokenizer, max_seq_len, overlong=overlong)


def open_tokenizer(args):
    """Load the tokenizer of --weight, or of --tokenizer_path."""
    if args.weight is None or is_folder(args.weight):
        return load_tokenizer(args.weight or args.tokenizer_path)
    weights = load_tensors(args.weight, hint="give the path of a .pth file or a folder")
    if not isinstance(weights, dict) or "tokenizer" not in weights:
        raise UserError(f"{args.weight} isn't a weights file of this program")
    return load_tokenizer(json_text=str(weights["tokenizer"]))


def check(args):
    """Report on each file. Returns 1 if any record is bad, otherwise 0."""
    tokenizer = open_tokenizer(args)
    tables = [file_report(path, tokenizer, args) for path in args.data_path]
    if args.json:
        print(json.dumps(tables, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(map(as_text, tables)))
    return int(any(table["bad"] for table in tables))


def file_report(path, tokenizer, args):
    """Return the report of `check` on a file, a dict of plain values."""
    data = open_data(path, tokenizer, args.max_seq_len, args.overlong)
    (file,) = data.files
    roles, answers, seen, duplicates = Counter(), Counter(), set(), []
    for number, record in read_records(path):
        if isinstance(record, ValueError):
            continue
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
        if digest in seen:
            duplicates.append(number)
        seen.add(digest)
        if file.report["format"] == "text":
            continue
        try:
            messages, _ = formats.to_conversation(record, file.report["format"], Counter())
        except (ValueError, TypeError, KeyError, AttributeError):  # a bad record, already counted
            continue
        roles.update(message["role"] for message in messages)
        answers[sum(message["role"] == "assistant" for message in messages)] += 1
    lengths = np.diff(file.offsets)
    tokens = int(lengths.sum())
    if isinstance(data, PairDataset):  # not packed
        T, num_rows, rows_per_step = args.max_seq_len, len(data), args.batch_size
    else:
        T = row_length(data.lengths, args.max_seq_len)
        num_rows = len(best_fit_decreasing(data.lengths.tolist(), T))
        rows_per_step = args.batch_size * (args.max_seq_len // T)
    return {
        "file": str(path),
        **{key: file.report[key] for key in ("format", "records", "bad", "bad_lines", "notes")},
        "duplicates": duplicates,
        "roles": roles,
        "answers_per_conversation": dict(sorted(answers.items())),
        "tokens": tokens,
        "characters_per_token": file.report["characters"] / max(1, tokens),
        "supervised": int(file.supervised.sum()) / max(1, tokens),
        "length_quantiles": {
            str(q): int(np.quantile(lengths, q)) for q in (0, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
        },
        "max_seq_len": args.max_seq_len,
        "longer": data.num_too_long,
        "dropped": data.num_dropped,
        "samples": len(data),
        "packed_rows": num_rows,
        "tokens_per_row": T,
        "packing_efficiency": int(data.lengths.sum()) / (num_rows * T),
        "batch_size": args.batch_size,
        "steps_per_epoch": math.ceil(num_rows / rows_per_step),
    }


def as_text(table):
    """Format a report as text, with the first ten bad and duplicate lines."""
    lines = []
    for name, value in table.items():
        if name == "bad_lines":
            lines += [f"  line {number}: {reason}" for number, reason in value[:10]]
            continue
        if name == "duplicates":
            value = {"records": len(value), "lines": value[:10]}
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {number}" for key, number in value.items()) or "none"
        elif isinstance(value, float):
            value = f"{value:.3f}"
        lines.append(f"{name:26}{value}")
    return "\n".join(lines)


def has_colours():
    """Return whether the output is a terminal and NO_COLOR isn't set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def show(args):
    """Print tokens in colour, or write them as an HTML page. Returns 0."""
    tokenizer, rows = open_tokenizer(args), []
    for path in args.data_path:
        data = open_data(path, tokenizer, args.max_seq_len, args.overlong)
        numbers = [[sample] for sample in range(len(data))]
        if args.packing:
            T = row_length(data.lengths, args.max_seq_len)
            numbers = best_fit_decreasing(data.lengths.tolist(), T)
        for row in numbers[: args.n]:
            samples = flatten(data.documents(sample) for sample in row)
            samples = [styled_tokens(*sample, tokenizer, args.ids) for sample in samples]
            rows.append((f"{data.file_lines(row)}: {sum(map(len, samples))} tokens", samples))
    if args.html:
        page = Path(__file__).with_name("show.html").read_text(encoding="utf-8")
        with atomic_write(args.html) as file:
            file.write(page.replace("<!-- rows -->", as_html(rows)).encode("utf-8"))
        print(f"page: {args.html}")
        return 0
    styles = STYLES if has_colours() else PLAIN
    for title, samples in rows:
        print(f"\n{title}" + ("" if has_colours() else "; supervised tokens are in [brackets]"))
        for tokens in samples:
            for (before, after), run in groupby(tokens, lambda token: styles[token[0]]):
                print(before + "".join(text for _, text in run) + after, end="")
            print("\n--" if args.packing else "")
    return 0


def as_html(rows):
    """Format rows as HTML, with a line between the samples of a row."""
    sections = []
    for title, samples in rows:
        spans = [
            "".join(f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in tokens)
            for tokens in samples
        ]
        body = "<hr>".join(spans)
        sections.append(f"<section><b>{html.escape(title)}</b>\n{body}</section>")
    return "\n".join(sections)


def styled_tokens(input_ids, labels, tokenizer, with_ids):
    """Return a sample as a list of (kind of token, text). A character that spans several tokens is
    shown at the last. A sample's first token is never predicted, so it isn't supervised.
    """
    spans = []
    pending = []  # tokens of an incomplete character
    pairs = zip(input_ids.tolist(), labels.tolist(), strict=True)
    for position, (token, label) in enumerate(pairs):
        supervised = label == token and position > 0
        kind = "supervised" if supervised else "plain"
        if token < NAMED_CONTROL_TOKENS:
            kind = "supervised control" if supervised else "control"
            text = tokenizer.id_to_token(token)
        else:
            pending.append(token)
            text = tokenizer.decode(pending)
            # A character in UTF-8 has at most 4 bytes.
            if text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 4:
                text = ""
            else:
                pending = []
        spans.append((kind, f"{text}[{token}]" if with_ids else text))
    if pending:  # the sample ends within a character
        spans.append((kind, tokenizer.decode(pending)))
    return spans


def split(args):
    """Write train, valid and test files and a manifest. Returns 0."""
    try:
        ratios = [float(ratio) for ratio in args.ratios.split(":")]
    except ValueError:
        ratios = []
    if len(ratios) not in (2, 3) or min(ratios) < 0 or not 0 < sum(ratios) < math.inf:
        raise UserError(f"--ratios {args.ratios}: give two or three numbers, as 8:1:1")
    names = ["train", "valid", "test"] if len(ratios) == 3 else ["train", "test"]
    groups = []
    for number, record in read_records(args.file):
        if isinstance(record, ValueError):
            raise UserError(f"{args.file}, line {number}: {record}. Fix it and rerun")
        if args.stratify and args.stratify not in record:
            raise UserError(f"{args.file}, line {number}: it has no {args.stratify!r}")
        groups.append(str(record.get(args.stratify)))
    if not groups:
        raise UserError(f"{args.file} is empty; give a JSONL file")
    assigned = assign_parts(groups, ratios, args.seed)

    def records(part):
        for index, (_, record) in enumerate(read_records(args.file)):
            if assigned[index] == part:
                yield record

    parts = {f"{name}.jsonl": records(part) for part, name in enumerate(names)}
    manifest = {"source": str(args.file), "ratios": args.ratios, "stratify": args.stratify}
    write_parts(args.out, parts, manifest | {"seed": args.seed}, [args.file])
    return 0


def assign_parts(groups, ratios, seed):
    """Assign records to parts at random. Returns the index of each record's part, a list. Each
    group is split in proportion to the ratios.
    """
    members = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    parts, rng = [0] * len(groups), np.random.default_rng(seed)
    for _, indices in sorted(members.items()):
        ends = np.round(np.cumsum(ratios) / sum(ratios) * len(indices)).astype(int)
        for rank, index in enumerate(rng.permutation(indices).tolist()):
            parts[index] = int(np.searchsorted(ends, rank, side="right"))
    return parts


def write_parts(folder, parts, manifest, sources=(), texts=None):
    """Write {file name: records} as JSONL, {file name: text}, and manifest.json with the counts and
    hashes of the parts. The files appear once all are complete.

    Raises UserError if one would overwrite a source, which is still being read.
    """
    for name in [*parts, *(texts or {}), "manifest.json"]:
        target = folder / name
        if target.exists() and any(target.samefile(path) for path in map(Path, sources)):
            raise UserError(f"{target} is the input and would be overwritten; give another --out")
    manifest = manifest | {"files": {}}
    # ExitStack exits in reverse order: the manifest is renamed last.
    with ExitStack() as complete:
        manifest_file = complete.enter_context(atomic_write(folder / "manifest.json"))
        for name, records in parts.items():
            count, digest = 0, hashlib.sha256()
            file = complete.enter_context(atomic_write(folder / name))
            for record in records:
                line = json.dumps(record, ensure_ascii=False)
                line = line.encode("utf-8", "backslashreplace") + b"\n"
                file.write(line)
                digest.update(line)
                count += 1
            manifest["files"][name] = {"records": count, "sha256": digest.hexdigest()}
        for name, text in (texts or {}).items():
            complete.enter_context(atomic_write(folder / name)).write(text.encode("utf-8"))
        manifest_file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8"))
    for name, file in manifest["files"].items():
        print(f"{folder / name}: {file['records']} records")


def main(argv=None):
    parser = cli.Parser(__doc__, formatter_class=argparse.HelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run, text):
        subparser = commands.add_parser(
            run.__name__, help=text, description=text, formatter_class=argparse.HelpFormatter
        )
        subparser.set_defaults(run=run)
        return subparser.add_argument

    def reader(run, text):
        add = command(run, text)
        add("--data_path", type=Path, nargs="+", required=True, help="files in any known format")
        add("--tokenizer_path", type=Path, default=SHIPPED_TOKENIZER)
        weight = "use the tokenizer of these weights: a .pth file, or a published model's folder"
        add("--weight", type=Path, help=weight)
        tokens = "tokens per row (%(default)s)"
        add("--max_seq_len", type=cli.number(int, 2), default=512, help=tokens)
        long = "how longer conversations are handled (%(default)s)"
        add("--overlong", choices=["truncate", "drop", "split"], default="truncate", help=long)
        return add

    add = reader(check, "read everything and report; exit code 1 if a record is bad")
    add("--batch_size", type=cli.number(int, 1), default=16, help="rows per step (%(default)s)")
    add("--json", action="store_true", help="print the report as JSON")
    add = reader(show, "show tokens in colour: supervised, not supervised, control")
    add("-n", "--n", type=cli.number(int, 1), default=3, help="samples or rows (%(default)s)")
    add("--packing", type=int, choices=[0, 1], default=0, help="1: packed rows")
    add("--ids", action="store_true", help="show token ids")
    add("--html", type=Path, metavar="FILE", help="write an HTML page instead")
    add = command(split, "write train, valid and test files with a manifest")
    add("file", type=Path)
    add("--ratios", default="8:1:1", help="sizes of the parts (%(default)s)")
    add("--seed", type=cli.number(int, 0), default=1)
    add("--stratify", metavar="FIELD", help="keep the proportions of this field's values")
    add("--out", type=Path, required=True, help="folder")
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
