"""Attention on every branch that a CPU can take, against the plain formula in float64; and that
one against torch's attention.
"""

import pytest
import torch
import torch.nn.functional as F

from dataset.packing import pad
from model import attention
from model.attention import attend, causal_mask, plain_attention
from model.causal_lm import CausalLM, ModelConfig
from tests.conftest import pack

LENGTHS = (1, 2, 63, 127, 128, 129, 200, 256, 257, 400)  # a block of queries on a CPU has 128
B, H, d = 2, 4, 8


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, so that `attend` takes that branch."""

    device = property(lambda self: torch.device("cuda"))


def formula(q, k, v, past, documents):
    """plain_attention in float64; the mask is made by hand, query t stands at place past + t."""
    mask = torch.zeros(len(q), 1, q.shape[2], k.shape[2], dtype=torch.bool)
    for row in range(len(q)):
        for t in range(q.shape[2]):
            mask[row, 0, t, : past + t + 1] = True
            if documents is not None:
                mask[row, 0, t] &= documents[row] == documents[row, past + t]
    return plain_attention(q.double(), k.double(), v.double(), mask)


def tensors(T, K, past, with_documents):
    generator = torch.Generator().manual_seed(T + past)
    q = torch.randn(B, H, T, d, generator=generator).requires_grad_()
    k, v = (torch.randn(B, K, past + T, d, generator=generator).requires_grad_() for _ in range(2))
    documents = None
    if with_documents:  # of all lengths, with padding (-1) at the beginning or the end
        documents = torch.randint(-1, 6, (B, past + T), generator=generator).sort(dim=1).values
        documents[1] = documents[1].flip(0)
    return (q, k, v), documents


def compare(found, expected, weights):
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).double()
    ours = torch.autograd.grad((found.double() * direction).sum(), weights)
    theirs = torch.autograd.grad((expected * direction).sum(), weights)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_plain_formula_is_torchs_attention(K):
    (q, k, v), documents = tensors(70, K, 5, True)
    mask = causal_mask(5, 70, documents, "cpu")
    shared = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    compare(plain_attention(q, k, v, mask), shared.double(), (q, k, v))


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("past", [0, 5, 130])
@pytest.mark.parametrize("with_documents", [False, True])
def test_attention_on_a_cpu_is_the_formula(K, past, with_documents):
    for T in LENGTHS:
        weights, documents = tensors(T, K, past, with_documents)
        mask = causal_mask(past, T, documents, "cpu") if with_documents else None
        compare(attend(*weights, mask), formula(*weights, past, documents), weights)
        if not with_documents:  # the causal mask, spelled out
            given = causal_mask(past, T, None, "cpu")
            compare(attend(*weights, given), formula(*weights, past, None), weights)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("past", [0, 5, 130])
@pytest.mark.parametrize("with_documents", [False, True])
def test_attention_on_a_gpu_is_the_formula(K, past, with_documents):
    for T in LENGTHS:
        weights, documents = tensors(T, K, past, with_documents)
        # As the model has it: without a mask the queries are all there are.
        plain = not with_documents and past == 0
        mask = None if plain else causal_mask(past, T, documents, "cpu")
        q, k, v = weights
        found = attend(q.as_subclass(OnGPU), k, v, mask)
        compare(found.as_subclass(torch.Tensor), formula(*weights, past, documents), weights)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("K", [1, 2, 4])
def test_flex_attention_is_the_formula(K, monkeypatch):
    """Uncompiled. Its backward pass does not run on a CPU."""
    monkeypatch.setattr(attention, "compile_once", lambda function: function)
    for T in LENGTHS[1:]:
        (q, k, v), documents = tensors(T, K, 0, True)
        with torch.no_grad():
            q, k, v = q.detach(), k.detach(), v.detach()
            found = attend(q, k, v, attention.document_block_mask(documents))
        expected = formula(q, k, v, 0, documents)
        torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("collate", [lambda documents: pack(documents, 64), pad])
def test_a_process_without_rows_computes_its_empty_batch_where_blocks_are_used(
    collate, monkeypatch
):
    """On a GPU with several processes: `pad` gives it a batch of a single token."""
    monkeypatch.setattr(attention, "flex_available", lambda device, head_dim: True)
    monkeypatch.setattr(attention, "compile_once", lambda function: function)
    model = CausalLM(ModelConfig(vocab_size=9, hidden_size=16, num_attention_heads=2))
    ids, labels, *where = collate([])
    with torch.no_grad():
        assert model(ids, *where, labels=labels) == 0


def test_queries_in_another_precision_than_the_cache_keep_theirs():
    """In a model cast to bf16 the cache holds fp32: keys are read as they are. A GPU's holds what
    autocast does not touch.
    """
    for T in (1, 3, 130):
        (q, k, v), _ = tensors(T, 2, 5, False)
        expected = formula(q.bfloat16(), k, v, 5, None)
        for place in (torch.Tensor, OnGPU):
            given = q.detach().bfloat16().as_subclass(place)
            found = attend(given, k, v, causal_mask(5, T, None, "cpu"))
            assert found.dtype == torch.bfloat16
            found = found.as_subclass(torch.Tensor).double()
            torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-2)


def test_autocast_leaves_the_scores_of_a_cpu_in_fp32():
    (q, k, v), _ = tensors(200, 2, 0, False)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, None)
    torch.testing.assert_close(found.double(), formula(q, k, v, 0, None), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_on_a_cpu_is_about_as_exact_as_torchs_kernel(masked):
    """Scores that were rounded to bf16 before the softmax had errors 3.5 times as large."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 256, 64) * size for n, size in ((4, 2.0), (2, 2.0), (2, 1.0)))
    q, k, v = (t.bfloat16().requires_grad_() for t in (q, k, v))
    documents = torch.arange(256)[None].expand(2, 256) // 90 if masked else None
    mask = causal_mask(0, 256, documents, "cpu")
    direction = torch.randn(2, 4, 256, 64)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]

    def with_gradients(attention, inputs):
        out = attention(*inputs)
        grads = torch.autograd.grad((out * direction.to(out)).sum(), inputs)
        return [out, *grads]

    def kernel(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    expected = with_gradients(lambda *t: plain_attention(*t, mask), exact)
    ours = with_gradients(lambda *t: attend(*t, mask if masked else None), (q, k, v))
    theirs = with_gradients(kernel, (q, k, v))
    for one, other, right in zip(ours, theirs, expected, strict=True):
        assert (one - right).abs().mean() < 1.7 * (other - right).abs().mean()
