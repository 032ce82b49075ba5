"""Puts realistic mistakes into the code, one at a time, and sees whether the tests notice.

    python tests/mutants.py                    # all of tests/mutants.toml; takes an hour
    python tests/mutants.py --only trainer     # those whose file begins so

Each mistake is made in a copy of the tree, where its tests run. Without it they must pass, so
`make mutants` runs the suite first. Prints a row for each, and ends with code 1 if less than 95 %
are noticed, or if a text to replace does not occur exactly once in its file: then the list has to
follow the code.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".toml")
LONGEST = 300  # seconds; a mistake may make a test wait for ever, which is noticed, too
PASSED, FAILED = 0, 1  # pytest's codes; others mean that no test ran


def pytest_code(tree, tests):
    """The exit code of pytest in a tree, stopping at the first failure; FAILED after LONGEST."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that what the tests start can be ended with them
    )
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9) if hasattr(os, "killpg") else process.kill()
        process.wait()
        return FAILED


def copy_of_tree(folder):
    tree = folder / "tree"
    left_out = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", "*_tiny.jsonl")
    shutil.copytree(ROOT, tree, ignore=left_out)
    (tree / "out").mkdir()
    return tree


def try_one(mutant, trees):
    """(exit code of the tests with the mistake in the code, seconds)."""
    tree = trees.get()
    path, began = tree / mutant["file"], time.perf_counter()
    before = path.read_text(encoding="utf-8")
    try:
        after = before.replace(mutant["text"], mutant["becomes"])
        path.write_text(after, encoding="utf-8")
        return pytest_code(tree, shlex.split(mutant["tests"])), time.perf_counter() - began
    finally:
        path.write_text(before, encoding="utf-8")
        trees.put(tree)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PREFIX", help="files that begin so")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once (%(default)s)")
    args = parser.parse_args()
    mutants = tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]
    mutants = [mutant for mutant in mutants if mutant["file"].startswith(args.only)]
    lost = []
    for mutant in mutants:
        count = (ROOT / mutant["file"]).read_text(encoding="utf-8").count(mutant["text"])
        if count != 1 or mutant["text"] == mutant["becomes"]:
            lost.append(f"{mutant['file']}: found {count} times, not once: {mutant['text']!r}")
    if lost or not mutants:
        sys.exit("\n".join(lost) or f"no mutant is in {args.only}")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        trees = Queue()
        for job in range(args.jobs):
            trees.put(copy_of_tree(Path(folder) / str(job)))
        missed = []
        for mutant, (code, seconds) in zip(
            mutants, pool.map(lambda mutant: try_one(mutant, trees), mutants), strict=True
        ):
            noticed = code == FAILED or code < 0  # a signal: the mistake corrupted memory
            said = "noticed" if noticed else "MISSED" if code == PASSED else f"pytest: {code}"
            missed += [] if noticed else [mutant]
            print(f"{said:8} {seconds:4.0f} s  {mutant['file']:32} {mutant['what']}", flush=True)
    noticed = len(mutants) - len(missed)
    print(f"{noticed} of {len(mutants)} noticed ({noticed / len(mutants):.1%})")
    sys.exit(noticed < 0.95 * len(mutants))


if __name__ == "__main__":
    main()
