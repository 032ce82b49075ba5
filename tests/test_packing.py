"""Packed rows: every document once, untouched, as if it were alone."""

import random

import pytest
import torch

from dataset.packing import SHORTEST, best_fit_decreasing, pack, pad
from model.causal_lm import CausalLM, ModelConfig
from model.loss import IGNORE, summed_cross_entropy, supervised_tokens


def random_rows(rng, count, longest):
    rows = []
    for _ in range(count):
        ids = torch.tensor([rng.randrange(3, 100) for _ in range(rng.randrange(2, longest))])
        learned = torch.tensor([rng.random() < 0.5 for _ in ids])
        rows.append((ids, torch.where(learned, ids, IGNORE)))
    return rows


@pytest.mark.parametrize("collate", [lambda rows: pack(rows, 300), pad])
def test_every_document_is_there_once_and_untouched(collate):
    rng = random.Random(0)
    for _ in range(50):
        rows = random_rows(rng, rng.randrange(1, 40), rng.choice([10, 100, 300]))
        ids, labels, positions, documents = collate(rows)
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


def plain_best_fit_decreasing(lengths, row_length):
    """The textbook's, which looks at every row for every item."""
    space = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, left in enumerate(space) if left >= length]
        if fitting:
            space[min(fitting, key=lambda index: space[index])] -= length
        else:
            space.append(row_length - length)
    return sorted(row_length - left for left in space)


def test_best_fit_decreasing_fills_rows_as_the_textbook_does():
    rng = random.Random(2)
    for _ in range(100):
        row_length = rng.choice([16, 100, 512])
        lengths = [rng.randint(1, row_length) for _ in range(rng.randrange(200))]
        rows = best_fit_decreasing(lengths, row_length)
        assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
        filled = sorted(sum(lengths[item] for item in row) for row in rows)
        assert filled == plain_best_fit_decreasing(lengths, row_length)


def test_best_fit_decreasing_needs_as_many_rows_as_trl():
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rng = random.Random(4)
    for _ in range(30):
        row_length = rng.choice([64, 512, 1024])
        lengths = [rng.randint(1, row_length) for _ in range(rng.randint(1, 800))]
        rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
        theirs = trl.pack_dataset(rows, row_length, strategy="bfd")
        assert len(theirs) == len(best_fit_decreasing(lengths, row_length))


def test_a_row_is_never_longer_than_asked_for():
    rng = random.Random(5)
    for _ in range(100):
        row_length = rng.randrange(4, 300)
        documents = random_rows(rng, rng.randrange(1, 30), row_length + 1)
        ids, _, positions, _ = pack(documents, row_length)
        assert ids.shape[1] <= row_length and positions.max() < row_length


def test_short_rows_waste_little_and_are_short():
    rng = random.Random(1)
    ids, *_, documents = pack(random_rows(rng, 64, 60), 512)
    assert (documents >= 0).float().mean() > 0.9 and ids.shape[1] == SHORTEST


def test_a_packed_document_has_the_losses_that_it_has_alone_and_no_influence_on_others():
    torch.manual_seed(0)
    config = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = CausalLM(ModelConfig(**config))
    rng = random.Random(3)
    for _ in range(10):
        rows = random_rows(rng, 12, rng.choice([8, 40, 120]))
        ids, labels, *where = pack(rows, 128)
        with torch.no_grad():
            packed = model(ids, *where)
            for document, _ in rows:
                alone = model(document[None])[0]
                lines, starts = torch.nonzero(where[0] == 0, as_tuple=True)
                near = [
                    packed[line, start : start + len(document)]
                    for line, start in zip(lines.tolist(), starts.tolist(), strict=True)
                    if torch.equal(ids[line, start : start + len(document)], document)
                ]
                assert any((part - alone).abs().max() < 1e-5 for part in near)
            # Another first document changes no logit of the rest.
            first = where[1] == 0
            changed = model(torch.where(first, (ids + 1) % 100, ids), *where)
        assert torch.equal(changed[~first], packed[~first])
        assert not torch.equal(changed[first], packed[first])


@pytest.mark.parametrize("collate", [lambda rows: pack(rows, 300), pad])
def test_no_rows_give_a_batch_without_loss(collate):
    ids, labels, *_ = collate([])
    x, weight = (
        torch.randn(*ids.shape, 5, requires_grad=True),
        torch.randn(7, 5, requires_grad=True),
    )
    loss = summed_cross_entropy(x, weight, labels)
    loss.backward()
    assert loss.item() == 0 and supervised_tokens(labels) == 0
    assert not x.grad.any() and not weight.grad.any()
