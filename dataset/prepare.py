"""Checks, shows and splits data files before training.

python dataset/prepare.py check --data_path mine.jsonl          # is it all right, how long is it
python dataset/prepare.py show --data_path mine.jsonl -n 3      # its tokens, in colour
python dataset/prepare.py split --ratios 8:1:1 --out parts mine.jsonl
"""

import argparse
import hashlib
import html
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import UserError, replacing, report_user_errors
from dataset import formats
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.loader import best_fit_decreasing, cut, layout
from dataset.split import ratios, split
from dataset.tokenizer import NAMED_CONTROL_TOKENS, SHIPPED_TOKENIZER, load_tokenizer

STYLES = {"supervised": "\033[32m", "not": "\033[90m", "control": "\033[35m"}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Tokens</title>
<style>
:root {{ color-scheme: light dark; --text: #222; --page: #fff; --learn: #cdeccf; --mark: #e3d3f5 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #ddd; --page: #181818; --learn: #1e4d26; --mark: #47306b }} }}
body {{ font: 15px/1.7 ui-monospace, monospace; color: var(--text); background: var(--page);
  max-width: 60rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }}
section {{ white-space: pre-wrap; border-top: 1px solid #8888; padding: 1rem 0 }}
span {{ border-right: 1px solid #8884 }}
.supervised {{ background: var(--learn) }} .not {{ opacity: .75 }}
.control {{ background: var(--mark) }} .control.supervised {{ background: var(--learn);
  outline: 1px solid var(--mark) }} sub {{ opacity: .6 }}
</style>
<h1>Tokens</h1>
<p>{legend}</p>
{rows}
</html>
"""


def open_data(path, args, **options):
    """(dataset of a file, whether it holds conversations), as its first good record says."""
    kind = SFTDataset
    for _, record in formats.read_records(path):
        try:
            kind = PretrainDataset if formats.format_of(record) == "text" else SFTDataset
            break
        except (ValueError, TypeError):
            continue  # a bad record: the next one decides
    if kind is PretrainDataset:
        options = {}
    return kind(path, args.tokenizer, args.max_seq_len, **options), kind is SFTDataset


# ------------------------------------------------------------------------------------------ check


def check(args):
    """Prints a table for each file; returns 1 if any record is a bad one."""
    tables = [table_of(path, args) for path in args.data_path]
    if args.json:
        print(json.dumps(tables, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(map(in_words, tables)))
    return int(any(table["bad"] for table in tables))


def table_of(path, args):
    """All that `check` reports of a file, as a dict of plain values."""
    options = {"overlong": args.overlong} if args.overlong else {}
    data, conversations = open_data(path, args, **options)
    (file,) = data.files
    lengths, tokens = np.diff(file.offsets), int(data.lengths.sum())
    roles, answers, seen, duplicates = Counter(), Counter(), set(), []
    for number, record in formats.read_records(path):
        if isinstance(record, ValueError):
            continue
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
        if digest in seen:
            duplicates.append(number)
        seen.add(digest)
        if conversations:
            try:
                messages, _ = formats.to_conversation(record, file.report["format"], Counter())
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # counted as a bad record already
            roles.update(message["role"] for message in messages)
            answers[sum(message["role"] == "assistant" for message in messages)] += 1
    rows = best_fit_decreasing(data.lengths.tolist(), args.max_seq_len)
    computed, padded = computed_tokens(data.lengths, rows, args)
    counts, edges = np.histogram(lengths, bins=10)
    edges = edges.astype(int).tolist()
    return {
        "file": str(path),
        **{key: file.report[key] for key in ("format", "records", "bad", "bad_lines")},
        "notes": dict(file.report["notes"]),
        "duplicates": duplicates,
        "roles": dict(roles),
        "answers_per_conversation": dict(sorted(answers.items())),
        "tokens": int(lengths.sum()),
        "characters_per_token": file.report["characters"] / max(1, int(lengths.sum())),
        "supervised": float(file.supervised.sum() / max(1, lengths.sum())),
        "length_quantiles": {
            str(q): int(np.quantile(lengths, q)) for q in (0, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
        },
        "length_histogram": list(zip(edges, edges[1:], counts.tolist(), strict=False)),
        "max_seq_len": args.max_seq_len,
        "longer": data.cut,
        "dropped": data.dropped,
        "samples": len(data),
        "packed_rows": len(rows),
        "packing_efficiency": tokens / (len(rows) * args.max_seq_len),
        "padding_saved": 1 - computed / padded,
        "batch_size": args.batch_size,
        "steps_per_epoch": -(-len(rows) // args.batch_size),
    }


def computed_tokens(lengths, rows, args):
    """(tokens of an epoch with padding, if packed; if each sample is padded to its batch)."""
    shuffled, computed, padded = np.random.default_rng(0).permutation, 0, 0
    for step in cut(shuffled(len(rows)).tolist(), args.batch_size):
        T, laid_out = layout([lengths[i] for row in step for i in rows[row]], args.max_seq_len)
        computed += T * len(laid_out)
    for batch in cut(shuffled(lengths), args.batch_size):
        padded += int(batch.max()) * len(batch)
    return computed, padded


def in_words(table):
    """A table as lines to read."""
    quantiles = ", ".join(f"{float(q):.0%} {n}" for q, n in table["length_quantiles"].items())
    numbers = table["duplicates"]
    lines_of = f" (line {', '.join(map(str, numbers[:10]))}{', ...' * (len(numbers) > 10)})"
    lines = [
        table["file"],
        f"  format        {table['format']}: {table['records']} records, {table['bad']} bad",
        *(f"                line {number}: {reason}" for number, reason in table["bad_lines"][:10]),
        *(f"                {count} {note}" for note, count in table["notes"].items()),
        f"  duplicates    {len(numbers)}" + (lines_of if numbers else ""),
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
        f"{table['dropped']} dropped, {table['samples']} samples",
        f"  packed        {table['packed_rows']} rows, {table['packing_efficiency']:.1%} full; "
        f"{table['padding_saved']:.0%} less to compute than padded to the longest of "
        f"{table['batch_size']}",
        f"  an epoch      {table['steps_per_epoch']} steps of {table['batch_size']} packed rows",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- show


def show(args):
    """Prints the tokens of samples or packed rows in colour, or writes a page; returns 0."""
    sections = []
    for path in args.data_path:
        data, _ = open_data(path, args)
        rows = [[index] for index in range(len(data))]
        if args.packing:
            rows = best_fit_decreasing(data.lengths.tolist(), args.max_seq_len)
        for number, row in enumerate(rows[: args.n], 1):
            samples = [tokens_of(data[index], args.tokenizer) for index in row]
            title = f"{path} record {int(data.samples[row[0], 1]) + 1}"
            if args.packing:
                title = f"{path} row {number}: {len(row)} document{'s' * (len(row) > 1)}"
            title += f", {sum(map(len, samples))} tokens"
            sections.append(
                as_html(title, samples, args) if args.html else in_colour(title, samples, args)
            )
    if not args.html:
        print("\n".join(sections))
        return 0
    kinds = {"supervised": "supervised", "not": "not supervised", "control": "control"}
    legend = " ".join(f'<span class="{kind}">{text}</span>' for kind, text in kinds.items())
    with replacing(args.html) as file:
        file.write(PAGE.format(legend=legend, rows="\n".join(sections)).encode())
    print(f"page: {args.html}")
    return 0


def in_colour(title, samples, args):
    """Samples for the terminal; a rule after each in a packed row."""
    parts = [f"\n{title}\n"]
    for sample in samples:
        for text, kinds, number in sample:
            colour = STYLES["control" if kinds == ["not", "control"] else kinds[0]]
            underline = "\033[4m" if "control" in kinds else ""
            shown = text + (f"[{number}]" if args.ids else "")
            parts.append(f"{colour}{underline}{shown}\033[0m")
        parts.append("\n--\n" if args.packing else "")
    return "".join(parts)


def as_html(title, samples, args):
    """Samples as a section of the page; a rule after each in a packed row."""
    parts = [f"<section><b>{html.escape(title)}</b>\n"]
    for sample in samples:
        for text, kinds, number in sample:
            sub = f"<sub>{number}</sub>" if args.ids else ""
            parts.append(f'<span class="{" ".join(kinds)}">{html.escape(text)}{sub}</span>')
        parts.append("<hr>" if args.packing else "")
    return "".join([*parts, "</section>"])


def tokens_of(sample, tokenizer):
    """(text, kinds, id) of each token; a character that spans several tokens is shown by the last.

    The first token of a sample is never predicted.
    """
    input_ids, labels = (part.tolist() for part in sample)
    found, begun = [], []
    for place, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        kinds = ["supervised" if label == token and place else "not"]
        if token < NAMED_CONTROL_TOKENS:
            kinds.append("control")
            text = tokenizer.id_to_token(token)
        else:
            begun.append(token)
            text = tokenizer.decode(begun)
            if text.endswith("\N{REPLACEMENT CHARACTER}") and len(begun) < 4:
                text = ""
            else:
                begun = []
        found.append((text, kinds, token))
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def whole(low):
    """An argparse type: a whole number from low up."""

    def convert(text):
        if not text.isdecimal() or len(text) > 15 or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text:.40}: give a whole number from {low} up")
        return int(text)

    return convert


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)

    def reader(name, run, text):
        part = parts.add_parser(name, help=text, description=text)
        add = part.add_argument
        add("--data_path", type=Path, nargs="+", required=True, help="files in any known format")
        add("--tokenizer_path", type=Path, default=SHIPPED_TOKENIZER)
        longest = "maximum length of a row, in tokens (%(default)s)"
        add("--max_seq_len", type=whole(2), default=512, help=longest)
        part.set_defaults(run=run)
        return add

    add = reader("check", check, "reads everything and reports; exit code 1 if a record is bad")
    rows = "rows of a step, for the estimate (%(default)s)"
    add("--batch_size", type=whole(1), default=16, help=rows)
    add("--overlong", choices=["truncate", "drop", "split"], help="what happens to longer ones")
    add("--json", action="store_true", help="for machines")
    add = reader("show", show, "shows tokens in colour: supervised, not supervised, control")
    add("-n", "--n", type=whole(1), default=3, help="rows to show (%(default)s)")
    add("--packing", type=int, choices=[0, 1], default=0, help="1: packed rows")
    add("--ids", action="store_true", help="with the number of each token")
    add("--html", type=Path, metavar="FILE", help="write a page instead")
    part = parts.add_parser("split", help="writes train, valid and test files with a manifest")
    part.add_argument("file", type=Path)
    part.add_argument("--ratios", type=ratios, default="8:1:1", help="sizes (%(default)s)")
    part.add_argument("--seed", type=whole(0), default=1)
    part.add_argument("--stratify", metavar="FIELD", help="keeps the shares of this field's values")
    part.add_argument("--out", type=Path, required=True, help="folder")
    part.set_defaults(run=split)
    args = parser.parse_args(argv)
    if "tokenizer_path" in args:
        args.tokenizer = load_tokenizer(args.tokenizer_path)
    return args.run(args)


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
