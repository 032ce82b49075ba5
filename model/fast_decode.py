"""Faster steps to the next token: weights in the processor's layout, and a compiled model. Both
give the logits of the plain forward pass, but for rounding.
"""

import copy
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch


@contextmanager
def laid_out_weights(model, batch_size):
    """Inside, the model is in eval mode and, on a CPU with oneDNN, multiplies with copies of its
    matrices in the memory layout of the processor. A new token reads every weight once, so the time
    of a step is the time to read them.
    """
    was_training, linears = model.training, []
    model.eval()
    lay_out = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    weight = model.lm_head.weight
    whole = weight.device.type == "cpu" and not hasattr(weight, "full_tensor")  # fsdp shards it
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(weight.dtype)
    able = half is None or getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported", bool)()
    if lay_out and whole and able and not model.config.use_moe:
        linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    try:
        for linear in linears:
            linear.forward = partial(multiply, lay_out(linear.weight.detach(), batch_size))
        yield
    finally:
        for linear in linears:
            linear.__dict__.pop("forward", None)
        model.train(was_training)


def multiply(weight, x):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def compiled_step(model, batch_size):
    """The model compiled for the step to the next token; kept for the next answer.

    On a CPU, a matrix times a single row is written as products and a sum: compiled, that reads
    bf16 weights at the speed of the memory. For several rows the compiler changes the layout of the
    matrices (its option `freezing`) and treats them as constants, so new ones are compiled again.
    """
    from torch._inductor import config as compiler

    weights = list(model.parameters())
    key = batch_size > 1, weights[0].dtype, sum(weight._version for weight in weights)
    if COMPILED.get(model, (None,))[0] != key:
        if model in COMPILED:
            torch.compiler.reset()  # else the code for the old weights is used for the new ones
        twin = copy.deepcopy(model, {id(weight): weight for weight in weights}).eval()
        on_cpu = weights[0].device.type == "cpu"
        for module in twin.modules():
            if type(module) is torch.nn.Linear and on_cpu and batch_size == 1:
                module.__class__ = OneRow
        frozen = compiler.patch(freezing=on_cpu and batch_size > 1)
        COMPILED[model] = key, frozen(torch.compile(twin, dynamic=True))
    return COMPILED[model][1]


COMPILED = WeakKeyDictionary()


class OneRow(torch.nn.Linear):
    def forward(self, x):
        return (x.float().unsqueeze(-2) * self.weight.float()).sum(dim=-1).to(x.dtype)
