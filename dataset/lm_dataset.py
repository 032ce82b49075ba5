"""Datasets: data files as tokenized samples.

A sample is (input_ids, labels), two int64 tensors of the same length. labels equals input_ids where
the token is supervised, and is -100 elsewhere. The loss shifts them by one, so that each position
predicts the next token. From a record to its samples:

    formats.py          JSON -> messages, from any known format
    chat_template.py    messages -> tokens and their loss mask
    token_cache.py      the tokens of all records, cached on disk
    here                tokens -> samples of at most max_length tokens
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from common import END_OF_TEXT, IGNORE, IM_END, UserError
from dataset import formats
from dataset.token_cache import tokenize
from model.chat_template import pieces

# The columns of `TokenDataset.samples`.
FILE, RECORD, START, END = range(4)


class TokenDataset(Dataset):
    """Base class: the samples of one or more files. A subclass defines how a record becomes tokens,
    `to_pieces`, and how a long record is split, `split_long`.

    files         the Tokens of each file
    samples       (n, 4) int64: each sample's file, its record in the file, and its start and end in
                  the file's tokens
    num_dropped   number of records without a supervised token in any sample
    num_too_long  number of records longer than max_length

    data_path is a path or a list of paths; max_length is in tokens; strict and cache_dir as in
    `tokenize`. Raises UserError for a file without usable records, for two files with the same
    content, and if no sample is left.
    """

    options = []  # what the tokens of a record depend on, except the record and the tokenizer

    def __init__(self, data_path, tokenizer, max_length=1024, strict=False, cache_dir=None):
        paths = data_path if isinstance(data_path, list) else [data_path]
        self.files = []
        self.num_dropped = 0
        self.num_too_long = 0
        samples = []
        for path in paths:
            tokens = self.read(path, tokenizer, strict, cache_dir)
            require_records(tokens.report, path)
            if tokens.sha256 in self.file_hashes:
                first = self.files[self.file_hashes.index(tokens.sha256)].path
                raise UserError(
                    f"{path} is a duplicate of {first}; its validation samples would leak into "
                    "training. Remove one, or give a weight, e.g. FILE:0.7"
                )
            samples.append(self.make_samples(tokens, len(self.files), max_length))
            self.files.append(tokens)
        self.samples = np.concatenate(samples)
        if not len(self.samples):
            raise UserError(
                f"{', '.join(map(str, paths))}: no supervised tokens (e.g. no assistant turn) fit "
                f"in --max_seq_len {max_length}; raise it, or run dataset/prepare.py check"
            )

    def to_pieces(self, record, report):
        """Return a record as [(piece, supervised)], as `chat_template.pieces` does, and note its
        format in the report. Raises ValueError for a bad record.
        """
        raise NotImplementedError

    def split_long(self, ids, mask, max_length):
        """Return the [(start, end)] of the samples of a record that is longer than max_length."""
        raise NotImplementedError

    def read(self, path, tokenizer, strict, cache_dir):
        """Return the Tokens of a file."""
        options = [type(self).__name__, *self.options]
        return tokenize(path, tokenizer, self.to_pieces, options, strict, cache_dir)

    def make_samples(self, tokens, file_index, max_length):
        """Return the samples of a file, (n, 4): one per record, or several for a long record.
        Counts the records that are too long and those that are dropped.
        """
        starts, ends = tokens.offsets[:-1], tokens.offsets[1:]
        files = np.full_like(starts, file_index)
        samples = np.stack([files, np.arange(len(starts)), starts, ends], axis=1)
        samples = samples[tokens.supervised > 0]
        too_long = samples[:, END] - samples[:, START] > max_length
        parts = [samples[~too_long]]
        for _, record, start, end in samples[too_long].tolist():
            mask = tokens.mask[start:end]
            for a, b in self.split_long(tokens.ids[start:end], mask, max_length):
                if mask[a + 1 : b].any():  # a sample's first token is never predicted
                    parts.append([[file_index, record, start + a, start + b]])
        samples = np.concatenate(parts)
        self.num_too_long += int(too_long.sum())
        self.num_dropped += len(starts) - len(np.unique(samples[:, RECORD]))
        return samples[np.argsort(samples[:, START], kind="stable")]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        file, _, start, end = self.samples[index]
        tokens = self.files[file]
        input_ids = torch.from_numpy(tokens.ids[start:end].astype(np.int64))
        supervised = torch.from_numpy(tokens.mask[start:end] == 1)
        return input_ids, torch.where(supervised, input_ids, IGNORE)

    def documents(self, index):
        """Return the sample's documents, a list of (input_ids, labels)."""
        return [self[index]]

    @property
    def lengths(self):
        """Number of tokens of each sample, (n,)."""
        return self.samples[:, END] - self.samples[:, START]

    @property
    def file_hashes(self):
        """The sha256 of each file."""
        return [file.sha256 for file in self.files]

    def file_lines(self, samples):
        """Return the files and lines of samples as text, for messages."""
        lines = {}
        for file, record, *_ in self.samples[samples].tolist():
            tokens = self.files[file]
            lines.setdefault(tokens.path, set()).add(int(tokens.lines[record]))
        return "; ".join(f"{path}, lines {sorted(numbers)}" for path, numbers in lines.items())


