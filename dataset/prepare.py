"""Look at data before training on it, and get it into shape.

python dataset/prepare.py check --data_path mine.jsonl          # is it all right, how long is it
python dataset/prepare.py show --data_path mine.jsonl -n 3      # its tokens, in colour
python dataset/prepare.py split --ratios 8:1:1 --out parts mine.jsonl
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import report_user_errors
from dataset import formats
from dataset.loader import best_fit_decreasing, cut, layout
from dataset.show import open_data, show
from dataset.split import split
from dataset.tokenizer import SHIPPED_TOKENIZER
from trainer import arguments


def check(args):
    """Prints a table for each file; returns 1 if any record is a bad one."""
    tables = [table_of(path, args) for path in args.data_path]
    if args.json:
        print(json.dumps(tables, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(map(in_words, tables)))
    return int(any(table["bad"] for table in tables))


def table_of(path, args):
    """All that `check` says of a file, as a dict of plain values."""
    data, stage, _ = open_data(path, args, **({"overlong": args.overlong} if args.overlong else {}))
    (file,) = data.files
    lengths = np.diff(file.offsets)
    roles, turns, seen, duplicates = Counter(), Counter(), set(), []
    for number, record in formats.read_records(path):
        if isinstance(record, ValueError):
            continue
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()[:16]
        if digest in seen:
            duplicates.append(number)
        seen.add(digest)
        if stage == "sft":
            try:
                messages, _ = formats.to_conversation(record, file.report["format"], Counter())
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            roles.update(message["role"] for message in messages)
            turns[sum(message["role"] == "assistant" for message in messages)] += 1
    rows = best_fit_decreasing(data.lengths.tolist(), args.max_seq_len)
    packed, computed = len(rows), 0
    for step in cut(np.random.default_rng(0).permutation(packed).tolist(), args.batch_size):
        T, laid = layout([data.lengths[i] for row in step for i in rows[row]], args.max_seq_len)
        computed += T * len(laid)
    drawn = np.random.default_rng(0).permutation(data.lengths)
    groups = [drawn[at : at + args.batch_size] for at in range(0, len(drawn), args.batch_size)]
    padded = int(sum(group.max() * len(group) for group in groups))
    tokens = int(data.lengths.sum())
    return {
        "file": str(path),
        **{key: file.report[key] for key in ("format", "records", "bad", "bad_lines")},
        "notes": dict(file.report["notes"]),
        "duplicates": duplicates,
        "roles": dict(roles),
        "answers_per_conversation": dict(sorted(turns.items())),
        "tokens": int(lengths.sum()),
        "characters_per_token": file.report["characters"] / max(1, int(lengths.sum())),
        "supervised": float(file.supervised.sum() / max(1, lengths.sum())),
        "length_quantiles": {
            str(q): int(np.quantile(lengths, q)) for q in (0, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
        },
        "length_histogram": histogram(lengths),
        "max_seq_len": args.max_seq_len,
        "longer": data.cut,
        "dropped": data.dropped,
        "rows": len(data),
        "packed_rows": packed,
        "packing_efficiency": tokens / (packed * args.max_seq_len),
        "padding_saved": 1 - computed / padded,
        "batch_size": args.batch_size,
        "steps_per_epoch": -(-packed // args.batch_size),
    }


def histogram(lengths, bins=10):
    """[from, to, count] of about as many equal parts as bins."""
    counts, edges = np.histogram(lengths, bins=bins)
    return [
        [int(low), int(high), int(count)]
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]


def in_words(table):
    """A table as lines to read."""
    quantiles = ", ".join(f"{float(q):.0%} {n}" for q, n in table["length_quantiles"].items())
    lines = [
        table["file"],
        f"  format        {table['format']}: {table['records']} records, {table['bad']} bad",
        *(f"                line {number}: {reason}" for number, reason in table["bad_lines"][:10]),
        *(f"                {count} {note}" for note, count in table["notes"].items()),
        f"  duplicates    {len(table['duplicates'])}" + lines_of(table["duplicates"]),
    ]
    if table["roles"]:
        roles = ", ".join(f"{count} {role}" for role, count in table["roles"].items())
        answers = ", ".join(f"{n}: {c}" for n, c in table["answers_per_conversation"].items())
        lines += [f"  turns         {roles}", f"  answers each  {answers}"]
    lines += [
        f"  tokens        {table['tokens']:,}, {table['supervised']:.1%} of them supervised, "
        f"{table['characters_per_token']:.2f} characters each",
        f"  lengths       {quantiles}",
    ]
    most = max(count for *_, count in table["length_histogram"])
    for low, high, count in table["length_histogram"]:
        lines.append(f"    {low:>6}-{high:<6} {'#' * -(-40 * count // most):<40} {count}")
    lines += [
        f"  at {table['max_seq_len']} tokens: {table['longer']} records are longer, "
        f"{table['dropped']} dropped, {table['rows']} rows",
        f"  packed        {table['packed_rows']} rows, {table['packing_efficiency']:.1%} full; "
        f"{table['padding_saved']:.0%} less to compute than padded to the longest of "
        f"{table['batch_size']}",
        f"  an epoch      {table['steps_per_epoch']} steps of {table['batch_size']} packed rows",
    ]
    return "\n".join(lines)


def lines_of(numbers):
    shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
    return f" (line {shown})" if numbers else ""


def main(argv=None):
    parser = arguments.Parser(description=__doc__.splitlines()[0])
    count, positive = arguments.number(int, 0), arguments.number(int, 1)
    parts = parser.add_subparsers(required=True)

    def reader(name, run, text):
        part = parts.add_parser(name, help=text, description=text)
        add = part.add_argument
        add("--data_path", type=Path, nargs="+", required=True, help="files in any known format")
        add("--tokenizer_path", type=Path, default=SHIPPED_TOKENIZER)
        longest = "tokens of a row at most (%(default)s)"
        add("--max_seq_len", type=arguments.number(int, 2), default=512, help=longest)
        part.set_defaults(run=run)
        return add

    add = reader("check", check, "reads everything and reports; exit code 1 if a record is bad")
    rows = "rows of a step, for the estimate (%(default)s)"
    add("--batch_size", type=positive, default=16, help=rows)
    add("--overlong", choices=["truncate", "drop", "split"], help="what happens to longer ones")
    add("--json", action="store_true", help="for machines")
    add = reader("show", show, "shows tokens in colour: supervised, not supervised, control")
    add("-n", "--n", type=positive, default=3, help="rows to show (%(default)s)")
    add("--packing", type=int, choices=[0, 1], default=0, help="1: packed rows")
    add("--ids", action="store_true", help="with the number of each token")
    add("--html", type=Path, metavar="FILE", help="a page instead")
    part = parts.add_parser("split", help="writes train, valid and test files with a manifest")
    part.add_argument("file", type=Path)
    part.add_argument("--ratios", default="8:1:1", help="sizes of the parts (%(default)s)")
    part.add_argument("--seed", type=count, default=1)
    part.add_argument("--stratify", metavar="FIELD", help="keeps the shares of this field's values")
    part.add_argument("--out", type=Path, required=True, help="folder")
    part.set_defaults(run=split)
    args = parser.parse_args(argv)
    arguments.stop_at(arguments.wrong_values(args))
    return args.run(args)


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
