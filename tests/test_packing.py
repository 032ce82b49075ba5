"""Packed rows: every document once, untouched, as if it were alone."""

import random
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import IGNORE
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import MIN_ROW_LENGTH, best_fit_decreasing, pad, row_length
from dataset.step_plan import batches, epoch_plan
from model.causal_lm import CausalLM, ModelConfig
from model.loss import count_supervised, summed_cross_entropy
from model.tokenizer import load_tokenizer
from tests.conftest import chat, pack, write_jsonl
from tests.test_chat_template import marked


def random_samples(rng, count, longest):
    rows = []
    for _ in range(count):
        ids = torch.tensor([rng.randrange(3, 100) for _ in range(rng.randrange(2, longest))])
        supervised = torch.tensor([rng.random() < 0.5 for _ in ids])
        rows.append((ids, torch.where(supervised, ids, IGNORE)))
    return rows


@pytest.mark.parametrize("collate", [lambda rows: pack(rows, 300), pad])
def test_every_document_is_there_once_and_untouched(collate):
    rng = random.Random(0)
    for _ in range(50):
        rows = random_samples(rng, rng.randrange(1, 40), rng.choice([10, 100, 300]))
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
        assert count_supervised(labels) == sum(int((b[1:] != IGNORE).sum()) for _, b in rows)


def plain_best_fit_decreasing(lengths, max_seq_len):
    """The textbook's, which looks at every row for every item."""
    space = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, left in enumerate(space) if left >= length]
        if fitting:
            space[min(fitting, key=lambda index: space[index])] -= length
        else:
            space.append(max_seq_len - length)
    return sorted(max_seq_len - left for left in space)


def test_best_fit_decreasing_fills_rows_as_the_textbook_does():
    rng = random.Random(2)
    for _ in range(100):
        max_seq_len = rng.choice([16, 100, 512])
        lengths = [rng.randint(1, max_seq_len) for _ in range(rng.randrange(200))]
        rows = best_fit_decreasing(lengths, max_seq_len)
        assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
        filled = sorted(sum(lengths[item] for item in row) for row in rows)
        assert filled == plain_best_fit_decreasing(lengths, max_seq_len)


def test_best_fit_decreasing_needs_as_many_rows_as_trl():
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rng = random.Random(4)
    for _ in range(30):
        max_seq_len = rng.choice([64, 512, 1024])
        lengths = [rng.randint(1, max_seq_len) for _ in range(rng.randint(1, 800))]
        rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
        theirs = trl.pack_dataset(rows, max_seq_len, strategy="bfd")
        assert len(theirs) == len(best_fit_decreasing(lengths, max_seq_len))


CONVERSATIONS = [chat("Hi", "Hello!", "Bye", "See you."), chat("1+1?", "2"), chat("Name?", "I am.")]
# The same by hand: what is supervised stands in brackets.
TEXTS = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello!<|im_end|>]\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[See you.<|im_end|>]\n",
    "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>]\n",
    "<|im_start|>user\nName?<|im_end|>\n<|im_start|>assistant\n[I am.<|im_end|>]\n",
]


@pytest.mark.parametrize("max_seq_len", [50, 90])
@pytest.mark.parametrize("packing", [True, False])
def test_conversations_become_the_batch_that_is_written_here_by_hand(
    tmp_path, max_seq_len, packing
):
    tokenizer = load_tokenizer()
    data = SFTDataset(write_jsonl(tmp_path / "x.jsonl", CONVERSATIONS), tokenizer)
    documents = [data[row] for row in range(3)]
    ids, labels, positions, numbers = pack(documents, max_seq_len) if packing else pad(documents)
    found = []
    for row in range(len(ids)):
        count = int(numbers[row].max()) + 1
        lengths = [int((numbers[row] == number).sum()) for number in range(count)]
        padding = ids.shape[1] - sum(lengths)
        in_order = [number for number in range(count) for _ in range(lengths[number])]
        assert numbers[row].tolist() == in_order + [-1] * padding
        assert labels[row, sum(lengths) :].tolist() == [IGNORE] * padding
        assert positions[row].tolist() == [*chain(*map(range, lengths)), *[0] * padding]
        pieces = (part[row].split([*lengths, padding]) for part in (ids, labels))
        for its_ids, its_labels in zip(*pieces, strict=True):
            supervised = its_labels != IGNORE
            assert torch.equal(its_labels[supervised], its_ids[supervised])
            found.append(marked(its_ids.tolist(), supervised.tolist()))
        assert set(found.pop()) <= set("<|endoftext|>")
    assert sorted(found) == sorted(TEXTS)
    assert len(ids) == {(True, 90): 1, (True, 50): 2}.get((packing, max_seq_len), 3)


def test_a_row_is_never_longer_than_asked_for():
    rng = random.Random(5)
    for _ in range(100):
        max_seq_len = rng.randrange(4, 300)
        documents = random_samples(rng, rng.randrange(1, 30), max_seq_len + 1)
        ids, _, positions, _ = pack(documents, max_seq_len)
        assert ids.shape[1] <= max_seq_len and positions.max() < max_seq_len


@pytest.mark.parametrize(
    "longest, max_seq_len, expected",
    [(60, 512, MIN_ROW_LENGTH), (150, 768, 192), (193, 768, 256), (400, 768, 768), (60, 500, 500)],
)
def test_rows_of_short_samples_are_short_and_waste_little(longest, max_seq_len, expected):
    rng = random.Random(1)
    lengths = np.array([rng.randrange(1, longest + 1) for _ in range(5000)] + [longest])
    assert row_length(lengths, max_seq_len) == expected
    rows = best_fit_decreasing(lengths.tolist(), expected)
    assert lengths.sum() / len(rows) / expected > 0.95


def test_the_rows_of_a_batch_are_those_of_the_plan(tmp_path):
    """Samples are packed once: a row of the plan is a row of the batch, with the same tokens."""
    texts = [{"text": "one two three " * (1 + i % 7)} for i in range(90)]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    data = PretrainDataset(path, load_tokenizer(), 384)
    args = SimpleNamespace(seed=1, packing=True, max_seq_len=384, batch_size=2, num_workers=0)
    args.accumulation_steps = 2
    assert row_length(data.lengths, 384) == 128
    for micro_batches in epoch_plan(data, range(len(data)), args, 0):
        assert len(micro_batches[0]) <= 2 * 3  # as many tokens as two rows of 384
        made = list(batches(data, micro_batches, args, torch.device("cpu")))
        for rows, (ids, _, _, documents) in zip(micro_batches, made, strict=True):
            assert ids.shape == (len(rows), 128)
            for row, line, document in zip(rows, ids, documents, strict=True):
                expected = torch.cat([data[sample][0] for sample in row])
                assert torch.equal(line[document >= 0], expected)


def test_a_packed_document_has_the_losses_that_it_has_alone_and_no_influence_on_others():
    torch.manual_seed(0)
    config = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = CausalLM(ModelConfig(**config))
    rng = random.Random(3)
    for _ in range(10):
        rows = random_samples(rng, 12, rng.choice([8, 40, 120]))
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
    assert loss.item() == 0 and count_supervised(labels) == 0
    assert not x.grad.any() and not weight.grad.any()
