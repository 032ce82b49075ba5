"""Generates Tiny World, the data about an invented village, small enough to train on a laptop.

    python dataset/tiny_world/generate.py                      # writes the three files below
    python dataset/tiny_world/generate.py --sums out/sums      # more sums to solve, see docs/15

pretrain_tiny.jsonl   text about 48 villagers (home, job, friend, pet, what each likes), stories,
                      dialogues, definitions, counting and sums
sft_tiny.jsonl        conversations; 16 of the villagers are never mentioned in them
eval_tiny.jsonl       held-out prompts with their answers; `World` (world.py) decides what is held
                      out of the other two files

The same seed writes the same bytes on every machine.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import atomic_write, report_user_errors
from dataset.tiny_world import FOLDER, PAIRS, PRACTICE
from dataset.tiny_world.chat import (
    calculation,
    conversations,
    preferences,
    questions,
    questions_in_own_words,
)
from dataset.tiny_world.text import pretraining_text
from dataset.tiny_world.world import World

SEED = 1


def write_tiny_world(folder=FOLDER, seed=SEED):
    """Writes the three files into folder and returns their records, pretraining first."""
    world = World(seed)
    texts = [{"text": text} for text in pretraining_text(world, random.Random(seed + 1))]
    files = {
        "pretrain_tiny.jsonl": texts,
        "sft_tiny.jsonl": list(conversations(world, random.Random(seed + 2))),
        "eval_tiny.jsonl": [
            *questions(world, random.Random(seed + 3)),
            *questions_in_own_words(world, random.Random(seed + 6)),
        ],
    }
    for name, records in files.items():
        write(Path(folder) / name, records)
    return files


def write(path, records):
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")


def write_file(path):
    """Write a file of Tiny World. The pretraining text, the conversations and the questions are
    written together.
    """
    if path == PAIRS:
        write(path, preferences(World(SEED), random.Random(SEED + 5)))
    elif path == PRACTICE:
        write(path, practice(World(SEED), random.Random(SEED + 4)))
    else:
        print(f"{path} does not exist yet: writing the Tiny World data", flush=True)
        write_tiny_world()


def practice(world, rng):
    """1,000 questions with a sum of training, and only their results."""
    return questions(world, rng, held_out=False, counts={calculation: 1000}, depths=())


def write_sums(folder, seed=SEED):
    """Writes solved.jsonl, conversations with sums and their steps; practice.jsonl, questions of
    the same kind with only the result; exam.jsonl, questions about the held-out sums.
    """
    world, rng = World(seed), random.Random(seed + 4)
    files = {
        "solved": [{"conversations": calculation(rng, world.training).messages} for _ in range(50)],
        "practice": list(practice(world, rng)),
        "exam": list(questions(world, rng, counts={calculation: 400}, depths=())),
    }
    for name, records in files.items():
        write(folder / f"{name}.jsonl", records)
        print(f"{folder / name}.jsonl: {len(records)} sums")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=SEED)
    sums = "write solved, practice and exam.jsonl there, and nothing else"
    parser.add_argument("--sums", type=Path, metavar="FOLDER", help=sums)
    args = parser.parse_args(argv)
    if args.sums:
        return write_sums(args.sums, args.seed)
    files = write_tiny_world(args.out, args.seed)
    for name, records in files.items():
        print(f"{args.out / name}: {len(records)} records")


if __name__ == "__main__":
    with report_user_errors():
        main()
