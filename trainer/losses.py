"""What the loops minimise."""

import torch.nn.functional as F

from dataset.lm_dataset import IGNORE


def summed_cross_entropy(logits, labels):
    """The sum of -log p(token) over the labelled tokens, each predicted by the position before it.

    logits (B, T, V); labels (B, T), -100 = no loss. Returns an fp32 scalar, not divided: a step's
    sum over all micro-batches and processes is divided once, by its number of labelled tokens.
    """
    logits = logits[:, :-1].flatten(0, 1).float()  # (B, T, V) -> (B * (T - 1), V)
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def supervised_tokens(labels):
    """How many terms the sum above has."""
    return int((labels[:, 1:] != IGNORE).sum())
