"""Distillation (arXiv:1503.02531): a student learns from all that a teacher thinks may come next,
not from the one token that did.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model.loss import IGNORE


class Distillation(nn.Module):
    """alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), summed over supervised positions.

    T flattens both distributions, so that the teacher's small probabilities count, too; T^2 gives
    the gradient its size back. Called like a CausalLM with labels.
    """

    def __init__(self, student, teacher, alpha, temperature):
        super().__init__()
        self.student, self.teacher = student, [teacher.eval().requires_grad_(False)]
        self.alpha, self.temperature = alpha, temperature

    def forward(self, input_ids, *where, labels):
        next_labels = labels[:, 1:]
        supervised = next_labels != IGNORE  # (B, T-1)
        ours = self.student(input_ids, *where)[:, :-1][supervised].float()  # (N, V)
        with torch.no_grad():
            theirs = self.teacher[0](input_ids, *where)[:, :-1][supervised].float()
        loss = F.cross_entropy(ours, next_labels[supervised], reduction="sum")
        log_p, log_q = (F.log_softmax(x / self.temperature, dim=-1) for x in (theirs, ours))
        divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return self.alpha * loss + (1 - self.alpha) * self.temperature**2 * divergence
