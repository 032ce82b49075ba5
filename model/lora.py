"""LoRA (arXiv:2106.09685): the weights stay as they are, and a matrix learns W x + s B A x.

A is (rank, in) and B is (out, rank), so both together are small. B begins at zero: at first the
model is what it was, bit for bit. s = alpha / rank keeps the step's size when the rank changes.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass
class LoRA:
    """What adapters are like, and which weights they belong to."""

    rank: int
    alpha: float
    dropout: float
    target: str  # the names of matrices, with commas between them, or all-linear
    base: str  # the hash of the weights beneath


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; an nn.Linear becomes one by `adapt`."""

    def forward(self, x):
        out = F.linear(x, self.weight)
        if self.unmerged is not None:  # the adapter is part of the weight for now
            return out
        x = F.dropout(x, self.lora.dropout, self.training)
        return out + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale

    @property
    def scale(self):
        return self.lora.alpha / self.lora.rank


def add_lora(model, rank=16, alpha=32.0, dropout=0.0, target="all-linear", base=None):
    """Gives the matrices that target names an adapter each; only these learn from now on.

    base: the hash of the weights, if it is known. Raises ValueError for a name that fits nothing.
    """
    names = (ALL_LINEAR if target == "all-linear" else target).split(",")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names
    }
    unknown = sorted(set(names) - {name.rpartition(".")[2] for name in linears})
    if unknown:
        raise ValueError(f"{','.join(unknown)}: there is {ALL_LINEAR}, or all-linear")
    model.lora = LoRA(rank, alpha, dropout, target, base or hash_of(model))
    model.requires_grad_(False)
    for linear in linears.values():
        adapt(linear, model.lora)
    return model


def adapt(linear, lora):
    linear.__class__ = LoRALinear
    linear.lora, linear.unmerged = lora, None
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    linear.lora_A = nn.Parameter(torch.empty(lora.rank, linear.in_features, **like))
    linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, lora.rank, **like))
    nn.init.kaiming_uniform_(linear.lora_A, a=5**0.5)  # as nn.Linear begins, and PEFT's adapters


def adapters(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


@torch.no_grad()
def merge(model):
    """Makes the adapters part of the weights: W + s B A, as quick as a model without adapters."""
    for linear in adapters(model):
        linear.unmerged = linear.weight.clone()
        linear.weight += linear.scale * linear.lora_B @ linear.lora_A


@torch.no_grad()
def unmerge(model):
    """Takes merge back, to the bit."""
    for linear in adapters(model):
        linear.weight.copy_(linear.unmerged)
        linear.unmerged = None


def merge_for_good(model):
    """The model with its adapters merged and gone: a plain one."""
    merge(model)
    for linear in adapters(model):
        linear.__class__ = nn.Linear
        del linear.lora_A, linear.lora_B, linear.lora, linear.unmerged
    model.lora = None
    return model.requires_grad_(True)


def adapter_state(state):
    """The part of a state dict that belongs to adapters."""
    return {name: weight for name, weight in state.items() if name.endswith(("lora_A", "lora_B"))}


def hash_of(model):
    """sha256 over the names and the bytes of all weights, adapters aside, as they are in fp32."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if not name.endswith(("lora_A", "lora_B")):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
