"""What a large file costs: a JSONL file of --gigabytes is made, tokenised, and read from its cache.

    python bench/memory.py --gigabytes 1            # on Linux or macOS; needs twice that on disk
    python bench/memory.py --gigabytes 0.019 --one_line        # a single long document

Prints the seconds and the most resident memory of each process, beside that of one that only loads
the code, and how long it takes from the second start to the first batch.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READ = """
import resource, sys, time
import torch
from types import SimpleNamespace
from dataset.lm_dataset import PretrainDataset
from dataset.step_plan import batches, epoch_plan
from model.tokenizer import load_tokenizer
began = time.perf_counter()
tokenizer = load_tokenizer()
if len(sys.argv) > 2:
    data = PretrainDataset(sys.argv[1], tokenizer, 512, cache_dir=sys.argv[2])
    opened = f"opened in {time.perf_counter() - began:.1f} s"
    print(f"{len(data):,} rows, {data.lengths.sum():,} tokens; {opened}")
if len(sys.argv) > 3:
    args = SimpleNamespace(seed=1, packing=True, max_seq_len=512, batch_size=16)
    args.num_workers, args.accumulation_steps = 0, 1
    plan = epoch_plan(data, range(len(data)), args, 0)
    micro_batches = [rows for step in plan for rows in step]
    loader = iter(batches(data, micro_batches, args, torch.device("cpu")))
    next(loader)
    print(f"first batch after {time.perf_counter() - began:.1f} s; {len(plan):,} steps an epoch")
    for _ in range(500):
        next(loader)
unit = 2**20 if sys.platform == "darwin" else 2**10
print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit} MB")
if sys.platform == "linux":  # pages of the mapped cache count as resident, but can be taken back
    status = open("/proc/self/status").read().split("RssAnon:")[1].split()
    print(f"{int(status[0]) // 1024} MB at the end without mapped files")
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--one_line", action="store_true", help="all texts as one document")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from dataset.tiny_world.text import portrait
    from dataset.tiny_world.world import World

    with tempfile.TemporaryDirectory() as folder:
        path, cache, rng = Path(folder) / "large.jsonl", Path(folder) / "cache", random.Random(0)
        people = World(1).people
        lines = [
            json.dumps({"text": " ".join(portrait(rng, rng.choice(people)) for _ in range(8))})
            + "\n"
            for _ in range(2000)
        ]
        size = 0
        with path.open("w", encoding="utf-8") as file:
            size += file.write('{"text": "') if args.one_line else 0
            while size < args.gigabytes * 1e9:
                line = rng.choice(lines)
                size += file.write(json.loads(line)["text"] if args.one_line else line)
            size += file.write('"}\n') if args.one_line else 0
        print(f"{size / 1e9:.2f} GB, {size // (sum(map(len, lines)) // len(lines)):,} documents")
        for name, more in (("code alone", []), ("prepare", [cache]), ("train from it", [cache, 1])):
            began = time.perf_counter()
            command = [sys.executable, "-c", READ, path, *more]
            done = subprocess.run(
                list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            print(
                f"{name:>14}: {time.perf_counter() - began:6.1f} s;",
                "; ".join(done.stdout.split("\n")),
            )


if __name__ == "__main__":
    main()
