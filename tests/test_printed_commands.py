"""What a run prints as the command that comes next does what it says; a run is found by the name
that was typed.
"""

import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import ROOT, UserError
from model.weights import load
from tests.conftest import LORA, TINY, run, run_here
from tests.test_errors import refused
from tests.test_training import StopAt, assert_equal, log, weights
from trainer import (
    checkpoint,
    train_distillation,
    train_dpo,
    train_full_sft,
    train_pretrain,
    training_run,
)
from trainer.flags import next_command, resume_command
from trainer.optimizer import learning_rate

SFT = "trainer/train_full_sft.py"


def flags(data, out, *more, name="sft"):
    common = ["--save_dir", out, "--data_path", data / f"{name}.jsonl", "--batch_size", 2]
    common += ["--max_seq_len", 96, "--dtype", "fp32", "--device", "cpu", *more]
    return list(map(str, common))


def last_line(printed):
    return printed.strip().splitlines()[-1]


def stopped(script, command, monkeypatch, capsys):
    """The last line that a run prints which is stopped at its second step."""
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopSignal", StopAt(2))
        with pytest.raises(SystemExit):
            script.main(command)
    return last_line(capsys.readouterr().out)


def run_line(line):
    """Runs a printed command in this process."""
    python, script, *rest = shlex.split(line.removeprefix("next: "))
    assert python == "python" and (ROOT / script).is_file()
    return run_here(script, *rest)


@pytest.fixture
def base(trained, tmp_path):
    shutil.copy(trained / "pretrain_32.pth", tmp_path / "pretrain_32.pth")
    return tmp_path


@pytest.mark.parametrize("more", [(), ("--save_weight", "mine"), (*LORA, "--save_weight", "b")])
def test_a_stopped_run_prints_the_command_that_resumes_it(base, data, monkeypatch, capsys, more):
    whole, name = base / "whole", "lora_b" if "b" in more else (more or ["", "full_sft"])[-1]
    shutil.copytree(base, whole, ignore=shutil.ignore_patterns("whole"))
    train_full_sft.main(flags(data, whole, *more))
    line = stopped(train_full_sft, flags(data, base, *more), monkeypatch, capsys)
    done = run_line(line)
    assert done.returncode == 0 and "at step 2" in done.stdout, done.stderr
    assert_equal(weights(whole, f"{name}_32"), weights(base, f"{name}_32"))
    assert log(whole, f"{name}_32") == log(base, f"{name}_32")


def test_a_job_is_resumed_by_torchrun(monkeypatch):
    args = SimpleNamespace(save_weight="full_sft", save_dir=ROOT / "out")
    line = resume_command(args, "full_sft", 2)
    assert line.startswith("torchrun --nproc_per_node 2 ") and "--save_dir" not in line
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # on two machines
    line = resume_command(args, "full_sft", 8)
    assert line.startswith("torchrun --nnodes 2 --nproc_per_node 4 ")


@pytest.mark.parametrize("typed", ["b", "lora_b"])
def test_a_run_of_lora_is_found_by_the_name_that_was_typed(base, data, monkeypatch, capsys, typed):
    stopped(train_full_sft, flags(data, base, *LORA, "--save_weight", "b"), monkeypatch, capsys)
    train_full_sft.main(["--save_dir", str(base), "--from_resume", "1", "--save_weight", typed])
    assert log(base, "lora_b_32")[-1]["step"] > 2
    assert not (base / "b_32.pth").exists() and (base / "lora_b_32.pth").exists()


def test_a_name_without_a_checkpoint_beside_another_run_of_that_name_is_refused(
    base, data, monkeypatch, capsys
):
    stopped(train_full_sft, flags(data, base), monkeypatch, capsys)
    resume = ["--save_dir", base, "--from_resume", 1]
    says = "a checkpoint of the run full_sft; to resume that, give --save_weight full_sft"
    refused(run_here(SFT, *resume, "--use_lora", 1), "no ", "lora_full_sft", says)
    for path in (base / "checkpoints").glob("full_sft_32_*"):
        path.rename(path.with_name(path.name.replace("full_sft", "full_sft_previous")))
    refused(run_here(SFT, *resume), "--save_weight full_sft_previous; to start again, omit")
    done = run_here(SFT, *flags(data, base, "--from_resume", 1, "--save_weight", "new"))
    assert done.returncode == 0 and "starting from the beginning" in done.stdout


