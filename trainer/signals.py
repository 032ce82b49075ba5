"""Signals, and the lock of a run."""

import os
import signal
import socket
import sys
from pathlib import Path

from common import UserError


class StopSignal:
    """Turns Ctrl-C, SIGTERM (sent by a cluster) and SIGHUP (the terminal was closed) into a flag
    that the loop checks between steps. A second Ctrl-C stops immediately.
    """

    def __init__(self):
        self.received = self.ending = False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Respect SIGHUP being ignored (nohup).
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.ending:  # ignore further signals while exiting
            return
        if number == getattr(signal, "SIGHUP", None):  # there is no terminal to print to
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        if self.received and number == signal.SIGINT:
            self.ending = True
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # also during interpreter shutdown
            raise KeyboardInterrupt
        self.received = True


class RunLock:
    """Prevents a second run from writing the same files. The OS releases it when the process ends
    for any reason, so there are no stale locks.

    Raises UserError, naming the owner, if another run holds it.
    """

    FAR = 2**30  # lock a byte beyond the owner's name: Windows also blocks reading locked bytes
    HELD = {}  # path: lock held by this process; in a notebook a stored traceback keeps it alive

    def __init__(self, path):
        path = Path(path)
        if path in self.HELD:
            self.HELD.pop(path).release()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; choose another folder (--save_dir)"
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
        self.HELD[path] = self

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
