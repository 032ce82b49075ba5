"""Run the full pipeline, `make demo`: data, pretraining, SFT, evaluation, chat.

Each stage runs commands from the README. Completed stages are skipped; --fresh starts over. All
figures are written to out/demo.json.
"""

import argparse
import json
import signal
import subprocess
import sys
import textwrap
import time

from common import ROOT, atomic_write, read_json, report_user_errors

OUT = ROOT / "out"
REPORT = OUT / "demo.json"
DATA = [ROOT / "dataset" / f"{name}_tiny.jsonl" for name in ("pretrain", "sft", "eval")]
RESULTS = [OUT / "eval" / "tiny_world" / f"{name}.json" for name in ("pretrain", "full_sft")]
LOGS = [OUT / "logs" / f"{name}_256.jsonl" for name in ("pretrain", "full_sft")]
SFT = ["trainer/train_full_sft.py", "--from_weight", "pretrain"]
EVAL = ["evaluation/run_eval.py", "--weight"]
SHORT = ["--max_new_tokens", "128"]  # a pretrained model continues, often without an end
TRAINING = ("pretrain", "sft")
STAGES = {  # stage: (commands, the files they write)
    "data": ([["dataset/tiny_world/generate.py"]], DATA),
    "pretrain": ([["trainer/train_pretrain.py"]], [OUT / "pretrain_256.pth"]),
    "sft": ([SFT], [OUT / "full_sft_256.pth"]),
    "eval": ([[*EVAL, "pretrain", *SHORT], [*EVAL, "full_sft"]], RESULTS),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument("--seed", type=int, default=1, help="training seed; starts over")
    args = parser.parse_args()
    if args.fresh:
        REPORT.unlink(missing_ok=True)
    # Ctrl-C is handled by the running command: training saves and exits, the chat stops its answer.
    signal.signal(signal.SIGINT, lambda *_: None)
    report = read_json(REPORT) if REPORT.exists() else {}
    if report.get("seed", 1) != args.seed or not report:
        report = {"seed": args.seed, "seconds": {}}
    setup = ROOT / ".venv" / "setup-seconds"  # written by make
    report["seconds"]["setup"] = round(float(setup.read_text())) if setup.exists() else 0
    for stage, (commands, files) in STAGES.items():
        if stage in report["seconds"] and all(path.exists() for path in files):
            seconds = report["seconds"][stage]
            print(f"{stage}: already done, in {seconds} s (make demo FRESH=1 starts over)")
            continue
        commands = begin(stage, commands, report)
        started = time.perf_counter()
        for script, *flags in commands:
            flags += ["--seed", str(args.seed)] if stage in TRAINING and args.seed != 1 else []
            print(f"\n$ python {' '.join([script, *flags])}", flush=True)
            done = subprocess.run([sys.executable, str(ROOT / script), *flags])
            if done.returncode:
                sys.exit(done.returncode)
        report["seconds"][stage] = round(time.perf_counter() - started, 1)
        report["begun"] = None
        save(report)

    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in RESULTS)
    last_lines = [path.read_text(encoding="utf-8").splitlines()[-1] for path in LOGS]
    report["scores"] = {"pretrain": before["scores"], "full_sft": after["scores"]}
    report["params"] = after["params"]
    report["tokens_trained"] = sum(json.loads(line)["tokens"] for line in last_lines)
    save(report)

    compare(before, after)
    spent = ", ".join(f"{stage} {seconds} s" for stage, seconds in report["seconds"].items())
    print(f"\n{spent}; all figures: {REPORT}")
    for path in LOGS:
        print(f"loss curve: {path.with_name(f'{path.stem}_loss.svg')}")
    if sys.stdin.isatty():
        print("\n$ python eval_llm.py", flush=True)
        subprocess.run([sys.executable, str(ROOT / "eval_llm.py")])


def begin(stage, commands, report):
    """Record that a stage begins, set later results aside, and return its commands. Training that
    the demo started is resumed; an earlier run of the user isn't, and is kept under another name.
    """
    if report.get("begun") == stage:
        resumed = [[script, "--from_resume", "1"] for script, *_ in commands]
        return resumed if stage in TRAINING else commands
    for later in list(STAGES)[list(STAGES).index(stage) :]:  # later stages depend on this one
        report["seconds"].pop(later, None)
    report["begun"] = stage
    save(report)
    if stage != "eval":
        for path in RESULTS:
            path.with_suffix(".part").unlink(missing_ok=True)  # for earlier weights
            if path.exists():  # maybe written by the user
                path.replace(path.with_stem(f"{path.stem}_before_demo"))
    return commands


def save(report):
    with atomic_write(REPORT) as file:
        file.write(json.dumps(report, indent=1).encode("utf-8"))


def compare(before, after):
    """Print the scores of two evaluations, and one prompt of each type with both answers."""
    print(f"\n{'held-out score':16}{'pretrained':>12}{'after SFT':>12}")
    for category, score in before["scores"].items():
        print(f"{category:16}{score:12.1%}{after['scores'][category]:12.1%}")
    printed_types = set()
    for old, new in zip(before["problems"], after["problems"], strict=True):
        if old["type"] in printed_types:
            continue
        printed_types.add(old["type"])
        print()
        for message in old["prompt"]:
            print(f"  {message['role']:12}{message['content']}")
        for name, problem in (("pretrained", old), ("after SFT", new)):
            answer = " ".join(problem["output"].split())
            print(f"  {name:12}{textwrap.shorten(answer, 300, placeholder=' ...')}")


if __name__ == "__main__":
    with report_user_errors():
        main()
