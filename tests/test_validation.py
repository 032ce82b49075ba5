"""Validation of several sources, in the log and in the picture."""

import json

import pytest
import torch

from dataset.lm_dataset import SFTDataset
from dataset.plan import split_rows
from tests.conftest import TINY, chat, sft, write_jsonl
from trainer import checkpoint
from trainer.metrics import MetricsLog


def test_each_source_has_a_validation_loss_of_its_own(data, tmp_path, monkeypatch):
    other = write_jsonl(
        tmp_path / "other.jsonl", [chat("Hello?", f"Hello, {i}!") for i in range(30)]
    )
    files, out = [data / "sft.jsonl", other], tmp_path / "out"
    # The rate is zero: what the log says is true of the weights that are saved.
    how = ["--from_weight", "none", *TINY, "--eval_split", 0.2, "--learning_rate", 0]
    sft(out, "--data_path", *files, *how, "--loss_curve", tmp_path / "curve.png")
    line = json.loads((out / "logs/full_sft_32.jsonl").read_text(encoding="utf-8").split("\n")[-2])

    model, tokenizer = checkpoint.build(checkpoint.load(out / "full_sft_32.pth"), "it")
    dataset = SFTDataset(files, tokenizer, max_length=96)
    _, rows = split_rows(dataset, 0.2, seed=1)
    losses, counts = {name: 0.0 for name in ("sft.jsonl", "other.jsonl")}, {}
    for row in rows:
        ids, labels = dataset[row]
        name = files[dataset.rows[row, 0]].name
        with torch.no_grad():
            log_p = model(ids[None])[0, :-1].log_softmax(-1)
        learned = labels[1:] >= 0
        losses[name] -= log_p[learned, labels[1:][learned]].sum().item()
        counts[name] = counts.get(name, 0) + int(learned.sum())
    assert set(counts) == set(losses)
    means = {name: losses[name] / counts[name] for name in losses}
    assert line["val_losses"] == pytest.approx(means, rel=1e-5)
    assert line["val_loss"] == pytest.approx(sum(losses.values()) / sum(counts.values()), rel=1e-5)
    assert (tmp_path / "curve.png").stat().st_size > 10_000

    drawn = []
    plot = pytest.importorskip("matplotlib.axes").Axes.plot
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda *a, **k: drawn.append(k["label"]) or plot(*a, **k)
    )
    MetricsLog(out / "logs/full_sft_32.jsonl", 10**6).draw(tmp_path / "again.png")
    of_sources = ["validation, other.jsonl", "validation, sft.jsonl"]
    assert drawn == ["training", "validation", *of_sources]


def test_files_of_one_name_are_told_apart_and_a_single_one_is_not_named(data, tmp_path):
    (tmp_path / "b").mkdir()
    twin = tmp_path / "b" / "sft.jsonl"
    twin.write_bytes((data / "sft.jsonl").read_bytes())
    how = ["--from_weight", "none", *TINY, "--eval_split", 0.2]
    for files in ([data / "sft.jsonl", twin], [twin]):
        out = tmp_path / str(len(files))
        sft(out, "--data_path", *files, *how)
        last = (out / "logs/full_sft_32.jsonl").read_text(encoding="utf-8").split("\n")[-2]
        expected = set(map(str, files)) if len(files) > 1 else set()
        assert set(json.loads(last).get("val_losses", {})) == expected
