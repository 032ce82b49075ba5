"""From data files to labelled rows.

A row is (input_ids, labels), two int64 tensors of the same length. labels is input_ids where the
model learns the token and -100 where it does not; the shift by one, so that each position predicts
the next, happens in the loss. The way of a line of a file:

    formats.py          its JSON -> messages, whatever format it is in
    chat_template.py    messages -> tokens and their loss mask
    cache.py            kept for the next start
    here                tokens -> rows of at most max_length
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from common import END_OF_TEXT, IGNORE, IM_END, UserError
from dataset import formats
from dataset.cache import tokenised
from dataset.chat_template import pieces


class TokenDataset(Dataset):
    """Rows of one or more tokenised files; below are its two kinds.

    files    the Tokens of each
    rows     (n, 4) int64: of each row its file, its record there, and from where to where it goes
             in the file's tokens
    dropped  records, or parts of them, without anything to learn within max_length
    """

    def __init__(self, data_path, tokenizer, max_length=1024, strict=False, **cache):
        self.files, self.samples, self.dropped, self.cut = [], [], 0, 0
        paths = data_path if isinstance(data_path, list) else [data_path]
        for path in paths:
            options = [type(self).__name__, *self.options]
            tokens = tokenised(path, tokenizer, self.to_pieces, options, strict, **cache)
            require_records(tokens.report, path)
            if tokens.content in self.content:
                first = self.files[self.content.index(tokens.content)].path
                raise UserError(
                    f"{path} is {first} again, so what one holds out to validate on would be "
                    f"trained on in the other; for two copies, give --data_path '{first}*2'"
                )
            self.samples.append(self.cut_samples(tokens, max_length, len(self.files)))
            self.files.append(tokens)
        self.samples = np.concatenate(self.samples)
        if not len(self.samples):
            raise UserError(
                f"{', '.join(map(str, paths))}: nothing to learn from, say an assistant's turn, "
                f"within --max_seq_len {max_length}; raise it, or look at the data with "
                "dataset/prepare.py check"
            )

    def cut_samples(self, tokens, max_length, file):
        """The rows of a file: its records as they are, those that are too long cut."""
        starts, ends = tokens.offsets[:-1], tokens.offsets[1:]
        records = np.arange(len(starts))
        fits = (ends - starts <= max_length) & (tokens.supervised > 0)
        rows = [np.stack([np.full(len(starts), file), records, starts, ends], 1)[fits]]
        self.dropped += int((tokens.supervised == 0).sum())
        for record in np.flatnonzero((ends - starts > max_length) & (tokens.supervised > 0)):
            start, end = int(starts[record]), int(ends[record])
            mask = tokens.mask[start:end]
            spans = self.spans(tokens.ids[start:end], mask, max_length)
            kept = [span for span in spans if mask[span[0] + 1 : span[1]].any()]
            self.cut += 1
            self.dropped += not kept
            rows += [np.array([[file, record, start + a, start + b] for a, b in kept])] * bool(kept)
        rows = np.concatenate(rows)
        return rows[np.argsort(rows[:, 2], kind="stable")]

    def __len__(self):
        return len(self.samples)

    @property
    def lengths(self):
        """(n,) tokens of each row."""
        return self.samples[:, 3] - self.samples[:, 2]

    @property
    def content(self):
        """The hash of each file."""
        return [file.content for file in self.files]

    def where(self, rows):
        """The files and lines that rows come from, in words."""
        lines = {}
        for file, record, *_ in self.samples[rows].tolist():
            lines.setdefault(self.files[file].path, set()).add(int(self.files[file].lines[record]))
        return "; ".join(f"{path}, lines {sorted(found)}" for path, found in lines.items())

    def __getitem__(self, index):
        file, _, start, end = self.samples[index]
        tokens = self.files[file]
        input_ids = torch.from_numpy(tokens.ids[start:end].astype(np.int64))
        learned = torch.from_numpy(tokens.mask[start:end] == 1)
        return input_ids, torch.where(learned, input_ids, IGNORE)


class PretrainDataset(TokenDataset):
    """Documents {"text"}: every token is learned, and <|endoftext|> after the last.

    A document longer than max_length becomes several rows. Each begins with the last token of the
    row before, so that every token but the document's first is predicted once.
    """

    options = ()

    def to_pieces(self, record, report):
        report["format"] = "text"
        text = formats.to_text(record)
        if not text:
            raise ValueError('"text" is empty')
        return [(text, 1), (END_OF_TEXT, 1)]

    def spans(self, ids, mask, max_length):
        return [(at, min(at + max_length, len(ids))) for at in range(0, len(ids), max_length - 1)]


class SFTDataset(TokenDataset):
    """Conversations in any format of `formats.py`: only the assistant's words are learned.

    overlong     what happens to a conversation longer than max_length.
                 truncate: it ends with the last answer that fits, or in the middle of the first;
                 split: what is left becomes further rows; drop: it is left out
    keep_think   whose reasoning is kept: that of all answers, of the last one, of none
    data_format  a name of `formats.py`; default: that of the file's first record
    """

    def __init__(self, *args, overlong="truncate", keep_think="all", data_format=None, **more):
        self.overlong, self.options = overlong, (keep_think, data_format)
        super().__init__(*args, **more)

    def to_pieces(self, record, report):
        keep_think, given = self.options
        report["format"] = report["format"] or given or formats.format_of(record)
        if report["format"] == "text":
            raise ValueError("it is pretraining text, not a conversation")
        messages, tools = formats.to_conversation(record, report["format"], report["notes"])
        answers = [message for message in messages if message["role"] == "assistant"]
        forgotten = {"all": [], "last": answers[:-1], "none": answers}[keep_think]
        for message in forgotten:
            message.pop("reasoning_content", None)
        return pieces(messages, tools)

    def spans(self, ids, mask, max_length):
        # An answer ends at an <|im_end|> that is learned. No text can imitate one.
        ends = np.flatnonzero((ids == IM_END) & (mask == 1)) + 1
        spans, start = [], 0
        while self.overlong != "drop":
            fitting = ends[(ends > start) & (ends <= start + max_length)]
            end = int(fitting[-1]) if len(fitting) else min(start + max_length, len(ids))
            spans.append((start, end))
            if end == len(ids) or self.overlong == "truncate":
                break
            start = end if len(fitting) else end - 1  # seen again, as in a cut document
        return spans

    def mix_in(self, documents, share, seed):
        """Adds rows of a PretrainDataset, share * the number of conversations, drawn by the seed;
        returns their numbers. Conversations alone make a model forget what they do not mention.
        """
        first = len(self.samples)
        count = min(len(documents), round(share * first))
        chosen = documents.samples[np.random.default_rng(seed).permutation(len(documents))[:count]]
        self.samples = np.concatenate([self.samples, chosen + [len(self.files), 0, 0, 0]])
        self.files = self.files + documents.files
        return range(first, len(self.samples))


def require_records(report, path):
    """Raises UserError if nothing in the file could be used, with the first reason."""
    if report["records"]:
        return
    if report["bad"]:
        number, reason = report["bad_lines"][0]
        raise UserError(
            f"{path}: none of its {report['bad']} records can be used; line {number}: {reason}. "
            'Pretraining reads lines of {"text": ...}, SFT lines of '
            '{"conversations": [{"role": ..., "content": ...}]} or another of the usual formats'
        )
    raise UserError(f"{path} is empty; give a JSONL file")
