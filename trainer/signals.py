"""What can happen to a run from outside: signals, and a second run under the same name."""

import os
import signal
import socket
import sys
from pathlib import Path

from common import UserError


class StopSignal:
    """Turns Ctrl-C, SIGTERM (a cluster takes the machine back) and SIGHUP (the terminal is closed)
    into a flag that the loop reads between two steps. A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.received = self.ending = False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # nohup has SIGHUP ignored, and means it.
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.ending:  # a third must not break into the ending
            return
        if number == getattr(signal, "SIGHUP", None):  # what is printed goes nowhere from here on
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        if self.received and number == signal.SIGINT:
            self.ending = True
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # also while the interpreter ends
            raise KeyboardInterrupt
        self.received = True


class RunLock:
    """Keeps a second run from writing the same files. The system releases it when the process
    ends, for whatever reason, so no stale lock is left.

    Raises UserError with the owner if another run holds it.
    """

    FAR = 2**30  # Windows locks bytes against reading too; those of the owner's name stay readable
    OWN = {}  # path: the lock of this process; an error that is kept, as in a notebook, keeps it

    def __init__(self, path):
        path = Path(path)
        if path in self.OWN:
            self.OWN.pop(path).release()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; choose another place (--save_dir)"
            ) from None
        try:
            self.acquire()
        except OSError:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            raise UserError(
                f"{owner} is training under this name, and holds {path}; wait for it, stop it, or "
                "choose another --save_weight or --save_dir"
            ) from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()
        self.OWN[path] = self

    def acquire(self):
        if sys.platform == "win32":
            import msvcrt

            self.file.seek(self.FAR)
            msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self):
        self.file.close()
