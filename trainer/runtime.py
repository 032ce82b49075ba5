"""Device, precision and process group.

`torchrun` starts the processes and sets their ranks in the environment. Without it there is one
process, and collectives are no-ops.
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
    """Device, precision and rank of a process. Weights stay fp32; autocast computes in dtype."""

    device: torch.device
    dtype: torch.dtype
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    rank: int
    world_size: int

    def sum(self, *values):
        """Sum each number over all processes; returns floats."""
        return all_reduce_sum(*values)

    def backward(self, loss):
        """Accumulate the gradient of a loss."""
        # DDP averages gradients; multiply by world_size to get the sum.
        self.scaler.scale(loss * self.world_size).backward()


def start_runtime(args):
    """Select the device and precision, and join the process group. Returns a Runtime.

    Replaces --dtype auto in args.dtype, so that a resumed run uses the same precision. Raises
    UserError if the device isn't available.
    """
    keep_freed_memory()
    device = pick_device(args.device, args.deterministic)
    rank, world_size = join_process_group()
    if args.dtype == "auto":  # rank 0 decides: machines may differ
        names = list(DTYPES)
        chosen = names.index(auto_dtype(device)) if rank == 0 else 0
        args.dtype = names[int(all_reduce_sum(chosen)[0])]  # the sum acts as a broadcast
    dtype = DTYPES[args.dtype]
    if args.dtype == "fp16" and device.type == "mps" and torch.__version__ < "2.8":
        raise UserError("--dtype fp16 on an Apple GPU needs torch 2.8 or newer; use fp32")
    autocast = autocast_to(dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Runtime(device, dtype, autocast, scaler, rank, world_size)


def autocast_to(dtype, device):
    """Return torch.autocast for a dtype on a device, disabled for fp32."""
    enabled = dtype != torch.float32
    # torch 2.6 warns about fp32 on MPS even if autocast is disabled.
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)


def join_process_group():
    """Join the process group of a torchrun job. Returns (rank, world_size).

    Counts and signals are summed on the CPU with gloo, which detects a lost process at once and
    needs no GPU sync. The timeout must be longer than tokenization. Gradients use a group of their
    own: see `parallelize`.
    """
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size()


def is_rank_zero():
    """Return whether this is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def all_reduce_sum(*values):
    """Sum each number over all processes; returns floats."""
    total = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def barrier():
    """Wait for all processes."""
    # barrier, not all_reduce: avoids a gloo/GIL deadlock at exit.
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def rank_zero_first():
    """Context manager: rank 0 runs the block first, so that the others find its files."""
    if not is_rank_zero():
        barrier()
    try:
        yield
    finally:
        if is_rank_zero():
            barrier()


def shut_down():
    """Wait for all processes and shut down the process group."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def torchrun_process():
    """Context manager for a script's main() under torchrun: only rank 0 prints; if a process is
    lost, the others end with one sentence and exit code 2; gloo's threads aren't waited for.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        sys.stdout = io.StringIO()
    code = 0
    try:
        yield
    except SystemExit as error:
        code = error.code or 0
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
        # DDP and fully_shard hold references to the group. A gloo thread that is still running when
        # Python exits sometimes aborts, and nccl waits for pending operations.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def parallelize(model, mode, dtype):
    """Wrap the model for several processes; returns it unchanged for one.

    ddp    each process holds the full model; gradients are averaged (torch's DDP)
    fsdp   weights, gradients and optimizer state are sharded; each layer is gathered when it is
           computed (arXiv:2304.11277; torch's `fully_shard`)
    """
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device.type
    # If a process is lost, nccl stops the others after this timeout. All processes start each step
    # together, so gradients never take that long.
    backend = "nccl" if device == "cuda" and dist.is_nccl_available() else "gloo"
    group = dist.new_group(backend=backend, timeout=timedelta(minutes=10))
    if mode == "ddp":
        return DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if device == "cpu" and torch.__version__ < "2.7":
        raise UserError("--parallel fsdp on a CPU needs torch 2.7 or newer; omit the flag")
    mesh = DeviceMesh.from_group(group, device)
    # Layers are gathered in dtype. As with ddp, rotary embeddings, the residual stream, embeddings
    # and the LM head are fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def is_sharded(model):
    """Return whether the model is sharded by FSDP."""
    return hasattr(model, "reshard")


def gradient_sync(ddp_model, enabled):
    """Context manager: average gradients over the processes only if enabled."""
    if is_sharded(ddp_model):
        ddp_model.set_requires_gradient_sync(enabled)
    elif not enabled and hasattr(ddp_model, "no_sync"):  # ddp
        return ddp_model.no_sync()
    return nullcontext()


def seed_step(seed, step, rank):
    """Seed the random numbers of a step (dropout) from its index, so that a resumed run gets the
    same as an uninterrupted one.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
