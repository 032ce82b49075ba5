"""The data of page.html: each function in VIEWS returns the data of one view, JSON-serializable.
Large arrays are base64-encoded.

Shapes: T tokens, n last tokens that are shown, L layers, H heads, V vocabulary.
"""

import base64
import json
import math
import threading
from collections import Counter
from contextlib import nullcontext, suppress
from functools import lru_cache

import numpy as np
import torch

from common import END_OF_TEXT, IM_END, IM_START
from dataset import formats
from model.chat_template import ROLES, parse_answer, parse_json, render, require_text
from serving.trace import trace

MOST_READ = 2048  # maximum input tokens of a view
LAST = 256  # tokens that are shown
MOST_WEIGHTS = 1 << 23  # maximum attention weights of a view: fewer tokens for large models
ALTERNATIVES = 10
EXACT = 256  # top logits that are sent exactly; others are grouped
POINTS = 500  # per curve
ONE_AT_A_TIME = threading.Lock()  # to limit memory; also see serving/batching.py


def to_base64(numbers, kind):
    """Encode an array or tensor as base64, converted to a little-endian numpy type."""
    array = np.ascontiguousarray(numbers, dtype=kind)
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def decode_each(served, ids):
    """Return the text of each token."""
    return [served.tokenizer.decode([token], skip_special_tokens=False) for token in ids]


def require_ids(served, ids):
    """Raise ValueError unless ids are valid and fit into the context."""
    vocabulary = range(served.model.config.vocab_size)
    most = min(MOST_READ, context_length(served))
    if not isinstance(ids, list) or not all(type(i) is int and i in vocabulary for i in ids):
        raise ValueError("ids is not a list of token ids")
    if not 0 < len(ids) <= most:
        raise ValueError(f"{len(ids)} tokens; a view can be of 1 to {most}")


def context_length(served):
    return served.model.config.max_position_embeddings


def append_turn(served, ids, text):
    """Append a user's text and the answer's header to a conversation, given as ids; pretrained
    weights get only the text.
    """
    require_text(text, "text is")
    before = [*ids] if isinstance(ids, list) else []
    encode = served.tokenizer.encode
    if served.chats:
        if before:
            before += [*([IM_END] if before[-1] != IM_END else []), *encode("\n").ids]
        message = [{"role": "user", "content": text.strip()}]
        new = render(message, add_generation_prompt=True, tokenizer=served.tokenizer)[0]
    else:
        new = encode(text).ids or [END_OF_TEXT]
    ids = before + new
    require_ids(served, ids)
    notice = ""
    if len(ids) > served.trained_length:
        notice = f"The conversation has {len(ids)} tokens, training had {served.trained_length} at "
        notice += "most: answers get worse. Begin a new one."
    return {"ids": ids, "texts": decode_each(served, ids), "notice": notice}


def tokens(served, ids):
    """Return the model's predictions for each of the last n tokens. Prediction k is made after
    token first + k; the last one is for the token after the text.
    """
    require_ids(served, ids)
    traced = trace(served.model, ids, LAST)
    logprobs = traced.logits.log_softmax(dim=-1)  # (n, V)
    first = len(ids) - len(logprobs)
    targets = torch.tensor(ids[first + 1 :])
    surprise = -logprobs[: len(targets)].gather(1, targets[:, None])[:, 0]  # (n - 1,)
    top = logprobs.topk(min(ALTERNATIVES, logprobs.shape[1])).indices  # (n, 10)
    values, sizes = in_groups(traced.logits)
    used = sorted(set(top.flatten().tolist()))
    return {
        "ids": ids,
        "texts": decode_each(served, ids),
        "first": first,
        "notice": hidden_notice(first, ids),
        "surprise": to_base64(surprise, "f4"),
        "top": top.tolist(),
        "names": dict(zip(used, decode_each(served, used), strict=True)),
        "logits": to_base64(values, "f4"),
        "sizes": sizes,
        "conversation": conversation(served, ids),
    }


def conversation(served, ids):
    """Return the messages of a chat as JSON, one per line; for other weights, the text."""
    starts = [place for place, token in enumerate(ids) if token == IM_START]
    if not starts:
        return served.tokenizer.decode(ids)
    messages = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        turn_ids = ids[start + 1 : end]
        turn_ids = turn_ids[: turn_ids.index(IM_END)] if IM_END in turn_ids else turn_ids
        for role in ROLES:
            header = served.tokenizer.encode(f"{role}\n").ids
            if turn_ids[: len(header)] == header and len(turn_ids) > len(header):
                answer = parse_answer(turn_ids[len(header) :], served.tokenizer)
                messages.append(json.dumps({"role": role} | answer, ensure_ascii=False))
    return "[" + ",\n ".join(messages) + "]"


