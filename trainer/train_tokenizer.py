"""Train a byte-level BPE tokenizer on JSONL: frequent byte sequences become single tokens.

    python trainer/train_tokenizer.py                       # Tiny World -> model/tokenizer.json
    python trainer/train_tokenizer.py --data_path mine.jsonl --vocab_size 6400 --out mine.json

The same data and vocabulary size give the same file, byte for byte.
"""

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cli import Parser, number
from common import UserError, atomic_write, report_user_errors
from dataset.formats import detect_format, to_conversation, to_text
from dataset.jsonl import read_records
from dataset.tiny_world import PRETRAIN, SFT, write_missing
from model.chat_template import encode_all
from model.tokenizer import CONTROL_TOKENS, SHIPPED_TOKENIZER, load_tokenizer

# Qwen2's pre-tokenizer expression, exactly: other programs know it by name and split text
# identically. Tokens are merged only within one of its pieces: a contraction, a word with a
# preceding space or mark, a single digit (for digit-by-digit arithmetic), punctuation, line ends,
# whitespace.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A run of over 1,000 letters, or of marks, from its start.
ENDLESS = re.compile(r"(?<![^\W\d_])[^\W\d_]{1001,}|(?<!_)(?<![^\w\s])(?:[^\w\s]|_){1001,}")


def train(texts, vocab_size):
    """Train a byte-level BPE tokenizer (tokenizers.Tokenizer) with at most vocab_size tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte is a token
        show_progress=False,
    )
    tokenizer.train_from_iterator(without_endless_words(texts), trainer)
    return tokenizer


def without_endless_words(texts):
    """Yield the texts, split within words of over 1,000 letters or marks, e.g. DNA: training time
    is quadratic in the length of a word.
    """
    for text in texts:
        end = 0
        for run in ENDLESS.finditer(text):
            yield text[end : run.start()]
            yield from (run[0][i : i + 1000] for i in range(0, len(run[0]), 1000))
            end = run.end()
        yield text[end:]


def read_texts(path):
    """Yield the documents of a file in any format, or the headers and contents of all messages."""
    name = None
    for line, record in read_records(path):
        try:
            if isinstance(record, ValueError):
                raise record
            name = name or detect_format(record)
            if name == "text":
                yield to_text(record)
                continue
            messages, _ = to_conversation(record, name, Counter())
        except ValueError as error:
            raise UserError(f"{path}, line {line} isn't a text or conversation: {error}") from None
        for message in messages:
            if message["content"]:
                yield f"{message['role']}\n"
                yield message["content"]


def main(argv=None):
    parser = Parser(__doc__)
    add, smallest = parser.add_argument, len(CONTROL_TOKENS) + 256
    files = "files of text or conversations; default: Tiny World"
    add("--data_path", type=Path, nargs="+", help=files)
    size = f"tokens, at least the {len(CONTROL_TOKENS)} control tokens and 256 bytes"
    add("--vocab_size", type=number(int, smallest), default=2048, help=size)
    add("--out", type=Path, default=SHIPPED_TOKENIZER, help="file to write")
    args = parser.parse_args(argv)
    texts = []
    for path in args.data_path or [PRETRAIN, SFT]:
        file_texts = list(read_texts(write_missing(path)))
        if not any(file_texts):
            raise UserError(f"{path}: it has no text; give a file with text")
        texts += file_texts
    tokenizer = train(texts, args.vocab_size)
    with atomic_write(args.out) as file:
        file.write(tokenizer.to_str(pretty=True).encode("utf-8"))
    tokenizer = load_tokenizer(args.out)
    token_ids = encode_all(set(texts), tokenizer)
    tokens = sum(len(token_ids[text]) for text in texts)
    characters = sum(map(len, texts))
    ratio = f"{characters / tokens:.2f} characters of the data per token"
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens, {ratio}")


if __name__ == "__main__":
    with report_user_errors():
        main()
