"""Runs the demo in a fresh clone for each seed, one after the other: seconds, memory, scores.

    python bench/demo.py --seeds 1 2 3

Commit first: a clone has what is committed. The installation is that of this Python.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

import torch

ROOT = Path(__file__).resolve().parents[1]


def run(seed):
    """Return what demo.py reports of a fresh clone, trained with a seed."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        command = [sys.executable, Path(folder) / "demo.py", "--seed", str(seed)]
        with Path(os.devnull).open("r+") as null:
            demo = subprocess.Popen(command, stdin=null, stdout=null)
        _, status, usage = os.wait4(demo.pid, 0)
        if status:
            sys.exit(f"seed {seed}: the demo failed")
        out = Path(folder) / "out"
        report = json.loads((out / "demo.json").read_text(encoding="utf-8"))
        for weight, scores in report["scores"].items():
            path = out / "eval" / "tiny_world" / f"{weight}.json"
            rows = json.loads(path.read_text(encoding="utf-8"))["problems"]
            others = [row["verdict"] == "correct" for row in rows if row["type"] != "own_words"]
            scores["without own_words"] = mean(others)
    return report | {"peak_rss_mb": usage.ru_maxrss // 1000}  # in kB on Linux


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"Python {platform.python_version()}, torch {torch.__version__}\n")  # fmt: skip
    rows, header = {}, "| |" + "".join(f" seed {seed} |" for seed in seeds)
    reports = []
    for seed in seeds:
        report = run(seed)
        report["seconds"].pop("setup")
        report["seconds"]["all"] = round(sum(report["seconds"].values()), 1)
        reports.append(report)
        print(f"seed {seed}: {json.dumps(report['seconds'])}", flush=True)
    for stage in reports[0]["seconds"]:
        rows[f"{stage}, seconds"] = [report["seconds"][stage] for report in reports]
    rows["peak memory, MB"] = [report["peak_rss_mb"] for report in reports]
    print(f"\n{header} median |\n|---|{'---|' * (len(seeds) + 1)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(map(str, values))} | {median(values)} |")
    print(f"\n{header} mean | pretrained |\n|---|{'---|' * (len(seeds) + 2)}")
    for name, before in reports[0]["scores"]["pretrain"].items():
        values = [report["scores"]["full_sft"][name] for report in reports]
        cells = [f"{value:.1%}" for value in (*values, mean(values), before)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
