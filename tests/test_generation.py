"""Generation against transformers: the same greedy tokens, the same filters."""

import shutil

import pytest
import torch

from model import generation
from model.causal_lm import CausalLM, ModelConfig
from model.generation import SamplingParams, apply_repetition_penalty, complete, generate, sample
from tests.test_model import SHAPE, pair, randomised

transformers = pytest.importorskip("transformers")
PROMPTS = [[5, 9, 77, 3], [8], [100, 4, 60, 61, 62, 63, 7], [12, 90]]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_greedy_is_token_for_token_that_of_transformers(kind):
    ours, theirs = pair(kind)
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        steps = generate(ours, [prompt], SamplingParams(30, 0), stop_ids=(2,))
        assert [token for (token,) in steps] == expected


def test_a_repetition_penalty_is_of_prompt_and_answer_as_in_transformers():
    ours, theirs = pair("qwen3")
    prompt = list(range(20, 90))
    for penalty in (1.05, 1.3, 3.0):
        options = {"max_new_tokens": 25, "repetition_penalty": penalty}
        expected = theirs.generate(
            torch.tensor([prompt]), do_sample=False, eos_token_id=2, pad_token_id=0, **options
        )[0, len(prompt) :].tolist()
        for prompts in ([prompt], [prompt, prompt[:3]]):
            steps = list(
                generate(ours, prompts, SamplingParams(temperature=0, **options), stop_ids=(2,))
            )
            assert [step[0] for step in steps][: len(expected)] == expected
        assert not set(expected) & set(prompt) or penalty < 3


def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone():
    ours, _ = pair("qwen3")
    alone = [complete(ours, [p], max_new_tokens=20, temperature=0)[0] for p in PROMPTS]
    assert complete(ours, PROMPTS, max_new_tokens=20, temperature=0) == alone
    assert len(set(map(tuple, alone))) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_it_writes_in_half_precision_on_every_cpu(dtype, prompts):
    """Also where the processor cannot lay such matrices out."""
    ours, _ = pair("qwen3")
    answers = complete(ours.to(dtype), prompts, max_new_tokens=5, temperature=0, stop_ids=())
    assert [len(answer) for answer in answers] == [5] * len(prompts)


def test_use_compile_decodes_with_the_compiled_step(monkeypatch):
    ours, calls = randomised(CausalLM(ModelConfig(**SHAPE))), []
    monkeypatch.setattr(generation, "compiled_step", lambda model, B: calls.append(B) or model)
    expected = complete(ours, PROMPTS, max_new_tokens=3, temperature=0)
    assert not calls
    options = {"max_new_tokens": 3, "temperature": 0, "use_compile": True}
    assert complete(ours, PROMPTS, **options) == expected and calls == [len(PROMPTS)]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.parametrize("prompts, again", [(PROMPTS[:1], False), (PROMPTS, True)])
def test_the_compiled_step_computes_the_same_also_with_new_weights(prompts, again):
    ours = randomised(CausalLM(ModelConfig(**SHAPE | {"num_hidden_layers": 1})))
    first = complete(ours, prompts, max_new_tokens=12, temperature=0)
    assert complete(ours, prompts, max_new_tokens=12, temperature=0, use_compile=True) == first
    if not again:
        return
    randomised(ours, seed=5)
    second = complete(ours, prompts, max_new_tokens=12, temperature=0)
    assert complete(ours, prompts, max_new_tokens=12, temperature=0, use_compile=True) == second
    assert first != second


def test_a_row_that_fills_the_context_is_finished_and_the_others_go_on():
    ours, _ = pair("qwen3")
    ours.config.max_position_embeddings = room = 12
    options = {"max_new_tokens": 9, "temperature": 0, "stop_ids": ()}
    prompts = [list(range(3, 3 + n)) for n in (10, 4, 12)]
    together = complete(ours, prompts, **options)
    assert list(map(len, together)) == [room - 10, room - 4, 0]
    ours.config.max_position_embeddings = 99
    for prompt, answer in zip(prompts, together, strict=True):
        assert complete(ours, [prompt], **options)[0][: len(answer)] == answer


