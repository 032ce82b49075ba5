"""Several short rows side by side in one: padding costs as much as text and teaches nothing."""

import torch

from dataset.lm_dataset import IGNORE
from dataset.tokenizer import PAD

SHORTEST = 128  # tokens of a packed row; longer ones make attention dearer, shorter ones pack worse


def pack(rows):
    """Rows (input_ids, labels) of different lengths as one batch of few rows, best-fit decreasing.

    Returns input_ids, labels, position_ids and document_ids, each (B, T). Positions start anew and
    the id changes with each document, so the model treats it as if it were alone. Its first token
    has no label: what stands before it is another document. Padding is document -1. T is that of
    the longest row, or 128. No rows at all give one token without loss, the share of a process that
    has nothing left to do.
    """
    T = max([SHORTEST, *(len(input_ids) for input_ids, _ in rows)]) if rows else 1
    bins = []  # [free tokens, its rows]
    for row in sorted(rows, key=lambda row: len(row[0]), reverse=True):
        fitting = [b for b in bins if b[0] >= len(row[0])]
        best = min(fitting, key=lambda b: b[0]) if fitting else [T, []]
        if not fitting:
            bins.append(best)
        best[0] -= len(row[0])
        best[1].append(row)
    shape = (max(1, len(bins)), T)
    ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORE)
    positions, documents = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for index, (_, held) in enumerate(bins):
        start = 0
        for number, (row_ids, row_labels) in enumerate(held):
            end = start + len(row_ids)
            ids[index, start:end] = row_ids
            labels[index, start + 1 : end] = row_labels[1:]
            positions[index, start:end] = torch.arange(len(row_ids))
            documents[index, start:end] = number
            start = end
    return ids, labels, positions, documents
