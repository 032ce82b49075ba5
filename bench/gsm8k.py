"""GSM8K from the official files to a report, in one command: data, tokenizer, pretraining on Tiny
World and the training problems' text, SFT on them, 200 test problems.

    python bench/gsm8k.py --raw FOLDER           # train.jsonl and test.jsonl of GSM8K

Each step is a command that the documentation lists; it prints them, and what each took.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT
from dataset.tiny_world import PRETRAIN, SFT, write_missing


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True, help="folder of the official files")
    parser.add_argument("--save_dir", type=Path, default=ROOT / "out" / "gsm8k_run")
    parser.add_argument("--limit", type=int, default=200, help="test problems (%(default)s)")
    parser.add_argument("--epochs", type=int, nargs=2, default=[1, 3], help="pretraining, SFT")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    data, out = args.save_dir / "data", ["--save_dir", args.save_dir]
    text, tokenizer = data / "text.jsonl", args.save_dir / "tokenizer.json"
    write_missing(PRETRAIN)
    pretrain, sft = args.epochs
    steps = {
        "data": ["recipes/prepare_math.py", "gsm8k", "--raw", args.raw, "--out", data],
        "tokenizer": [
            *["trainer/train_tokenizer.py", "--data_path", PRETRAIN, SFT, text],
            *["--vocab_size", 4096, "--out", tokenizer],
        ],
        "pretraining": [
            *["trainer/train_pretrain.py", "--data_path", PRETRAIN, text, "--tokenizer_path"],
            *[tokenizer, "--epochs", pretrain, "--max_seq_len", 512, "--batch_size", 2, *out],
        ],
        "SFT": [
            *["trainer/train_full_sft.py", "--config", "trainer/configs/gsm8k_full.toml"],
            *["--data_path", data / "train.jsonl", "--val_data_path", data / "valid.jsonl"],
            *["--epochs", sft, *out],
        ],
        "evaluation": [
            *["evaluation/run_eval.py", "--task", "gsm8k", "--weight", "gsm8k", "--data_path"],
            *[data / "test.jsonl", "--limit", args.limit, "--max_new_tokens", 256, *out],
        ],
    }
    spent = {}
    for name, command in steps.items():
        words = list(map(str, command))
        print(f"\n$ python {' '.join(words)}", flush=True)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)
        spent[name] = time.perf_counter() - began
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items()), end="; ")
    print(f"{sum(spent.values()) / 60:.1f} minutes together")


if __name__ == "__main__":
    main()
