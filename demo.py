"""The whole path in one command, `make demo`: writes the data, trains, compares, opens the chat.

Each stage is one of the commands that the README lists. A stage that is done is not done again;
--fresh starts over. The figures stand in out/demo.json.
"""

import argparse
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OUT = ROOT / "out"
REPORT = OUT / "demo.json"
DATA = [ROOT / "dataset" / f"{name}_tiny.jsonl" for name in ("pretrain", "sft", "eval")]
ANSWERS = [OUT / "eval" / "tiny_world" / f"{name}.json" for name in ("pretrain", "full_sft")]
PARTS = [path.with_suffix(".part") for path in ANSWERS]  # of an evaluation that was stopped
LOGS = [OUT / "logs" / f"{name}_384.jsonl" for name in ("pretrain", "full_sft")]
STAGES = {  # stage: its commands, and the files that they leave
    "data": ([["dataset/tiny_world/generate.py"]], DATA),
    "pretrain": ([["trainer/train_pretrain.py"]], [OUT / "pretrain_384.pth"]),
    "sft": (
        [["trainer/train_full_sft.py", "--from_weight", "pretrain"]],
        [OUT / "full_sft_384.pth"],
    ),
    "eval": ([["evaluation/run_eval.py", "--weight", path.stem] for path in ANSWERS], ANSWERS),
}


def begin(stage, report):
    """The commands of a stage that is not done, which the later ones follow from. A training that
    the demo has begun goes on; any other run is left to the trainer, which keeps it.
    """
    commands, _ = STAGES[stage]
    if report.get("begun") == stage and stage in ("pretrain", "sft"):
        return [[script, "--from_resume", "1"] for script, *_ in commands]
    for name in list(STAGES)[list(STAGES).index(stage) :]:
        report["seconds"].pop(name, None)
    report["begun"] = stage
    if stage != "eval":
        for path in PARTS:
            path.unlink(missing_ok=True)
        for path in filter(Path.exists, ANSWERS):  # maybe of an evaluation by hand
            path.replace(path.with_stem(f"{path.stem}_before_demo"))
    save(report)
    return commands


def save(report):
    OUT.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=1), encoding="utf-8")


def run(commands):
    """Runs commands one after the other, as a user would; returns the seconds."""
    started = time.perf_counter()
    for command in commands:
        print(f"\n$ python {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]])
        if done.returncode:
            sys.exit(done.returncode)
    return round(time.perf_counter() - started, 1)


def peak_memory():
    """The most memory that any stage of this run took, in MB; None where the system tells none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(size / (1e6 if sys.platform == "darwin" else 1e3))


def compare(before, after):
    """Prints the scores of two evaluations, and some prompts with both answers."""
    print(f"\n{'held-out score':16}{'pretrained':>12}{'after SFT':>12}")
    for category, score in before["scores"].items():
        print(f"{category:16}{score:12.1%}{after['scores'][category]:12.1%}")
    shown = set()
    for old, new in zip(before["problems"], after["problems"], strict=True):
        if old["type"] in shown:
            continue
        shown.add(old["type"])
        print()
        for message in old["prompt"]:
            print(f"  {message['role']:12}{message['content']}")
        for name, problem in (("pretrained", old), ("after SFT", new)):
            answer = " ".join(problem["output"].split())
            print(f"  {name:12}{textwrap.shorten(answer, 300, placeholder=' ...')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="start over")
    if parser.parse_args().fresh:
        for path in [REPORT, *PARTS, *(path for _, leaves in STAGES.values() for path in leaves)]:
            path.unlink(missing_ok=True)
    # Ctrl-C is for the stage that runs: training saves and ends, the chat stops its answer.
    signal.signal(signal.SIGINT, lambda *_: None)
    report = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {"seconds": {}}
    setup = ROOT / ".venv" / "setup-seconds"
    report["seconds"]["setup"] = round(float(setup.read_text())) if setup.exists() else 0

    for stage, (_, leaves) in STAGES.items():
        if stage in report["seconds"] and all(path.exists() for path in leaves):
            print(f"{stage}: done before, in {report['seconds'][stage]} s (make demo FRESH=1 anew)")
            continue
        report["seconds"][stage] = run(begin(stage, report))
        memory = [size for size in (report.get("peak_rss_mb"), peak_memory()) if size]
        report["peak_rss_mb"] = max(memory, default=None)
        report["begun"] = None
        save(report)

    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in ANSWERS)
    last_lines = [path.read_text(encoding="utf-8").splitlines()[-1] for path in LOGS]
    report["scores"] = {"pretrain": before["scores"], "full_sft": after["scores"]}
    report["params"] = after["params"]
    report["tokens_trained"] = sum(json.loads(line)["tokens"] for line in last_lines)
    save(report)

    compare(before, after)
    spent = ", ".join(f"{stage} {seconds} s" for stage, seconds in report["seconds"].items())
    print(f"\n{spent}; peak memory {report['peak_rss_mb']} MB; all figures: {REPORT}")
    for path in LOGS:
        for picture in path.parent.glob(f"{path.stem}_loss.*"):
            print(f"loss curve: {picture}")
    if sys.stdin.isatty():
        print("\n$ python eval_llm.py", flush=True)
        subprocess.run([sys.executable, str(ROOT / "eval_llm.py")])


if __name__ == "__main__":
    main()
