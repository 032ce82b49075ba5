"""What a run leaves, whatever ends it: a finished run has its weights, a new run keeps the files of
the one before, and whatever decides the result is compared before a run goes on.
"""

import copy
import gc
import os
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import UserError
from model.weights import find_weights, load, save_tensors
from tests.conftest import chat, flags_read, run_here, write_jsonl
from tests.test_errors import refused
from tests.test_training import StopAt, assert_equal, flags, log, weights
from trainer import checkpoint, train_distillation, train_full_sft, trainer_utils, training_run
from trainer.optimizer import set_learning_rate
from trainer.training_run import MAY_CHANGE, Progress, RunSpec, TrainingRun
from trainer.training_run import resume as resume_run

SFT = "trainer/train_full_sft.py"
RESUME = "checkpoints/full_sft_32_resume.pth"


def stopped_at(step, command, monkeypatch, script=train_full_sft):
    """The run of these flags, stopped after some steps."""
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopSignal", StopAt(step))
        with pytest.raises(SystemExit):
            script.main(command)


def resume(out, *more):
    train_full_sft.main(["--save_dir", str(out), "--from_resume", "1", *map(str, more)])


def files(out):
    return {str(path.relative_to(out)) for path in out.rglob("*.pth")}


# ------------------------------------------------------------------------------- finished, or not


@pytest.mark.parametrize("best", [0, 1])
@pytest.mark.parametrize("left", ["nothing", "earlier weights"])
def test_a_finished_run_that_is_resumed_writes_the_weights_that_are_missing(
    data, tmp_path, monkeypatch, best, left
):
    """As after a kill, or a full disk, between the last checkpoint and the weights."""
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(train_full_sft, "validation_loss", lambda *_: {"val_loss": next(losses)})
    more = {"val_interval": 1, "save_interval": 1, "save_best_at_end": best}
    train_full_sft.main(flags(data, tmp_path, **more))
    expected = weights(tmp_path)
    last = load(tmp_path / RESUME)
    assert (load(tmp_path / "full_sft_32.pth")["training"]["step"] == 2) == best
    (tmp_path / "full_sft_32.pth").unlink()
    if left == "earlier weights":
        content = load(tmp_path / "checkpoints/full_sft_32_step000004.pth")
        save_tensors(tmp_path / "full_sft_32.pth", content)
    resume(tmp_path)
    assert_equal(expected, weights(tmp_path))
    assert torch.equal(expected["model.norm.weight"], last["model"]["model.norm.weight"]) != best


def test_weights_that_are_the_best_already_are_not_replaced_by_the_last(data, tmp_path):
    """The file of the best may be gone when a finished run is resumed once more."""
    train_full_sft.main(flags(data, tmp_path, val_interval=1, save_best_at_end=1))
    before = weights(tmp_path)
    (tmp_path / "checkpoints/full_sft_32_best.pth").unlink()
    with pytest.raises(UserError, match="full_sft_32_best.pth"):
        resume(tmp_path)
    assert_equal(before, weights(tmp_path))


def test_patience_begins_anew_with_each_better_validation():
    run = Progress()
    assert [run.note_score(score) for score in (-3, -4, -2, -5, -6)] == [
        True,
        False,
        True,
        False,
        False,
    ]
    for patience, is_finished in ((2, True), (3, False), (0, False)):
        args, spec = SimpleNamespace(early_stop_patience=patience), SimpleNamespace(total_steps=9)
        state = SimpleNamespace(args=args, spec=spec, progress=run)
        assert TrainingRun.is_finished.fget(state) == is_finished, patience


def test_a_new_run_under_an_old_name_keeps_the_old_files_until_it_is_complete(
    data, tmp_path, monkeypatch, capsys
):
    command = flags(data, tmp_path, save_interval=2)
    train_full_sft.main(command)
    old, before, old_log = weights(tmp_path), files(tmp_path), log(tmp_path)
    capsys.readouterr()
    stopped_at(1, [*command, "--seed", "5"], monkeypatch)  # the same again, then Ctrl-C
    assert "full_sft_32 is kept as full_sft_previous_32 until" in capsys.readouterr().out
    kept = {name.replace("full_sft_32", "full_sft_previous_32") for name in before}
    assert kept <= files(tmp_path)
    assert_equal(old, weights(tmp_path, "full_sft_previous_32"))
    assert log(tmp_path, "full_sft_previous_32") == old_log
    assert load(tmp_path / RESUME)["run"]["step"] == 1

    stopped_at(1, [*command, "--seed", "6"], monkeypatch)  # and again: neither is lost
    assert kept <= files(tmp_path) and "full_sft_previous2_32.pth" in files(tmp_path)
    assert_equal(old, weights(tmp_path, "full_sft_previous_32"))

    with pytest.raises(UserError, match="an earlier run's weights are full_sft_previous"):
        shutil.move(tmp_path / "full_sft_32.pth", tmp_path / "x")
        find_weights(tmp_path, "full_sft")
    shutil.copytree(tmp_path, tmp_path.with_name("other"))
    resume(tmp_path.with_name("other"), "--save_weight", "full_sft_previous", "--epochs", 2)
    assert log(tmp_path.with_name("other"), "full_sft_previous_32")[-1]["step"] == 10

    resume(tmp_path)
    assert not [name for name in files(tmp_path) if "previous" in name]
    assert log(tmp_path)[-1]["step"] == 5 and not list((tmp_path / "logs").glob("*previous*"))


