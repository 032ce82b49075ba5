"""From data files to samples.

A sample is (input_ids, labels), two int64 tensors of the same length. labels is input_ids where the
token is supervised, and -100 elsewhere. The shift by one, so that each position predicts the next
token, happens in the loss. The steps from a record of a file to its samples:

    formats.py          its JSON -> messages, whatever format it is in
    chat_template.py    messages -> tokens and their loss mask
    token_cache.py      the tokens of all records, kept on disk for the next start
    here                tokens -> samples of at most max_seq_len tokens
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from common import END_OF_TEXT, IGNORE, IM_END, UserError
from dataset import formats
from dataset.token_cache import tokenised
from model.chat_template import pieces


class TokenDataset(Dataset):
    """The samples of one or more files; the two kinds of it are below.

    files    the Tokens of each file
    samples  (n, 4) int64: of each sample its file, its record in the file, and where it starts and
             ends in the file's tokens
    dropped  the number of records without a supervised token in any sample
    cut      the number of records that are longer than max_length

    Arguments: data_path is a path or a list of them, max_length the limit of a sample in tokens;
    strict and cache_dir are those of `tokenised`. Raises UserError for a file without a
    usable record, for the same content twice, and if no sample is left.
    """

    def __init__(self, data_path, tokenizer, max_length=1024, strict=False, **cache):
        paths = data_path if isinstance(data_path, list) else [data_path]
        self.files, self.dropped, self.cut = [], 0, 0
        samples = []
        for path in paths:
            tokens = self.read(path, tokenizer, strict, **cache)
            require_records(tokens.report, path)
            if tokens.content in self.content:
                first = self.files[self.content.index(tokens.content)].path
                raise UserError(
                    f"{path} has the content of {first}: what one holds out for validation would "
                    f"be trained on in the other; leave one out, or give a share, as FILE:0.7"
                )
            samples.append(self.make_samples(tokens, len(self.files), max_length))
            self.files.append(tokens)
        self.samples = np.concatenate(samples)
        if not len(self.samples):
            raise UserError(
                f"{', '.join(map(str, paths))}: no supervised token, say an assistant's turn, "
                f"is within --max_seq_len {max_length}; raise it, or use dataset/prepare.py check"
            )

    def read(self, path, tokenizer, strict, **cache):
        """Return the Tokens of a file."""
        options = [type(self).__name__, *self.options]
        return tokenised(path, tokenizer, self.to_pieces, options, strict, **cache)

    def make_samples(self, tokens, file, max_seq_len):
        """The samples of a file, (n, 4). A record is one sample; one that is too long is cut."""
        starts, ends = tokens.offsets[:-1], tokens.offsets[1:]
        table = np.stack([np.full_like(starts, file), np.arange(len(starts)), starts, ends], 1)
        table = table[tokens.supervised > 0]
        too_long = table[:, 3] - table[:, 2] > max_seq_len
        samples = [table[~too_long]]
        for _, record, start, end in table[too_long].tolist():
            mask = tokens.mask[start:end]
            for a, b in self.spans(tokens.ids[start:end], mask, max_seq_len):
                if mask[a + 1 : b].any():  # a sample's first token is never predicted
                    samples.append([[file, record, start + a, start + b]])
        samples = np.concatenate(samples)
        self.cut += int(too_long.sum())
        self.dropped += len(starts) - len(np.unique(samples[:, 1]))
        return samples[np.argsort(samples[:, 2], kind="stable")]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        file, _, start, end = self.samples[index]
        tokens = self.files[file]
        input_ids = torch.from_numpy(tokens.ids[start:end].astype(np.int64))
        supervised = torch.from_numpy(tokens.mask[start:end] == 1)
        return input_ids, torch.where(supervised, input_ids, IGNORE)

    def documents(self, index):
        """Return the documents of a row with this sample alone."""
        return [self[index]]

    @property
    def lengths(self):
        """(n,) tokens of each sample."""
        return self.samples[:, 3] - self.samples[:, 2]

    @property
    def content(self):
        """The hash of each file."""
        return [file.content for file in self.files]

    def where(self, samples):
        """The files and lines that samples come from, as text."""
        lines = {}
        for file, record, *_ in self.samples[samples].tolist():
            tokens = self.files[file]
            lines.setdefault(tokens.path, set()).add(int(tokens.lines[record]))
        return "; ".join(f"{path}, lines {sorted(numbers)}" for path, numbers in lines.items())


class PretrainDataset(TokenDataset):
    """Documents {"text"}: every token is supervised, and <|endoftext|> after the last.

    A document longer than max_length becomes several samples. Each begins with the last token of
    the one before, so that every token but the document's first is predicted once.
    """

    options = ()

    def to_pieces(self, record, report):
        report["format"] = "text"
        text = formats.to_text(record)
        if not text:
            raise ValueError('"text" is empty')
        return [(text, 1), (END_OF_TEXT, 1)]

    def spans(self, ids, mask, max_seq_len):
        """Where the samples of a long document start and end in it, as [(start, end)]."""
        starts = range(0, len(ids), max_seq_len - 1)
        return [(start, min(start + max_seq_len, len(ids))) for start in starts]


class SFTDataset(TokenDataset):
    """Conversations in any format of `formats.py`.

    overlong     what happens to a conversation longer than max_length.
                 truncate: it ends with the last answer that fits, or in the middle of the first;
                 split: the rest becomes further samples; drop: it is left out
    keep_think   whose reasoning is kept: that of all answers, of the last one, of none
    data_format  a name of `formats.py`; default: that of the file's first record
    """

    def __init__(self, *args, overlong="truncate", keep_think="all", data_format=None, **options):
        self.overlong, self.keep_think, self.data_format = overlong, keep_think, data_format
        self.options = [keep_think, data_format]  # what decides the tokens of a record
        super().__init__(*args, **options)

    def to_pieces(self, record, report):
        report["format"] = report["format"] or self.data_format or formats.detect_format(record)
        if report["format"] == "text":
            raise ValueError("it is pretraining text, not a conversation")
        messages, tools = formats.to_conversation(record, report["format"], report["notes"])
        answers = [message for message in messages if message["role"] == "assistant"]
        for answer in {"all": [], "last": answers[:-1], "none": answers}[self.keep_think]:
            answer.pop("reasoning_content", None)
        return pieces(messages, tools)

    def spans(self, ids, mask, max_seq_len):
        """Where the samples of a long conversation start and end in it, as [(start, end)]."""
        if self.overlong == "drop":
            return []
        # An answer ends at an <|im_end|> that is supervised. No text can imitate one.
        ends = np.flatnonzero((ids == IM_END) & (mask == 1)) + 1
        spans, start, end = [], 0, 0
        while end < len(ids):
            fitting = ends[(ends > start) & (ends <= start + max_seq_len)]
            end = int(fitting[-1]) if len(fitting) else min(start + max_seq_len, len(ids))
            spans.append((start, end))
            if self.overlong == "truncate":
                break
            start = end if len(fitting) else end - 1  # seen again, as in a cut document
        return spans

    def mix_in(self, documents, tokens, max_seq_len, seed):
        """Adds that number of tokens of a PretrainDataset, or all it has, drawn by the seed;
        returns the numbers of the new samples. Conversations alone make a model forget what they
        do not mention.

        A sample is a stretch of max_seq_len tokens: several documents in the order of their file in
        one context, as a conversation has several topics in one. The text of each document alone
        would teach nothing about names that are mentioned after others.
        """
        first, stretches = len(self.samples), []
        for number, file in enumerate(documents.files, len(self.files)):
            begins, total = file.offsets[:-1], int(file.offsets[-1])
            records = np.unique(np.searchsorted(begins, range(0, begins[-1] + 1, max_seq_len)))
            starts = begins[records]
            ends = np.minimum(starts + max_seq_len, total)
            stretches.append(np.stack([np.full_like(starts, number), records, starts, ends], 1))
        drawn = np.random.default_rng(seed).permutation(np.concatenate(stretches))
        lengths = drawn[:, 3] - drawn[:, 2]
        drawn = drawn[np.cumsum(lengths) - lengths < tokens]
        self.samples = np.concatenate([self.samples, drawn])
        self.files = self.files + documents.files
        return range(first, len(self.samples))


def require_records(report, path):
    """Raises UserError if no record of the file is usable, with the first reason."""
    if not report["records"]:
        reasons = [f"line {number}: {reason}" for number, reason in report["bad_lines"]]
        reason = reasons[0] if reasons else "it is empty"
        raise UserError(
            f"{path} has no usable record: {reason}. Pretraining reads lines of "
            '{"text": ...}, SFT lines of {"conversations": [{"role": ..., "content": ...}]} or '
            'another format of dataset/formats.py, DPO of {"prompt": ..., "chosen", "rejected"}'
        )
