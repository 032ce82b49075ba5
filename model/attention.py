"""Attention: a readable reference implementation, optimized versions per device, and the masks.
Tests compare each optimized version with `plain_attention`.

Shapes: B batch, H heads, K key/value heads, G = H / K heads that share a key, T queries (the tokens
of this call), S keys (cached + T), d head size.
"""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 128  # queries per block, tuned on a CPU: larger ones waste more work on masked scores
KEY_MULTIPLE = 64  # blocks begin at such a key: oneDNN compiles code for each matmul size


def plain_attention(q, k, v, mask):
    """softmax(Q K^T / sqrt(d)) V, equation 1 of arXiv:1706.03762.

    q (B, H, T, d), k and v (B, K, S, d), mask (1 or B, 1, T, S) with True where a query sees a key.
    Returns (B, H, T, d).
    """
    G = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(G, dim=1)  # (B, K, S, d) -> (B, H, S, d)
    v = v.repeat_interleave(G, dim=1)
    scores = q @ k.transpose(-2, -1)  # (B, H, T, d) @ (B, H, d, S) -> (B, H, T, S)
    scores = scores / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ v  # (B, H, T, S) @ (B, H, S, d) -> (B, H, T, d)


def causal_mask(past, T, document_ids, device):
    """Return the mask of the last T of S = past + T tokens, bool (1 or B, 1, T, S): a token attends
    to itself and to earlier tokens; with document_ids (B, S), only within its own document.
    """
    key = torch.arange(past + T, device=device)
    mask = (key[past:, None] >= key[None, :])[None, None]  # (T, 1) >= (1, S) -> (1, 1, T, S)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, past:, None] == document_ids[:, None, None, :])
    return mask


def document_mask(document_ids, head_dim):
    """Return the mask of rows without a cache, document_ids (B, T): a BlockMask where FlexAttention
    is available, else that of `causal_mask`. None, causal, without document_ids.
    """
    if document_ids is None:
        return None
    T, device = document_ids.shape[1], document_ids.device
    if T > 1 and flex_available(device, head_dim):  # FlexAttention needs more than one token
        return document_block_mask(document_ids)
    return causal_mask(0, T, document_ids, device)


def cached_mask(past, T, document_ids, device):
    """Return `causal_mask`, or None where each of the T queries sees all keys up to its own."""
    if document_ids is None and (past == 0 or T == 1):
        return None
    return causal_mask(past, T, document_ids, device)


def attend(q, k, v, mask):
    """Compute `plain_attention` with the fastest implementation for the device of q.

    mask comes from `document_mask` or `cached_mask`. None means causal attention; the T
    queries are then the last of the S tokens.
    """
    G, dtype = q.shape[1] // k.shape[1], q.dtype
    if isinstance(mask, BlockMask):
        k, v = (t.repeat_interleave(G, dim=1) for t in (k, v))  # (B, K, S, d) -> (B, H, S, d)
        return compiled(flex_attention)(q, k, v, block_mask=mask)
    # Up to torch 2.12, SDPA on MPS attends to future keys in half precision, and errs on masks
    # broadcast over heads.
    if q.device.type == "mps" or (q.device.type == "cpu" and q.shape[2] > 1):
        return attend_in_blocks(q, k, v, mask)
    if q.shape[2] == 1:
        return attend_one_query(q, k, v, mask)
    q = q.to(k.dtype)  # the KV cache may use a different dtype
    k, v = (t.repeat_interleave(G, dim=1) for t in (k, v))  # (B, K, S, d) -> (B, H, S, d)
    # There is no mask only when nothing is cached: T = S. See `cached_mask`.
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).to(dtype)


def attend_one_query(q, k, v, mask):
    """Attention for T = 1. The mask is the same in all heads, so the G heads that share a key are
    passed to torch's kernel as G queries of one head, and each key is read once.
    """
    B, H, _, d = q.shape
    grouped = q.reshape(B, k.shape[1], -1, d).to(k.dtype)  # (B, H, 1, d) -> (B, K, G, d)
    x = F.scaled_dot_product_attention(grouped, k, v, mask)
    return x.reshape(B, H, 1, d).to(q.dtype)  # (B, K, G, d) -> (B, H, 1, d)


