"""Optional speed-ups for single-token decoding. A decoding step reads every weight once for a few
rows of input, so it is limited by memory bandwidth.
"""

import copy
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

COMPILED = WeakKeyDictionary()  # model: (key, compiled copy)


@contextmanager
def prepacked_weights(model, batch_size):
    """Context manager: on a CPU, linear layers compute with copies of their weights in oneDNN's
    blocked layout, which is faster to read. With half-precision weights, the LM head computes in
    fp32: rounded to bf16, the top two logits are equal in one position of 40.
    """
    head = model.lm_head
    is_half = head.weight.dtype != torch.float32
    forwards = {}  # linear layer: its forward method
    if is_half and not hasattr(model, "reshard"):  # sharded by FSDP
        weight = head.weight.detach().float()
        forwards[head] = lambda x: F.linear(x.float(), weight)
    if can_prepack(model):
        for linear in model.modules():
            if type(linear) is torch.nn.Linear:
                weight = linear.weight.detach()
                weight = weight.float() if linear is head else weight
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch_size)
                forwards[linear] = partial(packed_linear, packed, linear.bias, weight.dtype)
    try:
        for linear, forward in forwards.items():
            linear.forward = forward
        yield
    finally:
        for linear in forwards:
            linear.__dict__.pop("forward", None)


def can_prepack(model):
    """Return whether oneDNN can lay out a model's weights: on a CPU, in a dtype it supports."""
    weight = model.lm_head.weight
    is_sharded = hasattr(model, "reshard")  # by FSDP
    if weight.device.type != "cpu" or is_sharded or model.config.use_moe:
        return False
    if weight.dtype != torch.float32:
        name = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
        is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
        if is_supported is None or not is_supported():
            return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def packed_linear(packed, bias, dtype, x):
    """Compute a linear layer from weights in oneDNN's layout, in a dtype."""
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")


def compiled_step(model, batch_size):
    """Return a compiled copy of the model, which shares its weights, for decoding steps. It is
    cached, and compiled again when the weights have changed.

    On a CPU with several rows, the compiler prepacks the weights itself ("freezing").
    """
    from torch._inductor import config as compiler

    weights = list(model.parameters())
    key = batch_size > 1, weights[0].dtype, sum(weight._version for weight in weights)
    if COMPILED.get(model, (None,))[0] != key:
        if model in COMPILED:
            torch.compiler.reset()  # otherwise the code for the old weights is reused
        twin = copy.deepcopy(model, {id(weight): weight for weight in weights}).eval()
        on_cpu = weights[0].device.type == "cpu"
        for module in twin.modules():
            if type(module) is torch.nn.Linear and on_cpu and batch_size == 1:
                module.__class__ = OneRow
        if weights[0].dtype != torch.float32:  # logits in fp32, as in `prepacked_weights`
            twin.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            if type(twin.lm_head) is not OneRow:  # OneRow computes in fp32 anyway
                twin.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().float())
        freeze = compiler.patch(freezing=on_cpu and batch_size > 1)
        COMPILED[model] = key, freeze(torch.compile(twin, dynamic=True))
    return COMPILED[model][1]


class OneRow(torch.nn.Linear):
    """A linear layer for a single row of input, as an elementwise product and a sum: compiled on a
    CPU, this reads bf16 weights at full memory bandwidth.
    """

    def forward(self, x):
        out = (x.float().unsqueeze(-2) * self.weight.float()).sum(dim=-1)
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)