def opens(line, path, capsys):
    """Whether a printed command opens these weights, and answers."""
    python, script, *rest = shlex.split(line.removeprefix("next: "))
    done = run_here(script, *rest, "--prompt", "Hi", "--max_new_tokens", 1)
    assert done.returncode == 0, done.stderr
    return str(path) in done.stdout


@pytest.mark.parametrize("more", [(), ("--save_weight", "mine"), (*LORA, "--save_weight", "b")])
def test_the_next_command_opens_what_was_trained(base, data, capsys, more):
    train_full_sft.main(flags(data, base, *more))
    name = "lora_b_32.pth" if "b" in more else f"{(more or ['', 'full_sft'])[-1]}_32.pth"
    line = last_line(capsys.readouterr().out)
    assert line.startswith("next: python eval_llm.py ") and opens(line, base / name, capsys)


def test_the_next_command_of_a_distillation_opens_the_student(trained, data, tmp_path, capsys):
    for name in ("pretrain_32.pth", "full_sft_32.pth"):
        shutil.copy(trained / name, tmp_path / name)
    train_distillation.main(flags(data, tmp_path))
    line = last_line(capsys.readouterr().out)
    assert "--weight distilled" in line and opens(line, tmp_path / "distilled_32.pth", capsys)


def test_the_next_command_of_pretraining_trains_on(data, tmp_path, capsys):
    name = ["--save_weight", "begin", *TINY]
    train_pretrain.main(flags(data, tmp_path, *name, name="pretrain"))
    line = last_line(capsys.readouterr().out)
    assert line.startswith("next: python trainer/train_full_sft.py --from_weight begin ")
    done = run_line(f"{line} --data_path {data / 'sft.jsonl'} --max_seq_len 96")
    assert done.returncode == 0 and str(tmp_path / "begin_32.pth") in done.stdout, done.stderr


def test_without_flags_the_next_command_has_none(monkeypatch):
    args = SimpleNamespace(save_weight="full_sft", save_dir=ROOT / "out", use_lora=False)
    monkeypatch.chdir(ROOT)
    assert next_command(args, "full_sft") == "python eval_llm.py"
    monkeypatch.chdir(ROOT / "docs")
    assert next_command(args, "full_sft").replace("\\", "/").strip("'") == "python ../eval_llm.py"


def test_an_early_stop_says_what_did_not_get_better(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_full_sft, "validation_loss", lambda *_: {"val_loss": 1.0})
    more = ["--from_weight", "none", *TINY, "--val_interval", "1", "--early_stop_patience", "2"]
    train_full_sft.main(flags(data, tmp_path, *more, "--epochs", 3))
    assert "no improvement in 2 validations" in capsys.readouterr().out


def test_a_rate_of_0_is_refused(tmp_path):
    """Nothing would be learned, without a word."""
    for flag in ("--learning_rate", "--lora_alpha"):
        refused(run_here(SFT, flag, 0), f"{flag} 0: give a number above 0")
    refused(
        run_here("trainer/train_dpo.py", "--dpo_beta", 0), "--dpo_beta 0: give a number above 0"
    )
    assert train_dpo.STAGE == "dpo"


def test_more_epochs_say_what_becomes_of_the_learning_rate(base, data, capsys):
    train_full_sft.main(flags(data, base, "--warmup_steps", 1))
    steps = log(base)[-1]["step"]
    capsys.readouterr()
    resume = ["--save_dir", str(base), "--from_resume", "1", "--epochs", "3"]
    train_full_sft.main(resume)
    printed = capsys.readouterr().out
    content = load(base / "checkpoints/full_sft_32_resume.pth")
    assert content["run"]["step"] == 3 * steps
    (said,) = [x for x in printed.splitlines() if "the schedule now ends after 3 epochs" in x]
    flags_then = type("Flags", (), content["arguments"])
    before, after = (
        learning_rate(*at, flags_then) for at in ((steps - 1, steps), (steps, 3 * steps))
    )
    assert f"the learning rate was {before:.3g} and continues from {after:.3g}" in said
    assert after > 2 * before


