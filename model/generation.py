"""Generation: one token after the other, each sampled from the model's distribution of the next.

Shapes: B prompts, T tokens of a call, V vocabulary.
"""

import torch

from common import STOP
from model.causal_lm import KVCache
from model.fast_decode import compiled_step, laid_out_weights


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
    temperature         divides the logits; below 1e-6 the most probable token is always taken
    top_k               samples from the k most probable tokens; 0: from all
    top_p               samples from the fewest tokens whose probabilities add up to top_p, at
                        least one (arXiv:1904.09751)
    repetition_penalty  above 1 makes tokens of prompt and answer less likely (arXiv:1909.05858)
    stop_ids            a row that samples one of these is finished; it is yielded, then None
    seed                of the sampling; None: another one each time
    use_compile         compiles the step to the next token; the first answer of a model waits
    allowed             constrained decoding: a function from the new ids of a row, a list, to the
                        ids that may follow

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
        dtype = torch.float32  # attention is fastest in it there
    cache = KVCache(model.config, len(prompts), longest + steps, device, dtype)
    generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
    finished = torch.tensor([length == room for length in lengths], device=device)
    stops = torch.tensor(stop_ids, device=device)
    seen, new, positions = ids, ids, (column - pads).clamp(min=0)
    forward = model
    forward_one = compiled_step(model, len(prompts)) if use_compile else model
    with laid_out_weights(model, len(prompts)):
        for _ in range(steps):
            logits = forward(new, positions, documents, cache)[:, -1].float()  # (B, V)
            if repetition_penalty != 1.0:
                logits = penalise(logits, seen, pads, repetition_penalty)
            if allowed:
                may = torch.full_like(logits, -torch.inf)
                for row, ids in enumerate(seen[:, longest:].tolist()):
                    may[row, allowed(ids)] = 0.0
                logits = logits + may
            new = sample(logits, temperature, top_k, top_p, generator)  # (B, 1)
            row_done, row_new = finished.tolist(), new[:, 0].tolist()
            yield [None if d else i for d, i in zip(row_done, row_new, strict=True)]
            finished |= torch.isin(new[:, 0], stops) | (positions[:, -1] >= room - 2)
            if finished.all():
                return
            positions = (positions[:, -1:] + 1).clamp(max=room - 1)
            documents = torch.zeros_like(new) if documents is not None else None
            seen, forward = torch.cat([seen, new], dim=1), forward_one


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


def sample(logits, temperature, top_k, top_p, generator):
    """One token id for each row of logits: (B, V) -> (B, 1)."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k > 0:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p < 1:
        probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = probability.cumsum(dim=-1) - probability  # of all more probable tokens together
        rest = (before >= top_p) & (before > 0)
        dropped = torch.zeros_like(rest).scatter(1, order, rest)
        logits = logits.masked_fill(dropped, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
