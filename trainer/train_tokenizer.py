"""Trains a byte-level BPE tokenizer on JSONL: a text that occurs often becomes one token.

    python trainer/train_tokenizer.py                       # Tiny World -> model/tokenizer.json
    python trainer/train_tokenizer.py --data_path mine.jsonl --vocab_size 6400 --out mine.json

The same data and vocabulary size give the same file, byte for byte.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from common import UserError, replacing, report_user_errors
from dataset.formats import format_of, read_records, to_conversation, to_text
from dataset.tiny_world.generate import PRETRAIN, SFT, write_missing
from dataset.tokenizer import CONTROL_TOKENS, SHIPPED_TOKENIZER, load_tokenizer

# Where text may be cut before pairs are merged: contractions, single digits (so that numbers are
# written digit by digit, as sums are done), single newlines, words and punctuation with the space
# before them, other space.
CUTS = r"'(?:s|t|re|ve|m|ll|d)\b|\p{N}|\n| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|\s"


def train(texts, vocab_size):
    """A byte-level BPE tokenizer (tokenizers.Tokenizer) of at most vocab_size tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any byte has a token
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def texts_of(path):
    """What is written in a file of any format: its texts, or the contents of its messages."""
    name = None
    for number, record in read_records(path):
        try:
            if isinstance(record, ValueError):
                raise record
            name = name or format_of(record)
            if name == "text":
                yield to_text(record)
            else:
                messages, _ = to_conversation(record, name, Counter())
                yield from [message["content"] for message in messages]
        except ValueError as error:
            raise UserError(f"{path}, line {number} is no text or conversation: {error}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data_path", type=Path, nargs="+", default=[PRETRAIN, SFT])
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=SHIPPED_TOKENIZER)
    args = parser.parse_args(argv)
    smallest = len(CONTROL_TOKENS) + 256
    if args.vocab_size < smallest:
        raise UserError(
            f"--vocab_size {args.vocab_size}: give at least {smallest}, "
            f"{len(CONTROL_TOKENS)} control tokens and 256 bytes"
        )
    texts = []
    for path in args.data_path:
        found = list(texts_of(write_missing(path)))
        if not any(found):
            raise UserError(f"{path}: there is no text in it; give a file with text")
        texts += found
    tokenizer = train(texts, args.vocab_size)
    with replacing(args.out) as file:
        file.write(tokenizer.to_str(pretty=True).encode("utf-8"))
    tokenizer = load_tokenizer(args.out)
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    characters = sum(map(len, texts))
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens,", end=" ")
    print(f"{characters / tokens:.2f} characters of the data per token")


if __name__ == "__main__":
    with report_user_errors():
        main()
