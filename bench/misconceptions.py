"""Do reasoning traces help? A model is taught to name the misconception behind a wrong sum, once
with the reasoning before the name and once without, and asked about sums that it never saw.

    python bench/misconceptions.py               # after the demo, which makes out/pretrain_256.pth
    python bench/misconceptions.py --score full_sft

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

from common import ROOT
from model.chat_template import render
from model.generation import complete
from model.weights import build_model, find_weights, load
from recipes.misconceptions import MARKS, conversation

PROMPTS = ROOT / "recipes" / "misconceptions.toml"
FORGOT = "The carry was forgotten."
TOOK = "It was taken away instead of added."
ADDED = "It was added instead of taken away."
SWAPPED = "The smaller digit was taken from the larger one."
COPIED = "Only the ones were reckoned with."


def traces():
    """Every wrong answer that a misconception leads to, for all two-digit numbers below 50. The
    reasoning tries one misconception after the other and sees which gives the answer.
    """
    for a in range(11, 50):
        for b in range(11, 50):
            ones = a % 10 + b % 10
            wrong = {TOOK: a - b} if a > b else {}
            wrong |= {FORGOT: a + b - 10} if ones >= 10 else {COPIED: a - a % 10 + ones}
            yield from of_sum(f"{a}+{b}", a + b, wrong)
            ones = a % 10 - b % 10
            wrong = {ADDED: a + b}
            wrong |= {SWAPPED: a // 10 * 10 - b // 10 * 10 - ones} if ones < 0 else {}
            wrong |= {COPIED: a - a % 10 + ones} if ones >= 0 else {}
            if a > b:
                yield from of_sum(f"{a}-{b}", a - b, wrong)


def of_sum(question, right, wrong):
    """Records of a sum; an answer that two misconceptions lead to is left out."""
    times = Counter(wrong.values())
    tried = "".join(f"{name} {answer}. " for name, answer in wrong.items())
    for name, answer in wrong.items():
        if answer != right and times[answer] == 1:
            texts = {"question": f"{question}?", "correct": str(right), "incorrect": str(answer)}
            cot = f"{tried}The student says {answer}."
            yield texts | {"cot": cot, "misconception": name}


def split(records, count):
    """(count records to learn from, 400 about sums that none of those mentions)."""
    sums = sorted({record["question"] for record in records})
    place = {question: n for n, question in enumerate(random.Random(1).sample(sums, len(sums)))}
    records.sort(key=lambda record: place[record["question"]])
    seen = {record["question"] for record in records[:count]}
    rest = [record for record in records[count:] if record["question"] not in seen]
    return records[:count], rest[:400]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_dir", type=Path, default=ROOT / "out", help="of the demo")
    parser.add_argument("--from_weight", default="pretrain")
    parser.add_argument("--records", type=int, default=1000, help="to learn from (%(default)s)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--score", nargs="+", metavar="NAME", help="ask these, train nothing")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    folder = args.save_dir / "misconceptions"
    folder.mkdir(parents=True, exist_ok=True)
    learned, asked = split(list(traces()), args.records)
    most = Counter(record["misconception"] for record in asked).most_common(1)[0][1]
    print(f"{len(learned)} records to learn from, {len(asked)} asked about afterwards; ", end="")
    print(f"always the commonest name: {most / len(asked):.1%}")
    for name in args.score or []:
        print(f"{name}: {score(find_weights(args.save_dir, name), asked):.1%} named rightly")
    for name in () if args.score else ("with", "without"):
        path, out, weight = folder / f"{name}.jsonl", folder / name, f"misconceptions_{name}"
        shown = learned if name == "with" else [record | {"cot": ""} for record in learned]
        path.write_text("".join(json.dumps(r) + "\n" for r in shown), encoding="utf-8")
        python("recipes/misconceptions.py", path, "--out", out)
        python(
            *["trainer/train_full_sft.py", "--from_weight", args.from_weight, "--epochs"],
            *[args.epochs, "--warmup_steps", 10, "--data_path", out / "train.jsonl"],
            *["--extend_tokens", out / "tokens.txt"],
            *["--save_dir", args.save_dir, "--save_weight", weight],
        )
        for state, known in (("before", args.from_weight), ("after", weight)):
            share = score(find_weights(args.save_dir, known), asked)
            print(f"{name} reasoning, {state}: {share:.1%} named rightly")


def python(*words):
    words = list(map(str, words))
    print(f"\n$ python {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def score(path, records):
    """The share of the records whose misconception a model names."""
    model, tokenizer = build_model(load(path), path)
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