def test_a_row_that_stops_is_finished_and_the_others_go_on():
    ours, _ = pair("qwen3")
    free = complete(ours, PROMPTS, max_new_tokens=12, temperature=0, stop_ids=())
    stop = next(token for token in free[0] if token not in free[1])
    rows = list(generate(ours, PROMPTS[:2], SamplingParams(12, 0), stop_ids=(stop,)))
    cut = free[0].index(stop)
    assert [a for a, _ in rows] == free[0][: cut + 1] + [None] * (12 - cut - 1)
    assert [b for _, b in rows] == free[1]


def test_filters_and_penalty_equal_those_of_transformers():
    from transformers.generation import logits_process as judge

    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    seen = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    expected = judge.RepetitionPenaltyLogitsProcessor(1.7)(seen, logits.clone())
    got = apply_repetition_penalty(logits, seen, torch.zeros(4, 1, dtype=torch.long), 1.7)
    torch.testing.assert_close(got, expected)
    padded = torch.cat([torch.full((4, 2), 49), seen], dim=1)  # padding is not penalised
    assert torch.equal(apply_repetition_penalty(logits, padded, torch.full((4, 1), 2), 1.7), got)

    for top_k, top_p in ((5, 1.0), (0, 0.6), (8, 0.8), (200, 1.0)):
        kept = judge.TemperatureLogitsWarper(0.8)(seen, logits.clone())
        if top_k:
            kept = judge.TopKLogitsWarper(top_k)(seen, kept)
        if top_p < 1:
            kept = judge.TopPLogitsWarper(top_p)(seen, kept)
        generator = torch.Generator().manual_seed(2)
        drawn = torch.cat(
            [sample(logits, SamplingParams(1, 0.8, top_k, top_p), generator) for _ in range(4000)],
            1,
        )
        share = torch.stack([(drawn == token).float().mean(1) for token in range(50)], 1)
        assert not share[kept == -torch.inf].any()
        torch.testing.assert_close(share, kept.softmax(-1), atol=0.035, rtol=0)


@pytest.mark.parametrize("number, place", [(0.0, 0), (0.4999, 0), (0.5001, 1), (1 - 2**-24, 1)])
def test_the_ends_of_the_random_numbers_give_possible_tokens(monkeypatch, number, place):
    """Two tokens of probability 1/2, among impossible ones; then a row with NaN."""
    logits = torch.full((3, 9), -torch.inf)
    tokens = [(2, 5), (0, 8), (7, 8)]
    for row, both in enumerate(tokens):
        logits[row, list(both)] = 4.0
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, number))
    found = sample(logits, SamplingParams(1, 1.0), None)
    assert found.tolist() == [[both[place]] for both in tokens]
    logits[1, 3] = torch.nan
    with pytest.raises(RuntimeError, match="nan"):
        sample(logits, SamplingParams(1, 1.0), None)


def test_a_seed_repeats_its_draws_and_draws_nothing_from_the_global_generator():
    ours, _ = pair("qwen3")
    for seed in (0, 7):
        first = complete(ours, PROMPTS, max_new_tokens=15, temperature=1.0, seed=seed)
        state = torch.get_rng_state()
        assert complete(ours, PROMPTS, max_new_tokens=15, temperature=1.0, seed=seed) == first
        assert torch.equal(torch.get_rng_state(), state)
        assert complete(ours, PROMPTS, max_new_tokens=15, temperature=1.0, seed=8) != first
    draws = [complete(ours, PROMPTS, max_new_tokens=15, temperature=1.0) for _ in range(2)]
    assert draws[0] != draws[1]


def test_the_output_layer_computes_the_last_token_of_each_prompt_alone():
    """All logits of long prompts would be the largest tensor by far."""
    ours, _ = pair("qwen3")
    shapes = []
    ours.lm_head.register_forward_pre_hook(lambda layer, inputs: shapes.append(inputs[0].shape))
    complete(ours, PROMPTS, max_new_tokens=3, temperature=0, stop_ids=())
    assert [shape[:-1].numel() for shape in shapes] == [len(PROMPTS)] * 3


