"""Where a run computes: its device, its precision, and the other processes of its job.

`torchrun` starts the processes and gives each its rank through the environment. Without it there is
one process, and what concerns others does nothing.
"""

import io
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import UserError
from model.device import DTYPES, auto_dtype, keep_freed_memory, pick_device


@dataclass
class Runtime:
    """Where and how precisely a process computes. Weights stay fp32; autocast computes in dtype."""

    device: torch.device
    dtype: torch.dtype
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    rank: int
    world_size: int

    def sum(self, *values):
        """Return each number summed over all processes, as floats."""
        return all_reduce_sum(*values)

    def backward(self, loss):
        """Add the gradient of a loss to the gradients of the weights."""
        # Processes average their gradients, but the sum is needed: hence the factor.
        self.scaler.scale(loss * self.world_size).backward()


def start_runtime(args):
    """Return the Runtime of this process, after it has joined the others of its job.

    What --dtype auto stands for is stored in args.dtype: a resumed run computes as it began.
    Raises UserError if the device cannot be used.
    """
    keep_freed_memory()
    device = pick_device(args.device, args.deterministic)
    rank, world_size = join()
    if args.dtype == "auto":  # the first process decides: machines may differ
        names = list(DTYPES)
        chosen = names.index(auto_dtype(device)) if rank == 0 else 0
        args.dtype = names[int(all_reduce_sum(chosen)[0])]
    dtype = DTYPES[args.dtype]
    if args.dtype == "fp16" and device.type == "mps" and torch.__version__ < "2.8":
        raise UserError("--dtype fp16 on an Apple GPU needs torch 2.8 or newer; use fp32")
    autocast = autocast_to(dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Runtime(device, dtype, autocast, scaler, rank, world_size)


def autocast_to(dtype, device):
    """torch.autocast to a dtype on a device; for fp32 one that does nothing."""
    enabled = dtype != torch.float32
    # torch 2.6 warns of fp32 on an Apple GPU, also where nothing is cast.
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)


def join():
    """Joins the other processes of a torchrun job; returns (rank, number of processes).

    Counts and signals are summed on the CPU by gloo: it notices a lost process at once, and no GPU
    waits for them. The limit is that of a wait, also for the process that tokenises. Gradients have
    a group of their own: see `parallelize`.
    """
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size()


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def all_reduce_sum(*values):
    """Each number summed over all processes, as floats."""
    total = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def barrier():
    """Waits for all processes."""
    # Not a sum: of the last one before the end, gloo's thread would hold a Python object, and wait
    # for Python while Python waits for that thread to end.
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_process_first():
    """The first process runs the block before the others do: they find its files."""
    if not is_first():
        barrier()
    try:
        yield
    finally:
        if is_first():
            barrier()


def end_job():
    """Leave the job; the first process waits for all."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def report_lost_process():
    """Around a script's main(): turns the error of a process that lost another one into a sentence
    and exit code 2, and ends the processes of a job without waiting for each other.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        sys.stdout = io.StringIO()  # only the first process prints
    code = 0
    try:
        yield
    except SystemExit as exit:
        code = exit.code
    except RuntimeError as error:
        lost = re.search("gloo|nccl|peer|timed? ?out", str(error), re.I)
        if not dist.is_initialized() or not lost:
            raise
        reason = str(error).splitlines()[0]
        print(
            f"error: process {dist.get_rank()} lost another one of this job ({reason}). See what "
            "that one printed; resume from the last checkpoint with --from_resume 1",
            file=sys.stderr,
        )
        code = 2
    if "RANK" in os.environ:
        # DDP and fully_shard keep references to the group that outlive it. A gloo thread that is
        # still there when Python exits now and then aborts, and nccl waits for what it has begun.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def parallelize(model, mode, dtype):
    """The model as the processes of a job run it together.

    ddp    every process holds all of it, and gradients are averaged (torch's DDP)
    fsdp   each holds a slice of the weights, their gradients and the optimizer's state, and
           gathers a layer when it computes it (arXiv:2304.11277; torch's `fully_shard`)
    """
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device.type
    # When a process is lost, nccl ends the others after this limit. Processes start each step
    # together, so no gradient waits that long.
    backend = "nccl" if device == "cuda" and dist.is_nccl_available() else "gloo"
    group = dist.new_group(backend=backend, timeout=timedelta(minutes=10))
    if mode == "ddp":
        return DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if device == "cpu" and torch.__version__ < "2.7":
        raise UserError("--parallel fsdp on a CPU needs torch 2.7 or newer; leave the flag out")
    mesh = DeviceMesh.from_group(group, device)
    # The layers are gathered in dtype. As with ddp, rotary positions, the residual stream, the
    # embeddings and the output layer are fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def gradient_sync(ddp_model, enabled):
    """Context manager: a backward pass averages gradients over the processes only if enabled."""
    if hasattr(ddp_model, "set_requires_gradient_sync"):  # fsdp
        ddp_model.set_requires_gradient_sync(enabled)
    elif not enabled and hasattr(ddp_model, "no_sync"):  # ddp
        return ddp_model.no_sync()
    return nullcontext()


def seed_step(args, step, rank):
    """Make the random numbers of a step (dropout) a function of its number: a resumed run gets
    those of an uninterrupted one.
    """
    torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))
