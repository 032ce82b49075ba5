"""What `trace` keeps, against transformers and against the model itself."""

import pytest
import torch

from model.causal_lm import CausalLM, ModelConfig
from serving.trace import GUESSES, trace
from tests.test_model import SHAPE, pair, randomised

IDS = torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@torch.inference_mode()
def test_the_attention_weights_and_hidden_states_are_those_of_transformers(kind):
    ours, theirs = pair(kind)
    found = trace(ours, IDS)
    expected = theirs(
        torch.tensor([IDS]), output_attentions=True, output_hidden_states=True, use_cache=False
    )
    torch.testing.assert_close(found.logits, expected.logits[0], atol=1e-4, rtol=1e-4)
    attentions = torch.cat(expected.attentions)  # (L, H, T, T)
    torch.testing.assert_close(found.attention, attentions, atol=1e-5, rtol=1e-4)
    # The last of theirs is already normalised.
    states = [theirs.model.norm(x) for x in expected.hidden_states[:-1]]
    states.append(expected.hidden_states[-1])
    for layer, state in enumerate(states):
        chances = theirs.lm_head(state)[0].softmax(dim=-1).topk(GUESSES)
        torch.testing.assert_close(found.probabilities[layer], chances.values, atol=1e-4, rtol=1e-4)
        chosen = theirs.lm_head(state)[0].softmax(dim=-1).gather(1, found.guesses[layer])
        torch.testing.assert_close(chosen, chances.values, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_last_tokens_are_traced_with_all_that_is_before_them():
    model = randomised(CausalLM(ModelConfig(**SHAPE)))
    whole, end = trace(model, IDS), trace(model, IDS, last=9)
    torch.testing.assert_close(end.logits, whole.logits[-9:])
    torch.testing.assert_close(end.attention, whole.attention[:, :, -9:, -9:])
    torch.testing.assert_close(end.probabilities, whole.probabilities[:, -9:])
    assert end.guesses.shape == (4, 9, GUESSES)
    sums = whole.attention.sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@torch.inference_mode()
def test_samples_of_a_packed_row_are_traced_as_each_alone():
    model = randomised(CausalLM(ModelConfig(**SHAPE)))
    packed = trace(model, IDS, document_ids=[0] * 25 + [1] * 15)
    for part in (slice(0, 25), slice(25, 40)):
        alone = trace(model, IDS[part])
        torch.testing.assert_close(packed.logits[part], alone.logits, atol=1e-4, rtol=1e-4)
        found = packed.attention[:, :, part, part]
        torch.testing.assert_close(found, alone.attention, atol=1e-5, rtol=1e-4)
    assert packed.attention[:, :, 25:, :25].abs().max() == 0


@torch.inference_mode()
def test_a_mixture_of_experts_is_traced():
    model = randomised(CausalLM(ModelConfig(**SHAPE, use_moe=True)))
    torch.testing.assert_close(trace(model, IDS).logits, model(torch.tensor([IDS]))[0])


@torch.inference_mode()
def test_a_model_in_half_precision_is_traced():
    model = randomised(CausalLM(ModelConfig(**SHAPE))).bfloat16()
    found, logits = trace(model, IDS), model(torch.tensor([IDS]))[0].float()
    torch.testing.assert_close(found.logits, logits, atol=0.3, rtol=0.1)
    sums = found.attention.sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
