"""Tiny World, the data about an invented village: its files, written when they are first needed."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
PRETRAIN, SFT, EVAL = (FOLDER / f"{name}_tiny.jsonl" for name in ("pretrain", "sft", "eval"))
PAIRS, PRACTICE = FOLDER / "dpo_tiny.jsonl", FOLDER / "practice_tiny.jsonl"


def write_missing(path):
    """Return path; write it first if it is a file of Tiny World that does not exist yet."""
    if path in (PRETRAIN, SFT, EVAL, PAIRS, PRACTICE) and not path.exists():
        from dataset.tiny_world import generate  # here: training on other data needs none of it

        generate.write_file(path)
    return path
