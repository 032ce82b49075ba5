"""Per-token loss table for one sample: the probability each model gives to the next token.

    python evaluation/show_loss.py                                   # a conversation of Tiny World
    python evaluation/show_loss.py --data_path mine.jsonl --record 3 --weight full_sft

Each line has the input token, the target token, its label (- means -100, no loss), and the
probabilities. Supervised lines are green in a terminal.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, number
from common import IGNORE, ROOT, UserError, report_user_errors

# isort: split
import torch

from dataset.prepare import STYLES, has_colours, open_data
from dataset.tiny_world import SFT, write_missing
from model.weights import build_model, find_weights, load


def probabilities(model, input_ids):
    """Return the model's probability of each next token, (T,) -> (T - 1,)."""
    with torch.inference_mode():
        logits = model(input_ids[None])[0, :-1]  # (1, T) -> (1, T, V) -> (T - 1, V)
    return logits.softmax(dim=-1).gather(1, input_ids[1:, None])[:, 0]


def table(names, columns, input_ids, labels, tokenizer, coloured):
    """Return the lines of the table; columns are the probabilities of each model."""

    def text(token):
        return repr(tokenizer.decode([token], skip_special_tokens=False))

    header = "".join(f"{name:>12}" for name in names)
    lines = [f"{'reads':20}{'predicts':20}{'label':>6}{header}"]
    targets = zip(input_ids[:-1].tolist(), input_ids[1:].tolist(), labels[1:].tolist(), strict=True)
    for position, (token, target, label) in enumerate(targets):
        cells = "".join(f"{column[position]:12.3f}" for column in columns)
        label_text = "-" if label == IGNORE else label
        line = f"{text(token):20}{text(target):20}{label_text:>6}{cells}"
        before, after = STYLES["plain" if label == IGNORE else "supervised"]
        lines.append(f"{before}{line}{after}" if coloured else line)
    return lines


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_path", type=Path, default=SFT, help="text or conversations; default: Tiny World's")
    add("--record", type=number(int, 1), default=1, help="which sample of the file (%(default)s)")
    weights = "names in --save_dir, or paths (pretrain full_sft)"
    add("--weight", nargs="+", default=["pretrain", "full_sft"], metavar="NAME", help=weights)
    add("--save_dir", type=Path, default=ROOT / "out", help="folder of weights")
    args = parser.parse_args(argv)
    paths = [find_weights(args.save_dir, name) for name in args.weight]
    opened = [build_model(load(path), path) for path in paths]
    tokenizer = opened[0][1]
    if len({each.to_str() for _, each in opened}) > 1:
        raise UserError(f"{', '.join(args.weight)} have different tokenizers; show one at a time")
    context = min(model.config.max_position_embeddings for model, _ in opened)
    data = open_data(write_missing(args.data_path), tokenizer, context)
    if args.record > len(data):
        raise UserError(f"--record {args.record}: {args.data_path} has {len(data)} samples")
    input_ids, labels = data[args.record - 1]
    columns = [probabilities(model.eval(), input_ids) for model, _ in opened]
    print("\n".join(table(args.weight, columns, input_ids, labels, tokenizer, has_colours())))
    supervised = labels[1:] != IGNORE
    for name, column in zip(args.weight, columns, strict=True):
        loss = -column[supervised].log().mean().item()
        typical = f"a typical probability of e^-{loss:.3f} = {math.exp(-loss):.3f}"
        print(f"{name}: {loss:.3f} nats per supervised token, {typical}")


if __name__ == "__main__":
    with report_user_errors():
        main()
