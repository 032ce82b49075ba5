"""Text generation: the prompts are computed once (prefill); then each decoding step samples one
token per row and computes only that token, using the cached keys and values of earlier ones.

Shapes: B batch, T time (tokens of the longest prompt, padded), V vocabulary.
"""

from contextlib import contextmanager

import torch

from common import PAD, STOP
from model.fast_decode import compiled_step, prepacked_weights
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
    """Continue each prompt. Yields a list of B new tokens per step.

    prompts             B lists of token ids, not empty
    temperature         divides the logits; below 1e-6, where they could overflow, it's greedy
    top_k               sample only from the k most probable tokens; 0: from all
    top_p               sample from the smallest set of tokens whose probabilities sum to top_p
                        (nucleus sampling, arXiv:1904.09751)
    repetition_penalty  above 1: tokens of the prompt and answer become less likely
                        (arXiv:1909.05858)
    stop_ids            a row ends with one of these, which is yielded; None follows
    seed                None: nondeterministic
    use_compile         use torch.compile for decoding steps; the first answer waits for it
    allowed             for constrained decoding: a function from a row's new ids, a list, to the
                        ids that may follow

    Stops when all rows are finished, or after max_new_tokens steps. A row that fills the model's
    context is finished too. Raises ValueError if a prompt is empty or longer than the context.
    """
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    lengths, context = [len(prompt) for prompt in prompts], model.config.max_position_embeddings
    B, T = len(prompts), max(lengths)
    if min(lengths) == 0 or max(lengths) > context:
        raise ValueError(f"a prompt needs from 1 to {context} tokens")
    steps = min(max_new_tokens, context - min(lengths))

    # Shorter prompts are padded on the left, so that all rows continue at the same column. Padding
    # is document -1, to which no real token attends.
    pads = torch.tensor([[T - length] for length in lengths], device=device)  # (B, 1)
    padded = [[PAD] * (T - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=device)  # (B, T); new tokens are appended
    column = torch.arange(T, device=device)
    positions = (column - pads).clamp(min=0)  # (T,) - (B, 1) -> (B, T)
    documents = torch.where(column < pads, -1, 0) if pads.any() else None  # (B, T)

    if device.type == "cpu":
        dtype = torch.float32  # fastest for attention on a CPU
    cache = KVCache(model.config, B, T + steps, device, dtype)
    generator = make_generator(seed, device)
    finished = [length == context for length in lengths]
    decode = compiled_step(model, B) if use_compile else model
    new = ids
    with eval_mode(model), prepacked_weights(model, B):
        for step in range(steps):
            if step == 0:  # prefill; only the logits at each prompt's last token are needed
                last = torch.arange(1, B + 1, device=device) * T - 1  # (B,), indices into B * T
                logits = model(new, positions, documents, cache, logit_positions=last)  # (B, V)
            else:  # decode one token per row
                logits = decode(new, positions, documents, cache)[:, -1]  # (B, V)
            logits = logits.float()
            if repetition_penalty != 1.0:
                logits = apply_repetition_penalty(logits, ids, pads, repetition_penalty)
            if allowed:
                logits = constrain(logits, ids[:, T:].tolist(), allowed)
            new = sample(logits, temperature, top_k, top_p, generator)  # (B, V) -> (B, 1)
            tokens = new[:, 0].tolist()  # the only GPU sync in the loop, unless allowed is given
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
    """Return the new ids for each prompt, without the stop token. Options as in `generate`."""
    answers = [[] for _ in prompts]
    stop_ids = options.get("stop_ids", STOP)
    for step in generate(model, prompts, **options):
        for answer, token in zip(answers, step, strict=True):
            if token is not None and token not in stop_ids:
                answer.append(token)
    return answers


@contextmanager
def eval_mode(model):
    """Context manager: put the model into eval mode, without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def apply_repetition_penalty(logits, ids, pads, penalty):
    """Apply the repetition penalty to logits (B, V): make each token in ids (B, T), after the row's
    left padding, less likely. Positive logits are divided; negative ones are multiplied, since
    dividing would raise them.
    """
    real = (torch.arange(ids.shape[1], device=ids.device) >= pads).to(logits)  # (B, T)
    used = torch.zeros_like(logits).scatter_add(1, ids, real) > 0  # (B, T) -> (B, V)
    return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def constrain(logits, answers, allowed):
    """Mask logits (B, V) so that only the tokens allowed after each of the B answers remain."""
    mask = torch.full_like(logits, -torch.inf)
    for row, answer in enumerate(answers):
        mask[row, allowed(answer)] = 0.0
    return logits + mask


def make_generator(seed, device):
    """Return the generator that `sample` uses for logits on a device; with seed None, return None:
    nondeterministic. On an Apple GPU it is a CPU generator, because torch 2.13's multinomial can
    return a token of probability 0 there.
    """
    if seed is None:
        return None
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)


def sample(logits, temperature, top_k, top_p, generator):
    """Sample one token id per row of logits, (B, V) -> (B, 1)."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k > 0:
        weakest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if top_p < 1:
        probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = probability.cumsum(dim=-1) - probability  # sum over all likelier tokens
        unlikely = (before >= top_p) & (before > 0)
        dropped = torch.zeros_like(unlikely).scatter(1, order, unlikely)  # in the order of ids
        logits = logits.masked_fill(dropped, -torch.inf)
    probability = logits.softmax(dim=-1)
    probability = probability if logits.is_cuda else probability.cpu()
    # NaN: multinomial raises an error; searchsorted would return an id outside the vocabulary.
    if logits.is_cuda or probability[:, 0].isnan().any():
        return torch.multinomial(probability, 1, generator=generator)
    # On a CPU multinomial is slow: it draws a random number for each token of the vocabulary.
    cumulative = probability.cumsum(dim=-1)  # (B, V)
    point = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).to(logits.device)
