"""What every floor of the project uses: errors of the user, files that appear complete or not at
all, and the ids that data, model and evaluation agree on. It imports nothing of the project.
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
IGNORE = -100  # the label of a token that carries no loss
GIT_LFS = b"version https://git-lfs"  # the first bytes of a file that Git LFS keeps elsewhere

# The ids of the control tokens, which mark the structure of a conversation: model/tokenizer.py.
PAD = END_OF_TEXT = 0
IM_START, IM_END, THINK, END_THINK = 1, 2, 3, 4
TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE = 5, 6, 7, 8
STOP = (IM_END, END_OF_TEXT)  # an answer ends at one of these


class UserError(ValueError):
    """A mistake in a file, a flag or the machine; the message names place, value and remedy."""


def report_interrupt(kind, error, trace):
    """Reports Ctrl-C outside of main(), while modules are imported, as a line, not a traceback."""
    if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, "ps1"):  # ps1: at Python's prompt
        return sys.__excepthook__(kind, error, trace)
    print("\nstopped at once", file=sys.stderr, flush=True)
    os._exit(130)


sys.excepthook = report_interrupt


@contextmanager
def report_user_errors():
    """Around a script's main(): turns a UserError into its message on stderr and exit code 2,
    Ctrl-C into a line and exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):  # a character that a console lacks ends no training
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped at once; what was saved before is complete", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, say `| head`, has gone
        sys.stderr.close()
        sys.exit(1)


@contextmanager
def replacing(path):
    """A binary file to write to, which replaces path when the block ends without an error. Until
    then, and when anything fails, what was at path stays as it is.

    Raises UserError if it cannot be written: no space, no permission.
    """
    path, begun = Path(path), False
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            begun = True
            yield file
            file.flush()
            os.fsync(file.fileno())
        patiently(part.replace, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Nothing that was there before is lost; "
            "make room, or choose another place (--save_dir)"
        ) from None
    finally:
        if begun:
            part.unlink(missing_ok=True)


def patiently(action, *args):
    """Does something to a file. Windows refuses while another program has it open, a virus scanner
    say: there it is tried again for three seconds.
    """
    for _ in range(30 if sys.platform == "win32" else 0):
        try:
            return action(*args)
        except PermissionError:
            time.sleep(0.1)
    return action(*args)


def open_file(path):
    """Return the file at path, open to be read as bytes. Raises UserError if it is missing, or a
    pointer of Git LFS.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} isn't a file, and data is read more than once; give a file")
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that can be read") from None
    if file.read(len(GIT_LFS)) == GIT_LFS:
        file.close()
        raise UserError(f"{path} is a pointer of Git LFS, not the file; run: git lfs pull")
    file.seek(0)
    return file


def read_json(path):
    """Return the value of a JSON file. Raises UserError if it is not JSON."""
    with open_file(path) as file:
        try:
            return json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} isn't JSON: {error}") from None


def is_folder(path):
    """Whether path is a folder. Path.is_dir would raise OSError for a name that is too long."""
    return os.path.isdir(path)  # noqa: PTH112
