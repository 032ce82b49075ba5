"""What the flags' types read, at their limits."""

import re

import pytest

from cli import Problem, choose_from, number, switch
from dataset.step_plan import Source
from tests.conftest import ROOT, TINY, flags_read, run_here
from trainer import train_full_sft, train_pretrain
from trainer.flags import conversation_flags, parse_args, training_parser


@pytest.mark.parametrize("kind", [int, float])
def test_a_number_is_read_from_its_lower_to_its_upper_limit(kind):
    read = number(kind, 2, 5)
    assert [read(text) for text in ("2", "5")] == [2, 5]
    assert all(type(read(text)) is kind for text in ("2", "5"))
    for text in ("1", "6", "", "x", "nan", "inf", "-inf", "9" * 5000):
        problem = read(text)
        assert isinstance(problem, Problem) and "from 2 to 5" in problem and len(problem) < 99


def test_a_number_without_an_upper_limit_is_finite():
    assert number(float, 0)("1e12") == 1e12 and number(int, 0)("4294967296") == 2**32
    assert isinstance(number(float, 0)("inf"), Problem)
    assert isinstance(number(int, 0)("9" * 20), Problem)


def test_words_and_switches_are_read_exactly():
    assert switch("1") is True and switch("0") is False
    assert choose_from("a", "b")("b") == "b"
    for read in (switch, choose_from("a", "b")):
        assert all(isinstance(read(text), Problem) for text in ("", "2", "True", "B"))


# ------------------------------------------------------------------------------------ TOML files

CONFIGS = sorted((ROOT / "trainer/configs").glob("*.toml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_runs(config, trained, data, tmp_path, monkeypatch):
    """At toy scale, as its own header says, from any folder."""
    text = config.read_text(encoding="utf-8")
    (tmp_path / "configs/out/gsm8k").mkdir(parents=True)
    for name in ("train", "valid"):
        lines = (data / "sft.jsonl").read_text(encoding="utf-8").splitlines(True)
        part = lines[:30] if name == "train" else lines[30:]
        (tmp_path / f"configs/out/gsm8k/{name}.jsonl").write_text("".join(part), encoding="utf-8")
    copy = tmp_path / "configs" / config.name  # its paths are relative to where it lies
    copy.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    toy = ["--config", copy, "--save_dir", tmp_path / "out", "--batch_size", 2, "--epochs", 1]
    toy += ["--max_seq_len", 96, "--device", "cpu", "--accumulation_steps", 1]
    if "train_full_sft" in text:
        start = ["--from_weight", trained / "pretrain_32.pth"]
        done = run_here("trainer/train_full_sft.py", *toy, *start)
    else:
        small = [*TINY, "--num_key_value_heads", 1, "--intermediate_size", 32]
        source = ["--data_path", data / "pretrain.jsonl"]
        done = run_here("trainer/train_pretrain.py", *toy, *small, *source)
    assert done.returncode == 0, done.stderr
    assert "weights: " in done.stdout


def read(config, *line):
    parser = training_parser("", save_weight="x", from_weight="none")
    conversation_flags(parser)
    return parse_args(parser, ["--config", str(config), *map(str, line)])


def test_a_list_in_a_config_is_a_list_on_the_command_line(data, tmp_path):
    config = tmp_path / "c.toml"
    for name in ("sft", "pretrain"):
        (tmp_path / f"{name}.jsonl").write_bytes((data / f"{name}.jsonl").read_bytes())
    config.write_text('data_path = ["sft.jsonl:0.5", "pretrain.jsonl:0.5"]\nuse_moe = true\n')
    args = read(config)
    expected = [Source(tmp_path / f"{name}.jsonl", 0.5) for name in ("sft", "pretrain")]
    assert args.data_path == [Source(s.path.resolve(), s.weight) for s in expected]
    assert args.use_moe is True
    assert read(config, "--data_path", data / "sft.jsonl").data_path == [
        Source((data / "sft.jsonl").resolve())
    ]
    config.write_text('data_path = "sft.jsonl"\n')
    assert read(config).data_path == [Source((tmp_path / "sft.jsonl").resolve())]


def test_help_shows_the_common_flags_first_and_none_twice(capsys):
    with pytest.raises(SystemExit):
        train_full_sft.main(["--help"])
    text = capsys.readouterr().out
    first = text.split("the flags that most people need:")[1].split("start and stop:")[0]
    assert len(re.findall(r"^  --", first, re.M)) == 10
    assert text.count("\n  --val_split ") == 1


# On these rest the times and scores in README.md and docs/1_demo.md.
VILLAGE = {"epochs": 1, "batch_size": 2, "max_seq_len": 768, "warmup_steps": 20, "seed": 1}
VILLAGE |= {"optimizer": "muon", "weight_decay": 0.1, "grad_clip": 1.0, "val_split": 0.01}
VILLAGE |= {"accumulation_steps": 1, "packing": True, "dropout": 0.0}
STAGES = {
    train_pretrain: {"learning_rate": 4e-3, "min_lr_ratio": 0.2},
    train_full_sft: {"learning_rate": 2.2e-3, "min_lr_ratio": 0.1, "replay_share": 0.4},
}


@pytest.mark.parametrize("script", STAGES, ids=lambda script: script.STAGE)
def test_the_defaults_are_what_the_demo_trains_with(script):
    args = vars(flags_read(script.main))
    for name, value in (VILLAGE | STAGES[script]).items():
        assert args[name] == value, name


def test_no_more_than_half_of_the_data_is_held_out(capsys):
    assert flags_read(train_pretrain.main, "--val_split", "0.5").val_split == 0.5
    with pytest.raises(SystemExit) as stopped:
        train_pretrain.main(["--val_split", "0.51"])
    assert stopped.value.code == 2
    assert "--val_split 0.51: give a number from 0 to 0.5" in capsys.readouterr().err
