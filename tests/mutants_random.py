"""Puts random mistakes into the code, one at a time, and counts how many the tests notice.

    python tests/mutants_random.py --count 400 --seed 1
    python tests/mutants_random.py --count 100 --only serving

A mistake is another operator, comparison, constant or condition, or a statement left out, drawn
from all of the product's code. It is tried in a copy of the tree with the tests that reach its
line, the shortest first, until one fails. Which tests those are is recorded by coverage.py, in one
run of the suite, and kept in --reach until that is deleted. Prints a row for each mistake, and a
table by folder; what survives is to be looked at by a person: it may change nothing.
"""

import argparse
import ast
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.mutants import FAILED, PASSED, ROOT, copy_of_tree

LONGEST = 120  # seconds of tests for one mistake, as measured without it
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr, ast.MatMult: ast.Mult, ast.LShift: ast.RShift, ast.And: ast.Or,
    ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip


def changed(node):
    """Return what may stand in the place of a node: a list of nodes."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        is_text = isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
        return [] if is_text else [ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)]
    if isinstance(node, ast.BoolOp):
        return [ast.BoolOp(OPERATORS[type(node.op)](), node.values)]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        other = OPERATORS[type(node.ops[0])]()
        return [ast.Compare(node.left, [other, *node.ops[1:]], node.comparators)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return [node.operand]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return [ast.Constant(not node.value)]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return [ast.Constant(node.value + 1)]
    if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.BoolOp):
        return [node.test]  # `mistakes` negates it
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_call or isinstance(node, ast.AugAssign | ast.Continue | ast.Break | ast.Raise):
        return [ast.Pass()]
    return []


def mistakes(path):
    """Return [(line, bytes to replace from, to, their replacement)] for a file."""
    source = path.read_bytes()
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    found = []

    def visit(node):
        if isinstance(node, ast.JoinedStr) or is_main(node):
            return
        for new in changed(node):
            place = node
            if isinstance(node, ast.If | ast.While):
                place, new = node.test, ast.UnaryOp(ast.Not(), node.test)
            start = begins[place.lineno - 1] + place.col_offset
            end = begins[place.end_lineno - 1] + place.end_col_offset
            text = ast.unparse(ast.fix_missing_locations(new))
            text = f"({text})" if isinstance(new, ast.expr) else text
            found.append((place.lineno, start, end, text))
        for field, child in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            for each in child if isinstance(child, list) else [child]:
                if isinstance(each, ast.AST):
                    visit(each)

    visit(ast.parse(source))
    return found


def is_main(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def record_reach(path):
    """Run the suite under coverage.py; write {"seconds": {test: its seconds}, "tests": {file:
    {line: the tests that reach it}}}.
    """
    from coverage import CoverageData

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "REACH_FOLDER": folder}
        command = ["-m", "pytest", "-n", "auto", "--dist", "worksteal", "-p", "tests.reach"]
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
        tests, seconds = defaultdict(lambda: defaultdict(set)), {}
        for file in Path(folder).glob("cov.*"):
            data = CoverageData(str(file))
            data.read()
            for name in data.measured_files():
                for line, contexts in data.contexts_by_lineno(name).items():
                    tests[str(Path(name).relative_to(ROOT))][line].update(filter(None, contexts))
        for file in Path(folder).glob("seconds.*"):
            seconds |= json.loads(file.read_text(encoding="utf-8"))
    lines = {name: {n: sorted(t) for n, t in of.items()} for name, of in tests.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seconds": seconds, "tests": lines}), encoding="utf-8")


def tests_of(line, lines):
    """Return the tests that reach a line, of {line: tests}. The parts of a long statement count for
    its first line; what runs while a module is imported is reached by all tests of its file.
    """
    for number in range(line, max(0, line - 12), -1):
        if lines.get(str(number)):
            return lines[str(number)]
    return set().union(*lines.values())


def choose(reached, seconds):
    """Return the tests to run for a line, the shortest first, LONGEST seconds in all."""
    chosen, total = [], 0.0
    for test in sorted((t for t in reached if t in seconds), key=seconds.get):
        total += seconds[test]
        if total > LONGEST:
            break
        chosen.append(test)
    return chosen


def become_pytest(tree, tests):
    """Run tests in a tree, in this forked process, whose libraries are loaded already."""
    os.setsid()
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "common")]:
        del sys.modules[name]
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    import pytest

    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    os._exit(int(code))


def try_one(mistake, trees, reach):
    """Return (the exit code of the tests, or None without a test that reaches it; seconds)."""
    file, (line, start, end, text) = mistake
    reached = tests_of(line, reach["tests"].get(file, {}))
    tests = choose(reached or tests_named_after(file, reach["seconds"]), reach["seconds"])
    if not tests:
        return None, 0.0
    tree, began = trees.get(), time.perf_counter()
    path, source = tree / file, (ROOT / file).read_bytes()
    try:
        path.write_bytes(source[:start] + text.encode() + source[end:])
        process = multiprocessing.get_context("fork").Process(
            target=become_pytest, args=(tree, tests)
        )
        process.start()
        process.join(3 * LONGEST)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return FAILED, time.perf_counter() - began
        return process.exitcode, time.perf_counter() - began
    finally:
        path.write_bytes(source)
        trees.put(tree)


def tests_named_after(file, seconds):
    """Return the tests of tests/test_NAME.py: of demo.py, which its tests run as a copy."""
    return [test for test in seconds if test.startswith(f"tests/test_{Path(file).stem}.py::")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="of mistakes (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the draw (%(default)s)")
    parser.add_argument("--only", default="", metavar="PREFIX", help="files that begin so")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once (%(default)s)")
    reach = ROOT / "out" / "reach.json"
    parser.add_argument("--reach", type=Path, default=reach, help="of the suite (%(default)s)")
    args = parser.parse_args()
    if not args.reach.exists():
        record_reach(args.reach)
    reach = json.loads(args.reach.read_text(encoding="utf-8"))
    listed = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
    files = [file for file in listed if not file.startswith(("tests/", "bench/"))]
    drawn = [
        (file, m) for file in files if file.startswith(args.only) for m in mistakes(ROOT / file)
    ]
    count = len(drawn)
    drawn = random.Random(args.seed).sample(drawn, min(args.count, count))
    print(f"{len(drawn)} of {count} mistakes, seed {args.seed}", flush=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    import numpy
    import tokenizers
    import torch
    import tqdm  # noqa: F401  loaded once, before the forks

    del numpy, tokenizers, torch
    table = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        trees = Queue()
        for job in range(args.jobs):
            trees.put(copy_of_tree(Path(folder) / str(job)))
        results = pool.map(lambda mistake: try_one(mistake, trees, reach), drawn)
        for (file, (line, start, end, text)), (code, seconds) in zip(drawn, results, strict=True):
            noticed = code not in (PASSED, None)  # a conftest that does not load is noticed, too
            said = "noticed" if noticed else "SURVIVED" if code == PASSED else "unreached"
            table[file.rpartition("/")[0].partition("/")[0] or "(root)"][said] += 1
            old = (ROOT / file).read_bytes()[start:end].decode()
            change = "" if noticed else f"  {' '.join(old.split())}  ->  {text}"
            print(f"{said:9} {seconds:4.0f} s  {file}:{line}{change}", flush=True)
    for folder, counts in sorted(table.items()):
        print(f"{folder:12} {counts['noticed']:4} of {counts.total():4} noticed")
    noticed = sum(counts["noticed"] for counts in table.values())
    print(f"{noticed} of {len(drawn)} noticed ({noticed / len(drawn):.1%})")


if __name__ == "__main__":
    main()
