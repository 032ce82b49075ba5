"""Types every command of Part I of the tutorial, in order, in a fresh clone, and prints how long
each took. Ends with code 1 if one fails.

    python bench/walk.py

Commit first: a clone has what is committed. The packages are those of this Python. Left out are the
experiments, which train for hours, and the exercises' tests, which fail until they are solved.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STOPPED = "--save_weight half"  # the exercise that interrupts a training with Ctrl-C after a minute


def commands(page):
    """The commands of a page, each as it is typed; a program is given to python -c."""
    blocks = re.findall(
        r"(?ms)^( *)```(bash|python)\n(.*?)^\1```", page.read_text(encoding="utf-8")
    )
    for _, language, block in blocks:
        block = textwrap.dedent(block)
        if language == "bash":
            block = re.sub(r"(?m)\s+#\s.*$", "", block)  # a comment behind a command
            yield from re.findall(r'(?ms)^(?:python -c "\n.*?"|\S.*?)$', block)
        elif block.startswith("import"):
            yield f"python -c {shlex.quote(block)}"


def main():
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    began, done, failed = time.perf_counter(), set(), []
    # In the background, a shell has its commands ignore Ctrl-C, and so would ours.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        for page in sorted((ROOT / "docs").glob("[1-7]_*.md")):
            for command in commands(page):
                if "bench/experiments.py" in command or command in done:
                    continue
                done.add(command)
                started = time.perf_counter()
                typed = subprocess.Popen(  # exec: the exit code is that of the command
                    f"exec {command}", shell=True, cwd=folder, env=environment,
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
                expected = 1 if command.startswith("diff") else 0  # the files differ
                if STOPPED in command and "--from_resume" not in command:
                    time.sleep(60)
                    os.killpg(typed.pid, signal.SIGINT)
                    expected = 130
                output = typed.communicate()[0].decode("utf-8", "replace")
                failed += [] if typed.returncode == expected else [command]
                seconds = time.perf_counter() - started
                print(f"{page.name}: {seconds:.1f} s: {command}\n{output}", flush=True)
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes; failed: {failed}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
