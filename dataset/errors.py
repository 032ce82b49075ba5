"""What a user can mend is said in a sentence; a traceback is for bugs."""

import os
import sys
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in a file, a flag or the machine; the message names place, value and remedy."""


def say_interrupted(kind, error, trace):
    """What Python calls for an exception outside of main(): Ctrl-C while modules are loaded, which
    takes seconds, is a line, too.
    """
    if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, "ps1"):  # ps1: at Python's prompt
        return sys.__excepthook__(kind, error, trace)
    print("\nstopped at once", file=sys.stderr, flush=True)
    os._exit(130)


sys.excepthook = say_interrupted


@contextmanager
def mistakes_in_plain_words():
    """Around a script's main(): a UserError becomes its message on stderr and exit code 2, Ctrl-C
    a line and exit code 130.
    """
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
