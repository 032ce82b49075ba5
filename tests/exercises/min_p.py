"""Exercise 4 of docs/6_chat.md: no token that is far less probable than the most probable one."""

import torch

from model.generation import SamplingParams, sample

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()  # (1, V)


def drawn(**options):
    generator = torch.Generator().manual_seed(1)
    rows = LOGITS.repeat(2000, 1)
    return sample(rows, SamplingParams(1, 1.0), generator, **options)[:, 0]


def test_unlikely_tokens_are_never_drawn():
    assert set(drawn(min_p=0.4).tolist()) == {0, 1}  # at least 0.4 * 0.5 = 0.2


def test_the_others_keep_their_proportion():
    share = (drawn(min_p=0.4) == 0).float().mean()
    assert abs(share - 0.5 / 0.8) < 0.05


def test_zero_changes_nothing():
    assert torch.equal(drawn(min_p=0.0), drawn())
