"""Shared fixtures: small data, and a model trained for a few steps, made once for all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --device cpu --dtype fp32"
TINY = TINY.split()


def run(*command, cwd=ROOT, text_input=None, timeout=120, **environment):
    """A command as a user types it; python is this one, and two threads are enough for anyone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        input=text_input if text_input is not None else "",
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )


def write_jsonl(path, records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def chat(*texts):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return {"conversations": messages}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with pretrain.jsonl and sft.jsonl: a few dozen records of ragged lengths."""
    folder = tmp_path_factory.mktemp("data")
    numbers = ["one", "two", "three", "four", "five", "six", "seven"]
    texts = [{"text": " and ".join(numbers[: 1 + i % 7]) + f" make {i}."} for i in range(60)]
    write_jsonl(folder / "pretrain.jsonl", texts)
    chats = [
        chat(f"What is {i}?" * (1 + i % 3), "It is a number. " * (1 + i % 4)) for i in range(40)
    ]
    write_jsonl(folder / "sft.jsonl", chats)
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A save_dir that holds tiny pretrain_32 and full_sft_32 weights."""
    out = tmp_path_factory.mktemp("out")
    common = ["--save_dir", out, "--batch_size", 2, "--max_seq_len", 96, "--log_interval", 1]
    for script, name, more in (
        ("train_pretrain.py", "pretrain.jsonl", TINY),
        ("train_full_sft.py", "sft.jsonl", ["--dtype", "fp32", "--device", "cpu"]),
    ):
        done = run(f"trainer/{script}", *common, *more, "--data_path", data / name)
        assert done.returncode == 0, done.stderr
    return out
