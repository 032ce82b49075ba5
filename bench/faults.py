"""Kills training runs, resumes them, and compares with runs left alone.

    python bench/faults.py --kills 100      # at random moments
    python bench/faults.py --writes         # before each write of a file, so after each, too

Each kill hits a fresh run: while its data is tokenised, while it trains, while it saves. Right
after, every .pth file must be complete, and the latest checkpoint that was written must be found.
The run is then resumed (or started again, where nothing was saved yet), and must end in the same
weights, to the bit, and the same log, but for timings. Where the run replaces an earlier one of its
name, the weights of that one must be there until the new one is complete.
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

from dataset.errors import UserError, mistakes_in_plain_words
from trainer import checkpoint, train_full_sft, train_pretrain
from trainer.arguments import ROOT

TOY = """--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --from_weight none
    --device cpu --dtype fp32 --save_interval 1 --eval_interval 4 --log_interval 1
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


def result(stem, out):
    """(weights, log without timings) of a finished run."""
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
    if not same(result(stem_of(name), out), expected):
        return when, saved, f"{name}: other weights, or another log ({out})"
    shutil.rmtree(out)
    return when, saved, None


# ------------------------------------------------------------------------- killed at each write

WRITES = {  # name: (script, its flags, whether it replaces a finished run of its name)
    "SFT, the best weights at the end": (
        "full_sft",
        "--eval_interval 2 --save_best_at_end 1",
        False,
    ),
    "pretraining, no earlier checkpoint": ("pretrain", "--keep_checkpoints 0", False),
    "SFT, under an old name": ("full_sft", "--seed 5", True),
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
            with mistakes_in_plain_words():
                SCRIPTS[script].main(flags)
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def newest_step(out, script):
    """The step of the checkpoint that a resumed run would take; 0 where there is none."""
    args = argparse.Namespace(save_dir=out, save_weight=script, hidden_size=None, use_moe=None)
    try:
        return checkpoint.load_latest(args)[1]["run"]["step"]
    except UserError:
        return 0


def each_write(name, data, folder, every):
    """Kills a run before every so many of its writes; returns (kills, [what was lost])."""
    script, more, replaces = WRITES[name]
    flags = [*TOY.split(), *more.split(), "--data_path", str(data / f"few_{script}.jsonl")]
    stem, failures = f"{script}_32", []
    flags += ["--packing", "0", "--batch_size", "13", "--save_dir"]
    old = folder / "old"
    if replaces:
        seed = [word if word != "5" else "1" for word in flags]
        assert run_killed(script, [*seed, str(old)], old, None)[0] == 0
        earlier = result(stem, old)

    def fresh(number):
        out = folder / f"{stem} {number}"
        shutil.rmtree(out, ignore_errors=True)
        if replaces:
            shutil.copytree(old, out)
        return out

    out = fresh("whole")
    code, writes = run_killed(script, [*flags, str(out)], out, None)
    assert code == 0, (out.parent / f"{out.name}.txt").read_text()
    expected = result(stem, out)
    saved = [event == "os.rename" and "_resume.pth" in file for event, file in writes]
    # A rename whose source is the old run's keeps its files; it saves nothing of this run.
    saved = [mark and "previous" not in file for mark, (_, file) in zip(saved, writes, strict=True)]
    for at in range(0, len(writes), every):
        out = fresh(at)
        code, _ = run_killed(script, [*flags, str(out)], out, at)
        place = f"{name}, killed before write {at}, {' '.join(writes[at])}"
        assert code == -signal.SIGKILL, place
        for path in out.rglob("*.pth"):
            checkpoint.load(path)
        began = any("logs" in file for _, file in writes[:at]) or not replaces
        step = newest_step(out, script) if began else 0
        if step < sum(saved[:at]) and began:
            failures.append(
                f"{place}: {sum(saved[:at])} checkpoints were written, step {step} found"
            )
        if replaces and not any(
            same(result(path.stem, out), earlier) for path in out.glob("*.pth")
        ):
            failures.append(f"{place}: the earlier run is gone")
        again = ["--from_resume", "1"] if step else []
        code, _ = run_killed(script, [*flags, str(out), *again], out, None)
        said = (out.parent / f"{out.name}.txt").read_text()
        if code or not same(result(stem, out), expected):
            failures.append(f"{place}, then {again}: code {code}, {said} ({out})")
        elif list(out.rglob("*.part")) or list(out.rglob("*_previous*")):
            failures.append(f"{place}: something stays behind in {out}")
        else:
            shutil.rmtree(out)
    return len(range(0, len(writes), every)), failures


def same(one, other):
    """Whether two results have the same weights, to the bit, and the same log."""
    names = one[0].keys() == other[0].keys()
    return names and one[1] == other[1] and all(torch.equal(one[0][k], other[0][k]) for k in one[0])


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
            kills, failures = each_write(name, folder, folder, args.every)
            print(f"{name:36}{kills:4} kills, {len(failures)} lost something", flush=True)
            lost += failures
        shutil.rmtree(folder) if not lost else None
        sys.exit("\n".join(lost))

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