def test_a_run_of_another_name_or_size_is_left_alone(data, tmp_path):
    """A name is no pattern: [1] is three letters of it."""
    for name in ("run", "run2", "run_32"):
        train_full_sft.main(flags(data, tmp_path, save_weight=name, save_interval=2))
    train_full_sft.main(flags(data, tmp_path, save_weight="run", use_moe=1))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    ours = [
        name for name in before if re.fullmatch(r"(.*/)?run_32(_(best|resume|step\d+))?.pth", name)
    ]
    assert len(ours) == 4
    train_full_sft.main(flags(data, tmp_path, save_weight="run", seed=7, save_interval=2))
    after = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert {name for name in before if before[name] != after[name]} == set(ours)


@pytest.mark.parametrize(
    "name", ["run[1]", "a*", "a/b", "..", "", "x.pth", "x" * 300, "a\0b", "a\n"]
)
def test_a_name_that_is_a_folder_or_a_pattern_is_refused(data, tmp_path, name):
    command = flags(data, tmp_path, save_weight=name)
    refused(run_here(SFT, *command), "--save_weight", "give a name of at most 100 bytes")


def test_half_a_file_of_a_killed_run_goes_when_the_run_starts_again(data, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    half = [folder / ".full_sft_32_new.pth.4242.part", tmp_path / ".full_sft_32.pth.4242.part"]
    others = [tmp_path / ".full_sft_32_moe.pth.4242.part", folder / ".other_32_new.pth.1.part"]
    for path in half + others:
        path.write_bytes(b"half")
    train_full_sft.main(flags(data, tmp_path))
    assert [path.exists() for path in half + others] == [False, False, True, True]


def test_the_checkpoint_before_stays_until_the_new_one_has_its_name(data, tmp_path, monkeypatch):
    """At each moment of a save some checkpoint is found and can be read."""
    seen, args = [], parse(["--save_dir", str(tmp_path)])

    def watched(act):
        def action(path, *more, **how):
            done = act(path, *more, **how)
            if tmp_path in path.parents:
                try:
                    seen.append(checkpoint.load_latest(args)["run"]["step"])
                except TypeError:  # there is none yet
                    seen.append(0)
            return done

        return action

    for name in ("replace", "unlink"):
        monkeypatch.setattr(f"pathlib.Path.{name}", watched(getattr(Path, name)))
    train_full_sft.main(flags(data, tmp_path, keep_checkpoints=0, save_interval=1))
    assert seen == sorted(seen) and set(seen) == {0, 1, 2, 3, 4, 5}


def test_of_several_sizes_the_newest_run_goes_on_and_the_newest_weights_are_taken(
    data, tmp_path, capsys
):
    for size in (32, 48):
        train_full_sft.main([*flags(data, tmp_path), "--hidden_size", str(size)])
    for size, newest in ((48, 32), (32, 48)):
        for path in tmp_path.rglob(f"*{size}*.pth"):
            os.utime(path, (1_000_000, 1_000_000))
        for path in tmp_path.rglob(f"*{newest}*.pth"):
            os.utime(path, (2_000_000, 2_000_000))
        assert find_weights(tmp_path, "full_sft").name == f"full_sft_{newest}.pth"
        args = parse(["--save_dir", str(tmp_path)])
        assert checkpoint.load_latest(args)["path"].name == f"full_sft_{newest}_resume.pth"


def test_resume_without_a_checkpoint_says_so_and_starts(data, tmp_path, capsys):
    """One command serves a job that is restarted again and again."""
    command = [*flags(data, tmp_path, save_interval=1), "--from_resume", "1"]
    train_full_sft.main(command)
    assert "full_sft_32_resume.pth yet: starting from the beginning" in capsys.readouterr().out
    first = weights(tmp_path)
    train_full_sft.main([*command, "--epochs", "2"])
    assert "resuming" in capsys.readouterr().out and log(tmp_path)[-1]["step"] == 10
    train_full_sft.main(flags(data, tmp_path / "plain", save_interval=1))
    assert_equal(first, weights(tmp_path / "plain"))


def as_earlier_versions_wrote(content):
    """A checkpoint with earlier names of flags."""
    arguments = content["arguments"]
    for name in ("split", "interval", "data_path"):
        arguments[f"eval_{name}"] = arguments.pop(f"val_{name}")
    return content


def test_a_checkpoint_of_an_earlier_version_ends_in_the_same_bits(data, tmp_path, monkeypatch):
    train_full_sft.main(flags(data, tmp_path / "whole", optimizer="adamw"))
    stopped_at(3, flags(data, tmp_path / "parts", optimizer="adamw"), monkeypatch)
    content = as_earlier_versions_wrote(load(tmp_path / "parts" / RESUME))
    save_tensors(tmp_path / "parts" / RESUME, content)
    resume(tmp_path / "parts")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_the_tensors_of_a_loaded_file_are_not_kept_in_memory(data, tmp_path, monkeypatch):
    """The model and the optimizer hold their own; a second copy would stay for the whole run."""
    stopped_at(3, flags(data, tmp_path), monkeypatch)
    loaded, load_file = [], load

    def watched(path):
        content = load_file(path)
        model, state = content["model"], content.get("optimizer", {"state": {}})["state"]
        tensors = [*model.values(), *(v for values in state.values() for v in values.values())]
        loaded.append([weakref.ref(tensor) for tensor in tensors])
        return content

    alive = []

    def step(*given):
        gc.collect()
        for references in loaded:
            alive.append([r() for r in references if r() is not None and r().numel() > 1])
        return set_learning_rate(*given)

    for module in (checkpoint, trainer_utils):
        monkeypatch.setattr(module, "load", watched)
    monkeypatch.setattr(train_full_sft, "set_learning_rate", step)
    resume(tmp_path)
    assert loaded and alive and not any(alive)
    new = ["--from_weight", "full_sft", "--save_weight", "new"]
    loaded.clear(), alive.clear()
    train_full_sft.main([*flags(data, tmp_path), *new])
    assert loaded and alive and not any(alive)


# ------------------------------------------------------------------------------ what may change


def parse(line, script=train_full_sft):
    """The flags of a script, as it reads them; distillation has all of SFT and its own."""
    return flags_read(script.main, *line)


OTHER = {  # a value that each flag that decides the result may have instead
    "epochs": 0, "learning_rate": 0.5, "min_lr_ratio": 0.3, "warmup_steps": 7, "weight_decay": 0.3,
    "optimizer": "adamw", "grad_clip": 0.3, "max_seq_len": 99, "packing": False, "dropout": 0.3,
    "val_split": 0.3, "tokenizer_path": "x.json", "hidden_size": 48, "num_hidden_layers": 7,
    "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 9, "use_moe": True,
    "num_experts": 9, "num_experts_per_tok": 3, "dtype": "bf16", "seed": 9, "use_lora": True,
    "lora_rank": 3, "lora_alpha": 3.0, "lora_dropout": 0.3, "lora_target": "q_proj",
    "teacher_weight": "x", "distill_alpha": 0.3, "distill_temperature": 3.0, "hidden_weight": 0.3,
    "aux_layers": "1", "freeze_base": True, "best_metric": "tiny_world",
    "replay_share": 0.3, "data_format": "qa", "overlong": "drop", "keep_think": "none",
    "extend_tokens": "x.txt",
}  # fmt: skip


SPEC = RunSpec(data=["x"], rows=5, rows_per_step=8, total_steps=1)


@pytest.mark.parametrize("name", OTHER)
def test_a_flag_that_decides_the_result_may_not_change(name):
    args = parse(["--from_weight", "none"], train_distillation)
    saved = {"arguments": vars(args), "run": vars(SPEC) | vars(Progress()), "path": "it.pth"}
    changed = copy.copy(args)
    setattr(changed, name, OTHER[name])
    with pytest.raises(UserError, match=rf"but {name} is {re.escape(str(OTHER[name]))} and was"):
        resume_run(SPEC, saved, changed, None, None, None)


def test_every_flag_may_change_or_may_not():
    """A new flag must be put on one of the two sides."""
    known = set(vars(parse(["--from_weight", "none"], train_distillation)))
    assert known == set(OTHER) | set(MAY_CHANGE) and not set(OTHER) & set(MAY_CHANGE)


CHANGES = """--device cpu --grad_checkpoint 1 --deterministic 0 --log_interval 3 --save_interval 1
    --val_interval 3 --sample_interval 2 --sample_prompt Hm --strict_data 1 --keep_checkpoints 3
    --early_stop_patience 50 --max_bad_steps 3 --from_weight x --parallel fsdp"""
# Tested where these flags are, or not part of the result.
ELSEWHERE = """from_resume force_resume save_dir save_weight config save_best_at_end batch_size

    accumulation_steps num_workers use_compile data_path val_data_path replay_path offline_dir
    cache_dir""".split()


def test_a_flag_that_may_change_changes_no_bit_of_the_result(data, tmp_path, monkeypatch):
    train_full_sft.main(flags(data, tmp_path / "whole", dropout=0.1, epochs=2))
    stopped_at(3, flags(data, tmp_path / "parts", dropout=0.1, epochs=2), monkeypatch)
    changed = re.findall(r"--(\w+)", CHANGES)
    assert sorted(changed + ELSEWHERE) == sorted(MAY_CHANGE)
    places = ["--cache_dir", tmp_path / "cache"]
    resume(tmp_path / "parts", *CHANGES.split(), *places)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_other_shares_of_the_data_are_refused_on_resume(data, tmp_path, monkeypatch):
    other = write_jsonl(tmp_path / "other.jsonl", [chat("Hello?", f"Hello {i}") for i in range(40)])
    command = flags(data, tmp_path)
    at = command.index("--data_path")
    both = [f"{data / 'sft.jsonl'}:0.5", f"{other}:0.5"]
    command[at : at + 2] = ["--data_path", *both]
    stopped_at(3, command, monkeypatch)
    again = ["--save_dir", tmp_path, "--from_resume", 1, "--data_path"]
    changed = [f"{data / 'sft.jsonl'}:0.4", f"{other}:0.6"]
    refused(run_here(SFT, *again, *changed), "the weights in --data_path have changed")
    assert run_here(SFT, *again, *both).returncode == 0


def test_a_teacher_with_other_weights_is_refused_on_resume(data, trained, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher_32.pth"
    teacher.write_bytes((trained / "full_sft_32.pth").read_bytes())
    more = {"teacher_weight": teacher, "from_weight": "none"}
    command = flags(data, tmp_path / "out", **more)
    stopped_at(3, command, monkeypatch, train_distillation)
    content = load(teacher)
    content["model"]["model.norm.weight"] += 0.01
    save_tensors(teacher, content)
    again = ["--save_dir", tmp_path / "out", "--from_resume", 1]
    script = "trainer/train_distillation.py"
    refused(run_here(script, *again), "the weights of the teacher have changed since the run began")
    teacher.write_bytes((trained / "full_sft_32.pth").read_bytes())
    assert run_here(script, *again).returncode == 0


def test_new_tokens_come_from_the_checkpoint_and_their_file_is_not_needed(
    data, trained, tmp_path, monkeypatch
):
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<a>\n<b>\n", encoding="utf-8")
    command = flags(data, tmp_path / "whole", from_weight=trained / "pretrain_32.pth", epochs=2)
    command += ["--extend_tokens", str(tokens)]
    train_full_sft.main(command)
    command[command.index(str(tmp_path / "whole"))] = str(tmp_path / "parts")
    stopped_at(3, command, monkeypatch)
    more = tmp_path / "more.txt"
    more.write_text("<a>\n<b>\n<c>\n<d>\n", encoding="utf-8")
    again = ["--save_dir", tmp_path / "parts", "--from_resume", 1]
    done = run_here(SFT, *again, "--extend_tokens", more)
    refused(done, "extend_tokens is", "more.txt and was", "tokens.txt")
    tokens.unlink()
    assert run_here(SFT, *again).returncode == 0
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="comes with torch 2.9")
def test_an_optimizer_that_does_not_fit_is_said_even_by_force(data, tmp_path, monkeypatch):
    stopped_at(3, flags(data, tmp_path), monkeypatch)
    force = ["--save_dir", tmp_path, "--from_resume", 1, "--force_resume", 1]
    done = run_here(SFT, *force, "--optimizer", "adamw")
    refused(done, "optimizer state doesn't match this run", "was muon", "--from_weight full_sft")
    assert run_here(SFT, *force, "--learning_rate", 0.01).returncode == 0


def test_a_finite_step_ends_a_row_of_bad_ones():
    progress = Progress()
    counts = []
    for grad_norm in (float("nan"), float("inf"), 1.0, float("nan"), 2.0):
        progress.advance(10, grad_norm)
        counts.append(progress.bad_steps)
    assert counts == [1, 2, 0, 1, 0] and (progress.step, progress.tokens) == (5, 50)


def test_a_folder_that_was_copied_elsewhere_goes_on_there(data, tmp_path, monkeypatch):
    """To the same bits; the folder that it was copied from is neither read nor written."""
    train_full_sft.main(flags(data, tmp_path / "whole", epochs=2))
    stopped_at(3, flags(data, tmp_path / "first", epochs=2), monkeypatch)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*.*")}
    resume(tmp_path / "second")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "second"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "first").rglob("*.*")}
    assert len(log(tmp_path / "second")) == len(log(tmp_path / "whole"))
