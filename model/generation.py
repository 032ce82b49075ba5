"""Text generation: the prompts are computed once (prefill); then each decoding step samples one
token per row and computes only that token, using the cached keys and values of earlier ones.

Shapes: B batch, T time (tokens of the longest prompt, padded), V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from common import PAD, STOP
from model.fast_decode import compiled_step, prepacked_weights
from model.kv_cache import KVCache


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are sampled.

    max_new_tokens      the maximum length of the answer
    temperature         divides the logits; below 1e-6, where they could overflow, it's greedy
    top_k               sample only from the k most probable tokens; 0: from all
    top_p               sample from the smallest set of tokens whose probabilities sum to top_p
                        (nucleus sampling, arXiv:1904.09751)
    repetition_penalty  above 1: tokens of the prompt and answer become less likely
                        (arXiv:1909.05858)
    seed                None: nondeterministic
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None


@torch.inference_mode()
def generate(model, prompts, params, stop_ids=STOP, allowed_ids=None, use_compile=False):
    """Continue each prompt. Yields a list of B new tokens per step.

    prompts      B lists of token ids, not empty
    params       SamplingParams
    stop_ids     a row ends with one of these, which is yielded; None follows
    allowed_ids  for constrained decoding: a function from a row's new ids, a list, to the ids that
                 may follow
    use_compile  use torch.compile for decoding steps; the first answer waits for it

    Stops when all rows are finished, or after max_new_tokens steps. A row that fills the model's
    context is finished too. Raises ValueError if a prompt is empty or longer than the context.
    """
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    context = model.config.max_position_embeddings
    lengths = [len(prompt) for prompt in prompts]
    B, T = len(prompts), max(lengths)
    if min(lengths) == 0 or max(lengths) > context:
        raise ValueError(f"a prompt needs from 1 to {context} tokens")
    steps = min(params.max_new_tokens, context - min(lengths))

    num_padding, position_ids, document_ids = left_padding(lengths, device)
    padded = [[PAD] * (T - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=device)  # (B, T); new tokens are appended
    if device.type == "cpu":
        dtype = torch.float32  # fastest for attention on a CPU
    cache = KVCache(model.config, B, T + steps, device, dtype)
    generator = make_generator(params.seed, device)
    is_finished = [length == context for length in lengths]
    decode = compiled_step(model, B) if use_compile else model
    next_ids = None  # (B, 1), the latest tokens
    with eval_mode(model), prepacked_weights(model, B):
        for step in range(steps):
            if step == 0:  # prefill; only the logits at each prompt's last token are needed
                last = torch.arange(1, B + 1, device=device) * T - 1  # (B,), indices into B * T
                logits = model(ids, position_ids, document_ids, cache, logit_positions=last)
            else:  # decode one token per row
                logits = decode(next_ids, position_ids, document_ids, cache)[:, -1]
            logits = logits.float()  # (B, V)
            if params.repetition_penalty != 1.0:
                penalty = params.repetition_penalty
                logits = apply_repetition_penalty(logits, ids, num_padding, penalty)
            if allowed_ids:
                logits = constrain(logits, ids[:, T:].tolist(), allowed_ids)
            next_ids = sample(logits, params, generator)  # (B, V) -> (B, 1)
            # The only GPU sync of the loop, unless allowed_ids is given.
            tokens = next_ids[:, 0].tolist()
            yield [None if done else t for done, t in zip(is_finished, tokens, strict=True)]
            for row, token in enumerate(tokens):
                is_full = lengths[row] + step + 1 >= context
                is_finished[row] = is_finished[row] or is_full or token in stop_ids
            if all(is_finished):
                return
            ids = torch.cat([ids, next_ids], dim=1)
            position_ids = (position_ids[:, -1:] + 1).clamp(max=context - 1)  # (B, 1)
            if document_ids is not None:
                document_ids = torch.zeros_like(next_ids)


def left_padding(lengths, device):
    """Return (num_padding (B, 1), position_ids (B, T), document_ids (B, T)) of B rows of these
    lengths, which are padded on the left so that all continue at the same column. Padding is
    document -1, to which no real token attends; without padding, document_ids is None.
    """
    T = max(lengths)
    num_padding = torch.tensor([[T - length] for length in lengths], device=device)
    column = torch.arange(T, device=device)
    position_ids = (column - num_padding).clamp(min=0)  # (T,) - (B, 1) -> (B, T)
    document_ids = None
    if min(lengths) < T:
        document_ids = torch.where(column < num_padding, -1, 0)
    return num_padding, position_ids, document_ids


def generate_batch(model, prompts, params, stop_ids=STOP, **options):
    """Generate an answer to each prompt. Returns (its ids without the stop token, whether it ended
    with one) for each; options as in `generate`.
    """
    answers = [[] for _ in prompts]
    has_stopped = [False] * len(prompts)
    for step in generate(model, prompts, params, stop_ids, **options):
        for row, token in enumerate(step):
            if token in stop_ids:
                has_stopped[row] = True
            elif token is not None:
                answers[row].append(token)
    return list(zip(answers, has_stopped, strict=True))


def complete(model, prompts, stop_ids=STOP, allowed_ids=None, use_compile=False, **params):
    """Return the new ids for each prompt, without the stop token; params are the fields of
    SamplingParams.
    """
    options = {"stop_ids": stop_ids, "allowed_ids": allowed_ids, "use_compile": use_compile}
    return [ids for ids, _ in generate_batch(model, prompts, SamplingParams(**params), **options)]


@contextmanager
def eval_mode(model):
    """Context manager: put the model into eval mode, without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def apply_repetition_penalty(logits, ids, num_padding, penalty):
    """Apply the repetition penalty to logits (B, V): make each token in ids (B, T), after the row's
    left padding, less likely. Positive logits are divided; negative ones are multiplied, since
    dividing would raise them.
    """
    real = (torch.arange(ids.shape[1], device=ids.device) >= num_padding).to(logits)  # (B, T)
    used = torch.zeros_like(logits).scatter_add(1, ids, real) > 0  # (B, T) -> (B, V)
    return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def constrain(logits, answers, allowed_ids):
    """Mask logits (B, V) so that only the tokens allowed after each of the B answers remain."""
    mask = torch.full_like(logits, -torch.inf)
    for row, answer in enumerate(answers):
        mask[row, allowed_ids(answer)] = 0.0
    return logits + mask


def make_generator(seed, device):
    """Return the generator that `sample` uses for logits on a device; with seed None, return None:
    nondeterministic. On an Apple GPU it is a CPU generator, because torch 2.13's multinomial can
    return a token of probability 0 there.
    """
    if seed is None:
        return None
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)


def sample(logits, params, generator):
    """Sample one token id per row of logits, (B, V) -> (B, 1). params: SamplingParams."""
    if params.temperature < 1e-6:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / params.temperature
    if params.top_k > 0:
        weakest = logits.topk(min(params.top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if params.top_p < 1:
        probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = probability.cumsum(dim=-1) - probability  # sum over all likelier tokens
        unlikely = (before >= params.top_p) & (before > 0)
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
