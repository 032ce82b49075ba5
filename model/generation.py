"""Generating text: the model computes the prompts once (prefill), then a loop samples one token for
each row and computes that token alone, with the keys and values of all earlier ones in a cache.

Shapes: B batch, T time (tokens of the longest prompt, padded), V vocabulary.
"""

from contextlib import contextmanager

import torch

from common import PAD, STOP
from model.fast_decode import compiled_step, weights_laid_out
from model.kv_cache import KVCache


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
    temperature         divides the logits; below 1e-6, where they would overflow, the most probable
                        token is always taken
    top_k               samples from the k most probable tokens only; 0: from all
    top_p               samples from the fewest tokens whose probabilities add up to top_p, at least
                        one (arXiv:1904.09751)
    repetition_penalty  above 1: tokens of prompt and answer become less likely (arXiv:1909.05858)
    stop_ids            a row is finished after one of these, which is yielded; then comes None
    seed                of the sampling; None: a different one each time
    use_compile         torch compiles the step of one token; the first answer waits for that
    allowed             for constrained decoding: a function from the new ids of a row, a list, to
                        the ids of which the next one is sampled

    Ends when all rows are finished, or after max_new_tokens steps. A row that fills the context of
    the model is finished too. Raises ValueError for an empty prompt or one longer than the context.
    """
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    lengths, context = [len(prompt) for prompt in prompts], model.config.max_position_embeddings
    B, T = len(prompts), max(lengths)
    if min(lengths) == 0 or max(lengths) > context:
        raise ValueError(f"a prompt needs from 1 to {context} tokens")
    steps = min(max_new_tokens, context - min(lengths))

    # Shorter prompts are padded on the left, so that all rows continue at the same column. Padding
    # is a document of its own, -1, which no real token sees.
    pads = torch.tensor([[T - length] for length in lengths], device=device)  # (B, 1)
    padded = [[PAD] * (T - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=device)  # (B, T); new tokens are appended
    column = torch.arange(T, device=device)
    positions = (column - pads).clamp(min=0)  # (T,) - (B, 1) -> (B, T)
    documents = torch.where(column < pads, -1, 0) if pads.any() else None  # (B, T)

    if device.type == "cpu":
        dtype = torch.float32  # attention on a CPU is fastest in it
    cache = KVCache(model.config, B, T + steps, device, dtype)
    generator = seeded(seed, device)
    finished = [length == context for length in lengths]
    decode = compiled_step(model, B) if use_compile else model
    new = ids
    with eval_mode(model), weights_laid_out(model, B):
        for step in range(steps):
            if step == 0:  # the whole prompts: the logits after the last token of each
                last = torch.arange(1, B + 1, device=device) * T - 1  # (B,), places in B * T
                logits = model(new, positions, documents, cache, at=last).float()  # (B, V)
            else:  # then a token each
                logits = decode(new, positions, documents, cache)[:, -1].float()  # (B, V)
            if repetition_penalty != 1.0:
                logits = penalise(logits, ids, pads, repetition_penalty)
            if allowed:
                logits = constrain(logits, ids[:, T:].tolist(), allowed)
            new = sample(logits, temperature, top_k, top_p, generator)  # (B, V) -> (B, 1)
            tokens = new[:, 0].tolist()  # the one moment that waits for a GPU
            yield [None if f else token for f, token in zip(finished, tokens, strict=True)]
            for row, token in enumerate(tokens):
                full = lengths[row] + step + 1 >= context
                finished[row] = finished[row] or full or token in stop_ids
            if all(finished):
                return
            ids = torch.cat([ids, new], dim=1)
            positions = (positions[:, -1:] + 1).clamp(max=context - 1)  # (B, 1)
            documents = torch.zeros_like(new) if documents is not None else None


def complete(model, prompts, **options):
    """The new ids of each prompt, without the stop token; options are those of `generate`."""
    answers = [[] for _ in prompts]
    stop_ids = options.get("stop_ids", STOP)
    for step in generate(model, prompts, **options):
        for answer, token in zip(answers, step, strict=True):
            if token is not None and token not in stop_ids:
                answer.append(token)
    return answers


@contextmanager
def eval_mode(model):
    """Inside, the model is in eval mode: nothing is dropped out."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def penalise(logits, ids, pads, penalty):
    """Logits (B, V) in which every token in ids (B, T), after the pads of its row, is less likely.

    A positive logit is divided, a negative one multiplied: dividing a negative one would raise it.
    """
    real = (torch.arange(ids.shape[1], device=ids.device) >= pads).to(logits)  # (B, T)
    used = torch.zeros_like(logits).scatter_add(1, ids, real) > 0  # (B, T) -> (B, V)
    return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def constrain(logits, answers, allowed):
    """Logits (B, V) in which only the tokens allowed after each of the B answers are possible."""
    mask = torch.full_like(logits, -torch.inf)
    for row, answer in enumerate(answers):
        mask[row, allowed(answer)] = 0.0
    return logits + mask


def seeded(seed, device):
    """The random numbers that `sample` draws for logits on a device; None for other ones each time.
    On an Apple GPU, torch 2.13's multinomial can return a token of probability 0; so it is the CPU
    that draws there.
    """
    if seed is None:
        return None
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)


def sample(logits, temperature, top_k, top_p, generator):
    """One token id for each row of logits, (B, V) -> (B, 1)."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k > 0:
        weakest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if top_p < 1:
        probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = probability.cumsum(dim=-1) - probability  # sum of all likelier tokens
        unlikely = (before >= top_p) & (before > 0)
        dropped = torch.zeros_like(unlikely).scatter(1, order, unlikely)  # in the order of ids
        logits = logits.masked_fill(dropped, -torch.inf)
    probability = logits.softmax(dim=-1)
    probability = probability if logits.is_cuda else probability.cpu()
    if logits.is_cuda or probability[:, 0].isnan().any():  # which multinomial refuses
        return torch.multinomial(probability, 1, generator=generator)
    # On a CPU that takes long: it draws a random number for each token of the vocabulary.
    cumulative = probability.cumsum(dim=-1)  # (B, V)
    point = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).to(logits.device)
