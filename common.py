"""Shared helpers: user-facing errors, atomic file writes, and the ids of the control tokens. It
imports nothing from the project.
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
IGNORE = -100  # the label of a token without a loss
GIT_LFS = b"version https://git-lfs"  # the first bytes of a file that Git LFS keeps elsewhere

# The ids of the control tokens, which mark the structure of a conversation: model/tokenizer.py.
PAD = END_OF_TEXT = 0
IM_START, IM_END, THINK, END_THINK = 1, 2, 3, 4
TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE = 5, 6, 7, 8
STOP = (IM_END, END_OF_TEXT)  # an answer ends at one of these


# OpenMP's threads spin while they wait for each other. If another program has the core of one, the
# others spin for milliseconds at each operation. Let them sleep sooner, unless the user has set it.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ |= {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}  # GNU's; LLVM's and Intel's


class UserError(ValueError):
    """An error the user can fix. The message says where, what, and how to fix it."""


def excepthook(exc_type, exc, tb):
    """Print one line instead of a traceback for Ctrl-C while modules are imported."""
    interactive = hasattr(sys, "ps1")  # Python's prompt sets it
    if interactive or not issubclass(exc_type, KeyboardInterrupt):
        return sys.__excepthook__(exc_type, exc, tb)
    print("\nInterrupted.", file=sys.stderr, flush=True)
    os._exit(130)


sys.excepthook = excepthook


@contextmanager
def report_user_errors():
    """Context manager for a script's main(): turn a UserError into its message on stderr and exit
    code 2, and Ctrl-C into one line and exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):  # don't crash on characters the console can't encode
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted. Files that were saved before are intact.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # stdout was closed, e.g. by piping into head
        sys.stderr.close()
        sys.exit(1)


@contextmanager
def atomic_write(path):
    """Context manager: open a binary file that replaces path when the block ends without an error.
    Until then, and after an error, the file at path is unchanged.

    Raises UserError if it cannot be written, e.g. for lack of space or permission.
    """
    path = Path(path)
    part_exists = False
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            part_exists = True
            yield file
            file.flush()
            os.fsync(file.fileno())
        retry_on_windows(part.replace, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. The files that were there are unchanged; "
            "free some space, or choose another folder"
        ) from None
    finally:
        if part_exists:
            part.unlink(missing_ok=True)


def retry_on_windows(fn, *args):
    """Call fn(*args), an action on a file. On Windows, retry for three seconds: it fails while
    another program, e.g. a virus scanner, has the file open.
    """
    for _ in range(30 if sys.platform == "win32" else 0):
        try:
            return fn(*args)
        except PermissionError:
            time.sleep(0.1)
    return fn(*args)


def open_file(path):
    """Open a file to read bytes. Raises UserError if it is missing, or only a Git LFS pointer."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file, and data is read twice; give a file")
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that can be read") from None
    if file.read(len(GIT_LFS)) == GIT_LFS:
        file.close()
        raise UserError(f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull")
    file.seek(0)
    return file


def read_json(path):
    """Read a JSON file. Raises UserError if it isn't JSON."""
    with open_file(path) as file:
        try:
            return json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} isn't JSON: {error}") from None


def is_folder(path):
    """Return whether path is a folder. Path.is_dir raises OSError if the name is too long."""
    return os.path.isdir(path)  # noqa: PTH112
