"""Learning from preferences and rewards, measured: the tables of page 21 of the tutorial.

    make demo
    python bench/rewards.py dpo          # a style by DPO, three seeds: two minutes
    python bench/rewards.py grpo         # sums by GRPO, three seeds, and two controls: half an hour

dpo trains the demo's chat model to answer shortly, and asks about villagers whom no pair mentions.
grpo begins with the demo's pretrained model and 50 solved sums, and learns from the results alone
of 1,000 others.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT
from dataset.chat_template import render
from dataset.tiny_world.chat import SHORT_KINDS, Pool, answer, ask, sentence
from dataset.tiny_world.generate import SEED, write_sums
from dataset.tiny_world.text import World
from model.generation import complete
from trainer import checkpoint

RANDOM = """
import random
def chance(prompt, answer, gold):
    return float(random.Random(answer + prompt[-1]["content"]).random() < 0.2)
"""


def run(*command):
    """Runs a script of the project; returns the seconds that it took."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - began


def score(folder, weight, *more, name=None):
    """The result of an evaluation with these flags, as run_eval.py writes it."""
    name = name or weight
    run("evaluation/run_eval.py", "--save_dir", folder, "--weight", weight, "--run", name, *more)
    path = folder / "eval" / "tiny_world" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def style(folder, weight):
    """(share of short answers, share with the right fact, mean tokens) of answers about villagers
    whom no pair and no conversation mentions.
    """
    path = checkpoint.find(folder, weight)
    model, tokenizer = checkpoint.build_model(checkpoint.load(path), path)
    rng, rows = random.Random(7), []
    for person in Pool(World(SEED), held_out=True).people:
        for kind in SHORT_KINDS:
            question = [{"role": "user", "content": sentence(ask(rng, person, kind))}]
            rows.append((question, getattr(person, kind), answer(person, kind)))
    prompts = [render(question, None, True, tokenizer)[0] for question, *_ in rows]
    said = complete(model, prompts, max_new_tokens=40, temperature=0)
    texts = [tokenizer.decode(ids) for ids in said]
    pairs = list(zip(texts, rows, strict=True))
    short = mean(text == sentence(value) for text, (_, value, _) in pairs)
    right = mean(value.lower() in text.lower() for text, (_, value, _) in pairs)
    return short, right, mean(map(len, said))


def dpo(folder, seeds):
    for seed in (None, *seeds):
        weight, seconds = "full_sft", 0.0
        if seed:
            weight = f"dpo_{seed}"
            flags = ["--save_weight", weight, "--seed", seed, "--save_dir", folder]
            seconds = run("trainer/train_dpo.py", *flags)
        short, right, tokens = style(folder, weight)
        totals = score(folder, weight)["totals"]
        said = f"short {short:.0%}, right {right:.0%}, {tokens:.1f} tokens"
        whole = f"tiny_world {totals['accuracy']:.1%}: {categories(totals)}"
        print(f"{weight:10} {seconds:4.0f} s, {said}; {whole}", flush=True)


def categories(totals):
    found = {name: right / count for name, (right, count) in totals["by_type"].items()}
    return ", ".join(f"{name} {value:.0%}" for name, value in found.items())


def grpo(folder, seeds):
    sums = folder / "sums"
    write_sums(sums)
    (sums / "random.py").write_text(RANDOM, encoding="utf-8")
    exam = ["--data_path", sums / "exam.jsonl"]
    for seed in seeds:
        base = f"few_{seed}"
        start = ["--from_weight", "pretrain", "--data_path", sums / "solved.jsonl", "--epochs", 20]
        start += ["--warmup_steps", 5, "--val_split", 0, "--seed", seed, "--save_dir", folder]
        run("trainer/train_full_sft.py", *start, "--save_weight", base)
        runs = {"grpo": []}
        if seed == seeds[0]:
            chance = f"{sums / 'random.py'}:chance"
            runs["random rewards"] = ["--reward", chance, "--epochs", 1]
        print(f"seed {seed}: {passes(folder, base, exam)}", flush=True)
        for name, more in runs.items():
            weight = f"{name.replace(' ', '_')}_{seed}"
            flags = ["--from_weight", base, "--data_path", sums / "practice.jsonl", "--seed", seed]
            flags += ["--save_weight", weight, "--save_dir", folder, "--epochs", 2, *more]
            seconds = run("trainer/train_grpo.py", *flags)
            print(f"  {name}: {seconds:.0f} s, {passes(folder, weight, exam)}", flush=True)


def passes(folder, weight, exam):
    """pass@1 at temperature 0, and pass@16 of the first 100 sums at temperature 1."""
    first = score(folder, weight, *exam)["totals"]["accuracy"]
    more = ["--num_samples", 16, "--temperature", 1, "--limit", 100, "--batch_size", 128]
    rows = score(folder, weight, *exam, *more, name=f"{weight}_16")["problems"]
    solved = {row["problem"] for row in rows if row["verdict"] == "correct"}
    return f"pass@1 {first:.1%}, pass@16 {len(solved) / 100:.0%}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("which", nargs="+", choices=["dpo", "grpo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--save_dir", type=Path, default=ROOT / "out", help="the demo's weights")
    args = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in args.which:
        {"dpo": dpo, "grpo": grpo}[name](args.save_dir.resolve(), args.seeds)


if __name__ == "__main__":
    main()
