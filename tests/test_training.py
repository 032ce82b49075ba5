"""The two loops: exact gradients however a step is split, exact resume, several processes."""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from common import IGNORE, UserError
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.step_plan import Source, batches, epoch_plan, flatten, mix, split_samples
from model import causal_lm
from model import loss as model_loss
from model.causal_lm import CausalLM, ModelConfig
from model.chat_template import render
from model.tokenizer import load_tokenizer
from model.weights import load
from tests.conftest import ROOT, TINY, chat, fsdp, run, run_here, torchrun, write_jsonl
from trainer import train_full_sft, train_pretrain, trainer_utils, training_run
from trainer.flags import parse_args, training_parser
from trainer.optimizer import clip_and_step, learning_rate, make_optimizer

CPU = torch.device("cpu")

SCRIPTS = {"pretrain": train_pretrain, "full_sft": train_full_sft}
FLAGS = [*TINY, "--from_weight", "none", "--log_interval", "1", "--val_interval", "4"]


def flags(data, out, stage="full_sft", **more):
    name = {"pretrain": "pretrain.jsonl", "full_sft": "sft.jsonl"}[stage]
    more = {"data_path": data / name, "save_dir": out, "batch_size": 8, "packing": 0, **more}
    return FLAGS + [str(part) for k, v in more.items() for part in (f"--{k}", v)]


def weights(out, name="full_sft_32"):
    return load(out / f"{name}.pth")["model"]


def log(out, name="full_sft_32"):
    lines = (out / "logs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    timings = ("tokens_per_s", "data_wait_s")
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]


def stopped_and_resumed(script, command, out, name, monkeypatch):
    """The weights and the log of a run of a train script that is stopped at step 3, and resumed."""
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopSignal", StopAt(3))
        with pytest.raises(SystemExit):
            script.main(command)
    save_weight = ["--save_weight", name.removesuffix("_32")]
    script.main(["--save_dir", str(out), "--from_resume", "1", *save_weight])
    return weights(out, name), log(out, name)


def assert_equal(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"atol": 0, "rtol": 0}))


def assert_like_one(folder, name, logged, start):
    """The run of two processes in folder/two has the weights and the log of that in folder/one, and
    has moved away from the weights in the file start.
    """
    one, two = (weights(folder / part, name) for part in ("one", "two"))
    before = load(start)["model"]
    assert max((one[key] - before[key]).abs().max() for key in one) > 1e-3
    assert_equal(one, two, atol=2e-5, rtol=1e-4)
    logs = [log(folder / part, name) for part in ("one", "two")]
    for key in logged.split():
        found = [[line.get(key) or 0 for line in lines] for lines in logs]
        assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("batch_size, accumulation_steps", [(8, 1), (4, 2), (1, 8), (3, 3)])
def test_a_steps_gradient_does_not_depend_on_its_split(
    data, tmp_path, monkeypatch, batch_size, accumulation_steps
):
    """One SGD step at rate 1 moves the weights by the gradient; plain autograd says what it is."""

    def sgd(model, args):
        start.update({k: v.clone() for k, v in model.state_dict().items()})
        return torch.optim.SGD(model.parameters(), lr=1.0)

    start = {}
    monkeypatch.setattr(train_full_sft, "make_optimizer", sgd)
    lines = (data / "sft.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "sft.jsonl").write_text("\n".join(lines), encoding="utf-8")
    split = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
    train_full_sft.main(
        flags(tmp_path, tmp_path, **split, learning_rate=1, grad_clip=0, val_split=0)
    )

    model = CausalLM(ModelConfig(**load(tmp_path / "full_sft_32.pth")["config"]))
    model.load_state_dict(start)
    dataset = SFTDataset(tmp_path / "sft.jsonl", load_tokenizer())
    rows = [dataset[i] for i in range(8)]
    assert len({int((labels != IGNORE).sum()) for _, labels in rows}) > 2  # ragged masks
    input_ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], True, 0)
    labels = torch.nn.utils.rnn.pad_sequence([row for _, row in rows], True, IGNORE)
    logits = model(input_ids)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    moved = weights(tmp_path)
    for name, weight in model.named_parameters():
        gradient = start[name] - moved[name]
        torch.testing.assert_close(gradient, weight.grad, atol=1e-6, rtol=1e-4)
    assert abs(log(tmp_path)[0]["loss"] - loss.item()) < 1e-4