class PretrainDataset(TokenDataset):
    """Pretraining documents {"text"}: every token is supervised, including a final <|endoftext|>.

    A document longer than max_length becomes several samples, which overlap by one token, so that
    every token except the document's first is predicted exactly once.
    """

    def to_pieces(self, record, report):
        report["format"] = "text"
        text = formats.to_text(record)
        if not text:
            raise ValueError('"text" is empty')
        return [(text, 1), (END_OF_TEXT, 1)]

    def split_long(self, ids, mask, max_length):
        starts = range(0, len(ids), max_length - 1)
        return [(start, min(start + max_length, len(ids))) for start in starts]


class SFTDataset(TokenDataset):
    """Conversations in any format of `formats.py`.

    overlong     how conversations longer than max_length are handled. truncate: end with the last
                 answer that fits, or within the first; split: into several samples; drop: skip
    keep_think   keep the reasoning of "all" answers, only the "last" one, or "none"
    data_format  a format of `formats.py`; default: detected from the first record
    """

    def __init__(self, *args, overlong="truncate", keep_think="all", data_format=None, **options):
        self.overlong, self.keep_think, self.data_format = overlong, keep_think, data_format
        self.options = [keep_think, data_format]  # these change a record's tokens
        super().__init__(*args, **options)

    def to_pieces(self, record, report):
        report["format"] = report["format"] or self.data_format or formats.detect_format(record)
        if report["format"] == "text":
            raise ValueError("it is pretraining text, not a conversation")
        messages, tools = formats.to_conversation(record, report["format"], report["notes"])
        answers = [message for message in messages if message["role"] == "assistant"]
        for answer in answers:
            is_last = answer is answers[-1]
            if self.keep_think == "none" or (self.keep_think == "last" and not is_last):
                answer.pop("reasoning_content", None)
        return pieces(messages, tools)

    def split_long(self, ids, mask, max_length):
        if self.overlong == "drop":
            return []
        # An answer ends at a supervised <|im_end|>. Text can't imitate one.
        ends = np.flatnonzero((ids == IM_END) & (mask == 1)) + 1
        spans, start, end = [], 0, 0
        while end < len(ids):
            fitting = ends[(ends > start) & (ends <= start + max_length)]
            end = int(fitting[-1]) if len(fitting) else min(start + max_length, len(ids))
            spans.append((start, end))
            if self.overlong == "truncate":
                break
            start = end if len(fitting) else end - 1  # overlap by one token, as in PretrainDataset
        return spans

    def add_replay(self, dataset, num_tokens, max_length, seed):
        """Add about num_tokens random tokens of a PretrainDataset, or all it has. Returns the
        indices of the new samples. Fine-tuning only on conversations makes a model forget
        everything else.

        A replay sample is max_length consecutive tokens of the file, so it holds several
        documents, as a conversation has several topics. Single documents don't teach reference to
        names introduced earlier.
        """
        first, rows = len(self.samples), []
        for number, file in enumerate(dataset.files, len(self.files)):
            document_starts, total = file.offsets[:-1], int(file.offsets[-1])
            records = np.unique(
                np.searchsorted(document_starts, range(0, document_starts[-1] + 1, max_length))
            )
            starts = document_starts[records]
            ends = np.minimum(starts + max_length, total)
            rows.append(np.stack([np.full_like(starts, number), records, starts, ends], 1))
        replayed = np.random.default_rng(seed).permutation(np.concatenate(rows))
        lengths = replayed[:, END] - replayed[:, START]
        replayed = replayed[np.cumsum(lengths) - lengths < num_tokens]
        self.samples = np.concatenate([self.samples, replayed])
        self.files = self.files + dataset.files
        return range(first, len(self.samples))


def require_records(report, path):
    """Raise UserError, with the first reason, if a file has no usable record."""
    if not report["records"]:
        reasons = [f"line {number}: {reason}" for number, reason in report["bad_lines"]]
        reason = reasons[0] if reasons else "it is empty"
        raise UserError(
            f"{path} has no usable record: {reason}. Expected for pretraining: "
            '{"text": ...}; for SFT: {"conversations": [{"role": ..., "content": ...}]} or '
            'another format of dataset/formats.py; for DPO: {"prompt": ..., "chosen", "rejected"}'
        )