def hidden_notice(first, ids):
    """Return a notice that the first tokens are hidden, or ""."""
    return f"The last {len(ids) - first} of {len(ids)} tokens are shown." if first else ""


def in_groups(logits):
    """Compress logits (n, V): return them in descending order in m groups, (n, m), and the group
    sizes. The first groups have one logit; later ones hold the log mean exp of neighbours, 3 % of
    the rank at a time. The sum of exponentials is exact, and approximate at other temperatures.
    """
    V = logits.shape[1]
    ordered = logits.sort(dim=-1, descending=True).values
    sizes = [1] * min(EXACT, V)
    while (rank := sum(sizes)) < V:
        sizes.append(min(V - rank, rank // 32))
    groups = ordered.split(sizes, dim=-1)[EXACT:]
    means = [group.logsumexp(dim=-1) - math.log(group.shape[1]) for group in groups]
    values = [ordered[:, :EXACT], *(mean[:, None] for mean in means)]
    return torch.cat(values, dim=-1), sizes


def attention(served, ids, second=None):
    """Return the attention weights of every head, (L, H, n, n), as 16-bit fractions. second: a
    user's text, packed after the ids as another sample in the same row.
    """
    require_ids(served, ids)
    documents = [0] * len(ids)
    if second is not None:
        second_ids = append_turn(served, [], second)["ids"]
        ids, documents = ids + second_ids, documents + [1] * len(second_ids)
        require_ids(served, ids)
    heads = served.model.config.num_hidden_layers * served.model.config.num_attention_heads
    last = max(2, min(LAST, math.isqrt(MOST_WEIGHTS // heads)))
    weights = trace(served.model, ids, last, documents).attention
    L, H, n, _ = weights.shape
    first = len(ids) - n
    notice = hidden_notice(first, ids)
    notice += " What they read from tokens before these is not shown." if first else ""
    return {
        "ids": ids[first:],
        "texts": decode_each(served, ids[first:]),
        "first": first,
        "notice": notice,
        "documents": documents[first:],
        "layers": L,
        "heads": H,
        "weights": to_base64((weights * 65535).round(), "u2"),
    }


def layers(served, ids):
    """Return the tokens the model would predict after the embedding and after each layer."""
    require_ids(served, ids)
    traced = trace(served.model, ids, LAST)
    guesses = traced.guesses
    first = len(ids) - guesses.shape[1]
    used = sorted({*guesses.flatten().tolist()})
    return {
        "ids": ids[first:],
        "texts": decode_each(served, ids[first:]),
        "first": first,
        "notice": hidden_notice(first, ids),
        "guesses": guesses.tolist(),
        "names": dict(zip(used, decode_each(served, used), strict=True)),
        "probabilities": to_base64(traced.probabilities, "f4"),
    }


@torch.inference_mode()
def compare(models, text):
    """Return the loss of each token of a conversation or text, for each model."""
    served = next(iter(models.values()))
    ids, mask = parse_sample(served, text)
    limit = min(LAST, context_length(served))
    notice = f"The first {limit} of {len(ids)} tokens are shown." if len(ids) > limit else ""
    ids, mask = ids[:limit], mask[:limit]
    if len(ids) < 2:
        raise ValueError("the text has fewer than two tokens: there is nothing to predict")
    losses = {}
    for name, other in models.items():
        device = other.model.lm_head.weight.device
        logits = other.model(torch.tensor([ids], device=device))[0, :-1].float().cpu()  # (T - 1, V)
        targets = torch.tensor(ids[1:])
        logprobs = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]  # (T - 1,)
        losses[name] = to_base64(-logprobs, "f4")
    result = {"ids": ids, "texts": decode_each(served, ids), "mask": mask, "notice": notice}
    return result | {"losses": losses}


def parse_sample(served, text):
    """Return (ids, loss mask) of a conversation as JSON in any known format, or of plain text."""
    require_text(text, "text is")
    record = {"text": text}
    if text.lstrip()[:1] in ("{", "["):
        record = parse_json(text, "what begins with a bracket")
        record = {"messages": record} if isinstance(record, list) else record
    if "text" in record:
        ids = served.tokenizer.encode(formats.to_text(record)).ids + [END_OF_TEXT]
        return ids, [1] * len(ids)
    messages, tools = formats.to_conversation(record, formats.detect_format(record), Counter())
    return render(messages, tools, tokenizer=served.tokenizer)


def tokenizer(served, text):
    """Return a text as tokens."""
    ids = served.tokenizer.encode(require_text(text, "text is")).ids
    notice = f"The first {LAST} of {len(ids)} tokens are shown." if len(ids) > LAST else ""
    return {"ids": ids[:LAST], "texts": decode_each(served, ids[:LAST]), "notice": notice}


def token(served, token_id):
    """Return the BPE merges of a token (none for a control token), and its nearest neighbours by
    cosine similarity of the embeddings.
    """
    require_ids(served, [token_id])
    steps = merges(served.tokenizer, served.tokenizer.id_to_token(token_id) or "")
    if len(steps[-1]) != 1:  # not made by merges
        steps = []
    decode = served.tokenizer.decoder.decode
    step_texts = [[decode([piece]) for piece in step] for step in steps]
    vectors = served.model.model.embed_tokens.weight.detach().float()  # (V, D)
    similar = torch.cosine_similarity(vectors, vectors[token_id][None], dim=-1)  # (V,)
    similar[token_id] = -2
    values, ids = similar.topk(min(ALTERNATIVES, len(similar) - 1))
    neighbours = list(zip(decode_each(served, ids.tolist()), values.tolist(), strict=True))
    (text,) = decode_each(served, [token_id])
    return {"id": token_id, "text": text, "steps": step_texts, "neighbours": neighbours}


def merges(tokenizer, token):
    """Return the pieces of a token after each BPE merge, starting with its bytes."""
    ranks, pieces = merge_ranks(tokenizer), list(token)
    steps = [pieces]
    while len(pieces) > 1:
        pairs = list(zip(pieces, pieces[1:], strict=False))
        best = min(pairs, key=lambda pair: ranks.get(pair, math.inf))
        if best not in ranks:
            break
        index = pairs.index(best)
        pieces = [*pieces[:index], "".join(best), *pieces[index + 2 :]]
        steps.append(pieces)
    return steps


@lru_cache(maxsize=4)
def merge_ranks(tokenizer):
    """Return {pair of pieces: merge rank}, 0 for the first merge."""
    ranks = {}
    for rank, pair in enumerate(json.loads(tokenizer.to_str())["model"]["merges"]):
        pieces = pair.split(" ") if isinstance(pair, str) else pair
        ranks[tuple(pieces)] = rank
    return ranks


def runs(logs):
    """Return the curves of all runs with a log in a folder, the newest run first."""
    stats = [(path.stat(), path) for path in logs.glob("*.jsonl")]
    stats.sort(key=lambda pair: -pair[0].st_mtime)
    curves = [(path.stem, curve(path, stat.st_mtime_ns, stat.st_size)) for stat, path in stats]
    return {"runs": [{"name": name, "points": points} for name, points in curves]}


@lru_cache(maxsize=64)
def curve(path, changed, size):
    """Return [step, loss, validation loss, learning rate] of a log's lines, subsampled if it is
    long. changed and size are part of the cache key: the file is read again when it has grown.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # an incomplete last line
            lines.append(json.loads(line))
    lines = [line for line in lines if isinstance(line, dict) and line.get("step")]
    every = len(lines) // POINTS + 1
    indices = {number for number, line in enumerate(lines) if line.get("val_loss")}
    indices |= {*range(0, len(lines), every), *range(len(lines))[-1:]}
    keys = ("step", "loss", "val_loss", "lr")
    return [[lines[number].get(key) for key in keys] for number in sorted(indices)]


VIEWS = {  # view: (its function, the fields of its request)
    "turn": (append_turn, ("ids", "text")),
    "tokens": (tokens, ("ids",)),
    "attention": (attention, ("ids", "second")),
    "layers": (layers, ("ids",)),
    "tokenizer": (tokenizer, ("text",)),
    "token": (token, ("id",)),
    "compare": (compare, ("text",)),
    "runs": (runs, ()),
}


def answer(models, logs, view, body):
    """Return the data of a view. models {name: OpenModel}; logs: folder of the logs; body: the
    request. Raises ValueError for an invalid request.
    """
    function, fields = VIEWS[view]
    argument = {"compare": models, "runs": logs}.get(view)
    if argument is None:
        name = body.get("model")
        if not isinstance(name, str) or name not in models:
            raise ValueError(f"there is no model {name!r:.100}")
        argument = models[name]
    with ONE_AT_A_TIME if view != "runs" else nullcontext():
        return function(argument, *(body.get(field) for field in fields))
