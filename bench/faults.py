"""Kills training runs at random moments, resumes them, and compares with runs left alone.

    python bench/faults.py --kills 100

Each kill hits a fresh run: while its data is tokenised, while it trains, while it saves. Right
after, every .pth file must be complete. The run is then resumed (or started again, where nothing
was saved yet), and must end in the same weights, to the bit, and the same log, but for timings.
Ends with code 1 if one differs; its folder stays.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from trainer import checkpoint
from trainer.arguments import ROOT

TOY = """--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --from_weight none
    --device cpu --dtype fp32 --save_interval 1 --eval_interval 4 --log_interval 1
    --max_seq_len 128"""
RUNS = {  # name: (script, its flags)
    "SFT, dropout, accumulation": ("full_sft", "--dropout 0.1 --accumulation_steps 2 --epochs 2"),
    "SFT, MoE, not packed": ("full_sft", "--use_moe 1 --packing 0 --batch_size 16 --epochs 4"),
    "SFT, a worker process": ("full_sft", "--num_workers 1 --epochs 2"),
    "pretraining": ("pretrain", "--batch_size 100 --keep_checkpoints 0"),
}


def command(name, data, out, *more):
    script, flags = RUNS[name]
    flags = [
        *TOY.split(),
        *flags.split(),
        "--save_dir",
        out,
        "--data_path",
        data / f"{script}.jsonl",
    ]
    return [sys.executable, str(ROOT / f"trainer/train_{script}.py"), *map(str, flags), *more]


def start(line):
    return subprocess.Popen(
        line,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its worker processes can be killed with it
    )


def result(name, out):
    """(weights, log without timings) of a finished run."""
    stem = f"{RUNS[name][0]}_32{'_moe' if 'moe' in RUNS[name][1] else ''}"
    lines = (out / "logs" / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    timings = ("tokens_per_s", "data_wait_s")
    log = [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]
    return checkpoint.load(out / f"{stem}.pth")["model"], log


def phase(out):
    """What a run was doing when it was killed, as the files say that it left."""
    saving = [*out.rglob("*.part"), *out.rglob("*_new.pth")]
    if any(".pth" in path.name for path in saving):
        return "saving"
    if list(out.glob("logs/*.jsonl")):
        return "training"
    return "preparing the data" if list(out.glob("cache/.*")) else "starting"


def trial(number, data, folder, references, seed):
    """(phase, whether anything was saved, what differs or None) of one kill."""
    rng = random.Random(f"{seed} {number}")
    name = list(RUNS)[number % len(RUNS)]
    expected, seconds, earliest = references[name]
    out = folder / f"{number}"
    process = start(command(name, data, out))
    # Every other pretraining is hit early: while its data, which is larger, is tokenised.
    time.sleep(rng.uniform(earliest, earliest + 0.5 if number % 8 == 7 else seconds))
    finished = process.poll() is not None
    os.killpg(process.pid, signal.SIGKILL) if not finished else None
    process.communicate()
    when = "after its end" if finished else phase(out)
    for path in out.rglob("*.pth"):
        checkpoint.load(path)  # complete, or an error
    saved = any(out.glob("checkpoints/*_resume.pth")) or any(out.glob("checkpoints/*_step*.pth"))
    process = start(command(name, data, out, *(["--from_resume", "1"] if saved else [])))
    printed, _ = process.communicate()
    if process.returncode:
        return when, saved, f"{name}: {printed} ({out})"
    weights, log = result(name, out)
    same = weights.keys() == expected[0].keys()
    same = same and all(torch.equal(weights[key], expected[0][key]) for key in weights)
    if not same or log != expected[1]:
        return when, saved, f"{name}: other {'log' if same else 'weights'} ({out})"
    shutil.rmtree(out)
    return when, saved, None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="trials at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    folder = Path(tempfile.mkdtemp())
    words = [f"{i} and {i * i % 97}." for i in range(3000)]
    texts = [" ".join(words[i : i + 1 + i % 30]) for i in range(len(words))]
    asked = [{"question": text[:40], "answer": text[40:200]} for text in texts[::13]]
    chats = [record for record in asked if record["answer"]]
    for stage, records in (("pretrain", [{"text": t} for t in texts]), ("full_sft", chats)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{stage}.jsonl").write_text(lines, encoding="utf-8")

    references = {}
    for name in list(RUNS)[: args.kills]:
        began, earliest, out = time.perf_counter(), None, folder / name.replace(" ", "_")
        process = start(command(name, folder, out))
        while process.poll() is None:
            if earliest is None and out.exists():
                earliest = time.perf_counter() - began  # python and torch are loaded
            time.sleep(0.01)
        if process.returncode:
            sys.exit(process.stdout.read())
        references[name] = result(name, out), time.perf_counter() - began, earliest
        print(f"{name}: {references[name][0][1][-1]['step']} steps, saved after each")

    failures, table, done = [], Counter(), 0
    with ThreadPoolExecutor(args.jobs) as pool:
        numbers = range(args.kills)
        for when, saved, failure in pool.map(
            lambda number: trial(number, folder, folder, references, args.seed), numbers
        ):
            done += 1
            table[when, saved] += 1
            failures += [failure] if failure else []
            print(f"\r{done} of {args.kills}", end="", file=sys.stderr)
    print(f"\n{'killed while':24}{'resumed':>9}{'anew':>7}")
    for when in sorted({when for when, _ in table}):
        print(f"{when:24}{table[when, True]:9}{table[when, False]:7}")
    print(f"{args.kills - len(failures)}/{args.kills} identical")
    if failures:
        sys.exit("\n".join(failures))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
