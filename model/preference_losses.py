"""Losses of learning from preferences (DPO) and from rewards (GRPO): tensors in, tensors out.

Shapes: B rows, T time, V vocabulary, P pairs, N supervised tokens, G answers to a question.
"""

import torch
import torch.nn.functional as F

from common import IGNORE
from model.loss import supervised_positions


def log_probabilities(model, batch, temperature=1.0):
    """(log p of the labels at a temperature, (B, T - 1), 0 where there is none; the logits of the N
    labels, divided by it, (N, V)). batch: input_ids, labels, position_ids, document_ids, (B, T);
    the last two may be None.
    """
    input_ids, labels, position_ids, document_ids = batch
    positions, targets = supervised_positions(labels, input_ids.device)  # (N,) each
    logits = model(input_ids, position_ids, document_ids, at=positions)
    logits = logits.float() / temperature  # (N, V)
    found = -F.cross_entropy(logits, targets, reduction="none")  # (N,)
    logp = found.new_zeros(labels.numel()).index_put((positions,), found)  # (B * T,)
    return logp.view(labels.shape)[:, :-1], logits


def pair_log_probabilities(model, batch):
    """The log-probability of the chosen and of the rejected answer of each pair, (P, 2): sums over
    their supervised tokens. In a row, document 0 is the chosen one, document 1 the rejected one;
    rows without supervised tokens, which come last, are no pairs.
    """
    logp, _ = log_probabilities(model, batch)
    labels, document_ids = batch[1][:, 1:], batch[3][:, 1:]
    halves = [(logp * (document_ids == half)).sum(dim=-1) for half in (0, 1)]
    pairs = int((labels != IGNORE).any(dim=-1).sum())  # counted on the CPU: labels stay there
    return torch.stack(halves, dim=-1)[:pairs]


def preference_loss(policy, reference, beta):
    """(the sum of the pairs' losses; the sums of loss, right pairs, margins, and log-probabilities
    of chosen and rejected answers, (5,)). policy and reference are the log-probabilities (P, 2)
    of the model in training and of the model before.

    The margin of a pair says how much more the chosen answer has gained than the rejected one; the
    loss is -log sigmoid(margin), equation 7 of arXiv:2305.18290.
    """
    gained = policy - reference.to(policy.device)
    margins = beta * (gained[:, 0] - gained[:, 1])  # (P,)
    loss = -F.logsigmoid(margins).sum()
    figures = [loss, (margins > 0).sum(), margins.sum(), *policy.sum(dim=0)]
    return loss, torch.stack([figure.detach() for figure in figures])


def advantages_of(rewards):
    """By how much each reward is above the mean of its group, (P, G) -> (P, G).

    GRPO proper (arXiv:2402.03300) also divides by the standard deviation of the group. That gives
    more weight to questions that are answered right nearly always, or nearly never
    (arXiv:2503.20783).
    """
    return rewards - rewards.mean(dim=1, keepdim=True)


def policy_loss(model, batch, advantages, temperature=1.0):
    """(minus the sum over all tokens of advantage * log p; the sum of the entropies, a number). A
    row is an answer, drawn at the temperature, with its advantage (B,); there may be more rows,
    without supervised tokens.

    Its gradient is that of the policy gradient theorem (REINFORCE, Williams 1992).
    """
    logp, logits = log_probabilities(model, batch, temperature)
    spread = logits.detach().log_softmax(dim=-1)  # (N, V)
    weight = F.pad(advantages, (0, len(logp) - len(advantages))).to(logp.device)
    return -(weight[:, None] * logp).sum(), -(spread.exp() * spread).sum().item()
