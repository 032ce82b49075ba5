"""Writing text: one token after the other, each drawn from what the model thinks may come next."""

import copy
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch

from common import STOP
from model.causal_lm import KVCache


@torch.inference_mode()
def generate(
    model,
    prompts,
    max_new_tokens=256,
    temperature=0.7,
    top_k=0,
    top_p=1.0,
    repetition_penalty=1.0,
    stop_ids=STOP,
    seed=None,
    use_compile=False,
    allowed=None,
):
    """Continues each prompt; yields the new tokens step by step, one list of B entries a step.

    prompts             B lists of token ids, of any lengths above 0
    temperature         0 takes the likeliest token always, and so does what is below 1e-6, where
                        logits would overflow; higher flattens the distribution
    top_k               draws from the k likeliest only; 0: from all
    top_p               draws from the fewest tokens whose probability adds up to top_p, one at
                        least (arXiv:1904.09751)
    repetition_penalty  above 1 makes tokens of prompt and answer less likely (arXiv:1909.05858)
    stop_ids            a row that draws one of these is finished; it is yielded, then None
    seed                of the draws; None: another each time
    use_compile         torch fuses the step from one token to the next; the first answer of a
                        model waits for that
    allowed             a function from the new ids of a row, a list, to those that may follow

    Ends when all rows are finished, or after max_new_tokens steps. A row that fills the model's
    context is finished, too. Raises ValueError for an empty prompt or one longer than the context.
    """
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    lengths, room = [len(prompt) for prompt in prompts], model.config.max_position_embeddings
    longest, shortest = max(lengths), min(lengths)
    if shortest == 0 or longest > room:
        raise ValueError(f"a prompt needs from 1 to {room} tokens")
    steps = min(max_new_tokens, room - shortest)
    # Shorter prompts are padded on the left, so that all rows go on at the same column. Padding is
    # a document of its own, -1, which no real token sees.
    pads = [longest - length for length in lengths]
    ids = torch.tensor([[0] * n + list(p) for n, p in zip(pads, prompts, strict=True)])
    ids, pads = ids.to(device), torch.tensor(pads, device=device)[:, None]
    column = torch.arange(longest, device=device)
    documents = torch.where(column < pads, -1, 0) if pads.any() else None  # (B, T)
    if device.type == "cpu":
        dtype = torch.float32  # in which attention is quickest there
    cache = KVCache(model.config, len(prompts), longest + steps, device, dtype)
    generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
    finished = torch.tensor([length == room for length in lengths], device=device)
    stops = torch.tensor(stop_ids, device=device)
    seen, new, positions = ids, ids, (column - pads).clamp(min=0)
    forward, forward_one = model, fused(model, len(prompts)) if use_compile else model
    with matrices_laid_out(model, len(prompts)):
        for _ in range(steps):
            logits = forward(new, positions, documents, cache)[:, -1].float()  # (B, V)
            if repetition_penalty != 1.0:
                logits = penalise(logits, seen, pads, repetition_penalty)
            if allowed:
                may = torch.full_like(logits, -torch.inf)
                for row, ids in enumerate(seen[:, longest:].tolist()):
                    may[row, allowed(ids)] = 0.0
                logits = logits + may
            new = choose(logits, temperature, top_k, top_p, generator)  # (B, 1)
            row_done, row_new = finished.tolist(), new[:, 0].tolist()
            yield [None if d else i for d, i in zip(row_done, row_new, strict=True)]
            finished |= torch.isin(new[:, 0], stops) | (positions[:, -1] >= room - 2)
            if finished.all():
                return
            positions = (positions[:, -1:] + 1).clamp(max=room - 1)
            documents = torch.zeros_like(new) if documents is not None else None
            seen, forward = torch.cat([seen, new], dim=1), forward_one


@contextmanager
def matrices_laid_out(model, batch_size):
    """Inside, the model is in eval mode and, on a CPU with oneDNN, reads copies of its matrices in
    the order in which the processor takes them. A new token needs every weight once, so the time
    that it takes is the time to read them.
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


def fused(model, batch_size):
    """The model, compiled for the step to the next token and kept for the next answer.

    On a CPU, a matrix times a single row is written as products and a sum: compiled, that reads
    bf16 weights as fast as the memory gives them. For several rows, the compiler lays the matrices
    out (it calls that freezing) and takes them for constants, so new ones are compiled again.
    """
    from torch._inductor import config as compiler

    weights = list(model.parameters())
    key = batch_size > 1, weights[0].dtype, sum(weight._version for weight in weights)
    if FUSED.get(model, (None,))[0] != key:
        if model in FUSED:
            torch.compiler.reset()  # the code for the old weights would be taken for the new ones
        twin = copy.deepcopy(model, {id(weight): weight for weight in weights}).eval()
        on_cpu = weights[0].device.type == "cpu"
        for module in twin.modules():
            if type(module) is torch.nn.Linear and on_cpu and batch_size == 1:
                module.__class__ = OneRow
        laid_out = compiler.patch(freezing=on_cpu and batch_size > 1)
        FUSED[model] = key, laid_out(torch.compile(twin, dynamic=True))
    return FUSED[model][1]


FUSED = WeakKeyDictionary()


class OneRow(torch.nn.Linear):
    def forward(self, x):
        return (x.float().unsqueeze(-2) * self.weight.float()).sum(dim=-1).to(x.dtype)


def complete(model, prompts, **options):
    """The new ids of each prompt, without the stop token; options are those of generate."""
    answers = [[] for _ in prompts]
    stop_ids = options.get("stop_ids", STOP)
    for step in generate(model, prompts, **options):
        for answer, token in zip(answers, step, strict=True):
            if token is not None and token not in stop_ids:
                answer.append(token)
    return answers


def penalise(logits, seen, pads, penalty):
    """Makes each token in seen (B, T), after its row's pads, less likely in logits (B, V).

    A positive logit is divided, a negative one multiplied: dividing a negative one would favour it.
    """
    real = (torch.arange(seen.shape[1], device=seen.device) >= pads).to(logits)
    used = torch.zeros_like(logits).scatter_add(1, seen, real) > 0
    return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits, temperature, top_k, top_p, generator):
    """One token id for each row of logits (B, V) -> (B, 1)."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k > 0:
        weakest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if top_p < 1:
        probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = probability.cumsum(dim=-1) - probability  # of all likelier tokens together
        unlikely = (before >= top_p) & (before > 0)
        dropped = torch.zeros_like(unlikely).scatter(1, order, unlikely)
        logits = logits.masked_fill(dropped, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
