"""Which rows a run takes: by properties that hold for any data and any seed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import IGNORE, UserError
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.prepare import assign_parts
from dataset.step_plan import Source, StepPlan, epoch_plan, flatten, mix, split_samples
from model.tokenizer import load_tokenizer
from tests.conftest import TINY, chat, run_here, write_jsonl

CPU = torch.device("cpu")

SEEDS = range(200)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of documents, short and long, of which no two are alike."""
    folder, sizes = tmp_path_factory.mktemp("texts"), np.random.default_rng(0).integers(1, 40, 90)
    records = [{"text": f"{i}" + " one" * int(size)} for i, size in enumerate(sizes)]
    paths = [write_jsonl(folder / "a.jsonl", records[:50])]
    paths += [write_jsonl(folder / "b.jsonl", records[50:])]
    return PretrainDataset(paths, load_tokenizer(), 64)


def evenly(drawn, of, share):
    """Whether each of the items was drawn about as often as its share says; drawn has a set per
    seed. Five standard deviations: a right drawing fails once in a hundred thousand times.
    """
    counts = np.array([sum(item in one for one in drawn) for item in of])
    limit = 5 * np.sqrt(len(drawn) * share * (1 - share)) + 1
    return bool((np.abs(counts - len(drawn) * share) < limit).all())


@pytest.mark.parametrize("again", ["the same path", "a link", "a copy"])
def test_a_file_given_twice_is_refused(tmp_path, again):
    """What is held out of one would be trained on in the other."""
    path = write_jsonl(tmp_path / "a.jsonl", [chat("Hi", f"{i}") for i in range(9)])
    other = path if again == "the same path" else tmp_path / "b.jsonl"
    if again == "a copy":
        other.write_bytes(path.read_bytes())
    elif again == "a link":
        other.hardlink_to(path)
    for options in ({}, {"cache_dir": tmp_path / "cache"}):
        with pytest.raises(UserError, match=r"a.jsonl.*leak into"):
            SFTDataset([path, other], load_tokenizer(), **options)
    flags = ["--from_weight", "none", "--data_path", path, other, "--save_dir", tmp_path / "out"]
    done = run_here("trainer/train_full_sft.py", *flags, *TINY)
    assert done.returncode == 2 and "leak into" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [SFTDataset, PretrainDataset])
def test_what_fits_exactly_is_whole_and_one_token_more_is_cut(tmp_path, kind):
    turns, text = chat("Hi", "one two three", "Ho", "four five"), {"text": "one two three four"}
    path = write_jsonl(tmp_path / "x.jsonl", [turns if kind is SFTDataset else text])
    ((whole, labels),) = kind(path, load_tokenizer(), 1000)
    ways = ("truncate", "split", "drop") if kind is SFTDataset else (None,)
    for options in ({"overlong": way} if way else {} for way in ways):
        data = kind(path, load_tokenizer(), len(whole), **options)
        assert (len(data), data.num_too_long, data.num_dropped) == (1, 0, 0)
        assert data[0][0].tolist() == whole.tolist() and data[0][1].tolist() == labels.tolist()
        data = kind(path, load_tokenizer(), len(whole) + 1, **options)
        assert (len(data), data.num_too_long) == (1, 0)
    data = kind(path, load_tokenizer(), len(whole) - 1)
    assert data.num_too_long == 1 and max(data.lengths) < len(whole)
    if kind is SFTDataset:  # the newline after the last answer is cut, and no more
        assert data[0][0].tolist() == whole[:-1].tolist()


@pytest.mark.parametrize("kind, name", [(SFTDataset, "sft"), (PretrainDataset, "pretrain")])
def test_the_supervised_tokens_of_a_record_are_those_with_a_label(data, kind, name):
    """But the first, which nothing predicts."""
    found = kind(data / f"{name}.jsonl", load_tokenizer(), 1000)
    labels = [int((labels[1:] != IGNORE).sum()) for _, labels in found]
    assert found.files[0].supervised.tolist() == labels
    assert found.lengths.tolist() == [len(input_ids) for input_ids, _ in found]


def orders(dataset, packing):
    """Of each of 20 epochs, the lengths of the longest document of each row, as they come."""
    args = SimpleNamespace(
        seed=1, packing=packing, max_seq_len=64, batch_size=1, accumulation_steps=1
    )
    for epoch in range(20):
        plan = epoch_plan(dataset, range(len(dataset)), args, epoch)
        rows = [row for ((row,),) in plan]
        yield [max(dataset.lengths[sample] for sample in row) for row in rows]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_come_shuffled_and_not_in_the_order_of_their_lengths(texts, packing):
    found = list(orders(texts, packing))
    assert len({tuple(lengths) for lengths in found}) == 20
    correlations = [np.corrcoef(range(len(lengths)), lengths)[0, 1] for lengths in found]
    assert abs(np.mean(correlations)) < 0.3  # 1 or -1 where they are sorted


def test_the_share_of_a_source_is_drawn_and_not_its_beginning(texts):
    rows = list(range(len(texts)))
    first, second = rows[:50], rows[50:]
    sources = [Source("a", 0.25), Source("b", 0.75)]
    mixed = [mix(rows, texts, sources, seed) for seed in SEEDS]
    share = round(0.25 * len(rows)) / len(first)  # each at most once
    assert all(len(one) == len(rows) for one in mixed)
    assert evenly([set(one) & set(first) for one in mixed], first, share)
    more = round(0.75 * len(rows)) / len(second) - 1  # each once, and some twice
    twice = [{row for row in second if one.count(row) == 2} for one in mixed]
    assert all(set(one) >= set(second) for one in mixed) and evenly(twice, second, more)


