"""Distillation: the formula, who learns, and a whole run."""

import copy
import json

import pytest
import torch

from dataset.errors import UserError
from model.causal_lm import CausalLM, ModelConfig
from model.distillation import Distillation
from model.loss import IGNORE
from tests.conftest import TINY, write_jsonl
from trainer import checkpoint, train_distillation, train_tokenizer

SMALL = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2}


def small(seed, hidden_size=32):
    torch.manual_seed(seed)
    return CausalLM(ModelConfig(hidden_size=hidden_size, **SMALL))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 8), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = labels[2, 2] = IGNORE
    return ids, labels


def test_the_loss_is_the_formula(batch):
    ids, labels = batch
    student, teacher, T, alpha = small(1, 16), small(2), 3.0, 0.3
    found = Distillation(student, teacher, alpha, T)(ids, labels=labels)
    expected = torch.zeros(())
    ours, theirs = (model(ids).double() for model in (student, teacher))
    for row in range(3):
        for place in range(7):
            label = labels[row, place + 1]
            if label == IGNORE:
                continue
            q, p = ours[row, place], theirs[row, place]
            expected = expected - alpha * q.softmax(0)[label].log()
            p, q = (p / T).softmax(0), (q / T).softmax(0)
            expected = expected + (1 - alpha) * T**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-4, rtol=1e-5)


def test_with_alpha_1_or_a_teacher_like_itself_it_is_sft(batch):
    ids, labels = batch
    student = small(1)
    plain = student(ids, labels=labels)
    torch.testing.assert_close(Distillation(student, small(2), 1.0, 2.0)(ids, labels=labels), plain)
    twin = Distillation(student, copy.deepcopy(student), 0.5, 2.0)(ids, labels=labels)
    torch.testing.assert_close(twin, 0.5 * plain)


def test_the_student_alone_learns(batch):
    ids, labels = batch
    student, teacher = small(1, 16), small(2)
    module = Distillation(student, teacher, 0.0, 2.0).train()
    assert not teacher.training and len(list(module.parameters())) == len([*student.parameters()])
    module(ids, labels=labels).backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in student.parameters())


def test_only_supervised_positions_count(batch):
    ids, labels = batch
    student, teacher = small(1), small(2)
    one = Distillation(student, teacher, 0.5, 2.0)(ids, labels=labels)
    forward = teacher.forward

    def other(input_ids, *where):  # what the teacher thinks elsewhere does not matter
        logits = forward(input_ids, *where)
        logits[:, :-1][labels[:, 1:] == IGNORE] += torch.randn(50)
        return logits

    teacher.forward = other
    assert torch.equal(Distillation(student, teacher, 0.5, 2.0)(ids, labels=labels), one)


def distill(trained, data, out, *more):
    flags = ["--teacher_weight", trained / "full_sft_32.pth", "--data_path", data / "sft.jsonl"]
    flags += ["--save_dir", out, "--batch_size", 2, "--max_seq_len", 96, "--log_interval", 1]
    flags += [*TINY, "--hidden_size", 16, "--student", "none", *more]
    train_distillation.main(list(map(str, flags)))


def test_a_run_and_its_resumption(trained, data, tmp_path, capsys):
    distill(trained, data, tmp_path / "whole", "--distill_alpha", 0.2)
    assert "taught by" in capsys.readouterr().out
    lines = (tmp_path / "whole/logs/distilled_16.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
    steps = json.loads(lines[-1])["step"]
    parts = tmp_path / "parts"
    distill(trained, data, parts, "--distill_alpha", 0.2, "--save_interval", steps // 2)
    folder = parts / "checkpoints"
    earlier = folder / f"distilled_16_step{steps // 2:06d}.pth"
    earlier.replace(folder / "distilled_16_resume.pth")
    train_distillation.main(["--from_resume", "1", "--save_dir", str(parts)])
    one, other = (
        checkpoint.load(tmp_path / f"{name}/distilled_16.pth")["model"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_teacher_with_another_tokenizer_is_refused(trained, data, tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "one two three " * 50}] * 3)
    path = tmp_path / "tokenizer.json"
    flags = ["--data_path", text, "--vocab_size", 300, "--out", path]
    train_tokenizer.main(list(map(str, flags)))
    with pytest.raises(UserError, match="tokenizer"):
        distill(trained, data, tmp_path / "out", "--tokenizer_path", path)
