"""Sequence packing: short samples share a row, because padding wastes compute.

A row holds documents: samples, or the parts of one (`TokenDataset.documents`). It also has each
token's position in its document (position_ids, from 0) and the index of its document in the row
(document_ids, -1 for padding), so that the model treats each document independently.
"""

import math
from bisect import bisect_left, insort

import numpy as np
import torch

from common import IGNORE, PAD

MIN_ROW_LENGTH = 128  # minimum length of a packed row, unless max_seq_len is shorter
ROW_MULTIPLE = 64  # row lengths are multiples of it: oneDNN caches compiled code per matmul size
ATTENTION_BREAK_EVEN = 2000  # see `row_length`; measured with the default model on a CPU
MAX_SAMPLED = 2000  # samples that are packed to choose the row length


def row_length(lengths, max_seq_len):
    """Return the length of packed rows, in tokens, for samples of these lengths.

    It is max_seq_len, or a fraction of it (1/2, 1/3, ...) that fits all samples, whichever
    minimizes the estimated cost. Shorter rows have more padding; in longer rows, attention costs
    more, because masked scores are computed too. In a row of ATTENTION_BREAK_EVEN tokens, attention
    takes as long as everything else.
    """
    longest = int(lengths.max(initial=1))
    stride = math.ceil(max(1, len(lengths)) / MAX_SAMPLED)
    sampled = lengths[::stride].tolist()

    def cost(T):
        return len(best_fit_decreasing(sampled, T)) * T * (ATTENTION_BREAK_EVEN + T)

    candidates = [max_seq_len]
    for parts in range(2, 1 + max_seq_len // max(MIN_ROW_LENGTH, longest)):
        T = max_seq_len // parts
        if T * parts == max_seq_len and T % ROW_MULTIPLE == 0:
            candidates.append(T)
    return min(candidates, key=cost)


def best_fit_decreasing(lengths, max_seq_len):
    """Pack items into rows with best-fit decreasing; returns rows of indices into lengths.

    From the longest to the shortest, each item goes into the row where it leaves the least space.
    No length may exceed max_seq_len. At most 22 % more rows than optimal (Johnson, 1973).
    """
    rows = []
    with_space = [[] for _ in range(max_seq_len + 1)]  # the rows that have this much space left
    spaces = []  # all s with rows in with_space[s], sorted
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    for item in order:
        place = bisect_left(spaces, lengths[item])
        if place == len(spaces):
            row, space = len(rows), max_seq_len
            rows.append([])
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                spaces.pop(place)
        rows[row].append(item)
        space -= lengths[item]
        if not with_space[space]:
            insort(spaces, space)
        with_space[space].append(row)
    return rows


def pad(documents, multiple=1, min_rows=1):
    """Batch documents (input_ids, labels) in separate rows; see `collate`."""
    return collate([[document] for document in documents], multiple=multiple, min_rows=min_rows)


def collate(rows, max_length=None, multiple=1, min_rows=1):
    """Batch rows of documents as input_ids, labels, position_ids and document_ids, (B, T) each. T
    is the longest row's length, rounded up to a multiple, but at most max_length; B is at least
    min_rows.

    A document's first token has no label, because the token before it is from another one. Without
    rows, return one token without loss: a dummy batch for ranks without data.
    """
    T = max((sum(len(ids) for ids, _ in row) for row in rows), default=1)
    T = math.ceil(T / multiple) * multiple
    T = T if max_length is None else min(T, max_length)
    shape = (max(min_rows, len(rows)), T)
    input_ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORE)
    position_ids, document_ids = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for index, row in enumerate(rows):
        start = 0
        for document, (ids, document_labels) in enumerate(row):
            end = start + len(ids)
            input_ids[index, start:end] = ids
            labels[index, start + 1 : end] = document_labels[1:]
            position_ids[index, start:end] = torch.arange(len(ids))
            document_ids[index, start:end] = document
            start = end
    return input_ids, labels, position_ids, document_ids
