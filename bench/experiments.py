"""The experiments of the tutorial, each printed as a table: what happens, and to how many of the
held-out questions?

    python bench/experiments.py supervise      # docs/5: which tokens of a conversation have a loss
    python bench/experiments.py pretraining    # docs/5: SFT without pretraining
    python bench/experiments.py mentions       # docs/4: how often must a fact be said?
    python bench/experiments.py symptoms       # docs/17: one mistake at a time

Each run has a folder of its own in out/experiments, and is not repeated: delete it to run it anew.
--jobs 2 has two runs at once, each on half of the cores.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import IM_END
from dataset import lm_dataset, step_plan, tiny_world
from dataset.tiny_world import chat, generate, text

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "experiments"
SFT = ["trainer/train_full_sft.py", "--from_weight", "{pretrained}"]
SAMPLES = ["--sample_interval", "20", "--sample_prompt", "Nelina lives", "--log_interval", "5"]
SCRATCH = ["trainer/train_full_sft.py", "--from_weight", "none"]
PRETRAIN = ["trainer/train_pretrain.py"]
EVALUATE = ["evaluation/run_eval.py", "--max_new_tokens", "256"]
SHARES = {"5": 0.03, "20": 0.11, "60": 0.33, "120": 0.66}  # mentions: part of the text that is kept
MENTIONS = OUT / "mentions"
TEXT, QUESTIONS = MENTIONS / "pretrain.jsonl", MENTIONS / "questions.jsonl"
# What each run of an experiment does: a training, and maybe the questions afterwards.
RUNS = {
    "supervise": {
        "answers": [SFT, EVALUATE],
        "all": [["bench/experiments.py", "all", *SFT], EVALUATE],
        "no_end": [["bench/experiments.py", "no_end", *SFT], EVALUATE],
    },
    "pretraining": {
        "answers": [SFT, EVALUATE],
        "conversations alone": [[*SCRATCH, "--replay_share", "0"], EVALUATE],
        "both at once": [[*SCRATCH, "--replay_share", "9", "--learning_rate", "4e-3"], EVALUATE],
    },
    "mentions": {
        "mentions": [
            [*PRETRAIN, "--data_path", TEXT],
            ["trainer/train_full_sft.py", "--replay_path", TEXT],
            [*EVALUATE, "--data_path", QUESTIONS],
        ]
    },
    "symptoms": {
        "as it is": [[*PRETRAIN, *SAMPLES]],
        "learning rate x 30": [[*PRETRAIN, "--learning_rate", "0.12"]],
        "no warm-up": [[*PRETRAIN, "--warmup_steps", "0"]],
        "labels shifted twice": [["bench/experiments.py", "shifted", *PRETRAIN]],
        "no document_ids": [["bench/experiments.py", "mixed", *PRETRAIN]],
        "first weights of 0.02": [["bench/experiments.py", "small", *PRETRAIN]],
        "no replay": [[*SFT, "--replay_share", "0"], EVALUATE],
    },
}

# Runs whose result is so far from the others that one seed, the first, shows it.
ONCE = {"conversations alone", "no_end", *RUNS["symptoms"]} - {"as it is"}


# Mistakes in the code, each one line. `python bench/experiments.py small trainer/train_pretrain.py`
# trains with one of them.
def shifted():
    """Labels are shifted by the data, and by the loss again: each position predicts the next but
    one.
    """
    right = step_plan.collate

    def wrong(*args, **options):
        ids, labels, *where = right(*args, **options)
        return ids, torch.roll(labels, -1, dims=1), *where

    step_plan.collate = wrong


def mixed():
    """The samples of a row see each other, and positions count on from one to the next."""
    right = step_plan.collate

    def wrong(*args, **options):
        ids, labels, positions, documents = right(*args, **options)
        positions = torch.arange(ids.shape[1]).expand_as(positions)
        return ids, labels, positions, torch.where(documents >= 0, 0, -1)

    step_plan.collate = wrong


def small():
    """All weights begin with a standard deviation of 0.02, as in GPT-2."""
    right = torch.nn.init.normal_
    torch.nn.init.normal_ = lambda weight, mean=0.0, std=1.0: right(weight, mean, 0.02)


def supervise_all():
    """Every token of a conversation is supervised, also the user's."""
    right = lm_dataset.pieces
    lm_dataset.pieces = lambda *args: [(piece, 1) for piece, _ in right(*args)]


def supervise_no_end():
    """The <|im_end|> after an answer is not supervised."""
    right = lm_dataset.pieces
    lm_dataset.pieces = lambda *args: [
        (piece, 0 if piece == IM_END else mask) for piece, mask in right(*args)
    ]


MISTAKES = {"shifted": shifted, "mixed": mixed, "small": small}
MISTAKES |= {"all": supervise_all, "no_end": supervise_no_end}


def train_with_mistake(name, script, flags):
    MISTAKES[name]()
    from trainer import train_full_sft, train_pretrain

    {PRETRAIN[0]: train_pretrain, SFT[0]: train_full_sft}[script].main(flags)


