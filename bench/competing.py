"""Training and decoding beside other busy programs, with settings of OpenMP, in tokens per second.

    python bench/competing.py                # some minutes; nothing else may run
    python bench/competing.py --rounds 5

Every measurement is a process of its own, because OpenMP reads its settings once. The settings
take turns, alone and beside a Python loop that keeps one core busy; medians count.
"""

import argparse
import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "as the project sets it": {},
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=100": {"GOMP_SPINCOUNT": "100"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def measure_here(seconds):
    """Print the tokens per second of decoding 16 prompts, and of training steps like SFT's."""
    sys.path.insert(0, str(ROOT))
    importlib.import_module("common")  # sets what the project sets, before torch is loaded
    import torch

    from model.causal_lm import CausalLM, ModelConfig
    from model.device import auto_dtype, keep_freed_memory, pick_dtype
    from model.generation import SamplingParams, generate

    keep_freed_memory()
    torch.manual_seed(0)
    model = CausalLM(ModelConfig())
    prompts = torch.randint(10, 2000, (16, 20)).tolist()
    device = torch.device("cpu")
    decoder = CausalLM(ModelConfig()).eval().to(pick_dtype("auto", device))

    def decode():
        params = SamplingParams(max_new_tokens=8, temperature=0.0)
        return sum(1 for step in generate(decoder, prompts, params, stop_ids=()) for _ in step)

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    input_ids = torch.randint(10, 2000, (2, 768))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=auto_dtype(device) == "bf16")

    def train():
        with autocast:
            loss = model(input_ids, labels=input_ids)
        (loss / input_ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return input_ids.numel()

    for work in (decode, train):
        work()
        tokens, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            tokens += work()
        print(tokens / (time.perf_counter() - began))


def measure(setting, competitors, seconds):
    """Return (decode, train) in tokens per second, measured by a new process."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | setting
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(competitors)
    ]
    command = [sys.executable, __file__, "--child", str(seconds)]
    try:
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return tuple(float(line) for line in done.stdout.split())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measure_here(args.child)
    results = {}
    for _ in range(args.rounds):
        for name, setting in SETTINGS.items():
            for competitors in (0, 1):
                figures = measure(setting, competitors, args.seconds)
                results.setdefault((name, competitors), []).append(figures)
    import torch

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"Python {platform.python_version()}, torch {torch.__version__}\n")  # fmt: skip
    print("| setting | decode, alone | with one other | train, alone | with one other |")
    print("|---|---|---|---|---|")
    for name in SETTINGS:
        cells = []
        for work in (0, 1):
            for competitors in (0, 1):
                values = [figures[work] for figures in results[name, competitors]]
                cells.append(f"{statistics.median(values):,.0f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