class StopAt:
    """In StopSignal's place: asks for a stop after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self):
        return self

    @property
    def received(self):
        self.steps -= 1
        return self.steps == 0


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("use_moe, packing", [(0, 0), (0, 1), (1, 1)])
def test_a_resumed_run_ends_in_the_same_bits(data, tmp_path, monkeypatch, stage, use_moe, packing):
    main = SCRIPTS[stage].main
    more = {"epochs": 2, "dropout": 0.1, "accumulation_steps": 2, "batch_size": 4}
    more |= {"stage": stage, "use_moe": use_moe, "packing": packing}
    if packing:
        more |= {"max_seq_len": 96, "batch_size": 2 if stage == "full_sft" else 1}
    main(flags(data, tmp_path / "whole", **more))
    for steps in (3, 1, 2):  # in the first epoch, at its end, in the second
        with monkeypatch.context() as patch:
            patch.setattr(training_run, "StopSignal", StopAt(steps))
            with pytest.raises(SystemExit) as stopped:
                resume = ["--from_resume", "1"] if (tmp_path / "parts").exists() else []
                main([*flags(data, tmp_path / "parts", **more), *resume])
            assert stopped.value.code == 130
    main([*flags(data, tmp_path / "parts", **more), "--from_resume", "1"])
    name = f"{stage}_32{'_moe' if use_moe else ''}"
    assert_equal(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))
    assert log(tmp_path / "whole", name) == log(tmp_path / "parts", name)
    assert log(tmp_path / "whole", name)[-1]["epoch"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process there at once")
@pytest.mark.parametrize("micro_batch", [5, 6])  # the first and the last of the third step's two
def test_sigterm_within_a_step_stops_after_it_and_nothing_is_lost(
    data, tmp_path, monkeypatch, micro_batch
):
    more = {"accumulation_steps": 2, "batch_size": 4, "dropout": 0.1}
    train_full_sft.main(flags(data, tmp_path / "whole", **more))
    calls = []

    def loss(x, weight, labels):
        calls.append(1)
        if len(calls) == micro_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return model_loss.summed_cross_entropy(x, weight, labels)

    with monkeypatch.context() as patch:
        patch.setattr(causal_lm, "summed_cross_entropy", loss)
        with pytest.raises(SystemExit) as stopped:
            train_full_sft.main(flags(data, tmp_path / "parts", **more))
    assert stopped.value.code == 130 and log(tmp_path / "parts")[-1]["step"] == 3
    train_full_sft.main([*flags(data, tmp_path / "parts", **more), "--from_resume", "1"])
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def test_a_resumed_run_takes_over_the_flags_that_are_not_given(data, tmp_path, monkeypatch, capsys):
    more = {"epochs": 2, "dropout": 0.1, "learning_rate": 0.003, "val_split": 0.1, "seed": 5}
    train_full_sft.main(flags(data, tmp_path / "whole", **more))
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopSignal", StopAt(3))
        with pytest.raises(SystemExit):
            train_full_sft.main(flags(data, tmp_path / "parts", **more))
    capsys.readouterr()
    train_full_sft.main(
        ["--save_dir", str(tmp_path / "parts"), "--from_resume", "1", "--save_interval", "7"]
    )
    assert "save_interval is 7 and was 500\n" in capsys.readouterr().out
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_finished_run_resumed_does_nothing_and_says_so(data, tmp_path, capsys):
    train_full_sft.main(flags(data, tmp_path))
    before = weights(tmp_path)
    train_full_sft.main([*flags(data, tmp_path), "--from_resume", "1"])
    assert "This run is already finished" in capsys.readouterr().out
    assert_equal(before, weights(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to a child")
def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    command = flags(data, tmp_path, epochs=2000)
    process = subprocess.Popen(
        [sys.executable, ROOT / "trainer/train_full_sft.py", *command],
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "logs/full_sft_32.jsonl").exists():
        time.sleep(0.1)
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Resume with:\npython trainer/train_full_sft.py --from_resume 1 --save_weight" in printed
    resume = load(tmp_path / "checkpoints/full_sft_32_resume.pth")
    assert 0 < resume["run"]["step"] < 2000 * 5


@pytest.mark.parametrize("processes, parallel, packing", [(3, "ddp", 1)])  # two: test_step.py
def test_several_processes_end_in_the_weights_of_one(data, tmp_path, processes, parallel, packing):
    shared = {"epochs": 2, "val_interval": 3, "packing": packing, "max_seq_len": 96}
    more = {"batch_size": 1, "accumulation_steps": 2, "parallel": parallel, "sample_interval": 3}
    train_full_sft.main(flags(data, tmp_path / "one", batch_size=2 * processes, **shared))
    script = ROOT / "trainer/train_full_sft.py"
    several = flags(data, tmp_path / "several", **(shared | more))
    done = torchrun(processes, script, *several, cwd=tmp_path, fork=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starting from scratch") == 1  # one process speaks
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "several"), atol=2e-5, rtol=1e-4)
    for one, other in zip(log(tmp_path / "one"), log(tmp_path / "several"), strict=True):
        assert one["tokens"] == other["tokens"]
        assert abs(one["loss"] - other["loss"]) < 1e-5 * (1 + one["loss"])
        assert (one["val_loss"] is None) == (other["val_loss"] is None)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_one_sample_held_out_is_a_validation(data, tmp_path, stage):
    one = tmp_path / "one.jsonl"
    name = {"pretrain": "pretrain.jsonl", "full_sft": "sft.jsonl"}[stage]
    one.write_text((data / name).read_text(encoding="utf-8").splitlines(True)[0], encoding="utf-8")
    SCRIPTS[stage].main(flags(data, tmp_path, stage, val_data_path=one))
    lines = log(tmp_path, f"{stage}_32")
    assert [line["step"] for line in lines if line.get("val_loss")] == [4, len(lines)]


def test_pretraining_in_two_processes_ends_in_the_weights_of_one(data, tmp_path):
    shared = {"epochs": 2, "packing": 1, "max_seq_len": 64, "num_key_value_heads": 1, "seed": 3}
    train_pretrain.main(flags(data, tmp_path / "one", "pretrain", batch_size=4, **shared))
    two = flags(data, tmp_path / "two", "pretrain", batch_size=1, accumulation_steps=2, **shared)
    done = torchrun(2, ROOT / "trainer/train_pretrain.py", *two)
    assert done.returncode == 0, done.stderr
    one, two = (weights(tmp_path / part, "pretrain_32") for part in ("one", "two"))
    assert_equal(one, two, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", fsdp("fsdp")])
def test_a_run_of_two_processes_is_resumed_by_two_to_the_bit_and_by_one(data, tmp_path, parallel):
    shared = {"epochs": 2, "max_seq_len": 96, "packing": 1}
    (tmp_path / "stop.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.test_training import StopAt\n"
        "from trainer import train_full_sft as train, training_run\n"
        "training_run.StopSignal = StopAt(int(sys.argv.pop(1)))\n"
        "with train.torchrun_process(): train.main()\n",
        encoding="utf-8",
    )

    def two(out, steps, *more):
        command = flags(data, tmp_path / out, batch_size=2, parallel=parallel, **shared)
        stop = [tmp_path / "stop.py", steps, *command, *more]
        return torchrun(2, *stop)

    whole = two("whole", -1)
    assert whole.returncode == 0, whole.stderr
    stopped = two("two", 4)
    assert "Stopped at step 4" in stopped.stdout, stopped.stderr
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    resumed = two("two", -1, "--from_resume", 1)
    assert resumed.returncode == 0, resumed.stderr
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "two"))
    assert log(tmp_path / "whole") == log(tmp_path / "two")
    one = flags(data, tmp_path / "one", batch_size=4, **shared)
    done = run_here("trainer/train_full_sft.py", *one, "--from_resume", 1)
    assert "1 processes resume a run of 2" in done.stdout, done.stderr
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "one"), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("code", [0, 130])
def test_a_process_of_a_job_leaves_before_python_takes_itself_apart(code):
    program = f"""if True:
        import atexit, os, sys
        from trainer import runtime
        atexit.register(os.abort)
        with runtime.torchrun_process():
            print("done")
            sys.exit({code})
    """
    done = run("-c", program, cwd=ROOT, RANK="0")
    assert (done.returncode, done.stdout) == (code, "done\n")


@pytest.mark.parametrize("dtype", ["bf16", "auto"])
def test_lower_precision_keeps_fp32_weights(data, tmp_path, dtype):
    train_pretrain.main(flags(data, tmp_path, "pretrain", dtype=dtype, epochs=2))
    saved = load(tmp_path / "pretrain_32.pth")
    assert {weight.dtype for weight in saved["model"].values()} == {torch.float32}
    assert saved["training"]["dtype"] in ("bf16", "fp32")
    losses = [line["loss"] for line in log(tmp_path, "pretrain_32")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("bad, more", [(1, {"max_bad_steps": 2}), (2, {})])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(
    data, tmp_path, monkeypatch, capsys, bad, more
):
    calls = []

    def sometimes_nan(x, weight, labels):
        calls.append(1)
        loss = model_loss.summed_cross_entropy(x, weight, labels)
        return loss * math.nan if len(calls) == bad else loss

    monkeypatch.setattr(causal_lm, "summed_cross_entropy", sometimes_nan)
    train_full_sft.main(flags(data, tmp_path, **more))
    assert f"step {bad} is skipped" in capsys.readouterr().out and len(calls) > 5
    assert all(weight.isfinite().all() for weight in weights(tmp_path).values())


def test_too_many_bad_steps_in_a_row_save_point_at_the_data_and_stop(data, tmp_path, monkeypatch):
    calls = []

    def nan_from_the_third(x, weight, labels):
        calls.append(1)
        loss = model_loss.summed_cross_entropy(x, weight, labels)
        return loss * math.nan if len(calls) > 2 else loss

    monkeypatch.setattr(causal_lm, "summed_cross_entropy", nan_from_the_third)
    with pytest.raises(
        UserError, match=r"2 consecutive steps .* at step 4.*sft.jsonl, lines"
    ) as error:
        train_full_sft.main(flags(data, tmp_path, max_bad_steps=2, epochs=2))
    lines = [int(n) for n in re.findall(r"\d+", str(error.value).split("lines [")[1].split("]")[0])]
    assert len(lines) == 8 and all(1 <= line <= 40 for line in lines)
    saved = load(tmp_path / "checkpoints/full_sft_32_resume.pth")
    assert saved["run"]["step"] == 4
    assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_rolling_and_best_checkpoints(data, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, math.nan, 2.6, 1.0, 0.5])
    monkeypatch.setattr(train_full_sft, "validation_loss", lambda *_: {"val_loss": next(losses)})
    more = {"epochs": 3, "val_interval": 2, "save_interval": 2, "keep_checkpoints": 2}
    more |= {"early_stop_patience": 3, "save_best_at_end": 1}
    train_full_sft.main(flags(data, tmp_path, **more))  # 15 steps, were it not for the patience
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pth"))
    assert names == [
        "full_sft_32_best.pth",
        "full_sft_32_resume.pth",
        "full_sft_32_step000006.pth",
        "full_sft_32_step000008.pth",
    ]
    folder = tmp_path / "checkpoints"
    assert load(folder / names[1])["run"]["step"] == 10
    assert load(folder / names[2])["run"]["step"] == 6
    best = load(folder / names[0])
    assert best["training"]["step"] == 4 and best["stage"] == "full_sft"
    assert_equal(best["model"], weights(tmp_path))
    train_full_sft.main([*flags(data, tmp_path, **more), "--from_resume", "1"])  # does nothing
    assert_equal(best["model"], weights(tmp_path))


def test_the_best_weights_can_be_those_that_answer_best(data, tmp_path, monkeypatch):
    scores = iter([0.2, 0.6, 0.4])
    score = lambda task, *_: next(scores) * len(task.problems)  # noqa: E731
    monkeypatch.setattr(train_full_sft.TaskScore, "count_solved", score)
    more = {"val_interval": 2, "best_metric": "tiny_world"}
    train_full_sft.main(flags(data, tmp_path, **more))
    best = load(tmp_path / "checkpoints/full_sft_32_best.pth")
    assert best["training"]["step"] == 4 and best["training"]["best_score"] == 0.6


def test_muon_moves_the_layers_matrices_and_resumes_to_the_bit(data, tmp_path, monkeypatch):
    more = {"optimizer": "muon", "epochs": 2, "weight_decay": 0, "learning_rate": 0.01}
    train_full_sft.main(flags(data, tmp_path / "whole", **more))
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopSignal", StopAt(3))
        with pytest.raises(SystemExit):
            train_full_sft.main(flags(data, tmp_path / "parts", **more))
    train_full_sft.main(["--save_dir", str(tmp_path / "parts"), "--from_resume", "1"])
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    saved = load(tmp_path / "parts/checkpoints/full_sft_32_resume.pth")["optimizer"]
    moved = [values for values in saved["state"].values() if "momentum_buffer" in values]
    assert len(moved) == 2 * 7  # two layers: q, k, v, o, gate, up, down

    # But for its size, the first step of a matrix has most singular values near 1.
    start = CausalLM(ModelConfig(**load(tmp_path / "whole/full_sft_32.pth")["config"]))
    model = copy.deepcopy(start)
    args = args_of(**(more | {"learning_rate": 1.0}))
    ids = torch.randint(2048, (4, 50))
    model(ids, labels=ids).backward()
    make_optimizer(model, args).step()
    moved = [
        weight - before
        for (name, weight), before in zip(model.named_parameters(), start.parameters(), strict=True)
        if "proj" in name
    ]
    for step in moved:
        sizes = torch.linalg.svdvals(step.detach()) / (0.2 * max(step.shape) ** 0.5)
        assert sizes.max() < 1.4 and sizes.median() > 0.6


@pytest.mark.parametrize("use_moe", [0, 1])
def test_computing_layers_twice_to_save_memory_changes_no_bit(data, tmp_path, use_moe):
    for checkpointed in (0, 1):
        more = {"dropout": 0.1, "use_moe": use_moe, "grad_checkpoint": checkpointed}
        train_full_sft.main(flags(data, tmp_path / str(checkpointed), **more))
    name = f"full_sft_32{'_moe' if use_moe else ''}"
    assert_equal(weights(tmp_path / "0", name), weights(tmp_path / "1", name))


def test_metrics_have_their_documented_keys_and_the_loss_falls(trained):
    lines = (trained / "logs/full_sft_32.jsonl").read_text(encoding="utf-8").splitlines()
    keys = "step epoch tokens loss val_loss lr grad_norm tokens_per_s data_wait_s".split()
    assert all(list(json.loads(line)) == keys for line in lines)
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert last["loss"] < first["loss"] and last["val_loss"] is not None


def test_sft_starts_from_the_pretrained_weights_and_not_from_its_flags(trained):
    pretrained = load(trained / "pretrain_32.pth")
    tuned = load(trained / "full_sft_32.pth")
    assert tuned["config"] == pretrained["config"] and tuned["stage"] == "full_sft"
    assert set(tuned) == {"format", "stage", "config", "tokenizer", "model", "training"}
    distance = sum((tuned["model"][k] - w).norm() for k, w in pretrained["model"].items())
    assert 0 < distance < 0.5 * sum(w.norm() for w in pretrained["model"].values())


def args_of(**values):
    line = [str(part) for k, v in values.items() for part in (f"--{k}", v)]
    return parse_args(training_parser("", save_weight="x", batch_size=4, epochs=1), line)


def test_the_schedule_rises_peaks_and_ends_on_its_floor():
    args = args_of(learning_rate=0.5, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, 100, args) for step in range(100)]
    assert 0 < rates[0] < rates[1] and max(rates) == 0.5 == rates[10]
    assert rates[-1] == pytest.approx(0.05)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[10 + 89 // 2] == pytest.approx(0.275, rel=0.03)  # half way down the cosine
    assert learning_rate(0, 1, args) == 0.5 and learning_rate(1, 2, args) > 0


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_plan_takes_every_row_once_the_same_rows_in_each_step(data, world_size, packing):
    dataset = SFTDataset(data / "sft.jsonl", load_tokenizer())
    rows = range(5, 35)
    shared = {"seed": 3, "packing": packing, "max_seq_len": 96}
    args = args_of(batch_size=2, accumulation_steps=6 // world_size, **shared)
    plans = [epoch_plan(dataset, rows, args, 1, rank, world_size) for rank in range(world_size)]
    single = epoch_plan(dataset, rows, args_of(batch_size=12, **shared), 1)
    for steps, (reference,) in zip(zip(*plans, strict=True), single, strict=True):
        assert len({len(micro_batches) for micro_batches in steps}) == 1  # no process waits
        taken = flatten(flatten(flatten(steps)))
        assert sorted(taken) == sorted(flatten(reference))
    assert sorted(row for (step,) in single for row in flatten(step)) == list(rows)
    assert epoch_plan(dataset, rows, args, 2) != epoch_plan(dataset, rows, args, 1)


@pytest.mark.parametrize("max_seq_len", [30, 96])
@pytest.mark.parametrize("kind, name", [(SFTDataset, "sft"), (PretrainDataset, "pretrain")])
def test_every_supervised_token_is_trained_once_per_epoch(data, kind, name, max_seq_len):
    """Counted over an epoch's batches, against the whole documents; none is cut but at its end."""
    more = {"overlong": "split"} if kind is SFTDataset else {}
    dataset = kind(data / f"{name}.jsonl", load_tokenizer(), max_seq_len, **more)
    whole = kind(data / f"{name}.jsonl", load_tokenizer(), 10_000)
    expected = Counter(t for i in range(len(whole)) for t in whole[i][1][1:].tolist() if t != -100)
    args = args_of(batch_size=2, max_seq_len=max_seq_len)
    for epoch in range(2):
        plan = epoch_plan(dataset, range(len(dataset)), args, epoch)
        trained = Counter()
        for _, labels, *_ in batches(dataset, [rows for step in plan for rows in step], args, CPU):
            trained.update(label for label in labels.flatten().tolist() if label != -100)
        assert trained == expected


