"""From a JSONL file to labelled rows.

A row is (input_ids, labels), two int64 tensors of the same length. labels is input_ids where the
model learns the token and -100 where it does not; the shift by one, so that each position predicts
the next, happens in the loss. Everything is tokenised once, when the dataset is made.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.chat_template import render
from dataset.errors import UserError
from dataset.tokenizer import END_OF_TEXT

IGNORE = -100  # the label of a token that carries no loss; torch's cross_entropy skips it


class PretrainDataset(Dataset):
    """Documents {"text"}: every token is learned, and <|endoftext|> after the last.

    A document longer than max_length becomes several rows, so that nothing is lost.
    """

    def __init__(self, data_path, tokenizer, max_length=1024, strict=False):
        self.rows, self.bad_lines = [], []

        def encoded(text):
            if not isinstance(text, str) or not text:
                raise ValueError(f'"text" is {text!r}, which is not text')
            return tokenizer.encode(text, add_special_tokens=False).ids + [END_OF_TEXT]

        for ids in records(data_path, "text", encoded, strict, self.bad_lines):
            for start in range(0, len(ids), max_length):
                self.rows.append(np.array(ids[start : start + max_length], dtype=np.int32))
        # A row of one token predicts nothing; such a rest of a cut document is left out.
        self.rows = [row for row in self.rows if len(row) > 1]
        self.dropped = 0
        require_rows(self, data_path)

    def __len__(self):
        return len(self.rows)

    def length(self, index):
        return len(self.rows[index])

    def __getitem__(self, index):
        input_ids = torch.from_numpy(self.rows[index].astype(np.int64))
        return input_ids, input_ids.clone()


class SFTDataset(Dataset):
    """Conversations {"conversations": [{"role", "content"}]}: only the assistant's words count.

    A conversation longer than max_length is cut at its end. One that then has nothing left to
    learn is dropped and counted in `dropped`.
    """

    def __init__(self, data_path, tokenizer, max_length=1024, strict=False):
        self.rows, self.bad_lines, self.dropped = [], [], 0

        def rendered(messages):
            return render(messages, tokenizer=tokenizer)

        for ids, mask in records(data_path, "conversations", rendered, strict, self.bad_lines):
            row = np.array([ids[:max_length], mask[:max_length]], dtype=np.int32)  # (2, T)
            if row[1, 1:].any():  # the first token is never predicted
                self.rows.append(row)
            else:
                self.dropped += 1
        require_rows(self, data_path)

    def mix_in(self, documents, share, seed):
        """Adds rows of a PretrainDataset, share * the number of conversations, drawn by the seed;
        returns their numbers. Conversations alone make a model forget what they do not mention.
        """
        first = len(self.rows)
        count = min(len(documents), round(share * len(self.rows)))
        for index in np.random.default_rng(seed).permutation(len(documents))[:count]:
            row = documents.rows[index]
            self.rows.append(np.stack([row, np.ones_like(row)]))
        return range(first, len(self.rows))

    def __len__(self):
        return len(self.rows)

    def length(self, index):
        return self.rows[index].shape[1]

    def __getitem__(self, index):
        input_ids, mask = torch.from_numpy(self.rows[index].astype(np.int64))
        return input_ids, torch.where(mask == 1, input_ids, IGNORE)


def records(data_path, key, convert, strict, bad_lines):
    """Yields convert(record[key]) for each line; counts in bad_lines what is not such a record."""
    try:
        file = Path(data_path).open("rb")
    except OSError as error:
        raise UserError(f"--data_path {data_path}: {error.strerror}; give a JSONL file") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
                if not isinstance(record, dict) or key not in record:
                    keys = list(record) if isinstance(record, dict) else type(record).__name__
                    raise ValueError(f'there is no "{key}" in it, only {keys}')
                yield convert(record[key])
            except json.JSONDecodeError as error:
                bad_lines.append((number, f"not JSON: {error.msg}, at character {error.colno}"))
            except (ValueError, TypeError, RecursionError) as error:
                bad_lines.append((number, str(error)))
            if strict and bad_lines:
                raise UserError(f"{data_path}, line {number}: {bad_lines[0][1]}")


def require_rows(dataset, data_path):
    """Raises UserError if nothing in the file could be used, with the first reason."""
    if len(dataset):
        return
    if dataset.bad_lines:
        number, reason = dataset.bad_lines[0]
        raise UserError(
            f"{data_path}: none of its {len(dataset.bad_lines)} records can be used; "
            f'line {number}: {reason}. Pretraining reads lines of {{"text": ...}}, SFT lines of '
            '{"conversations": [{"role": ..., "content": ...}]}'
        )
    if dataset.dropped:
        raise UserError(
            f"{data_path}: no conversation has an assistant's turn within --max_seq_len; raise it"
        )
    raise UserError(f"{data_path} is empty; give a JSONL file")
