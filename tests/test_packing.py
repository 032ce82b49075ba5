"""Packed rows: every document once, untouched, as if it were alone."""

import random

import torch

from dataset.lm_dataset import IGNORE
from dataset.packing import SHORTEST, pack
from trainer.losses import summed_cross_entropy, supervised_tokens


def random_rows(rng, count, longest):
    rows = []
    for _ in range(count):
        ids = torch.tensor([rng.randrange(3, 100) for _ in range(rng.randrange(2, longest))])
        learned = torch.tensor([rng.random() < 0.5 for _ in ids])
        rows.append((ids, torch.where(learned, ids, IGNORE)))
    return rows


def test_every_document_is_there_once_and_untouched():
    rng = random.Random(0)
    for _ in range(50):
        rows = random_rows(rng, rng.randrange(1, 40), rng.choice([10, 100, 300]))
        ids, labels, positions, documents = pack(rows)
        assert ids.shape[1] == max(SHORTEST, *(len(row) for row, _ in rows), 0)
        found = []
        for line in range(len(ids)):
            for number in range(int(documents[line].max()) + 1):
                place = documents[line] == number
                assert positions[line][place].tolist() == list(range(int(place.sum())))
                assert labels[line][place][0] == IGNORE
                found.append((ids[line][place].tolist(), labels[line][place][1:].tolist()))
        assert sorted(found) == sorted((a.tolist(), b[1:].tolist()) for a, b in rows)
        assert (labels[documents == -1] == IGNORE).all()
        assert supervised_tokens(labels) == sum(int((b[1:] != IGNORE).sum()) for _, b in rows)


def test_short_rows_waste_little():
    rng = random.Random(1)
    rows = random_rows(rng, 64, 60)
    ids, *_, documents = pack(rows)
    assert (documents >= 0).float().mean() > 0.9


def test_no_rows_give_a_batch_without_loss():
    ids, labels, *_ = pack([])
    logits = torch.randn(*ids.shape, 7, requires_grad=True)
    loss = summed_cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == 0 and supervised_tokens(labels) == 0 and not logits.grad.any()
