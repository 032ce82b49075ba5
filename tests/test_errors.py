"""Bad input: one clear sentence with place and remedy, exit code 2, no traceback, nothing lost."""

import copy
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

from common import UserError, atomic_write, report_user_errors
from dataset.lm_dataset import PretrainDataset, SFTDataset
from model.tokenizer import load_tokenizer
from model.weights import build_model, load
from tests.conftest import ROOT, TINY, chat, run, run_here, write_jsonl
from trainer.checkpoint import build_resumed

SFT = ["trainer/train_full_sft.py", "--from_weight", "none", *TINY]


def refused(done, *says):
    """The command ended with code 2 and a sentence that holds each of the words."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for words in says:
        assert words in done.stderr, done.stderr
    return done.stderr


def test_all_problems_of_the_flags_are_told_at_once(tmp_path):
    wrong = [
        "--batch_size",
        "0",
        "--dtype",
        "fp8",
        "--use_moe",
        "yes",
        "--data_path",
        "nowhere.jsonl",
    ]
    wrong += ["--learning_rate", "fast", "--save_weight", "../x"]
    said = refused(run("trainer/train_pretrain.py", *wrong), "batch_size 0: give a whole number")
    for part in (
        "dtype fp8",
        "use_moe yes",
        "nowhere.jsonl",
        "learning_rate fast",
        "save_weight ../x",
    ):
        assert part in said
    assert len(said.splitlines()) == 6


def test_an_unknown_flag_is_named():
    refused(run_here("trainer/train_pretrain.py", "--bach_size", "4"), "--bach_size")
    refused(run_here("eval_llm.py", "--weigth", "x"), "--weigth")
    refused(run_here("eval_llm.py", "--temperature", "hot"), "temperature hot")


def test_the_config_file_sets_defaults_and_its_errors_are_named(tmp_path, data):
    config = tmp_path / "c.toml"
    config.write_text("hidden_size = 48\nepochs = 1\n[run]\nuse_moe = false\nbatch_size = 8\n")
    flags = ["--config", config, "--data_path", data / "sft.jsonl", "--save_dir", tmp_path / "o"]
    done = run_here("trainer/train_full_sft.py", "--from_weight", "none", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "full_sft_48.pth").exists()
    done = run_here(
        "trainer/train_full_sft.py", "--from_weight", "none", *flags, "--hidden_size", "32"
    )
    assert (tmp_path / "o" / "full_sft_32.pth").exists(), done.stderr
    config.write_text("hiden_size = 48\nbatch_size = -1\n")
    refused(
        run_here("trainer/train_full_sft.py", *flags), "hiden_size isn't a flag", "batch_size -1"
    )
    config.write_text("hidden_size = = 48\n")
    refused(run_here("trainer/train_full_sft.py", *flags), "c.toml", "line 1")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b'{"text": "wrong stage"}\n', "it is pretraining text, not a conversation"),
        (b'{"conversations": [{"role": "user", "content"', "line 1: not JSON"),
        (b"\xff\xfe\x00", "is UTF-16 text; save it as UTF-8"),
        (b"\xff\x00", "line 1: "),
        (b'{"conversations": [{"role": "user", "content": "alone"}]}\n', "no assistant turn"),
        (b'["a list"]\n', "expected a JSON object, got str"),
    ],
)
def test_unusable_data(tmp_path, content, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    refused(run_here(*SFT, "--data_path", path, "--save_dir", tmp_path / "out"), "bad.jsonl", says)
    assert not list((tmp_path / "out").rglob("*.pth"))


def test_bad_lines_among_good_ones_are_counted_with_their_numbers(tmp_path):
    path = tmp_path / "mixed.jsonl"
    good = json.dumps(chat("Hi", "Hello\u2028you"), ensure_ascii=False).encode()
    surrogate = b'{"conversations": [{"role": "user", "content": "\\ud800"}]}'
    lines = [b"\xef\xbb\xbf" + good + b"\r", b"{", b"", good, b'{"x": 1}', surrogate, good]
    path.write_bytes(b"\n".join(lines))
    dataset = SFTDataset(path, load_tokenizer())
    assert len(dataset) == 3
    assert [number for number, _ in dataset.files[0].report["bad_lines"]] == [2, 5, 6]
    with pytest.raises(UserError, match="mixed.jsonl, line 2: not JSON"):
        SFTDataset(path, load_tokenizer(), strict=True)


def test_what_truncation_leaves_without_anything_to_learn_is_dropped_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [chat("Hi", "Hello you."), chat("Hi " * 200, "You?")])
    dataset = SFTDataset(path, load_tokenizer(), max_length=64)
    assert (len(dataset), dataset.num_dropped) == (1, 1)
    whole, _ = dataset[0]
    input_ids, labels = SFTDataset(path, load_tokenizer(), max_length=len(whole) - 3)[0]
    assert torch.equal(input_ids, whole[:-3]) and (labels != -100).any()
    assert 2 not in labels  # the <|im_end|> was cut off, and is not learned as if it were there


def test_a_long_document_is_split_and_nothing_is_lost(tmp_path):
    tokenizer, text = load_tokenizer(), "one two three four five " * 40
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text}])
    dataset = PretrainDataset(path, tokenizer, max_length=32)
    rows = [dataset[i][0] for i in range(len(dataset))]
    for row, following in zip(rows, rows[1:], strict=False):
        assert row[-1] == following[0]  # is seen again, so that what follows it is predicted
    ids = torch.cat([rows[0], *(row[1:] for row in rows[1:])]).tolist()
    assert ids == tokenizer.encode(text).ids + [0] and len(dataset) > 3


def test_missing_weights_name_the_command_that_makes_them(tmp_path, data):
    flags = ["--save_dir", tmp_path, "--data_path", data / "sft.jsonl"]
    refused(run_here("trainer/train_full_sft.py", *flags), "pretrain_*.pth", "train_pretrain.py")
    refused(run_here("eval_llm.py", "--save_dir", tmp_path), "full_sft_*.pth", "train_full_sft.py")
    refused(run_here("eval_llm.py", "--weight", tmp_path / "no.pth"), "no.pth")


def test_shape_flags_that_contradict_the_weights_are_named(trained, data):
    flags = ["--save_dir", trained, "--data_path", data / "sft.jsonl", "--num_hidden_layers", "5"]
    done = run_here("trainer/train_full_sft.py", *flags, "--max_seq_len", "4096")
    refused(done, "--num_hidden_layers 5", "has 2", "--max_seq_len 4096", "context of 2048")


def test_another_vocabulary_is_named(trained, data, tmp_path):
    make = ["--data_path", data / "sft.jsonl", "--vocab_size", "300", "--out", tmp_path / "t.json"]
    assert run_here("trainer/train_tokenizer.py", *make).returncode == 0
    flags = ["--save_dir", trained, "--data_path", data / "sft.jsonl"]
    done = run_here("trainer/train_full_sft.py", *flags, "--tokenizer_path", tmp_path / "t.json")
    refused(done, "t.json isn't the tokenizer", "start from scratch")


def test_another_run_cannot_be_resumed(trained, data):
    flags = ["--save_dir", trained, "--from_resume", "1", "--batch_size", "4", "--epochs", "9"]
    done = run_here("trainer/train_full_sft.py", *flags, "--max_seq_len", "64")
    said = refused(done, "a step takes 4 rows", "and took 2", "max_seq_len is 64 and was 96")
    assert "epochs" not in said
    data = ["--data_path", data / "pretrain.jsonl"]
    done = run_here(
        "trainer/train_pretrain.py", *flags[:4], *data, "--learning_rate", 0.5, "--seed", 3
    )
    refused(done, "learning_rate is 0.5 and was 0.004", "seed is 3 and was 1")


def break_weights(path, how):
    content = torch.load(path, weights_only=True)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif how == "text":
        path.write_text("not weights")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "malicious":
        path.write_bytes(pickle.dumps(Malicious()))
    elif how == "missing weight":
        del content["model"]["model.norm.weight"]
        torch.save(content, path)
    elif how == "wrong shape":
        content["model"]["model.norm.weight"] = torch.zeros(7)
        torch.save(content, path)
    elif how == "other program":
        torch.save(content["model"], path)


class Malicious:
    def __reduce__(self):
        return os.system, ("echo harmed",)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "damaged"),
        ("text", "damaged"),
        ("empty", "damaged"),
        ("malicious", "could run any code"),
        ("missing weight", 'Missing key(s) in state_dict: "model.norm.weight"'),
        ("wrong shape", "size mismatch for model.norm.weight"),
        ("other program", "isn't a weights file of this program"),
    ],
)
def test_damaged_weights(trained, tmp_path, how, says):
    path = shutil.copy(trained / "full_sft_32.pth", tmp_path / "full_sft_32.pth")
    break_weights(path, how)
    done = run_here("eval_llm.py", "--weight", path, "--prompt", "Hi")
    refused(done, "full_sft_32.pth", says)
    assert "harmed" not in done.stdout
    if how == "truncated":  # with torch's own words
        assert "damaged (PytorchStreamReader" in done.stderr


CONFIG = {  # a value that no file of ours has
    "vocab_size": (0, -1, 10**12, "x", 2048.0, None), "hidden_size": (0, 10**9, [32], True),
    "num_hidden_layers": (0, 10**9, -3, "2"), "num_attention_heads": (0, 3, 10**9, None),
    "num_key_value_heads": (9, -2, "x"), "head_dim": (15, -16, 10**6),
    "intermediate_size": (-1, "x"),
    "rope_theta": ("x", math.nan, math.inf), "rms_norm_eps": (None, -1.0), "use_moe": (1, "no", {}),
    "num_experts_per_tok": (0, -1, "2"), "qk_norm": (None, 5), "tie_word_embeddings": ("yes",),
    "max_position_embeddings": (0, "x"), "unknown": (1,),
}  # fmt: skip
PARTS = {
    "config": ({}, None, [], "x"), "tokenizer": (None, "", "{}", 5), "stage": (None, 5),
    "model": ({}, None, [], {"x": 1}, {5: torch.zeros(1)}, {"x": torch.zeros(1)}),
    "lora": ({}, None, {"rank": 4}, "x"), "projections": (5, [3], ["a", "b"]),
    "first_new_token": (-1, "x", 10**9), "format": (None, 2, "1"),
}  # fmt: skip
WEIGHTS = {
    "ints": lambda w: w.long(), "complex": lambda w: w.to(torch.complex64),
    "sparse": lambda w: w.to_sparse(), "scalar": lambda w: w.sum(), "a number": lambda w: 1.0,
}  # fmt: skip


def changed(content, part, name, value):
    content = copy.deepcopy(content)
    if part:
        content[part][name] = value
    else:
        content[name] = value
    return content


@pytest.mark.parametrize("part, name", [("config", k) for k in CONFIG] + [(None, k) for k in PARTS])
def test_crafted_weights_are_refused_in_a_sentence(trained, tmp_path, part, name):
    content = torch.load(trained / "full_sft_32.pth", weights_only=True)
    for value in (CONFIG if part else PARTS)[name]:
        path = tmp_path / "crafted_32.pth"
        torch.save(changed(content, part, name, value), path)
        with pytest.raises(UserError, match="crafted_32.pth"):
            (build_resumed if name == "projections" else build_model)(load(path), path)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_no_floating_point_numbers_are_refused(trained, tmp_path, kind):
    content = torch.load(trained / "full_sft_32.pth", weights_only=True)
    content["model"]["model.norm.weight"] = WEIGHTS[kind](content["model"]["model.norm.weight"])
    torch.save(content, tmp_path / "crafted_32.pth")
    with pytest.raises(UserError, match="crafted_32.pth.*model"):
        build_model(load(tmp_path / "crafted_32.pth"), "crafted_32.pth")


@pytest.mark.parametrize("name", ["run", "arguments", "optimizer", "scaler"])
def test_a_crafted_checkpoint_is_refused_in_a_sentence(trained, data, tmp_path, name):
    content = torch.load(trained / "checkpoints/full_sft_32_resume.pth", weights_only=True)
    (tmp_path / "checkpoints").mkdir()
    place = tmp_path / "checkpoints/full_sft_32_resume.pth"
    resume = ["--save_dir", tmp_path, "--from_resume", 1]
    values = {"run": [None, {}, content["run"] | {"step": "x"}], "optimizer": [None, {}]}
    for value in values.get(name, [None]):
        torch.save(changed(content, None, name, value), place)
        refused(run_here("trainer/train_full_sft.py", *resume), "full_sft_32_resume.pth")


def test_a_file_that_may_not_be_read_is_not_called_damaged(trained, tmp_path, monkeypatch):
    folder = tmp_path / "folder_32.pth"
    folder.mkdir()
    said = refused(run_here("eval_llm.py", "--weight", folder), "folder_32.pth cannot be read: ")
    assert "damaged" not in said
    monkeypatch.setattr("zipfile.is_zipfile", denied)
    said = refused(run_here("eval_llm.py", "--weight", trained / "full_sft_32.pth"), "denied")
    assert "damaged" not in said and "full_sft_32.pth cannot be read: " in said


def denied(path):
    raise PermissionError(13, "Permission denied", str(path))


BIG = "9" * 20
WRONG_FLAGS = [
    (["--seed", BIG], "--seed 9999"),
    (["--seed", "-1"], "--seed -1: give a whole number from 0 to 9007199254740992"),
    (["--epochs", "9" * 5000], "--epochs 9999"),
    (["--learning_rate", "nan"], "--learning_rate nan"),
    (["--learning_rate", "inf"], "--learning_rate inf"),
    (["--sample_prompt", ""], "--sample_prompt: give from 1 to 500 characters"),
    (["--sample_prompt", "x" * 501], "--sample_prompt: give from 1 to 500 characters"),
    (["--val_data_path", "x" * 300], "no such file"),
    (["--config", "x" * 300], "File name too long"),
    (["--save_dir", "x" * 300], "--save_dir xxx"),
    (["--save_dir", "x" * 300, "--from_resume", "1"], "File name too long"),
    (["--from_weight", "x" * 300], "there is no "),
    (["--from_weight", "x" * 300 + ".pth"], "cannot be read: File name too long"),
    (["--num_attention_heads", "100"], "head_dim (0) must be even"),
    (["--early_stop_patience", "1", "--val_split", "0"], "--early_stop_patience needs --val_split"),
    (["--save_best_at_end", "1", "--val_split", "0"], "--save_best_at_end needs --val_split"),
    (["--best_metric", "tiny_world", "--val_split", "0"], "--best_metric needs --val_split"),
]


@pytest.mark.parametrize("flags, says", WRONG_FLAGS, ids=[" ".join(f)[:40] for f, _ in WRONG_FLAGS])
def test_a_wrong_value_of_a_flag_is_said(data, tmp_path, flags, says):
    where = [] if "--save_dir" in flags else ["--save_dir", tmp_path]
    said = refused(run_here(*SFT, "--data_path", data / "sft.jsonl", *where, *flags), says)
    assert len(said) < 1000 and not list(tmp_path.rglob("*.pth"))


def test_a_mixture_of_experts_of_the_smallest_width_trains(data, tmp_path):
    small = ["--use_moe", 1, "--intermediate_size", 1, "--save_dir", tmp_path]
    done = run_here(*SFT, "--data_path", data / "sft.jsonl", *small)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "full_sft_32_moe.pth")["config"]["moe_intermediate_size"] == 1


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("before")
    says = "weights.pth cannot be written: .*No space"
    with pytest.raises(UserError, match=says), atomic_write(path) as file:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half of it")
        raise ZeroDivisionError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="a file size limit is a Unix thing")
def test_a_full_disk_while_saving(trained, data, tmp_path):
    """A limit on the size of files stands in for a full disk: writing fails in the middle."""
    out = shutil.copytree(trained, tmp_path / "out")
    files = sorted(out.rglob("*.pth"))
    before = [path.read_bytes() for path in files]
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        f"sys.path.insert(0, {str(ROOT)!r});"
        "from common import report_user_errors as m\n"
        "from trainer.train_full_sft import main\n"
        "with m(): main(sys.argv[1:])"
    )
    flags = ["--save_dir", out, "--data_path", data / "sft.jsonl", "--device", "cpu"]
    command = [sys.executable, "-c", script, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    refused(done, "full_sft_32_best.pth cannot be written", "ree some space")
    assert [path.read_bytes() for path in sorted(out.rglob("*.pth"))] == before
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize(
    "error, code, says",
    [
        (UserError("this is wrong"), 2, "error: this is wrong\n"),
        (KeyboardInterrupt(), 130, "\nInterrupted. Files that were saved before are intact.\n"),
    ],
)
def test_the_end_of_a_script_is_a_sentence_and_a_code(error, code, says, capsys):
    with pytest.raises(SystemExit) as stopped, report_user_errors():
        raise error
    assert stopped.value.code == code and capsys.readouterr().err == says


def test_a_console_that_lacks_a_character_shows_another(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    with report_user_errors():
        print("für \u4f60", flush=True)
    assert console.buffer.getvalue() == b"f?r ?\n"
