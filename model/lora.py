"""LoRA (arXiv:2106.09685): the weights W are frozen; a layer computes W x + s B A x, and only the
adapter, A and B, is trained.

A is (rank, in) and B is (out, rank), so both together are small. B begins at zero: at first the
output is that of the model without adapters, bit for bit. s = alpha / rank makes the size of an
update independent of the rank.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass
class LoRA:
    """The shape of the adapters, and the weights that they belong to."""

    rank: int
    alpha: float
    dropout: float
    target: str  # the names of matrices, separated by commas, or all-linear
    base: str  # hash_of the weights that they were trained on


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; `adapt` makes an nn.Linear one."""

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)  # (..., in) -> (..., out)
        x = F.dropout(x, self.lora.dropout, self.training)
        # (..., in) -> (..., rank) -> (..., out)
        x = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return out + x * self.scale

    @property
    def scale(self):
        return self.lora.alpha / self.lora.rank


def add_lora(model, rank=16, alpha=32.0, dropout=0.0, target="all-linear", base=None):
    """Adds an adapter to each matrix that target names, and freezes all other weights.

    base: the hash of the weights, if it is known. Raises ValueError for a name of no matrix.
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
    """Makes an nn.Linear a LoRALinear, in place."""
    linear.__class__ = LoRALinear
    linear.lora = lora
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    linear.lora_A = nn.Parameter(torch.empty(lora.rank, linear.in_features, **like))
    linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, lora.rank, **like))
    nn.init.kaiming_uniform_(linear.lora_A, a=5**0.5)  # as in nn.Linear and in PEFT


@torch.no_grad()
def merge(model):
    """Adds the adapters to the weights, W + s B A, and removes them; returns the model, all of it
    trainable. It is as fast as a model that never had adapters.
    """
    for linear in model.modules():
        if isinstance(linear, LoRALinear):
            linear.weight += linear.scale * linear.lora_B @ linear.lora_A
            linear.__class__ = nn.Linear
            del linear.lora_A, linear.lora_B, linear.lora
    model.lora = None
    return model.requires_grad_(True)


def adapter_state(state):
    """The adapters' part of a state dict."""
    return {name: weight for name, weight in state.items() if name.endswith(("lora_A", "lora_B"))}


def hash_of(model):
    """The sha256 of the names and the bytes in fp32 of all weights but the adapters."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if not name.endswith(("lora_A", "lora_B")):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
