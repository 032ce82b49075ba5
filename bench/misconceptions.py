"""Do reasoning traces help? A model is taught to name the misconception behind a wrong sum, once
with the reasoning before the name and once without, and asked about sums that it never saw.

    python bench/misconceptions.py               # after the demo, which makes out/pretrain_384.pth

Each step is a command that the documentation lists; it prints them.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.chat_template import render
from dataset.cot import MARKS, conversation
from model.generation import complete
from trainer import checkpoint
from trainer.arguments import ROOT

PROMPTS = ROOT / "dataset" / "cot_prompts.toml"
FORGOT = "The carry was forgotten."
TOOK = "It was taken away instead of added."
ADDED = "It was added instead of taken away."
SWAPPED = "The smaller digit was taken from the larger one."
COPIED = "Only the ones were reckoned with."


def traces():
    """Every two-digit sum that some misconception gets wrong, with the reasoning that shows it."""
    for a in range(11, 50):
        for b in range(11, 50):
            (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
            sums, right = {}, a + b
            if ones_a + ones_b >= 10:
                cot = f"{ones_a}+{ones_b}={ones_a + ones_b}, write {(ones_a + ones_b) % 10}. "
                cot += f"{tens_a}+{tens_b}={tens_a + tens_b}, and no carry."
                sums[FORGOT] = right - 10, cot
            else:
                cot = f"{ones_a}+{ones_b}={ones_a + ones_b}. The {tens_a} stays."
                sums[COPIED] = tens_a * 10 + ones_a + ones_b, cot
            if a > b:
                sums[TOOK] = a - b, f"{a}+{b}={right}, but {a}-{b}={a - b}."
            yield from of_sum(f"{a}+{b}", right, sums)
            if a <= b:
                continue
            sums, right = {ADDED: (a + b, f"{a}-{b}={a - b}, but {a}+{b}={a + b}.")}, a - b
            if ones_a < ones_b:
                cot = f"{ones_b}-{ones_a}={ones_b - ones_a}. {tens_a}-{tens_b}={tens_a - tens_b}."
                sums[SWAPPED] = (tens_a - tens_b) * 10 + ones_b - ones_a, cot
            else:
                cot = f"{ones_a}-{ones_b}={ones_a - ones_b}. The {tens_a} stays."
                sums[COPIED] = tens_a * 10 + ones_a - ones_b, cot
            yield from of_sum(f"{a}-{b}", right, sums)


def of_sum(question, right, sums):
    """Records of a sum; a wrong answer that two misconceptions lead to is left out."""
    times = Counter(wrong for wrong, _ in sums.values())
    for misconception, (wrong, cot) in sums.items():
        if wrong != right and times[wrong] == 1:
            texts = {"question": f"{question}?", "correct": str(right), "incorrect": str(wrong)}
            yield texts | {"cot": cot, "misconception": misconception}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_dir", type=Path, default=ROOT / "out", help="of the demo")
    parser.add_argument("--from_weight", default="pretrain")
    parser.add_argument("--records", type=int, default=400, help="to learn from (%(default)s)")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    records, folder = list(traces()), args.save_dir / "misconceptions"
    random.Random(1).shuffle(records)
    folder.mkdir(parents=True, exist_ok=True)
    learned, asked = records[: args.records], records[args.records :][:400]
    most = Counter(record["misconception"] for record in asked).most_common(1)[0][1]
    print(f"{len(learned)} records to learn from, {len(asked)} asked about afterwards; ", end="")
    print(f"always the commonest name: {most / len(asked):.1%}")
    for name in ("with", "without"):
        path, out, weight = folder / f"{name}.jsonl", folder / name, f"misconceptions_{name}"
        shown = learned if name == "with" else [record | {"cot": ""} for record in learned]
        path.write_text("".join(json.dumps(r) + "\n" for r in shown), encoding="utf-8")
        python("dataset/prepare.py", "cot", path, "--out", out)
        python(
            *["trainer/train_full_sft.py", "--from_weight", args.from_weight, "--epochs"],
            *[args.epochs, "--warmup_steps", 10, "--data_path", out / "train.jsonl"],
            *["--extend_tokens", out / "tokens.txt"],
            *["--save_dir", args.save_dir, "--save_weight", weight],
        )
        for state, known in (("before", args.from_weight), ("after", weight)):
            share = score(checkpoint.find(args.save_dir, known), asked)
            print(f"{name} reasoning, {state}: {share:.1%} named rightly")


def python(*words):
    words = list(map(str, words))
    print(f"\n$ python {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def score(path, records):
    """The share of the records whose misconception a model names."""
    model, tokenizer = checkpoint.build(checkpoint.load(path), path)
    forms, right = tomllib.loads(PROMPTS.read_text(encoding="utf-8")), 0
    for start in range(0, len(records), 50):
        chosen = records[start : start + 50]
        turns = [
            conversation(record, forms["templates"][0], "")["conversations"] for record in chosen
        ]
        prompts = [
            render(turn[:1], add_generation_prompt=True, tokenizer=tokenizer)[0] for turn in turns
        ]
        answers = complete(model.eval(), prompts, max_new_tokens=100, temperature=0)
        for record, answer in zip(chosen, answers, strict=True):
            said = tokenizer.decode(answer).partition(MARKS[1])[2]
            right += said.strip() == record["misconception"]
    return right / len(records)


if __name__ == "__main__":
    main()