def test_the_validation_split_stays_when_the_data_grows(tmp_path):
    def held_out(count):
        records = [chat(f"What is {i}?", f"It is {i}. " * (1 + i % 9)) for i in range(count)]
        path = write_jsonl(tmp_path / f"{count}.jsonl", records)
        # Long ones are split into several rows, which stay on the same side.
        dataset = SFTDataset(path, load_tokenizer(), max_length=24, overlong="split")
        train, held = split_samples(dataset, 0.1, 1)
        records = [{int(dataset.samples[row, 1]) for row in rows} for rows in (train, held)]
        assert not records[0] & records[1] and sorted(train + held) == list(range(len(dataset)))
        return records[1]

    small, large = held_out(100), held_out(150)
    assert small == {record for record in large if record < 100} and 3 < len(small) < 25


def test_sources_are_mixed_by_weight_and_joined(data, tmp_path):
    paths = [data / "sft.jsonl", tmp_path / "other.jsonl"]
    write_jsonl(paths[1], [chat("Hello?", "Hello!")] * 10)
    dataset = SFTDataset(paths, load_tokenizer())
    count = {}
    for name, weights_of_files in {"joined": (None, None), "weights": (0.5, 1.5)}.items():
        sources = [Source(*pair) for pair in zip(paths, weights_of_files, strict=True)]
        rows = mix(range(50), dataset, sources, seed=1)
        count[name] = [sum(row < 40 for row in rows), sum(row >= 40 for row in rows)]
        assert set(range(40, 50)) <= set(rows)
    # 50 rows in all, a quarter of them from the first file.
    assert count == {"joined": [40, 10], "weights": [12, 38]}