@pytest.mark.parametrize("split", [0, 0.01])
def test_shares_of_tiny_files(tmp_path, split):
    """One record each rounded to none of either; what cannot be trained on is told."""
    flags = [*TINY, "--from_weight", "none", "--max_seq_len", 64, "--save_dir", tmp_path]
    flags += ["--val_split", split, "--data_path"]
    flags += [f"{write_jsonl(tmp_path / f'{n}.jsonl', [chat('Hi', n)])}:0.5" for n in ("a", "b")]
    done = run_here("trainer/train_full_sft.py", *flags)
    if split:
        assert done.returncode == 2 and "a.jsonl:0.5 has no training sample" in done.stderr
    else:
        assert done.returncode == 0 and "2 samples" in done.stdout, done.stderr


def test_each_source_with_a_share_has_at_least_one_sample(texts):
    sources = [Source("a", 0.001), Source("b", 1.0)]
    mixed = mix(list(range(len(texts))), texts, sources, 1)
    assert sum(sample < 50 for sample in mixed) == 1


def test_replayed_text_is_drawn_and_not_its_beginning(texts, tmp_path):
    """In stretches of up to 40 tokens, each beginning with a document."""
    path = write_jsonl(tmp_path / "x.jsonl", [chat("Hi", f"{i}") for i in range(20)])
    talks, drawn = SFTDataset(path, load_tokenizer()), []
    begin, files = talks.samples, talks.files
    for seed in SEEDS:
        talks.samples, talks.files = begin, files
        added = talks.add_replay(texts, 600, 40, seed)
        assert list(added) == list(range(20, len(talks)))
        lengths = talks.lengths[20:]
        assert lengths.max() == 40 and 600 <= lengths.sum() < 640
        drawn.append({tuple(row) for row in talks.samples[20:].tolist()})
    talks.samples, talks.files = begin, files
    talks.add_replay(texts, 10**9, 40, 0)
    everything = [tuple(row) for row in talks.samples[20:].tolist()]
    assert len({row[:2] for row in everything}) == len(everything)  # none twice
    share = sum(map(len, drawn)) / len(drawn) / len(everything)
    assert evenly(drawn, everything, share)
    of_file = {1: texts.files[0], 2: texts.files[1]}
    for file, record, start, end in everything:
        assert start == of_file[file].offsets[record] and end - start <= 40


def test_every_row_validates_under_some_seed(texts):
    rows = list(range(len(texts)))
    held_out = [split_samples(texts, 0.3, seed)[1] for seed in SEEDS]
    assert evenly([set(one) for one in held_out], rows, 0.3)
    assert sorted(split_samples(texts, 0.3, 5)[0] + held_out[5]) == rows
    # Of two files alike in length, not the same places.
    places = [
        ({row for row in one if row < 40}, {row - 50 for row in one if row >= 50})
        for one in held_out
    ]
    assert sum(one == other for one, other in places) < 5


def test_every_record_is_in_each_part_under_some_seed():
    drawn = [assign_parts(["a", "b"] * 30, [7, 2, 1], seed) for seed in SEEDS]
    for part, share in enumerate((0.7, 0.2, 0.1)):
        chosen = [{i for i, p in enumerate(one) if p == part} for one in drawn]
        assert all(len(one) == 60 * share for one in chosen)
        assert evenly(chosen, range(60), share)


def test_a_long_conversation_is_split_behind_its_answers():
    """Nine tokens; answers end at the third and the seventh."""
    ids, mask = np.array([9, 8, 2, 9, 9, 8, 2, 9, 9]), np.array([0, 1, 1, 0, 0, 1, 1, 0, 0])
    dataset = SFTDataset.__new__(SFTDataset)
    for overlong, limit, spans in (
        ("split", 4, [(0, 3), (3, 7), (7, 9)]),
        ("split", 3, [(0, 3), (3, 6), (5, 7), (7, 9)]),  # in the middle: a token is seen again
        ("truncate", 4, [(0, 3)]),
        ("truncate", 7, [(0, 7)]),
        ("drop", 4, []),
    ):
        dataset.overlong = overlong
        assert dataset.split_long(ids, mask, limit) == spans, (overlong, limit)


def test_each_epoch_of_a_run_has_its_own_order(data):
    dataset = SFTDataset(data / "sft.jsonl", load_tokenizer(), 64)
    args = SimpleNamespace(
        seed=1, packing=False, batch_size=3, accumulation_steps=2, max_seq_len=64, epochs=3,
        num_workers=0,
    )  # fmt: skip
    runtime = SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=1)
    samples = list(range(len(dataset)))
    plan, taken = StepPlan(dataset, samples, args, runtime), []
    for batches in plan.steps_after(0):
        assert len(batches[0][0]) <= 3
        taken.append(plan.step_samples)
    steps = [step for epoch in range(3) for step in epoch_plan(dataset, samples, args, epoch)]
    expected = [flatten(flatten(step)) for step in steps]
    assert taken == expected and taken[: len(taken) // 3] != taken[-(len(taken) // 3) :]
    rest = StepPlan(dataset, samples, args, runtime)
    later = [list(rest.step_samples) for _ in rest.steps_after(len(taken) - 3)]
    assert later == taken[-3:]
