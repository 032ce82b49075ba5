"""What every floor of the project uses: errors of the user, files that appear complete or not at
all, and the ids that data, model and evaluation agree on. It imports nothing of the project.
"""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
IGNORE = -100  # the label of a token that carries no loss

# The ids of the control tokens, which mark the structure of a conversation: dataset/tokenizer.py.
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


def save_tensors(path, content):
    """Writes plain values and tensors with torch.save. Raises UserError as `replacing` does."""
    import torch  # here: a script that writes text does not wait for torch to load

    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's error on a full disk
            raise OSError(0, getattr(error.__context__, "strerror", None) or str(error)) from None


def load_tensors(path, remedy="train anew, or get it again", verify=True, **options):
    """What `save_tensors` wrote, by torch.load; no code in the file is run. verify compares the
    checksum of every part, which reads all of it.

    Raises UserError if it is missing, damaged, or holds more than plain values and tensors.
    """
    import pickle
    import zipfile

    import torch

    try:
        if verify and zipfile.is_zipfile(path):  # as torch.save writes it
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {remedy}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than plain values and tensors, or is damaged; it is not opened, "
            f"because it could run any code; {remedy}"
        ) from None
    except Exception as error:  # the readers of zip and pickle raise nearly anything on any bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); {remedy}") from None