def test_the_context_is_the_limit():
    small = randomised(CausalLM(ModelConfig(**{**SHAPE, "max_position_embeddings": 10})))
    assert len(complete(small, [[3] * 7], max_new_tokens=50, stop_ids=())[0]) == 3
    with pytest.raises(ValueError, match="from 1 to 10"):
        complete(small, [[3] * 11])
    with pytest.raises(ValueError, match="from 1 to 10"):
        complete(small, [[]])


def test_weights_that_change_after_a_generation_are_those_of_the_next_forward_pass():
    """No copy of the weights that were laid out for generation stays."""
    model = randomised(CausalLM(ModelConfig(**SHAPE)))
    before = complete(model, PROMPTS, max_new_tokens=6, temperature=0)
    randomised(model, seed=5)
    fresh = CausalLM(ModelConfig(**SHAPE))
    fresh.load_state_dict(model.state_dict())
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(model(ids), fresh(ids)) and model(ids).requires_grad
    after = complete(model, PROMPTS, max_new_tokens=6, temperature=0)
    assert after == complete(fresh, PROMPTS, max_new_tokens=6, temperature=0) != before


def test_generating_leaves_the_model_training_if_it_was():
    model = randomised(CausalLM(ModelConfig(**SHAPE))).train()
    complete(model, [[3]], max_new_tokens=2)
    assert model.training


@pytest.mark.parametrize("use_compile", [False, True])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("shape", [{}, {"use_moe": True}])
def test_logits_of_half_precision_weights_are_not_rounded(prompts, use_compile, shape, monkeypatch):
    """Rounded to bf16, the two likeliest of many tokens are often equal."""
    if use_compile and (shape or not shutil.which("g++")):
        pytest.skip("torch.compile needs a compiler; experts are not compiled here")
    torch.manual_seed(0)
    config = ModelConfig(**{**SHAPE, "vocab_size": 3000, "num_hidden_layers": 1}, **shape)
    model, seen, plain = CausalLM(config).bfloat16().eval(), [], generation.sample

    def keep(logits, *how):
        seen.append(logits)
        return plain(logits, *how)

    monkeypatch.setattr(generation, "sample", keep)
    list(generate(model, prompts, SamplingParams(4, 0), use_compile=use_compile))
    logits = torch.cat(seen)
    # A number in bf16 has 8 bits; of 3,000 different ones most need more.
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    assert model.lm_head(torch.zeros(1, 64).bfloat16()).dtype == torch.bfloat16  # as before


def test_top_p_keeps_the_fewest_tokens_that_add_up_to_it():
    """Probabilities 1/2, 1/4, 1/4 are exact: the first alone is half of all."""
    logits = torch.tensor([[0.25, 0.5, 0.25]]).log()
    for top_p, kept in ((0.5, {1}), (0.51, {0, 1}), (1.0, {0, 1, 2}), (0.0, {1})):
        generator = torch.Generator().manual_seed(1)
        drawn = {
            sample(logits, SamplingParams(1, 1.0, 0, top_p), generator).item() for _ in range(200)
        }
        assert drawn == kept or (top_p == 0.51 and drawn == {1, 2})


@pytest.mark.parametrize("penalty", [0.5, 0.9, 1.0])
def test_a_penalty_of_at_most_1_is_that_of_transformers(penalty):
    from transformers.generation import logits_process as judge

    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    seen = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(1))
    expected = judge.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    found = apply_repetition_penalty(logits, seen, torch.zeros(3, 1, dtype=torch.long), penalty)
    torch.testing.assert_close(found, expected)
    ours, theirs = pair("qwen3")
    prompt, options = list(range(20, 40)), {"max_new_tokens": 8, "repetition_penalty": penalty}
    expected = theirs.generate(
        torch.tensor([prompt]), do_sample=False, eos_token_id=2, pad_token_id=0, **options
    )[0, len(prompt) :].tolist()
    assert complete(ours, [prompt], temperature=0, stop_ids=(2,), **options) == [expected]
