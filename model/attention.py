"""Attention (arXiv:1706.03762): the formula, and the same faster on each device; and which tokens a
token may see.

Shapes: B rows, H heads, K key and value heads, G = H / K, T queries, S keys, d head size.
"""

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 128  # queries at once on a CPU; a larger block computes more scores that are masked


def plain_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v over the keys that mask allows: `attend`, as the formula says.

    q (B, H, T, d), k and v (B, K, S, d), mask (1 or B, 1, T, S) bool -> (B, H, T, d)
    """
    G = q.shape[1] // k.shape[1]  # query heads that share a key and value head
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)  # -> (B, H, S, d)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, T, d) @ (B, H, d, S)
    scores = scores.masked_fill(~mask, -torch.inf)  # (B, H, T, S)
    return scores.softmax(dim=-1) @ v


def visible(past, T, document_ids, device):
    """The mask of the T last of S = past + T tokens: bool (1 or B, 1, T, S), True where seen."""
    key = torch.arange(past + T, device=device)
    mask = (key[past:, None] >= key[None, :])[None, None]
    if document_ids is not None:  # (B, S)
        mask = mask & (document_ids[:, None, past:, None] == document_ids[:, None, None, :])
    return mask


def attend(q, k, v, mask):
    """`plain_attention` in the fastest way for the device: (B, H, T, d).

    mask is the result of `visible` or `document_blocks`. None: each token sees itself and those
    before it; the T queries are the last of the S tokens.
    """
    if q.shape[2] == 1:
        return attend_from_one(q, k, v, mask)
    if q.device.type == "cpu" and not isinstance(mask, BlockMask):
        return attend_in_blocks(q, k, v, mask)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if isinstance(mask, BlockMask):
        return compiled(flex_attention)(q, k, v, block_mask=mask)
    # Without a mask, the queries are all there are.
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def attend_from_one(q, k, v, mask):
    """Attention of one query, which sees all keys. The G heads that share a key are passed to
    torch's kernel as G queries of one head, so each key is read once.
    """
    B, H, _, d = q.shape
    together = q.reshape(B, k.shape[1], -1, d).to(k.dtype)  # (B, H, 1, d) -> (B, K, G, d)
    x = F.scaled_dot_product_attention(together, k, v, mask)
    return x.reshape(B, H, 1, d).to(q.dtype)


def attend_in_blocks(q, k, v, mask):
    """The formula for one block of queries after the other; keys after a block are not computed. On
    a CPU this is faster than torch's fused kernel, most of all in bf16. The G heads that share a
    key become one larger product.
    """
    (B, H, T, d), K, S, dtype = q.shape, k.shape[1], k.shape[2], q.dtype
    q, results = q.to(k.dtype).reshape(B, K, H // K, T, d) * d**-0.5, []
    with torch.autocast("cpu", enabled=False):
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            t, seen = end - start, S - T + end
            block = q[:, :, :, start:end].reshape(B, K, -1, d)  # (B, K, G * t, d)
            scores = block @ k[:, :, :seen].transpose(-1, -2)  # (B, K, G * t, seen)
            scores = scores.view(B, K, -1, t, seen)
            if mask is not None:
                hidden = ~mask[:, :, None, start:end, :seen]
                scores = scores.masked_fill(hidden, -torch.inf)
            elif t > 1:
                future = torch.ones(t, t, dtype=torch.bool).triu(1)
                scores[..., seen - t :].masked_fill_(future, -torch.inf)
            weights = scores.softmax(dim=-1).view(B, K, -1, seen)
            results.append((weights @ v[:, :, :seen]).view(B, K, -1, t, d))
    return torch.cat(results, dim=3).reshape(B, H, T, d).to(dtype)


def blocks_available(device, head_dim):
    """Whether torch can compile FlexAttention: it needs CUDA, Triton and a power of two."""
    return device.type == "cuda" and head_dim in (16, 32, 64, 128, 256) and find_spec("triton")


def document_blocks(document_ids):
    """The BlockMask of document_ids (B, T): a token sees its own document up to itself.

    On a GPU, FlexAttention (arXiv:2412.05496) computes only those blocks of the T x T scores in
    which some query may see some key, so packed rows cost as much as their documents alone.
    """
    B, T = document_ids.shape

    def same_document(row, head, query, key):
        same = document_ids[row, query] == document_ids[row, key]
        return same & (query >= key)

    device = document_ids.device
    return compiled(create_block_mask)(same_document, B, None, T, T, device=device)


def compiled(function):
    """The function compiled to one kernel; inside a compiled model that happens anyway."""
    return function if torch.compiler.is_compiling() else compile_once(function)


@cache
def compile_once(function):
    return torch.compile(function)