def write_mentions():
    """Pretraining text in which 16 villagers are mentioned more or less often, and questions about
    them. Four villagers of each group are two pairs of friends.
    """
    world, rng = text.World(text.SEED), random.Random(5)
    group = {p.name: list(SHARES)[i // 4] for i, p in enumerate(world.held_out)}
    kept, said = [], dict.fromkeys(SHARES, 0)
    for document in text.pretraining_text(world, random.Random(text.SEED + 1)):
        named = [p for p in world.held_out if re.search(rf"\b{p.name}\b", document, re.I)]
        if rng.random() < min([SHARES[group[p.name]] for p in named], default=1):
            kept.append({"text": document})
            for person in named:
                values = [getattr(person, kind) for kind in chat.KINDS]
                said[group[person.name]] += sum(v.lower() in document.lower() for v in values)
    MENTIONS.mkdir(parents=True, exist_ok=True)
    generate.write(TEXT, kept)
    records = []
    for person in world.held_out:
        for kind in chat.KINDS:
            for wording in text.words.asks[kind][: text.DIRECT]:
                question = text.sentence(chat.ask(rng, person, kind, wording=wording))
                record = {"category": group[person.name], "conversations": chat.turns(question)}
                records.append(record | {"expected": chat.answer(person, kind)})
    generate.write(QUESTIONS, records)
    return {name: count / (4 * len(chat.KINDS)) for name, count in said.items()}


def execute(name, seed, commands, threads):
    """Runs the commands of a run in its folder; returns the folder."""
    folder = OUT / f"{name.replace(' ', '_')}_{seed}"
    if (folder / "done").exists():
        return folder
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    pretrained = OUT / f"as_it_is_{seed}" / "pretrain_256.pth"
    for command in commands:
        words = [str(word).format(pretrained=pretrained) for word in command]
        flags = ["--save_dir", folder]
        flags += [] if words[0] == EVALUATE[0] else ["--seed", seed]
        done = subprocess.run(
            [sys.executable, *map(str, [ROOT / words[0], *words[1:], *flags])],
            capture_output=True, text=True, encoding="utf-8", env=environment,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{name}, seed {seed}: {done.stderr}")
        (folder / "output.txt").write_text(done.stdout, encoding="utf-8")
    (folder / "done").touch()
    print(f"{name}, seed {seed}: done", flush=True)
    return folder


def result_of(folder):
    """The evaluation of a run, or None."""
    for path in folder.glob("eval/tiny_world/*.json"):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def log_of(folder):
    """The last log of a run."""
    path = max(folder.glob("logs/*.jsonl"), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(values, form="{:.1%}"):
    """The mean of some values, and the lowest and the highest."""
    texts = [form.format(value) for value in (mean(values), min(values), max(values))]
    return texts[0] if len(values) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def report(folders):
    """Prints the losses and scores of each run, and how many answers did not end."""
    for name, of_seeds in folders.items():
        logs = [log_of(folder) for folder in of_seeds]
        print(f"\n{name}\n  tokens {logs[0][-1]['tokens']:,}")
        last = [log[-1]["val_loss"] or float("nan") for log in logs]
        print("  validation loss", spread(last, "{:.3f}"))
        if (of_seeds[0] / "pretrain_256.pth").exists() and not result_of(of_seeds[0]):
            command = ["eval_llm.py", "--weight", of_seeds[0] / "pretrain_256.pth"]
            command += ["--prompt", "Nelina lives", "--max_new_tokens", "40"]
            done = subprocess.run(
                [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
            )
            print("  it writes: Nelina lives", done.stdout.partition("\n")[2].strip())
        results = [result for result in map(result_of, of_seeds) if result]
        if results:
            for category in results[0]["scores"]:
                scores = [result["scores"][category] for result in results]
                print(f"  {category:20}{spread(scores)}")
            cut = [[row["truncated"] for row in result["problems"]] for result in results]
            print("  without an end", spread([mean(rows) for rows in cut]))
            for row in results[0]["problems"][:400:80]:
                print(f"    {row['prompt'][-1]['content']} -> {row['output']!r:.300}")


def main():
    if sys.argv[1:] and sys.argv[1] in MISTAKES:
        return train_with_mistake(sys.argv[1], sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=RUNS, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    tiny_world.write_missing(tiny_world.PRETRAIN)
    if "mentions" in args.experiment:
        for name, count in write_mentions().items():
            print(f"group {name}: a fact is mentioned {count:.0f} times")
    runs = {"as it is": RUNS["symptoms"]["as it is"]}
    for experiment in args.experiment:
        runs |= RUNS[experiment]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = {}  # name: its runs, then their folders
        for name, commands in runs.items():
            seeds = args.seeds[:1] if name in ONCE else args.seeds
            folders[name] = [pool.submit(execute, name, seed, commands, threads) for seed in seeds]
            if name == "as it is":  # the others begin with its weights
                [run.result() for run in folders[name]]
        folders = {name: [run.result() for run in waiting] for name, waiting in folders.items()}
    report(folders)


if __name__ == "__main__":
    main()
