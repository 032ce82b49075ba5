"""Several short documents side by side in one row: padding costs as much as text, teaches nothing.

A packed row has besides its ids the place of each token in its document (position_ids, which start
anew) and the document's number in the row (document_ids, -1 for padding), so that the model treats
every document as if it were alone.
"""

from bisect import bisect_left, insort

import numpy as np
import torch

from dataset.tokenizer import PAD
from model.loss import IGNORE

SHORTEST = 128  # tokens of a packed row; longer ones make attention dearer, shorter ones pack worse


def best_fit_decreasing(lengths, row_length):
    """Which items share a row: a list of rows, each a list of indices into lengths.

    From the longest to the shortest, each goes where it leaves the least space. No length may
    exceed row_length. This is at most 22 % above the fewest rows possible (Johnson, 1973).
    """
    rows, with_space, spaces = [], [[] for _ in range(row_length + 1)], []  # spaces is sorted
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    for item in order:
        at = bisect_left(spaces, lengths[item])
        if at == len(spaces):
            row, space = len(rows), row_length
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


def layout(lengths, row_length):
    """(tokens of a row, the rows) for a batch of documents; the rows are lists of indices.

    Rows are about as long as the longest document, where that takes no more tokens than rows of
    row_length: a token attends to its whole row, and what is not its document is masked out.
    About, because a CPU keeps compiled code for each size of product that it meets.
    """
    shortest = min(row_length, -max([SHORTEST, *lengths]) // 64 * -64)
    layouts = [(T, best_fit_decreasing(lengths, T)) for T in (shortest, row_length)]
    return min(layouts, key=lambda layout: layout[0] * len(layout[1]))


def pack(documents, row_length):
    """Documents (input_ids, labels) as one batch of rows that hold several."""
    T, rows = layout([len(input_ids) for input_ids, _ in documents], row_length)
    return batch([[documents[item] for item in row] for row in rows], T)


def pad(documents):
    """Documents as one batch, each in a row of its own, padded to the longest."""
    return batch([[d] for d in documents], max((len(ids) for ids, _ in documents), default=0))


def batch(rows, T):
    """Rows of documents as input_ids, labels, position_ids and document_ids, each (B, T).

    A document's first token has no label: what stands before it is another document. No rows at
    all give one token without loss, the share of a process that has nothing left to do.
    """
    shape = (max(1, len(rows)), max(1, T))
    ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORE)
    positions, documents = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for index, row in enumerate(rows):
        start = 0
        for number, (row_ids, row_labels) in enumerate(row):
            end = start + len(row_ids)
            ids[index, start:end] = row_ids
            labels[index, start + 1 : end] = row_labels[1:]
            positions[index, start:end] = torch.arange(len(row_ids))
            documents[index, start:end] = number
            start = end
    return ids, labels, positions, documents
