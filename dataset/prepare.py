"""Look at data before training on it.

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

from dataset import formats
from dataset.errors import UserError, mistakes_in_plain_words
from dataset.files import replacing
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import best_fit_decreasing, layout
from dataset.plan import cut
from dataset.tokenizer import NAMED_CONTROL_TOKENS, SHIPPED_TOKENIZER, load_tokenizer


def open_data(path, args, **more):
    """(dataset, stage) of a file: its first record in a known format says which it is."""
    stage = "sft"
    for _, record in formats.read_records(path):
        if isinstance(record, dict) and any(
            set(keys) <= set(record) for keys in formats.KEYS.values()
        ):
            stage = "pretrain" if formats.format_of(record) == "text" else "sft"
            break
    kind = SFTDataset if stage == "sft" else PretrainDataset
    tokenizer = load_tokenizer(args.tokenizer_path)
    return kind(path, tokenizer, args.max_seq_len, **more), stage, tokenizer


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


# ------------------------------------------------------------------------------------------- show

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


def show(args):
    """Prints rows as tokens in colour, or writes them as a page; returns 0."""
    written = []
    for path in args.data_path:
        data, _, tokenizer = open_data(path, args)
        rows = [[index] for index in range(len(data))]
        if args.packing:
            rows = best_fit_decreasing(data.lengths.tolist(), args.max_seq_len)
        for number, row in enumerate(rows[: args.n], 1):
            tokens = [token for index in row for token in tokens_of(data[index], tokenizer)]
            plural = "s" * (len(row) > 1)
            title = f"{path} row {number}: {len(row)} document{plural}" if args.packing else None
            record = int(data.rows[row[0], 1]) + 1
            title = title or f"{path} record {record}"
            written.append(
                (f"{title}, {len(tokens)} tokens", tokens, [len(data[i][0]) for i in row])
            )
    if args.html:
        legend = " ".join(
            f'<span class="{kind}">{kind}</span>' for kind in ("supervised", "not", "control")
        )
        rows = "\n".join(section(args, *row) for row in written)
        with replacing(args.html) as file:
            file.write(
                PAGE.format(legend=legend.replace(">not<", ">not supervised<"), rows=rows).encode()
            )
        print(f"page: {args.html}")
        return 0
    for title, tokens, lengths in written:
        print(f"\n{title}")
        ends = set(np.cumsum(lengths).tolist())
        for place, (text, kinds, number) in enumerate(tokens, 1):
            colour = STYLES["control" if "control" in kinds and "not" in kinds else kinds[0]]
            shown = text + (f"[{number}]" if args.ids else "")
            underline = "\033[4m" if "control" in kinds else ""
            print(
                f"{colour}{underline}{shown}\033[0m",
                end="\n--\n" if args.packing and place in ends else "",
            )
        print()
    return 0


def section(args, title, tokens, lengths):
    """A row as HTML; a rule between its documents."""
    ends, spans = set(np.cumsum(lengths).tolist()), [f"<section><b>{html.escape(title)}</b>\n"]
    for place, (text, kinds, number) in enumerate(tokens, 1):
        sub = f"<sub>{number}</sub>" if args.ids else ""
        spans.append(f'<span class="{" ".join(kinds)}">{html.escape(text)}{sub}</span>')
        spans.append("<hr>" if args.packing and place in ends else "")
    return "".join(spans) + "</section>"


def tokens_of(row, tokenizer):
    """(text, kinds, id) of each token; a character that spans several tokens is shown by the last.

    A token is never predicted if it is the first of its row.
    """
    input_ids, labels = (part.tolist() for part in row)
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


# ------------------------------------------------------------------------------------------ split


def split(args):
    """Writes train, valid and test files and a manifest; returns 0."""
    try:
        ratios = [float(ratio) for ratio in args.ratios.split(":")]
    except ValueError:
        ratios = []
    if not 2 <= len(ratios) <= 3 or min(ratios) < 0 or sum(ratios) <= 0:
        raise UserError(f"--ratios {args.ratios}: give two or three numbers, as 8:1:1")
    names = ["train", "valid", "test"] if len(ratios) == 3 else ["train", "test"]
    groups = {}
    for index, (number, record) in enumerate(formats.read_records(args.file)):
        if isinstance(record, ValueError):
            raise UserError(f"{args.file}, line {number}: {record}. Mend it, and split again")
        if args.stratify and args.stratify not in record:
            raise UserError(f"{args.file}, line {number}: there is no {args.stratify!r} in it")
        groups.setdefault(str(record.get(args.stratify)) if args.stratify else "", []).append(index)
    if not groups:
        raise UserError(f"{args.file} is empty; give a JSONL file")
    part_of, rng = {}, np.random.default_rng(args.seed)
    for _, indices in sorted(groups.items()):
        ends = np.round(np.cumsum(ratios) / sum(ratios) * len(indices)).astype(int)
        for place, index in enumerate(rng.permutation(indices).tolist()):
            part_of[index] = names[int(np.searchsorted(ends, place, side="right"))]
    manifest = {"source": str(args.file), "seed": args.seed, "ratios": args.ratios}
    manifest |= {"stratify": args.stratify, "files": {}}
    for name in names:
        path, count, digest = args.out / f"{name}.jsonl", 0, hashlib.sha256()
        with replacing(path) as file:
            for index, (_, record) in enumerate(formats.read_records(args.file)):
                if part_of[index] == name:
                    line = json.dumps(record, ensure_ascii=False)
                    line = line.encode("utf-8", "backslashreplace") + b"\n"
                    file.write(line)
                    digest.update(line)
                    count += 1
        manifest["files"][path.name] = {"records": count, "sha256": digest.hexdigest()}
        print(f"{path}: {count} records")
    with replacing(args.out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8"))
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)

    def reader(name, run, text):
        part = parts.add_parser(name, help=text, description=text)
        add = part.add_argument
        add("--data_path", type=Path, nargs="+", required=True, help="files in any known format")
        add("--tokenizer_path", type=Path, default=SHIPPED_TOKENIZER)
        add("--max_seq_len", type=int, default=512, help="tokens of a row at most (%(default)s)")
        part.set_defaults(run=run)
        return add

    add = reader("check", check, "reads everything and reports; exit code 1 if a record is bad")
    add("--batch_size", type=int, default=16, help="rows of a step, for the estimate (%(default)s)")
    add("--overlong", choices=["truncate", "drop", "split"], help="what happens to longer ones")
    add("--json", action="store_true", help="for machines")
    add = reader("show", show, "shows tokens in colour: supervised, not supervised, control")
    add("-n", type=int, default=3, help="rows to show (%(default)s)")
    add("--packing", type=int, choices=[0, 1], default=0, help="1: packed rows")
    add("--ids", action="store_true", help="with the number of each token")
    add("--html", type=Path, metavar="FILE", help="a page instead")
    part = parts.add_parser("split", help="writes train, valid and test files with a manifest")
    part.add_argument("file", type=Path)
    part.add_argument("--ratios", default="8:1:1", help="sizes of the parts (%(default)s)")
    part.add_argument("--seed", type=int, default=1)
    part.add_argument("--stratify", metavar="FIELD", help="keeps the shares of this field's values")
    part.add_argument("--out", type=Path, required=True, help="folder")
    part.set_defaults(run=split)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    with mistakes_in_plain_words():
        sys.exit(main())