def test_the_optimizer_does_not_sound_as_if_it_set_the_rate():
    text = " ".join(run_here(SFT, "--help").stdout.split())
    assert "or adamw: with it, use about 1/4 of the Muon learning rate" in text


def test_a_default_that_is_given_is_not_refused(trained, monkeypatch):
    for flag, value in (("--seed", 1), ("--repetition_penalty", "1.0"), ("--use_compile", 0)):
        done = run_here("eval_llm.py", "--save_dir", trained, "--serve", 99999, flag, value)
        refused(done, "--serve 99999, --host 127.0.0.1")
    done = run_here("eval_llm.py", "--save_dir", trained, "--serve", 0, "--seed", 2)
    refused(done, "--serve doesn't support --seed")


def test_the_villages_data_in_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("dataset/tiny_world/generate.py", "--out", tmp_path / "file" / "x")
    assert "cannot be written" in refused(done) and len(done.stderr.splitlines()) == 1


def test_an_error_of_reading_does_not_blame_the_target(base, data, monkeypatch):
    """The best weights are read once; an error of that names their own file."""
    train_full_sft.main(flags(data, base, "--val_interval", 1, "--save_best_at_end", 1))
    best, plain = base / "checkpoints/full_sft_32_best.pth", Path.open
    place = base / "full_sft_32.pth"
    run = SimpleNamespace(weights_path=place, checkpoint_path=lambda ending: best)

    def unreadable(path, mode="r", *how, **more):
        if path == best and "r" in mode:
            raise OSError(5, "Input/output error")
        return plain(path, mode, *how, **more)

    place.unlink()
    with monkeypatch.context() as patch:  # a second time, after `load` has read all of it
        patch.setattr(Path, "open", unreadable)
        checkpoint.put_best_in_place(run)
    assert_equal(weights(base), load(best)["model"])
    best.unlink()
    with pytest.raises(UserError, match="full_sft_32_best.pth cannot be read"):
        checkpoint.put_best_in_place(run)


def test_a_run_that_began_with_a_relative_path_is_resumed_from_elsewhere(
    base, data, monkeypatch, capsys
):
    for folder in ("here", "there/deep"):
        (base / folder).mkdir(parents=True)
    more = ["--from_weight", "../pretrain_32.pth", *LORA, "--save_weight", "b"]
    monkeypatch.chdir(base / "here")
    stopped(train_full_sft, flags(data, base / "out", *more), monkeypatch, capsys)
    monkeypatch.chdir(base / "there" / "deep")
    resume = ["--from_resume", 1, "--save_weight", "b", "--save_dir", base / "out"]
    done = run_here(SFT, *resume)
    assert done.returncode == 0 and "at step 2" in done.stdout, done.stderr


ROOMS = ("dataset", "evaluation", "trainer", "recipes", "convert")
FILES = [
    *ROOT.glob("*.py"),
    *(file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))),
]
COMMANDS = [
    path.relative_to(ROOT) for path in FILES if "__main__" in path.read_text(encoding="utf-8")
]


DRIVER = """
import os, runpy, sys
for command in sys.argv[2:]:
    # As in a Python of its own, except that torch has been loaded.
    for name in [name for name in sys.modules if name.split(".")[0] in sys.argv[1].split()]:
        del sys.modules[name]
    path = sys.path[:]
    sys.path[0] = os.path.dirname(command)
    runpy.run_path(command, run_name="imported")
    sys.path[:] = path
    print(command)
"""


def test_each_command_finds_the_project_from_any_folder(tmp_path):
    assert len(COMMANDS) > 20
    (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")
    ours = " ".join([*ROOMS, "model", "serving", "common", "cli"])
    done = run(
        "driver.py", ours, *(ROOT / command for command in COMMANDS), cwd=tmp_path, fork=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(COMMANDS)
