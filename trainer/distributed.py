"""One process or several: what a training loop needs to know of the others.

`torchrun` starts the processes and tells each its number through the environment. Without it
there is one process, and everything here does nothing.
"""

import io
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist


def start(backend):
    """Joins the other processes of a torchrun job. Returns (rank, number of processes)."""
    if "RANK" not in os.environ:
        return 0, 1
    # AdamW and DDP import this in passing. After the group it would keep the group alive, and a
    # gloo thread that is still there when Python ends now and then aborts the process.
    import torch._dynamo  # noqa: F401

    dist.init_process_group(backend)
    if dist.get_rank() > 0:
        sys.stdout = io.StringIO()  # the first process speaks for all
    return dist.get_rank(), dist.get_world_size()


def end():
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank():
    """Which of its machine's processes this is, and so which GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", 0))


def add_up(*values, device="cpu"):
    """Each number summed over all processes, as floats."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


@contextmanager
def first_process_first():
    """The first process does what is inside before the others do: they find its files."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and dist.get_rank() == 0:
            dist.barrier()


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()
