"""Distillation (arXiv:1503.02531): a student is trained on all probabilities that a teacher gives
the next token, not on the one token that came.

Shapes: B batch, T time, D hidden (of student and teacher, which may differ), V vocabulary,
N supervised positions, n chosen layers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import IGNORE
from model.loss import CHUNK


class Teacher:
    """A trained model, called like a CausalLM, that returns a dict:

    hidden_states      (B, T, D) of the last layer, after its norm
    aux_hidden_states  (B, T, n, D) of the chosen layers, counted from 1, if there are any
    """

    def __init__(self, model, layers=()):
        self.model, self.layers = model.eval().requires_grad_(False), list(layers)
        self.output, self.config = model.lm_head.weight, model.config  # output: (V, D)
        self.seen = watch(model, self.layers)

    @torch.no_grad()
    def __call__(self, input_ids, position_ids=None, document_ids=None):
        found = {"hidden_states": self.model.hidden_states(input_ids, position_ids, document_ids)}
        if self.layers:
            found["aux_hidden_states"] = torch.stack([self.seen[i] for i in self.layers], dim=2)
        return found


def watch(model, layers):
    """{layer: (B, T, D)}: the outputs of layers, counted from 1, in the latest forward pass."""
    seen = {}
    for layer in layers:

        def keep(module, inputs, output, layer=layer):
            seen[layer] = output

        model.model.layers[layer - 1].register_forward_hook(keep)
    return seen


def add_projections(model, width, count):
    """Gives a student matrices that make its hidden states as wide as a teacher's. `Distillation`
    trains them; the weights file leaves them out.
    """
    D, like = model.config.hidden_size, model.lm_head.weight
    layers = [nn.Linear(D, width, bias=False, device=like.device) for _ in range(count)]
    model.projections = nn.ModuleList(layers)


class Distillation(nn.Module):
    """alpha * CE + (1 - alpha) * T^2 * KL(teacher || student) + beta * MSE, summed over supervised
    positions.

    The temperature T flattens both distributions, so that small probabilities count too; T^2 keeps
    the size of the gradient. MSE, mean over D, compares the projected hidden states of the student
    with the teacher's: those of the last layer, and those of the teacher's chosen layers with the
    student's at the same share of its depth. Called like a CausalLM with labels. The teacher is a
    Teacher, or a recorded one (dataset/offline.py).
    """

    def __init__(self, student, teacher, alpha, temperature, beta=0.0):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.alpha, self.temperature, self.beta = alpha, temperature, beta
        scale = student.config.num_hidden_layers / teacher.config.num_hidden_layers
        self.layers = [max(1, round(layer * scale)) for layer in teacher.layers] if beta else []
        self.seen = watch(student, set(self.layers))

    def forward(self, input_ids, position_ids=None, document_ids=None, labels=None):
        supervised = labels[:, 1:] != IGNORE  # (B, T-1): each position predicts the next token
        theirs = self.teacher(input_ids, position_ids, document_ids)
        theirs = {name: part[:, :-1][supervised] for name, part in theirs.items()}  # (N, ...)
        x = self.student.hidden_states(input_ids, position_ids, document_ids)  # (B, T, D)
        ours = [x, *(self.seen[layer] for layer in self.layers)]
        ours = [states[:, :-1][supervised] for states in ours]  # (N, D) each
        targets, loss = labels[:, 1:][supervised], 0.0
        for start in range(0, max(1, len(targets)), CHUNK):
            part = slice(start, start + CHUNK)
            chunk = ours[0][part], targets[part], theirs["hidden_states"][part]
            # The logits, (CHUNK, V), are recomputed in the backward pass instead of kept.
            loss = loss + checkpoint(self.of_predictions, *chunk, use_reentrant=False)
        if self.beta:
            aux = theirs.get("aux_hidden_states", ours[0][:, :0])  # (N, n, D)
            of_teacher = [theirs["hidden_states"], *aux.unbind(1)]
            projections = self.student.projections
            for project, mine, other in zip(projections, ours, of_teacher, strict=True):
                error = project(mine).float() - other.float()
                loss = loss + self.beta * error.square().mean(dim=-1).sum()
        return loss

    def of_predictions(self, x, targets, teacher_states):
        """The first two terms for hidden states (N, D) of student and teacher, and targets (N,)."""
        logits = self.student.lm_head(x).float()  # (N, D) -> (N, V)
        log_q = F.log_softmax(logits / self.temperature, dim=-1)
        teacher_logits = F.linear(teacher_states.type_as(self.teacher.output), self.teacher.output)
        log_p = F.log_softmax(teacher_logits.float() / self.temperature, dim=-1)
        divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return self.alpha * loss + (1 - self.alpha) * self.temperature**2 * divergence
