"""Exercise 4 of docs/3_model.md: attention that sees the last W tokens alone."""

import torch

from model.attention import causal_mask, plain_attention


def test_a_token_sees_the_last_tokens_alone():
    mask = causal_mask(0, 6, None, torch.device("cpu"), window=3)[0, 0]  # (T, T)
    assert mask.sum(dim=1).tolist() == [1, 2, 3, 3, 3, 3]
    assert mask[5].tolist() == [False, False, False, True, True, True]


def test_cached_tokens_and_documents_count_as_before():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    mask = causal_mask(4, 2, documents, torch.device("cpu"), window=2)[0, 0]  # (2, 6)
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


def test_without_a_window_nothing_changes():
    q = k = v = torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(1))
    device = torch.device("cpu")
    wide = plain_attention(q, k, v, causal_mask(0, 5, None, device, window=5))
    assert torch.equal(wide, plain_attention(q, k, v, causal_mask(0, 5, None, device)))
