"""Distillation (arXiv:1503.02531): a student is trained to predict the probabilities of a teacher,
and so of all tokens that may come next, not only the one that did.

Shapes: B batch, T time, D hidden (of student and teacher, which may differ), V vocabulary, N
supervised positions.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError
from model.loss import chunk_size, supervised_positions


class Teacher:
    """A trained model in eval mode, without gradients. Called like a CausalLM, it returns a list of
    hidden states, (B, T, D) each: those of the last layer, after its norm, and then the outputs of
    the given layers, counted from 1.
    """

    def __init__(self, model, layers=()):
        self.model, self.layers = model.eval().requires_grad_(False), list(layers)
        self.output, self.config = model.lm_head.weight, model.config  # output (V, D)
        self.outputs = record_outputs(model, self.layers)

    @torch.no_grad()
    def __call__(self, input_ids, *where):
        x = self.model.hidden_states(input_ids, *where)
        return [x, *(self.outputs[layer] for layer in self.layers)]


def record_outputs(model, layers):
    """{layer: its output (B, T, D) in the last forward pass}; layers are counted from 1."""
    outputs = {}
    for layer in layers:

        def keep(module, inputs, output, layer=layer):
            outputs[layer] = output

        model.model.layers[layer - 1].register_forward_hook(keep)
    return outputs


def add_projections(model, width, count):
    """Adds matrices to a student that make its hidden states as wide as those of the teacher, one
    for each compared layer. `Distillation` trains them; the weights file leaves them out.
    """
    D, device = model.config.hidden_size, model.lm_head.weight.device
    layers = [nn.Linear(D, width, bias=False, device=device) for _ in range(count)]
    model.projections = nn.ModuleList(layers)


def load_projections(model, shape, weights, path):
    """Add the projections of a checkpoint to a student. Raises UserError if they don't fit."""
    try:
        add_projections(model, *shape)
        own = {name.removeprefix("projections."): weight for name, weight in weights.items()}
        model.projections.load_state_dict(own)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged: its projections do not fit ({reason:.300})") from None


class Distillation(nn.Module):
    """alpha * CE + (1 - alpha) * T^2 * KL(teacher || student) + beta * MSE, summed over supervised
    positions.

    The temperature T flattens both distributions, so that the teacher's small probabilities count
    too; T^2 keeps the size of the gradient. MSE, a mean over D, compares projected hidden states of
    the student with those of the teacher: of the last layer, and of the teacher's chosen layers
    with the student's layers at the same fraction of the depth. Called like a CausalLM with labels.
    The teacher is a Teacher or a recorded one (trainer/recorded_teacher.py).
    """

    def __init__(self, student, teacher, alpha, temperature, beta=0.0):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.alpha, self.temperature, self.beta = alpha, temperature, beta
        scale = student.config.num_hidden_layers / teacher.config.num_hidden_layers
        self.layers = [max(1, round(layer * scale)) for layer in teacher.layers] if beta else []
        self.outputs = record_outputs(student, set(self.layers))

    def forward(self, input_ids, *where, labels):
        positions, targets = supervised_positions(labels, input_ids.device)  # (N,) each
        theirs = self.teacher(input_ids, *where)
        ours = [self.student.hidden_states(input_ids, *where)]
        ours += [self.outputs[layer] for layer in self.layers]
        theirs = [states.flatten(0, 1)[positions] for states in theirs]  # (B, T, D) -> (N, D)
        ours = [states.flatten(0, 1)[positions] for states in ours]
        loss, size = 0.0, chunk_size(targets)
        for start in range(0, max(1, len(targets)), size):
            part = slice(start, start + size)
            chunk = ours[0][part], theirs[0][part], targets[part]
            # The logits are computed again in the backward pass instead of kept.
            loss = loss + checkpoint(self.prediction_loss, *chunk, use_reentrant=False)
        if self.beta:
            for project, our, their in zip(self.student.projections, ours, theirs, strict=True):
                error = project(our).float() - their.float()  # (N, D)
                loss = loss + self.beta * error.square().mean(dim=-1).sum()
        return loss

    def prediction_loss(self, ours, theirs, targets):
        """The first two terms; ours and theirs are hidden states of the last layer, (N, D)."""
        logits = self.student.lm_head(ours).float()  # (N, D) -> (N, V)
        teacher_logits = F.linear(theirs.type_as(self.teacher.output), self.teacher.output).float()
        log_q = F.log_softmax(logits / self.temperature, dim=-1)
        log_p = F.log_softmax(teacher_logits / self.temperature, dim=-1)
        divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return self.alpha * loss + (1 - self.alpha) * self.temperature**2 * divergence