def test_the_folder_that_it_is_started_from_does_not_matter(data, tmp_path):
    script = ROOT / "trainer/train_pretrain.py"
    there, here = tmp_path / "there", tmp_path / "here"
    done = run(script.name, *flags(data, there, "pretrain"), cwd=script.parent, fork=False)
    assert done.returncode == 0, done.stderr
    train_pretrain.main(flags(data, here, "pretrain"))
    assert_equal(weights(there, "pretrain_32"), weights(here, "pretrain_32"))


def test_sample_answers_are_shown_while_training_and_change_nothing(data, tmp_path, capsys):
    train_full_sft.main(flags(data, tmp_path / "quiet", dropout=0.1))
    train_full_sft.main(flags(data, tmp_path / "shown", dropout=0.1, sample_interval=1))
    assert capsys.readouterr().out.count("Who are you? ->") == 5
    assert_equal(weights(tmp_path / "quiet"), weights(tmp_path / "shown"))


def test_replay_counts_what_is_repeated_for_its_share(data, tmp_path):
    """20 times one conversation, and half as many tokens of text, in stretches of up to 64."""
    dataset, tokenizer = SFTDataset(data / "sft.jsonl", load_tokenizer(), 64), load_tokenizer()
    args = {"replay_path": data / "pretrain.jsonl", "replay_share": 0.5, "seed": 1}
    args |= {"max_seq_len": 64, "strict_data": False, "cache_dir": tmp_path}
    new = trainer_utils.replay(dataset, [0] * 20, SimpleNamespace(**args), tokenizer)
    wanted = 0.5 * 20 * int(dataset.lengths[0])
    assert wanted <= dataset.lengths[list(new)].sum() < wanted + 64


