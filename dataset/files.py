"""Files appear complete or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path

from dataset.errors import UserError


@contextmanager
def replacing(path):
    """A binary file to write to. It takes path's place when the block ends well; until then, and
    when anything fails, what was at path stays as it is.

    Raises UserError if it cannot be written: no space, no permission.
    """
    path = Path(path)
    beside, begun = path.with_name(f".{path.name}.{os.getpid()}.part"), False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            begun = True
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Nothing that was there before is lost; "
            "make room, or choose another place (--save_dir)"
        ) from None
    finally:
        if begun:
            beside.unlink(missing_ok=True)


def save_tensors(path, content):
    """torch.save, with plain values and tensors. Raises UserError as `replacing` does."""
    import torch  # here: who writes text does not wait for it

    try:
        with replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # what torch makes of a full disk's OSError
        reason = getattr(error.__context__, "strerror", None) or error
        raise UserError(
            f"{path} cannot be written: {reason}. Nothing that was there before is lost; make "
            "room, and go on from there (training: --from_resume 1)"
        ) from None
