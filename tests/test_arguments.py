"""What the flags' types read, at their limits."""

import importlib
import re

import pytest

from cli import Parser, Problem, choose_from, number, switch
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
    first = text.split("common options:")[1].split("starting and stopping:")[0]
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


# ---------------------------------------------------------------- limits and defaults, by hand

TRAINING = {  # flag: lowest value, highest (None: any), default
    "epochs": (1, None, 1), "batch_size": (1, None, 2), "max_seq_len": (2, None, 768),
    "hidden_size": (1, None, None), "num_hidden_layers": (1, None, None), "seed": (0, None, 1),
    "num_attention_heads": (1, None, None), "num_key_value_heads": (1, None, None),
    "intermediate_size": (1, None, None), "num_experts": (1, None, None),
    "num_experts_per_tok": (1, None, None), "early_stop_patience": (0, None, 0),
    "max_bad_steps": (1, None, 10), "val_split": (0.0, 0.5, 0.01), "num_workers": (0, None, None),
    "dropout": (0.0, 0.9, 0.0), "accumulation_steps": (1, None, 1), "warmup_steps": (0, None, 20),
    "min_lr_ratio": (0.0, 1.0, 0.2), "weight_decay": (0.0, None, 0.1),
    "grad_clip": (0.0, None, 1.0),
    "log_interval": (1, None, 10), "val_interval": (1, None, 100), "save_interval": (1, None, 500),
    "keep_checkpoints": (0, None, 1), "sample_interval": (0, None, 0), "lora_rank": (1, None, 16),
    "lora_dropout": (0.0, 0.9, 0.0),
}  # fmt: skip
FINE_TUNING = TRAINING | {"min_lr_ratio": (0.0, 1.0, 0.1)}
SAMPLED = {
    "max_new_tokens": (1, None, 512), "temperature": (0.0, 100.0, 0.0), "batch_size": (1, None, 16),
    "seed": (0, 2**63 - 1, 1), "limit": (0, None, 0), "hidden_size": (1, None, None),
}  # fmt: skip
LIMITS = {
    "trainer.train_pretrain": TRAINING,
    "trainer.train_full_sft": FINE_TUNING | {"replay_share": (0.0, None, 0.4)},
    "trainer.train_distillation": FINE_TUNING
    | {"distill_alpha": (0.0, 1.0, 0.1), "distill_temperature": (0.01, None, 1.0),
       "hidden_weight": (0.0, None, 0.0)},
    "trainer.train_dpo": TRAINING
    | {"sft_weight": (0.0, None, 0.0), "batch_size": (1, None, 8), "warmup_steps": (0, None, 10),
       "val_split": (0.0, 0.5, 0.1), "val_interval": (1, None, 20),
       "min_lr_ratio": (0.0, 1.0, 0.1)},
    "trainer.train_grpo": TRAINING
    | {"prompts_per_step": (1, None, 12), "group_size": (2, None, 8), "pass_k": (1, None, 8),
       "temperature": (0.01, None, 1.2), "max_new_tokens": (1, None, 48),
       "answers_at_once": (1, None, 256), "batch_size": (1, None, 32), "warmup_steps": (0, None, 5),
       "min_lr_ratio": (0.0, 1.0, 0.5), "log_interval": (1, None, 1), "val_split": (0.0, 0.5, 0.05),
       "val_interval": (1, None, 20), "sample_interval": (0, None, 20)},
    "evaluation.run_eval": SAMPLED | {"num_samples": (1, None, 1)},
    "recipes.rejection_sample": SAMPLED
    | {"num_samples": (1, None, 8), "keep": (1, None, 4), "max_new_tokens": (1, None, 256),
       "temperature": (0.0, 100.0, 0.8), "batch_size": (1, None, 64)},
}  # fmt: skip
LIMITS["eval_llm"] = {
    "hidden_size": (1, None, None), "max_batch": (1, None, 16), "temperature": (0.0, 100.0, 0.0),
    "top_k": (0, 10**9, 0), "top_p": (0.0, 1.0, 1.0), "repetition_penalty": (0.01, 100.0, 1.0),
    "max_new_tokens": (1, 10**9, 256), "seed": (0, 2**63 - 1, 1),
}  # fmt: skip
LIMITS["recipes.sid"] = {"max_history": (1, None, 10), "seed": (0, None, 1)}
LEARNING_RATES = {"pretrain": 4e-3, "full_sft": 2.2e-3, "dpo": 2e-4, "grpo": 3e-4}


class Caught(Exception):
    pass


def parser_of(module, monkeypatch):
    """The parser of a command, taken from it before it reads the command line."""

    def catch(parser, *_, **__):
        raise Caught(parser)

    script = importlib.import_module(module)
    if hasattr(script, "parse_run"):
        monkeypatch.setattr(script, "parse_run", catch)
    monkeypatch.setattr(Parser, "parse_args", catch)
    with pytest.raises(Caught) as caught:
        script.main([])
    return caught.value.args[0]


@pytest.mark.parametrize("module", LIMITS)
def test_numbers_have_their_limits_and_defaults(module, monkeypatch):
    parser = parser_of(module, monkeypatch)
    for name, (low, high, default) in LIMITS[module].items():
        action = parser._option_string_actions[f"--{name}"]
        assert parser.get_default(name) == default, name
        step = 1 if isinstance(low, int) else 1e-3
        assert action.type(str(low)) == low, name
        assert isinstance(action.type(str(low - step)), Problem), name
        if high is not None:
            assert action.type(str(high)) == high, name
            assert isinstance(action.type(str(high + step)), Problem), name
    stage = module.rpartition("train_")[2]
    if stage in LEARNING_RATES:
        assert parser.get_default("learning_rate") == LEARNING_RATES[stage]
        above = parser._option_string_actions["--learning_rate"].type
        assert isinstance(above("0"), Problem) and above("1e-9") == 1e-9