def test_the_speed_is_that_of_training_alone(data, tmp_path, monkeypatch):
    """A validation that takes long changes data_wait_s and tokens_per_s by nothing."""
    now = [0.0]

    def tick(seconds):
        now[0] += seconds

    def validation(*_):
        tick(1000)
        return {"val_loss": 1.0}

    def step(*given):
        tick(2)
        return clip_and_step(*given)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train_full_sft, "validation_loss", validation)
    monkeypatch.setattr(train_full_sft, "clip_and_step", step)
    train_full_sft.main(flags(data, tmp_path, val_interval=1, save_interval=1))
    lines = (tmp_path / "logs/full_sft_32.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    for before, line in zip(lines, lines[1:], strict=False):
        counted = line["tokens"] - lines[0]["tokens"]  # the first step does not count
        steps = line["step"] - 1
        assert line["tokens_per_s"] == pytest.approx(counted / (2 * steps), rel=1e-5)
        assert line["data_wait_s"] == before["data_wait_s"] == 0


def test_pretraining_text_can_be_mixed_in_and_all_of_it_is_learned(data, tmp_path, capsys):
    plain = SFTDataset(data / "sft.jsonl", load_tokenizer())
    mixed = SFTDataset(data / "sft.jsonl", load_tokenizer())
    documents = PretrainDataset(data / "pretrain.jsonl", load_tokenizer())
    added = mixed.add_replay(documents, 500, 96, seed=1)
    assert len(plain) == 40 and 5 < len(added) < 20
    assert all(torch.equal(*mixed[row]) for row in added)
    assert torch.equal(mixed[3][1], plain[3][1])
    more = {"replay_path": data / "pretrain.jsonl", "replay_share": 0.5, "val_split": 0}
    train_full_sft.main(flags(data, tmp_path, **more, max_seq_len=96))
    samples = int(re.search(r"(\d+) samples of", capsys.readouterr().out)[1])
    assert 45 < samples < 100


@pytest.mark.parametrize("chat", [False, True])
def test_a_sample_of_text_has_no_template_and_one_of_a_chat_has(chat, monkeypatch):
    prompts = []
    keep = lambda model, ids, **_: prompts.extend(ids) or [[20]]  # noqa: E731
    monkeypatch.setattr("model.generation.complete", keep)
    tokenizer, args = load_tokenizer(), SimpleNamespace(sample_prompt="Who?", use_compile=False)
    model = CausalLM(ModelConfig(hidden_size=32, num_hidden_layers=1))
    runtime = SimpleNamespace(rank=0, autocast=nullcontext())
    trainer_utils.show_sample(model, tokenizer, args, runtime, chat=chat)
    asked = [{"role": "user", "content": "Who?"}]
    text, (template, _) = tokenizer.encode("Who?").ids, render(asked, add_generation_prompt=True)
    assert prompts == [template if chat else text]
