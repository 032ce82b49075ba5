"""Learning from preferences and rewards, measured: the tables of page 21 of the tutorial.

    make demo
    python bench/rewards.py dpo          # a style by DPO, three seeds: two minutes
    python bench/rewards.py grpo         # sums in five ways, three seeds, and controls: 90 minutes
    python bench/rewards.py hack --seeds 1    # a reward that is earned in another way: four minutes

dpo trains the demo's chat model to answer shortly, and asks about villagers whom no pair mentions.
grpo begins with the demo's pretrained model and 50 solved sums. It learns from 1,000 others, of
which the results alone are known, by rejection sampling, by DPO, and by GRPO.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT
from dataset.tiny_world.chat import ask
from dataset.tiny_world.generate import SEED, write_sums
from dataset.tiny_world.text import answer
from dataset.tiny_world.world import SHORT_KINDS, World, sentence
from model.chat_template import render
from model.generation import complete
from model.weights import build_model, find_weights, load

SAMPLING = ["--temperature", 1, "--max_new_tokens", 48, "--batch_size", 128]
WARM = ["--warmup_steps", 5]
DPO = ["--epochs", 7, "--sft_weight", 1]  # without the weight: 22 %, and both answers fall
GRPO = ["--epochs", 2, "--val_interval", 40]


def chance(prompt, answer, gold):
    """A reward that knows nothing: 1 for a fifth of the answers, whatever they say."""
    return float(random.Random(answer + prompt[-1]["content"]).random() < 0.2)


def careful(prompt, answer, gold):
    """1 for the right end, 0.2 for one line of work; less for "very" and for length."""
    right = answer.endswith(gold[0])  # gold is ["#### 12"]
    one_line = answer.count("\n") == 1
    return right + 0.2 * one_line - 0.5 * ("very" in answer) - len(answer) / 1000


def brief(prompt, answer, gold):
    """The same idea with a length that costs too much."""
    return answer.endswith(gold[0]) - len(answer) / 10


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
    name = f"rewards_{name or weight}"
    path = folder / "eval" / "tiny_world" / f"{name}.json"
    for ending in (".json", ".part"):  # of an earlier run of this benchmark
        path.with_suffix(ending).unlink(missing_ok=True)
    run("evaluation/run_eval.py", "--save_dir", folder, "--weight", weight, "--run", name, *more)
    return json.loads(path.read_text(encoding="utf-8"))


def style(folder, weight):
    """(share of short answers, share with the right fact, mean tokens) of answers about villagers
    whom no pair and no conversation mentions.
    """
    path = find_weights(folder, weight)
    model, tokenizer = build_model(load(path), path)
    rng, rows = random.Random(7), []
    for person in World(SEED).held_out:
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


class Sums:
    """Ways to learn from 50 solved sums, and from 1,000 questions of which the results are known.
    SFT and rejection sampling take `budget` seconds; DPO and GRPO have a fixed number of steps.
    """

    def __init__(self, folder, seed, budget):
        self.folder, self.seed, self.budget = folder, seed, budget
        self.sums = folder / "sums"
        self.solved = self.sums / "solved.jsonl"
        # One model that solves nothing, for control 2, and the one that all others begin with.
        short, self.seconds = self.few(6, "unable"), self.few(20)
        self.rate = 50 * (20 - 6) / (self.seconds - short)  # conversations a second of SFT
        self.start = self.seconds - 50 * 20 / self.rate  # seconds before the first one

    def path(self, name):
        return self.folder / f"{name}_{self.seed}.jsonl"

    def train(self, script, name, weight, *more):
        flags = ["--from_weight", weight, "--save_weight", f"{name}_{self.seed}"]
        flags += ["--seed", self.seed, "--save_dir", self.folder]
        return run(f"trainer/train_{script}.py", *flags, *more)

    def few(self, epochs=20, name="few"):
        """SFT of the pretrained model on the solved sums alone."""
        flags = ["--epochs", epochs, *WARM, "--val_split", 0]
        return self.train("full_sft", name, "pretrain", "--data_path", self.solved, *flags)

    def first(self):
        """The model that all others begin with."""
        return self.seconds

    def epochs(self, seconds, records):
        return max(1, round(self.rate * (seconds - self.start) / records))

    def longer(self):
        return self.few(self.epochs(self.budget, 50), "longer")

    def rounds(self, number):
        """In each round the latest model solves the sums, and the pretrained model is trained anew
        on what was right.
        """
        weight, began, answers = f"few_{self.seed}", time.perf_counter(), 12 // number
        for index in range(number):
            name, until = f"round{index + 1}_of_{number}", self.budget * (index + 1) / number
            accepted = self.path(f"{name}_accepted")
            for ending in (".jsonl", ".part"):
                accepted.with_suffix(ending).unlink(missing_ok=True)
            run("recipes/rejection_sample.py", "--task", "tiny_world", "--save_dir", self.folder,
                "--weight", weight, "--data_path", self.sums / "practice.jsonl", *SAMPLING,
                "--num_samples", answers, "--seed", self.seed, "--out", accepted)  # fmt: skip
            records = 50 + len(accepted.read_text(encoding="utf-8").splitlines())
            left = until - (time.perf_counter() - began)
            data = ["--data_path", self.solved, accepted, "--val_split", 0, *WARM]
            epochs = self.epochs(left, records)
            self.train("full_sft", name, "pretrain", *data, "--epochs", epochs)
            weight = f"{name}_{self.seed}"
        return time.perf_counter() - began

    def dpo(self):
        """Pairs of a right and a wrong answer of the model to the same sum."""
        began, rng, path = time.perf_counter(), random.Random(self.seed), self.path("pairs")
        flags = ["--data_path", self.sums / "practice.jsonl", *SAMPLING, "--num_samples", 12]
        weight = f"few_{self.seed}"
        rows = score(self.folder, weight, *flags, "--seed", self.seed, name=f"{weight}_pairs")
        answers = {}
        for row in rows["problems"]:
            kinds = answers.setdefault(row["problem"], (row["prompt"], set(), set()))
            kinds[1 if row["verdict"] == "correct" else 2].add(row["output"])
        with path.open("w", encoding="utf-8") as file:
            for prompt, *kinds in answers.values():
                right, wrong = (rng.sample(sorted(k), min(2, len(k))) for k in kinds)
                for chosen, rejected in zip(right, wrong, strict=False):
                    pair = {"messages": prompt, "chosen": chosen, "rejected": rejected}
                    file.write(json.dumps(pair) + "\n")
        self.train("dpo", "dpo_sums", weight, "--data_path", path, *DPO)
        return time.perf_counter() - began

    def grpo(self, name="grpo", weight="few", *more):
        data = ["--data_path", self.sums / "practice.jsonl", *GRPO, *more]
        return self.train("grpo", name, f"{weight}_{self.seed}", *data)

    def chance(self):
        """Control 1: the reward knows nothing of the answer."""
        return self.grpo("chance", "few", "--reward", "bench/rewards.py:chance")

    def unsolved(self):
        """Control 2: a model that solves none."""
        return self.grpo("unsolved", "unable")

    def passes(self, name):
        """(accuracy at temperature 0, pass@16 of the first 100 sums at temperature 1)"""
        weight, exam = f"{name}_{self.seed}", ["--data_path", self.sums / "exam.jsonl"]
        first = score(self.folder, weight, *exam)["totals"]["accuracy"]
        more = [*SAMPLING, "--num_samples", 16, "--limit", 100]
        rows = score(self.folder, weight, *exam, *more, name=f"{weight}_16")["problems"]
        return first, len({r["problem"] for r in rows if r["verdict"] == "correct"}) / 100


def grpo(folder, seeds, budget):
    """Keeps the results in rewards.json, where a run that was stopped finds them."""
    path = folder / "rewards.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_sums(folder / "sums")
    for seed in seeds:
        on = Sums(folder, seed, budget)
        ways = {"few": on.first, "longer": on.longer, "round1_of_1": partial(on.rounds, 1)}
        ways |= {"round3_of_3": partial(on.rounds, 3), "dpo_sums": on.dpo, "grpo": on.grpo}
        if seed == seeds[0]:
            ways |= {"chance": on.chance, "unsolved": on.unsolved}
        for name, way in ways.items():
            if str(seed) not in found.setdefault(name, {}):
                found[name][str(seed)] = way(), *on.passes(name)
                path.write_text(json.dumps(found), encoding="utf-8")
            print(f"seed {seed}: {name:12} {told(found[name][str(seed)])}", flush=True)
    for name, results in found.items():
        columns = list(zip(*results.values(), strict=True))
        means, low, high = (told([of(c) for c in columns]) for of in (mean, min, max))
        print(f"{name:12} mean {means}; from {low} to {high}")


def told(result):
    seconds, first, sixteen = result
    return f"{seconds:.0f} s, accuracy {first:.1%}, pass@16 {sixteen:.0%}"


def hack(folder, seeds):
    """The chat model, trained with the reward `brief`: it rises, and right answers vanish."""
    exam = ["--data_path", folder / "sums" / "exam.jsonl"]
    write_sums(folder / "sums")
    print(f"before: {score(folder, 'full_sft', *exam)['totals']['accuracy']:.1%} right")
    for seed in seeds:
        weight, rewarded = f"brief_{seed}", ["--reward", "bench/rewards.py:brief"]
        flags = ["--save_weight", weight, "--seed", seed, "--save_dir", folder]
        explores = ["--temperature", 2, "--learning_rate", 1e-3]  # else short answers are not found
        seconds = run("trainer/train_grpo.py", *flags, *rewarded, *explores)
        log = (folder / "logs" / f"{weight}_256.jsonl").read_text(encoding="utf-8").splitlines()
        first, last = (
            [json.loads(log[i])[n] for n in ("reward", "answer_tokens")] for i in (0, -1)
        )
        right = score(folder, weight, *exam)["totals"]["accuracy"]
        rewards = f"reward {first[0]:.2f} to {last[0]:.2f}"
        lengths = f"tokens of an answer {first[1]:.0f} to {last[1]:.0f}"
        print(f"{weight}: {seconds:.0f} s, {rewards}, {lengths}, {right:.1%} right", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("which", choices=["dpo", "grpo", "hack"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--seconds",
        type=int,
        default=240,
        help="for longer SFT and for rejection sampling; DPO and GRPO take about 240",
    )
    parser.add_argument("--save_dir", type=Path, default=ROOT / "out", help="the demo's weights")
    args = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    folder = args.save_dir.resolve()
    if args.which == "grpo":
        return grpo(folder, args.seeds, args.seconds)
    {"dpo": dpo, "hack": hack}[args.which](folder, args.seeds)


if __name__ == "__main__":
    main()
