"""Kills training runs, resumes them, and compares with runs left alone.

    python bench/faults.py --kills 100      # at random moments
    python bench/faults.py --writes         # before each write of a file, so after each, too

Each kill hits a fresh run: while its data is tokenised, while it trains, while it saves. Right
after, every .pth file must be complete, and the latest checkpoint that was written must be found.
The run is then resumed (or started again, where nothing was saved yet), and must end in the same
weights, to the bit, and the same log, but for timings. Where the run replaces an earlier one of its
name, the weights of that one must still exist until the new one is complete.
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

from common import ROOT, report_user_errors
from model.weights import load
from trainer import checkpoint, train_full_sft, train_pretrain

TOY = """--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --from_weight none
    --device cpu --dtype fp32 --save_interval 1 --val_interval 4 --log_interval 1
    --max_seq_len 128"""
SCRIPTS = {"full_sft": train_full_sft, "pretrain": train_pretrain}
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


def stem_of(name):
    return f"{RUNS[name][0]}_32{'_moe' if 'moe' in RUNS[name][1] else ''}"


def log_of(path):
    """Return a log without its timings, or None without a log."""
    if not path.exists():
        return None
    timings = ("tokens_per_s", "data_wait_s")
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def result(stem, out):
    """(weights, log without timings) of a finished run."""
    return load(out / f"{stem}.pth")["model"], log_of(out / "logs" / f"{stem}.jsonl")


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
        load(path)  # complete, or an error
    saved = any(out.glob("checkpoints/*_resume.pth")) or any(out.glob("checkpoints/*_step*.pth"))
    process = start(command(name, data, out, *(["--from_resume", "1"] if saved else [])))
    printed, _ = process.communicate()
    if process.returncode:
        return when, saved, f"{name}: {printed} ({out})"
    if not same(result(stem_of(name), out), expected):
        return when, saved, f"{name}: other weights, or another log ({out})"
    shutil.rmtree(out)
    return when, saved, None


# ------------------------------------------------------------------------- killed at each write

WRITES = {  # name: (script, its flags, its seed; with 2, it replaces a finished run of seed 1)
    "SFT, the best weights at the end": ("full_sft", "--val_interval 2 --save_best_at_end 1", 1),
    "pretraining, no earlier checkpoint": ("pretrain", "--keep_checkpoints 0", 1),
    "SFT, under an old name": ("full_sft", "--keep_checkpoints 1", 2),
}
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.fsync")


def run_killed(script, flags, out, kill_at):
    """Runs a script in a forked process and kills it before its write of that number.

    Returns (exit code, its writes as [(event, file)]).
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        run_watched(script, flags, out, kill_at, writer)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as lines:
        events = [tuple(line.rstrip("\n").split(" ", 1)) for line in lines]
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), events


def run_watched(script, flags, out, kill_at, writer):
    """The part of `run_killed` in the child; does not return."""
    done = 0

    def before(event, given):
        nonlocal done
        if event == "open" and not (isinstance(given[2], int) and given[2] & CHANGING):
            return
        if event not in ("open", *EVENTS) or not str(given[0]).startswith(str(out)):
            return
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        target = given[1] if event == "os.rename" else given[0]
        os.write(writer, f"{event} {target}\n".encode())

    def fsync(file):
        before("os.fsync", [str(out)])
        sync(file)

    sync, os.fsync = os.fsync, fsync
    sys.addaudithook(before)
    code = 1
    try:
        with (out.parent / f"{out.name}.txt").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with report_user_errors():
                SCRIPTS[script].main(flags)
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def newest_step(out, script, seed):
    """Return the step from which the run of this seed would continue, or 0 without a checkpoint."""
    args = argparse.Namespace(save_dir=out, save_weight=script, hidden_size=None, use_moe=None)
    content = checkpoint.load_latest(args)
    ours = content and content["arguments"]["seed"] == seed
    return content["run"]["step"] if ours else 0


def is_kept(out, earlier):
    """Whether an earlier run's weights and log are there, under whatever name."""
    stems = {path.stem for path in [*out.glob("*.pth"), *out.glob("logs/*.jsonl")]}
    weights = [load(path)["model"] for path in out.glob("*.pth")]
    logs = [log_of(out / "logs" / f"{stem}.jsonl") for stem in stems]
    return any(equal(found, earlier[0]) for found in weights) and earlier[1] in logs


def each_write(name, data, every):
    """Kills a run before every so many of its writes; returns (kills, [what was lost])."""
    script, more, seed = WRITES[name]
    flags = f"{TOY} {more} --packing 0 --batch_size 13 --data_path {data / f'few_{script}.jsonl'}"
    stem, failures, old = f"{script}_32", [], data / "old"

    def go(out, seed, kill_at=None, resume=0):
        last = ["--save_dir", str(out), "--seed", str(seed), "--from_resume", str(resume)]
        return run_killed(script, [*flags.split(), *last], out, kill_at)

    def fresh(number):
        """A folder in which, for a seed of 2, a run of seed 1 has ended under the same name."""
        out = data / f"{stem}-{number}"
        shutil.rmtree(out, ignore_errors=True)
        if seed == 2:
            shutil.copytree(old, out)
        return out

    if seed == 2:
        go(old, 1)
        earlier = result(stem, old)
    out = fresh("whole")
    _, writes = go(out, seed)
    expected = result(stem, out)
    steps, saved = expected[1][-1]["step"], []
    for event, file in writes:  # how many checkpoints were complete before each of them
        moved = event == "os.rename" and file.endswith(f"{stem}_resume.pth")
        saved.append((saved or [0])[-1] + moved)
    for at in range(0, len(writes), every):
        out, place = fresh(at), f"{name}, killed before write {at}, {' '.join(writes[at])}"
        code, _ = go(out, seed, at)
        step, before = newest_step(out, script, seed), saved[at - 1] if at else 0
        for path in out.rglob("*.pth"):
            load(path)  # complete, or an error
        if code != -signal.SIGKILL or step < before:
            failures.append(f"{place}: {before} checkpoints were written, step {step} was found")
        if seed == 2 and step < steps and not is_kept(out, earlier):
            failures.append(f"{place}: the earlier run is gone")
        code, _ = go(out, seed, resume=int(step > 0))
        if code or not same(result(stem, out), expected):
            failures.append(f"{place}: other weights, or another log ({out})")
        elif list(out.rglob(".*.part")) or list(out.rglob("*_previous*")):
            failures.append(f"{place}: something stays behind in {out}")
        else:
            shutil.rmtree(out)
    return len(range(0, len(writes), every)), failures


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same(one, other):
    """Whether two results have the same weights, to the bit, and the same log."""
    return equal(one[0], other[0]) and one[1] == other[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writes", action="store_true", help="kill at each write instead")
    parser.add_argument("--every", type=int, default=1, help="with --writes, only each so many")
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
        few = "".join(lines.splitlines(keepends=True)[:40])
        (folder / f"few_{stage}.jsonl").write_text(few, encoding="utf-8")

    if args.writes:
        torch.set_num_threads(1)  # the children are forked, and threads do not survive that
        lost = []
        for name in WRITES:
            kills, failures = each_write(name, folder, args.every)
            print(f"{name:36}{kills:4} kills, {len(failures)} lost something", flush=True)
            lost += failures
        shutil.rmtree(folder) if not lost else None
        sys.exit("\n".join(lost) or 0)

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
        references[name] = result(stem_of(name), out), time.perf_counter() - began, earliest
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
