"""Packed rows on a GPU: attention at the cost of the documents, not of the row squared.

FlexAttention (arXiv:2412.05496) splits the T x T scores into blocks and computes only those in
which some query may see some key. Small rows on a CPU take a plain mask instead (`causal_lm.py`).
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def available(device, head_dim):
    """Whether torch can compile the kernel: it takes CUDA, Triton and a power of two."""
    return device.type == "cuda" and head_dim in (16, 32, 64, 128, 256) and find_spec("triton")


def document_blocks(document_ids):
    """document_ids (B, T) -> the BlockMask with which a token sees its document up to itself."""
    B, T = document_ids.shape

    def visible(row, head, query, key):
        same = document_ids[row, query] == document_ids[row, key]
        return same & (query >= key)

    return compiled(create_block_mask)(visible, B, None, T, T, device=document_ids.device)


def attend(q, k, v, blocks):
    """q, k, v (B, H, T, d) -> (B, H, T, d)."""
    return compiled(flex_attention)(q, k, v, block_mask=blocks)


def compiled(function):
    """The function as one fused kernel; inside a compiled model that happens anyway."""
    return function if torch.compiler.is_compiling() else compile_once(function)


@cache
def compile_once(function):
    return torch.compile(function)
