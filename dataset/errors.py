"""What a user can mend is said in a sentence; a traceback is for bugs."""

import sys
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in a file, a flag or the machine; the message names place, value and remedy."""


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