def attend_in_blocks(q, k, v, mask):
    """Attention for one block of queries at a time, without the keys after the block, nor those
    before the documents of its queries. On a CPU this is faster than torch's fused kernel,
    especially in bf16: it skips scores that the mask hides, and the G heads that share a key are
    computed in one larger matmul.
    """
    B, H, T, d = q.shape
    _, K, S, _ = k.shape
    dtype = q.dtype
    q = q.to(k.dtype).reshape(B, K, H // K, T, d) * d**-0.5  # (B, H, T, d) -> (B, K, G, T, d)
    results = []
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            t = end - start  # queries of the block
            first, last = 0, S - T + end  # the block sees the keys first:last
            if mask is None:
                future = torch.ones(t, last, dtype=torch.bool, device=q.device)
                hidden = future.triu(1 + last - t)  # (t, seen)
            else:
                first = first_visible_key(mask[:, :, start:end, :last])
                hidden = ~mask[:, :, None, start:end, first:last]  # (1 or B, 1, 1, t, seen)
            seen = last - first
            weights = AttentionWeights.apply(q[:, :, :, start:end], k[:, :, first:last], hidden)
            weights = weights.view(B, K, -1, seen)  # (B, K, G, t, seen) -> (B, K, G * t, seen)
            results.append((weights @ v[:, :, first:last]).view(B, K, -1, t, d))
    return torch.cat(results, dim=3).reshape(B, H, T, d).to(dtype)  # from (B, K, G, T, d)


def first_visible_key(mask):
    """Return the index of the first key that a query of the mask sees, rounded down to a multiple
    of KEY_MULTIPLE; mask (B, 1, t, S). Returns 0 in compiled code and on GPUs, where reading the
    index would wait for the device.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    return int(mask.any(dim=(0, 1, 2)).int().argmax()) // KEY_MULTIPLE * KEY_MULTIPLE


class AttentionWeights(torch.autograd.Function):
    """softmax(Q K^T) for scaled queries. Scores are fp32, so half-precision results are rounded
    only once, as in torch's kernels. Only the weights are saved for the backward pass.
    """

    @staticmethod
    def forward(ctx, q, k, hidden):
        """q (B, K, G, t, d), k (B, K, seen, d), hidden True where a query doesn't attend to a key.
        Returns (B, K, G, t, seen).
        """
        B, K, G, t, d = q.shape
        scores = q.reshape(B, K, G * t, d).float() @ k.float().transpose(-1, -2)
        scores = scores.view(B, K, G, t, -1).masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(dim=-1).to(q.dtype)
        ctx.save_for_backward(q, k, weights)
        return weights

    @staticmethod
    def backward(ctx, grad):
        q, k, weights = ctx.saved_tensors
        B, K, G, t, d = q.shape
        # weights * (grad - sum(grad * weights)), the gradient of the scores
        grad = torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
        grad = grad.view(B, K, G * t, -1)
        q_grad = (grad @ k).view(B, K, G, t, d)  # (B, K, G * t, seen) @ (B, K, seen, d)
        return q_grad, grad.transpose(-1, -2) @ q.reshape(B, K, G * t, d), None


def flex_available(device, head_dim):
    """Return whether FlexAttention can be used: on NVIDIA GPUs since Ampere, with Triton and a
    compiler, for head sizes that are a power of two.
    """
    if device.type != "cuda" or head_dim not in (16, 32, 64, 128, 256):
        return False
    return flex_works(device, head_dim)


@cache
def flex_works(device, head_dim):
    """Return whether the output and gradients of FlexAttention match `plain_attention` on a small
    batch; otherwise warn with the reason. Checked once per device, because support depends on GPU,
    driver and compiler.
    """
    if not find_spec("triton") or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 100 + [1] * 130 + [-1] * 26] * 2, device=device)  # (B, T)
    # q, k, v, and the gradient of the output
    tensors = torch.randn(4, 2, 4, 256, head_dim, generator=generator).to(device)
    results = []
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda", enabled=False),
        ):
            for mask in (document_block_mask(documents), causal_mask(0, 256, documents, device)):
                q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
                implementation = attend if isinstance(mask, BlockMask) else plain_attention
                out = implementation(q, k, v, mask)
                results.append([out, *torch.autograd.grad((out * tensors[3]).sum(), (q, k, v))])
        for actual, expected in zip(*results, strict=True):
            # The tolerance allows for matmuls in TF32.
            torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
    except Exception as error:  # any compile failure falls back to SDPA
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"FlexAttention is not used, packed rows are slower: {reason}", stacklevel=2)
        return False
    return True


def document_block_mask(document_ids):
    """Return `causal_mask` without a cache as a BlockMask; document_ids (B, T).

    FlexAttention (arXiv:2412.05496) skips blocks of the T x T scores that are fully masked, so the
    cost of a packed row is the cost of its documents.
    """
    B, T = document_ids.shape

    def same_document(row, head, query, key):
        same = document_ids[row, query] == document_ids[row, key]
        return same & (query >= key)

    device = document_ids.device
    return compiled(create_block_mask)(same_document, B, None, T, T, device=device)


def compiled(function):
    """Return the function compiled to a fused kernel, unless the whole model is being compiled."""
    return function if torch.compiler.is_compiling() else compile_once(function)


@cache
def compile_once(function):
    # All batches have one shape: see `dataset.step_plan`.
    return torch.compile(function, dynamic=False)
