"""Sequence packing: several samples share a row, and rows are padded to one length.

Padding wastes compute, so short samples are packed. Beside its ids a row has the place of each
token in its sample (position_ids, from 0 in each) and the number of its sample in the row
(document_ids, -1 for padding), so that the model treats each sample as if it were alone.
"""

import math
from bisect import bisect_left, insort

import numpy as np
import torch

from common import IGNORE, PAD

SHORTEST = 128  # tokens of a packed row at least, where max_seq_len is not shorter than that
MULTIPLE = 64  # a CPU keeps compiled code for each size of product, so rows have few lengths
ATTENTION = 2000  # see `row_length`; measured with the default model on a CPU
SAMPLED = 2000  # samples that are packed to choose the length of rows


def row_length(lengths, args):
    """Return the tokens of a packed row: args.max_seq_len, or, where all samples are shorter, the
    half, a third ... of it that costs least. Short rows are filled less well. But a token attends
    to its whole row, where other samples are only masked out: in a row of ATTENTION tokens that
    takes as long as everything else. Without args.packing it is the longest sample.
    """
    longest = int(lengths.max(initial=1))
    if not args.packing:
        return longest
    some, costs = lengths[:: math.ceil(max(1, len(lengths)) / SAMPLED)].tolist(), {}
    for parts in range(1, 1 + args.max_seq_len // max(SHORTEST, longest)):
        T = args.max_seq_len // parts
        if parts == 1 or T * parts == args.max_seq_len and T % MULTIPLE == 0:
            costs[T] = len(best_fit_decreasing(some, T)) * T * (ATTENTION + T)
    return min(costs, key=costs.get, default=args.max_seq_len)


def best_fit_decreasing(lengths, max_seq_len):
    """Which items share a row: a list of rows, each a list of indices into lengths.

    From the longest to the shortest, each goes where it leaves the least space. No length may
    exceed max_seq_len. This is at most 22 % above the fewest rows possible (Johnson, 1973).
    """
    rows, with_space, spaces = [], [[] for _ in range(max_seq_len + 1)], []  # spaces is sorted
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    for item in order:
        at = bisect_left(spaces, lengths[item])
        if at == len(spaces):
            row, space = len(rows), max_seq_len
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                spaces.pop(at)
        rows[row].append(item)
        space -= lengths[item]
        if not with_space[space]:
            insort(spaces, space)
        with_space[space].append(row)
    return rows


def pad(documents, T=1, count=1):
    """Return samples (input_ids, labels) as one batch, each in a row of its own. The length of the
    rows is a multiple of T; there are at least count.
    """
    return collate([[document] for document in documents], multiple=T, count=count)


def collate(rows, longest=None, multiple=1, count=1):
    """Return rows of samples as input_ids, labels, position_ids and document_ids, each (B, T): T is
    the length of the longest row, rounded up to a multiple, but not above longest; B is at least
    count.

    A sample's first token has no label: what stands before it is another sample. No rows at
    all give one token without loss, the share of a process that has nothing left to do.
    """
    T = max((sum(len(row_ids) for row_ids, _ in row) for row in rows), default=1)
    T = math.ceil(T / multiple) * multiple
    T = T if longest is None else min(T, longest)
    shape = (max(count, len(rows)), T)
    ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORE)
    position_ids, document_ids = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for index, row in enumerate(rows):
        start = 0
        for number, (row_ids, row_labels) in enumerate(row):
            end = start + len(row_ids)
            ids[index, start:end] = row_ids
            labels[index, start + 1 : end] = row_labels[1:]
            position_ids[index, start:end] = torch.arange(len(row_ids))
            document_ids[index, start:end] = number
            start = end
    return ids, labels, position_ids, document_ids
