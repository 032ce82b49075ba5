"""LoRA (arXiv:2106.09685): the weights W are frozen; a layer computes W x + s B A x, and only the
adapter, A and B, is trained.

A is (rank, in) and B is (out, rank), so both are small. B starts at zero, so the initial output is
the base model's, bit for bit. s = alpha / rank, so that another rank needs little retuning.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass
class LoRA:
    """Configuration of the adapters, and the hash of their base weights."""

    rank: int
    alpha: float
    dropout: float
    target: str  # names of the layers, separated by commas, or all-linear
    base: str  # weights_hash of the base weights


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; `adapt` converts an nn.Linear."""

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
    """Add an adapter to each linear layer named by target, and freeze all other weights.

    base: the weights' hash, if known. Raises ValueError for an unknown layer name.
    """
    names = (ALL_LINEAR if target == "all-linear" else target).split(",")
    linears = {
        name: module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names
    }
    unknown = sorted(set(names) - {name.rpartition(".")[2] for name in linears})
    if unknown:
        raise ValueError(f"{','.join(unknown)}: choose from {ALL_LINEAR}, or all-linear")
    model.lora = LoRA(rank, alpha, dropout, target, base or weights_hash(model))
    model.requires_grad_(False)
    for linear in linears.values():
        adapt(linear, model.lora)
    return model


def adapt(linear, lora):
    """Convert an nn.Linear to a LoRALinear in place, so that parameter names stay the same."""
    linear.__class__ = LoRALinear
    linear.lora = lora
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    linear.lora_A = nn.Parameter(torch.empty(lora.rank, linear.in_features, **like))
    linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, lora.rank, **like))
    nn.init.kaiming_uniform_(linear.lora_A, a=5**0.5)  # as in nn.Linear and in PEFT


@torch.no_grad()
def merge(model):
    """Merge the adapters into the weights, W + s B A, and remove them. Returns the model with all
    weights trainable; it runs as fast as one without adapters.
    """
    for linear in model.modules():
        if isinstance(linear, LoRALinear):
            linear.weight += linear.scale * linear.lora_B @ linear.lora_A
            linear.__class__ = nn.Linear
            del linear.lora_A, linear.lora_B, linear.lora
    model.lora = None
    return model.requires_grad_(True)


def adapter_state(state):
    """Return the adapter weights of a state dict."""
    return {name: weight for name, weight in state.items() if name.endswith(("lora_A", "lora_B"))}


def weights_hash(model):
    """Return the sha256 of the base weights: their names, and their bytes in fp32."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if not name.endswith(("lora_A", "lora_B")):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
