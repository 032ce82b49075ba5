"""The model against transformers: same weights, same logits, same loss, same gradients."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import attention, loss
from model.causal_lm import CausalLM, ModelConfig
from model.kv_cache import KVCache

transformers = pytest.importorskip("transformers")
SHAPE = dict(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=112,
    max_position_embeddings=128,
    rms_norm_eps=0.05,  # as the base of RoPE: not the default, so that a lost one is seen
)
THETA = 500.0


def randomised(model, seed=0):
    """Weights far from their start values, so that no term is too small to be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 0.2 + (1 if weight.dim() == 1 else 0))
    return model.eval()


def pair(kind, tie=False):
    """Our model and transformers' with the same weights, loaded by strict state_dict."""
    more = {"qk_norm": kind == "qwen3", "tie_word_embeddings": tie, "rope_theta": THETA}
    config = ModelConfig(**SHAPE, **more)
    ours = randomised(CausalLM(config))
    name = {"qwen3": "Qwen3", "llama": "Llama"}[kind]
    config = getattr(transformers, name + "Config")(
        **SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=tie,
        attention_bias=False,
        attn_implementation="eager",
    )
    theirs = getattr(transformers, name + "ForCausalLM")(config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(0, 128, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("tie", [False, True])
def test_logits_loss_and_gradients_equal_transformers(kind, tie, input_ids):
    ours, theirs = pair(kind, tie)
    labels = input_ids.clone()
    labels[:, :10] = -100
    expected = theirs(input_ids, labels=labels)
    logits = ours(input_ids)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    mean = ours(input_ids, labels=labels) / loss.count_supervised(labels)
    torch.testing.assert_close(mean, expected.loss, atol=1e-5, rtol=0)
    mean.backward()
    expected.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_cached_logits_equal_uncached_ones_of_transformers(kind, input_ids):
    ours, theirs = pair(kind)
    cache = KVCache(ours.config, batch_size=3, max_length=40)
    with torch.no_grad():  # a prompt, a chunk in the middle, then token by token
        parts = [ours(input_ids[:, :20], kv_cache=cache), ours(input_ids[:, 20:30], kv_cache=cache)]
        parts += [ours(input_ids[:, t : t + 1], kv_cache=cache) for t in range(30, 40)]
        expected = theirs(input_ids).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=0)


def test_moe_loads_into_transformers_from_its_published_format(tmp_path, input_ids):
    from safetensors.torch import save_file

    ours = randomised(
        CausalLM(
            ModelConfig(
                **SHAPE,
                use_moe=True,
                num_experts=6,
                num_experts_per_tok=2,
                moe_intermediate_size=48,
                tie_word_embeddings=False,
            )
        )
    )
    transformers.Qwen3MoeConfig(
        **SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(tmp_path)
    save_file(ours.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids), theirs(input_ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_moe_equals_a_dense_computation_that_runs_every_expert(norm_topk_prob):
    more = {"use_moe": True, "num_experts": 5, "norm_topk_prob": norm_topk_prob}
    config = ModelConfig(**SHAPE, **more, num_experts_per_tok=2)
    moe = randomised(CausalLM(config)).model.layers[0].mlp
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(2))
    probability = torch.softmax(moe.gate(x), dim=-1)
    threshold = probability.sort(dim=-1, descending=True).values[..., 1:2]
    weight = torch.where(probability >= threshold, probability, 0.0)
    if norm_topk_prob:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    every = torch.stack([expert(x) for expert in moe.experts], dim=-1)  # (B, T, D, E)
    torch.testing.assert_close(moe(x), (every * weight[:, :, None]).sum(dim=-1))


def test_moe_balance_loss_is_k_when_even_and_gives_every_expert_a_gradient():
    config = ModelConfig(**SHAPE, use_moe=True, num_experts=4, num_experts_per_tok=2)
    moe = CausalLM(config).model.layers[0].mlp.train()
    x = torch.randn(1, 400, 64)
    torch.nn.init.zeros_(moe.gate.weight)
    moe(x)
    torch.testing.assert_close(moe.load_balance_loss, torch.tensor(2.0))
    with torch.no_grad():
        moe.gate.weight[0] = 100 * x[0, 0]  # one token cannot reach all experts
    moe(x[:, :1]).sum().backward()
    assert all(expert.up_proj.weight.grad is not None for expert in moe.experts)


def test_a_document_in_a_packed_row_has_the_logits_that_it_has_alone(input_ids):
    ours, _ = pair("qwen3")
    row = input_ids[:1]
    documents = torch.tensor([[0] * 15 + [1] * 5 + [2] * 20])
    positions = torch.cat([torch.arange(n) for n in (15, 5, 20)])[None]
    with torch.no_grad():
        packed = ours(row, position_ids=positions, document_ids=documents)
        alone = torch.cat([ours(part) for part in row.split([15, 5, 20], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_the_plain_loss_is_the_sum_over_supervised_tokens():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    labels = torch.tensor([[3, loss.IGNORE, 4, 10, loss.IGNORE], [loss.IGNORE, 0, 0, 7, 2]])
    expected = 0.0
    for row, place in (labels[:, 1:] != loss.IGNORE).nonzero().tolist():
        p = (weight @ hidden[row, place]).softmax(dim=0)
        expected = expected - p[labels[row, place + 1]].log()
    torch.testing.assert_close(loss.plain_cross_entropy(hidden, weight, labels), expected)


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_the_loss_in_chunks_is_the_plain_one_and_so_are_its_gradients(monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    torch.manual_seed(0)
    x, weight = torch.randn(3, 9, 16), torch.randn(40, 16)
    labels = torch.randint(40, (3, 9)).masked_fill(torch.rand(3, 9) < 0.3, loss.IGNORE)
    results = []
    for summed in (loss.summed_cross_entropy, loss.plain_cross_entropy):
        own = [t.clone().requires_grad_() for t in (x, weight)]
        value = summed(*own, labels)
        (value * 0.7).backward()
        results.append([value, *(t.grad for t in own)])
        with torch.no_grad():
            torch.testing.assert_close(summed(*own, labels), value)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_blocks_of_documents_see_what_the_plain_mask_sees(monkeypatch):
    """The GPU's way, whose forward pass also runs, uncompiled, on a CPU."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=99, hidden_size=32, num_attention_heads=2))
    input_ids = torch.randint(3, 99, (3, 300))
    document_ids = torch.randint(-1, 5, (3, 300)).sort(dim=1).values
    with torch.no_grad():
        expected = model(input_ids, document_ids=document_ids)
        monkeypatch.setattr(attention, "flex_available", lambda device, head_dim: True)
        monkeypatch.setattr(
            attention, "compile_once", lambda function: calls.append(function) or function
        )
        calls = []
        found = model(input_ids, document_ids=document_ids)
    assert len(calls) == 1 + model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_rows_first_token_is_not_supervised_whatever_its_label():
    labels = torch.tensor([[5, 6, loss.IGNORE], [loss.IGNORE, 7, 8], [9, *[loss.IGNORE] * 2]])
    assert loss.count_supervised(labels) == 3


def test_dropout_is_on_the_embeddings_and_on_both_results_of_each_layer(input_ids):
    """With all of them dropped, what is left shows where dropout is."""
    model = CausalLM(ModelConfig(**SHAPE, dropout=1.0)).train()
    assert not model.hidden_states(input_ids).any()
    model.model.dropout.p = 0.0
    embedded = model.model.norm(model.model.embed_tokens(input_ids))
    assert torch.equal(model.hidden_states(input_ids), embedded)
    model.eval()
    assert not torch.allclose(model.hidden_states(input_ids), embedded)


def test_the_first_weights_that_end_an_mlp_are_smaller_in_a_deeper_model():
    """What all layers add to the residual stream has one size then; others keep theirs."""
    torch.manual_seed(0)
    sizes = []
    for depth in (1, 9):
        model = CausalLM(ModelConfig(**{**SHAPE, "num_hidden_layers": depth}))
        layer = {name: weight.std() for name, weight in model.model.layers[0].named_parameters()}
        sizes.append({name: size.item() for name, size in layer.items() if "norm" not in name})
    for name, size in sizes[1].items():
        assert size == pytest.approx(sizes[0][name] / (3 if "down_proj" in name else 1), rel=0.1)
        # Attention keeps the size of what it reads; an MLP begins with little.
        expected = 0.02 if "mlp" in name else 64**-0.5
        assert sizes[0][name] == pytest.approx(expected / (2**0.5 if "down" in name else 1), 0.1)


def test_the_first_loss_is_near_that_of_guessing(input_ids):
    torch.manual_seed(0)
    logits = CausalLM(ModelConfig(**SHAPE))(input_ids)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    )
    # Logits of variance 1 cost half a nat more than equal ones: E[exp(x)] = exp(1/2).
    assert abs(loss.item() - math.log(128) - 0.5) < 0.2


@pytest.mark.parametrize(
    "wrong", [dict(num_key_value_heads=3), dict(head_dim=15), dict(use_moe=True, num_experts=1)]
)
def test_impossible_shapes_are_refused_with_their_values(wrong):
    with pytest.raises(ValueError, match=r"\(\d+\)"):
        ModelConfig(**{**SHAPE, **wrong})


class Sizes(TorchDispatchMode):
    """Keeps the shape of each tensor that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append((str(function), tuple(result.shape)))
        return result


def test_a_frozen_output_layer_gets_no_gradient_and_costs_none():
    """Under LoRA: 620 MB and a product for each chunk, at the size of Qwen3-0.6B."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(2, 30, 16, requires_grad=True), torch.randint(3, 50, (2, 30))
    weight = torch.randn(50, 16)
    expected = torch.autograd.grad(loss.plain_cross_entropy(hidden, weight, labels), hidden)[0]
    for is_trained in (True, False):
        weight.requires_grad_(is_trained)
        with Sizes() as sizes:
            loss.summed_cross_entropy(hidden, weight, labels).backward()
        of_weight = [
            name for name, shape in sizes.seen if shape == (50, 16) and "detach" not in name
        ]
        assert bool(of_weight) == is_trained, of_weight
        torch.testing.assert_close(hidden.grad, expected, atol=1e-5, rtol=1e-4)
        hidden.grad = None


def test_the_loss_in_bf16_is_that_in_fp32_of_the_same_logits():
    """Also of a vocabulary of another size than the chunk, and with one label left out."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 9, 16, generator=generator).bfloat16()
    weight = torch.randn(50, 16, generator=generator).bfloat16()
    labels = torch.randint(0, 50, (2, 9), generator=generator)
    labels[0, 4] = -100
    logits = (hidden @ weight.T).float()[:, :-1].flatten(0, 1)  # rounded to bf16, as there
    expected = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    found = loss.summed_cross_entropy(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)
