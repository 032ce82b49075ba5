"""Validation of several sources, in the log and in the picture; the best weights of every way to
fine-tune.
"""

import json

import pytest
import torch

from dataset.lm_dataset import SFTDataset
from dataset.step_plan import split_samples
from model.weights import build_model, load
from tests.conftest import TINY, chat, curves_of, sft, write_jsonl
from trainer import train_distillation, train_full_sft


def test_each_source_has_a_validation_loss_of_its_own(data, tmp_path):
    other = write_jsonl(
        tmp_path / "other.jsonl", [chat("Hello?", f"Hello, {i}!") for i in range(30)]
    )
    files, out = [data / "sft.jsonl", other], tmp_path / "out"
    # The rate moves no weight: what the log says is true of the weights that are saved.
    how = ["--from_weight", "none", *TINY, "--val_split", 0.2, "--learning_rate", 1e-12]
    sft(out, "--data_path", *files, *how)
    log = (out / "logs/full_sft_32.jsonl").read_text(encoding="utf-8").splitlines()
    line = json.loads(log[-1])

    model, tokenizer = build_model(load(out / "full_sft_32.pth"), "it")
    dataset = SFTDataset(files, tokenizer, max_length=96)
    _, rows = split_samples(dataset, 0.2, seed=1)
    losses, counts = {name: 0.0 for name in ("sft.jsonl", "other.jsonl")}, {}
    for row in rows:
        ids, labels = dataset[row]
        name = files[dataset.samples[row, 0]].name
        with torch.no_grad():
            log_p = model(ids[None])[0, :-1].log_softmax(-1)
        learned = labels[1:] >= 0
        losses[name] -= log_p[learned, labels[1:][learned]].sum().item()
        counts[name] = counts.get(name, 0) + int(learned.sum())
    assert set(counts) == set(losses)
    means = {name: losses[name] / counts[name] for name in losses}
    assert line["val_losses"] == pytest.approx(means, rel=1e-5)
    assert line["val_loss"] == pytest.approx(sum(losses.values()) / sum(counts.values()), rel=1e-5)
    of_sources = ["validation, other.jsonl", "validation, sft.jsonl"]
    curves = curves_of(out / "logs/full_sft_32_loss.svg")
    assert list(curves) == ["training", "validation", *of_sources]
    points = [line for line in map(json.loads, log) if line["val_loss"]]
    assert all(len(curves[label]) == len(points) for label in of_sources)


def test_files_of_one_name_are_told_apart_and_a_single_one_is_not_named(data, tmp_path):
    (tmp_path / "b").mkdir()
    twin = tmp_path / "b" / "sft.jsonl"
    twin.write_bytes((data / "sft.jsonl").read_bytes() + b"\n")  # one file twice is refused
    how = ["--from_weight", "none", *TINY, "--val_split", 0.2]
    for files in ([data / "sft.jsonl", twin], [twin]):
        out = tmp_path / str(len(files))
        sft(out, "--data_path", *files, *how)
        last = (out / "logs/full_sft_32.jsonl").read_text(encoding="utf-8").split("\n")[-2]
        expected = set(map(str, files)) if len(files) > 1 else set()
        assert set(json.loads(last).get("val_losses", {})) == expected


KINDS = {
    "lora": ["--use_lora", 1],
    "new_tokens": ["--freeze_base", 1],
    "taught": ["--hidden_weight", 0.1],
    "mixed": [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_weights_of_every_way(
    kind, trained, data, shop_data, recorded, tmp_path, monkeypatch
):
    losses = iter([3.0, 2.0, 4.0, 5.0])
    script = train_distillation if kind == "taught" else train_full_sft
    monkeypatch.setattr(script, "validation_loss", lambda *_: {"val_loss": next(losses)})
    start = ["--from_weight", trained / "pretrain_32.pth", "--val_split", 0.1]
    start += ["--save_weight", "full_sft"]
    sources = {
        "new_tokens": [shop_data / "train.jsonl", "--extend_tokens", shop_data / "tokens.txt"],
        "mixed": [f"{data / 'sft.jsonl'}:0.7", f"{shop_data / 'train.jsonl'}:0.3"],
    }
    read = ["--data_path", *sources.get(kind, [data / "sft.jsonl"])]
    read = ["--offline_dir", recorded] if kind == "taught" else read
    every = ["--val_interval", 1, "--save_interval", 1, "--early_stop_patience", 2]
    sft(tmp_path, *start, *read, *KINDS[kind], *every, "--save_best_at_end", 1, script=script)
    name = "lora_full_sft_32" if kind == "lora" else "full_sft_32"
    kept = load(tmp_path / f"{name}.pth")
    assert kept["training"]["step"] == 2
    folder = tmp_path / "checkpoints"
    steps = {
        path.name.removeprefix(f"{name}_"): load(path)["run"]["step"]
        for path in folder.glob("*.pth")
        if "best" not in path.name
    }
    assert steps == {"resume.pth": 4, "step000003.pth": 3}
    last = load(folder / f"{name}_resume.pth")["model"]
    assert set(kept["model"]) <= set(last)
    assert any(not torch.equal(weight, last[name]) for name, weight in kept["model"].items())
    assert ("lora" in kept) == (kind == "lora")
    assert not any("projections" in name for name in kept["model"])
