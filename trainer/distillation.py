"""Distillation (arXiv:1503.02531): train a student to predict a teacher's next-token distribution.

Shapes: B batch, T time, D hidden (student and teacher may differ), V vocabulary, N supervised
positions.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError
from model.loss import chunk_size, supervised_positions


class Teacher:
    """A frozen model in eval mode. Called like a CausalLM, it returns a list of hidden states,
    (B, T, D) each: the normalized last hidden state, then the outputs of layers, counted from 1.
    """

    def __init__(self, model, layers=()):
        self.model, self.layers = model.eval().requires_grad_(False), list(layers)
        self.lm_head_weight, self.config = model.lm_head.weight, model.config  # (V, D)
        self.layer_outputs = record_outputs(model, self.layers)

    @torch.no_grad()
    def __call__(self, input_ids, position_ids=None, document_ids=None):
        x = self.model.hidden_states(input_ids, position_ids, document_ids)
        return [x, *(self.layer_outputs[layer] for layer in self.layers)]


def record_outputs(model, layers):
    """Return {layer: its output (B, T, D)}, updated by each forward pass; layers count from 1."""
    outputs = {}
    for layer in layers:

        def keep(module, inputs, output, layer=layer):
            outputs[layer] = output

        model.model.layers[layer - 1].register_forward_hook(keep)
    return outputs


def add_projections(model, width, count):
    """Add projections to a student, which map its hidden states to the teacher's width, one per
    compared layer. `Distillation` trains them; the weights file omits them.
    """
    D, device = model.config.hidden_size, model.lm_head.weight.device
    layers = [nn.Linear(D, width, bias=False, device=device) for _ in range(count)]
    model.projections = nn.ModuleList(layers)


def load_projections(model, shape, weights, path):
    """Add the projections of a checkpoint to a student. Raises UserError if they don't fit."""
    try:
        add_projections(model, *shape)
        state = {name.removeprefix("projections."): weight for name, weight in weights.items()}
        model.projections.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged: its projections don't match ({reason:.300})") from None


class Distillation(nn.Module):
    """The loss alpha * CE + (1 - alpha) * temperature^2 * KL(teacher || student) + beta * MSE,
    summed over supervised positions.

    The temperature flattens both distributions, so that small probabilities of the teacher count
    too; temperature^2 preserves the gradient's scale. MSE, a mean over D, compares the student's
    projected hidden states with the teacher's: the last one, and further layers of the teacher with
    the student's layers at the same relative depth. Called like a CausalLM with labels. The teacher
    is a Teacher or an OfflineTeacher (trainer/recorded_teacher.py).
    """

    def __init__(self, student, teacher, alpha, temperature, beta=0.0, teacher_hash=None):
        super().__init__()
        self.student, self.teacher, self.teacher_hash = student, teacher, teacher_hash
        self.alpha, self.temperature, self.beta = alpha, temperature, beta
        scale = student.config.num_hidden_layers / teacher.config.num_hidden_layers
        self.layers = [max(1, round(layer * scale)) for layer in teacher.layers] if beta else []
        self.layer_outputs = record_outputs(student, set(self.layers))

    def forward(self, input_ids, position_ids=None, document_ids=None, *, labels):
        positions, targets = supervised_positions(labels, input_ids.device)  # (N,) each
        teacher_states = self.teacher(input_ids, position_ids, document_ids)
        student_states = [self.student.hidden_states(input_ids, position_ids, document_ids)]
        student_states += [self.layer_outputs[layer] for layer in self.layers]
        # Supervised positions only: (B, T, D) -> (N, D)
        teacher_states = [states.flatten(0, 1)[positions] for states in teacher_states]
        student_states = [states.flatten(0, 1)[positions] for states in student_states]
        loss, size = 0.0, chunk_size(targets)
        for start in range(0, max(1, len(targets)), size):
            part = slice(start, start + size)
            chunk = student_states[0][part], teacher_states[0][part], targets[part]
            # Recompute the logits in the backward pass to save memory.
            loss = loss + checkpoint(self.prediction_loss, *chunk, use_reentrant=False)
        if self.beta:
            layers = zip(self.student.projections, student_states, teacher_states, strict=True)
            for project, student, teacher in layers:
                error = project(student).float() - teacher.float()  # (N, D)
                loss = loss + self.beta * error.square().mean(dim=-1).sum()
        return loss

    def prediction_loss(self, student_states, teacher_states, targets):
        """Return the first two terms, from the last hidden states, (N, D) each."""
        logits = self.student.lm_head(student_states).float()  # (N, D) -> (N, V)
        teacher_states = teacher_states.type_as(self.teacher.lm_head_weight)
        teacher_logits = F.linear(teacher_states, self.teacher.lm_head_weight).float()  # (N, V)
        log_q = F.log_softmax(logits / self.temperature, dim=-1)
        log_p = F.log_softmax(teacher_logits / self.temperature, dim=-1)
        divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return self.alpha * loss + (1 - self.alpha) * self.temperature**2 * divergence
