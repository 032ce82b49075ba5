"""Two ways to make the step to the next token faster; `generate` works without either. That step
reads every weight once for a few rows of input, so its time is the time to read the weights.
"""

import copy
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

COMPILED = WeakKeyDictionary()  # model: (key, its compiled copy)


@contextmanager
def weights_laid_out(model, batch_size):
    """Context manager: the linear layers of a model on a CPU with oneDNN compute with copies of
    their weights in oneDNN's own order, which is faster to read. In half precision the output layer
    computes in fp32, with a copy of its weights: rounded to bf16, the logits of the two likeliest
    tokens are the same in one position of 40.
    """
    lay_out = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    head, linears = model.lm_head, []
    whole = not hasattr(model, "reshard")  # fsdp shards the weights
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(head.weight.dtype)
    able = half is None or getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported", bool)()
    on_cpu = head.weight.device.type == "cpu"
    if lay_out and whole and on_cpu and able and not model.config.use_moe:
        linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    try:
        for linear in linears:
            if linear is not head or half is None:
                laid_out = lay_out(linear.weight.detach(), batch_size)
                linear.forward = partial(multiply, laid_out, linear.bias)
        if half and whole:
            weight = head.weight.detach().float()
            product = partial(F.linear, weight=weight)
            if head in linears:
                product = partial(multiply, lay_out(weight, batch_size), None)
            head.forward = lambda x: product(x.float())
        yield
    finally:
        for linear in [*linears, head]:
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
        if weights[0].dtype != torch.float32:  # logits in fp32: see `weights_laid_out`
            twin.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            if type(twin.lm_head) is not OneRow:  # which computes in fp32
                twin.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().float())
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
