"""The losses of DPO and GRPO.

Shapes: B rows, T time, V vocabulary, P pairs, N supervised tokens, Q questions, G answers per
question.
"""

import torch
import torch.nn.functional as F

from common import IGNORE
from model.loss import supervised_positions


def log_probabilities(model, batch, temperature=1.0):
    """Return (log p of each label at a temperature, (B, T - 1), 0 where there's no label; the
    logits at the N labels divided by the temperature, (N, V)). batch: input_ids, labels,
    position_ids, document_ids, (B, T) each; the last two may be None.
    """
    input_ids, labels, position_ids, document_ids = batch
    positions, targets = supervised_positions(labels, input_ids.device)  # (N,) each
    logits = model(input_ids, position_ids, document_ids, logit_positions=positions)
    logits = logits.float() / temperature  # (N, V)
    target_logp = -F.cross_entropy(logits, targets, reduction="none")  # (N,)
    logp = target_logp.new_zeros(labels.numel())  # (B * T,)
    logp = logp.index_put((positions,), target_logp)
    return logp.view(labels.shape)[:, :-1], logits


def pair_log_probabilities(model, batch):
    """Return the log-probabilities of each pair's chosen and rejected answer, (P, 2), summed over
    supervised tokens. In a row, document 0 is the chosen answer and document 1 the rejected one;
    rows without supervised tokens, which come last, are padding.
    """
    logp, _ = log_probabilities(model, batch)
    _, labels, _, document_ids = batch
    document_ids = document_ids[:, 1:]  # (B, T - 1), as logp
    sums = [(logp * (document_ids == document)).sum(dim=-1) for document in (0, 1)]
    num_pairs = int((labels[:, 1:] != IGNORE).any(dim=-1).sum())  # on the CPU, without a GPU sync
    return torch.stack(sums, dim=-1)[:num_pairs]


def dpo_loss(policy, reference, beta):
    """Return (the DPO loss summed over pairs; sums of loss, correctly ranked pairs, margins, and
    log p of the chosen and rejected answers, (5,)). policy and reference are log-probabilities (P,
    2) of the policy and of the frozen reference model.

    margin = beta * (log-ratio of chosen - log-ratio of rejected); the loss is -log sigmoid(margin),
    equation 7 of arXiv:2305.18290.
    """
    log_ratios = policy - reference.to(policy.device)  # (P, 2)
    margins = beta * (log_ratios[:, 0] - log_ratios[:, 1])  # (P,)
    loss = -F.logsigmoid(margins).sum()
    sums = [loss, (margins > 0).sum(), margins.sum(), *policy.sum(dim=0)]
    return loss, torch.stack([value.detach() for value in sums])


def group_advantages(rewards):
    """Return the group-relative advantages: reward minus group mean, (Q, G) -> (Q, G).

    The original GRPO (arXiv:2402.03300) also divides by the group's standard deviation, which gives
    more weight to questions that are answered correctly almost always or almost never
    (arXiv:2503.20783).
    """
    return rewards - rewards.mean(dim=1, keepdim=True)


def grpo_loss(model, batch, advantages, temperature=1.0):
    """Return (the policy gradient loss, summed over tokens; the summed entropy, a float). A row is
    an answer sampled at the temperature, with its advantage (B,); rows without supervised tokens
    may follow.

    The loss is -advantage * log p (REINFORCE, Williams 1992), valid for one update per batch of
    answers, for which GRPO's probability ratio is 1.
    """
    logp, logits = log_probabilities(model, batch, temperature)
    num_padding = len(logp) - len(advantages)
    advantages = F.pad(advantages, (0, num_padding)).to(logp.device)  # (B,)
    loss = -(advantages[:, None] * logp).sum()
    log_softmax = logits.detach().log_softmax(dim=-1)  # (N, V)
    entropy = -(log_softmax.exp() * log_softmax).sum().item()
    return loss, entropy
