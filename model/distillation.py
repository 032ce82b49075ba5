"""Distillation (arXiv:1503.02531): a student learns from all that a teacher thinks may come next,
not from the one token that did.

Shapes: B batch, T time, D hidden (of student and teacher, which may differ), V vocabulary,
N supervised positions, n chosen layers, k tokens.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import IGNORE
from model.loss import CHUNK


class Teacher:
    """What a trained model says of each token. Called like a CausalLM, it gives a dict:

    hidden_states      (B, T, D) of the last layer, after its norm
    aux_hidden_states  (B, T, n, D) of the chosen layers, counted from 1, if there are any

    or, with top_k, the k likeliest next tokens and the logarithms of their probabilities at the
    given temperature, top_ids and top_log_p, each (B, T, k).
    """

    def __init__(self, model, layers=(), top_k=0, temperature=1.0):
        self.model, self.layers = model.eval().requires_grad_(False), list(layers)
        self.top_k, self.temperature = top_k, temperature
        self.output, self.config = model.lm_head.weight, model.config  # output: (V, D)
        self.seen = watch(model, self.layers)

    @torch.no_grad()
    def __call__(self, input_ids, *where):
        x = self.model.hidden_states(input_ids, *where)
        if self.top_k:
            log_p = F.log_softmax(self.model.lm_head(x).float() / self.temperature, dim=-1)
            log_p, ids = log_p.topk(self.top_k)
            return {"top_ids": ids, "top_log_p": log_p}
        found = {"hidden_states": x}
        if self.layers:
            found["aux_hidden_states"] = torch.stack([self.seen[i] for i in self.layers], dim=2)
        return found


def watch(model, layers):
    """{layer: (B, T, D)}, what these layers, counted from 1, gave in the last forward pass."""
    seen = {}
    for layer in layers:

        def keep(module, given, out, layer=layer):
            seen[layer] = out

        model.model.layers[layer - 1].register_forward_hook(keep)
    return seen


def add_projections(model, width, count):
    """Gives a student what makes its hidden states as wide as a teacher's; `Distillation` trains
    it, the weights file leaves it out.
    """
    D, like = model.config.hidden_size, model.lm_head.weight
    layers = [nn.Linear(D, width, bias=False, device=like.device) for _ in range(count)]
    model.projections = nn.ModuleList(layers)


class Distillation(nn.Module):
    """alpha * CE + (1 - alpha) * T^2 * KL(teacher || student) + beta * MSE, summed over supervised
    positions.

    T flattens both distributions, so that the teacher's small probabilities count, too; T^2 gives
    the gradient its size back. MSE, mean over D, compares the projected hidden states of the
    student with the teacher's: those of the last layer, and those of the teacher's chosen layers
    with the student's at the same share of its depth. Called like a CausalLM with labels; the
    teacher is a Teacher, or one that was recorded (dataset/offline.py).
    """

    def __init__(self, student, teacher, alpha, temperature, beta=0.0):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.alpha, self.temperature, self.beta = alpha, temperature, beta
        scale = student.config.num_hidden_layers / teacher.config.num_hidden_layers
        self.layers = [max(1, round(layer * scale)) for layer in teacher.layers] if beta else []
        self.seen = watch(student, set(self.layers))

    def forward(self, input_ids, *where, labels):
        supervised = labels[:, 1:] != IGNORE  # (B, T-1)
        said = self.teacher(input_ids, *where)
        said = {name: part[:, :-1][supervised] for name, part in said.items()}  # (N, ...)
        x = self.student.hidden_states(input_ids, *where)  # (B, T, D)
        ours = [x, *(self.seen[layer] for layer in self.layers)]
        ours = [states[:, :-1][supervised] for states in ours]  # (N, D) each
        next_ids, loss = labels[:, 1:][supervised], 0.0
        for start in range(0, max(1, len(next_ids)), CHUNK):
            part = slice(start, start + CHUNK)
            chunk = ours[0][part], next_ids[part], {name: it[part] for name, it in said.items()}
            # The scores, (CHUNK, V), are computed once more in the backward pass, not kept.
            loss = loss + checkpoint(self.of_predictions, *chunk, use_reentrant=False)
        if self.beta:
            aux = said.get("aux_hidden_states", ours[0][:, :0])  # (N, n, D)
            theirs = [said["hidden_states"], *aux.unbind(1)]
            for project, mine, other in zip(self.student.projections, ours, theirs, strict=True):
                error = project(mine).float() - other.float()
                loss = loss + self.beta * error.square().mean(dim=-1).sum()
        return loss

    def of_predictions(self, x, next_ids, said):
        scores = self.student.lm_head(x).float()  # (N, D) -> (N, V)
        log_q = F.log_softmax(scores / self.temperature, dim=-1)
        if "top_ids" in said:
            divergence = divergence_of_top(said["top_log_p"].float(), said["top_ids"], log_q)
        else:
            theirs = F.linear(
                said["hidden_states"].type_as(self.teacher.output), self.teacher.output
            )
            log_p = F.log_softmax(theirs.float() / self.temperature, dim=-1)
            divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        loss = F.cross_entropy(scores, next_ids, reduction="sum")
        return self.alpha * loss + (1 - self.alpha) * self.temperature**2 * divergence


def divergence_of_top(log_p, ids, log_q):
    """KL over k + 1 events: each of the teacher's k likeliest tokens, and any other token. At most
    the KL over all V, and equal to it where k = V.

    log_p, ids (N, k), log_q (N, V). Returns the sum over N.
    """
    p = log_p.exp()
    known = (p * (log_p - log_q.gather(-1, ids))).sum()
    if ids.shape[-1] == log_q.shape[-1]:
        return known
    rest_p = (1 - p.sum(dim=-1)).clamp(min=0)
    rest_log_q = log_q.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    return known + (torch.xlogy(rest_p, rest_p) - rest_p * rest_log_q).sum()
