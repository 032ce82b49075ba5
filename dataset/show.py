"""The tokens of a data file in colour: supervised, not supervised, control."""

import html

import numpy as np

from common import replacing
from dataset import formats
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.loader import best_fit_decreasing
from dataset.tokenizer import NAMED_CONTROL_TOKENS, load_tokenizer

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
            record = int(data.samples[row[0], 1]) + 1
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
