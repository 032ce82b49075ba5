"""Two ways to make the step to the next token faster; `generate` works without either. That step
reads every weight once for a few rows of input, so its time is the time to read the weights.
"""

import copy
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch

COMPILED = WeakKeyDictionary()  # model: (key, its compiled copy)


@contextmanager
def weights_laid_out(model, batch_size):
    """Inside, the linear layers of a model on a CPU with oneDNN compute with copies of their
    weights in oneDNN's own order, which is faster to read. Elsewhere it changes nothing.
    """
    lay_out = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    weight, linears = model.lm_head.weight, []
    whole = weight.device.type == "cpu" and not hasattr(model, "reshard")  # fsdp shards them
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(weight.dtype)
    able = half is None or getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported", bool)()
    if lay_out and whole and able and not model.config.use_moe:
        linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    try:
        for linear in linears:
            laid_out = lay_out(linear.weight.detach(), batch_size)
            linear.forward = partial(multiply, laid_out, linear.bias)
        yield
    finally:
        for linear in linears:
            linear.__dict__.pop("forward", None)


def multiply(weight, bias, x):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def compiled_step(model, batch_size):
    """A compiled copy of the model, which shares its weights, for calls with one new token per row.
    It is kept for later answers, and compiled again when the weights have changed.

    For several rows on a CPU, the compiler itself lays the weights out; it calls that freezing.
    """
    from torch._inductor import config as compiler

    weights = list(model.parameters())
    key = batch_size > 1, weights[0].dtype, sum(weight._version for weight in weights)
    if COMPILED.get(model, (None,))[0] != key:
        if model in COMPILED:
            torch.compiler.reset()  # else the code of the old weights would be used again
        twin = copy.deepcopy(model, {id(weight): weight for weight in weights}).eval()
        on_cpu = weights[0].device.type == "cpu"
        for module in twin.modules():
            if type(module) is torch.nn.Linear and on_cpu and batch_size == 1:
                module.__class__ = OneRow
        freeze = compiler.patch(freezing=on_cpu and batch_size > 1)
        COMPILED[model] = key, freeze(torch.compile(twin, dynamic=True))
    return COMPILED[model][1]


class OneRow(torch.nn.Linear):
    """A linear layer for a single row of input, as products and a sum: compiled on a CPU, this
    reads bf16 weights at the speed of the memory.
    """

    def forward(self, x):
        out = (x.float().unsqueeze(-2) * self.weight.float()).sum(dim=-1)
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)
