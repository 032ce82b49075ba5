"""Where a run computes: its device, its precision, and the other processes of its job.

`torchrun` starts the processes and gives each its rank through the environment. Without it there is
one process, and what concerns others does nothing.
"""

import ctypes
import io
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Compute:
    """Where and how precisely a process computes. Weights stay fp32; autocast computes in dtype."""

    device: torch.device
    dtype: torch.dtype
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    rank: int
    world_size: int

    def sum(self, *values):
        """Each number summed over all processes, as floats."""
        return all_reduce_sum(*values, device=self.device)


def start(args):
    """The Compute of this process, after it has joined the others of its job.

    What --dtype auto stands for is stored in args.dtype: a resumed run computes as it began.
    Raises UserError if the device cannot be used.
    """
    keep_freed_memory()
    device = pick_device(args.device, args.deterministic)
    rank, world_size = join("nccl" if device.type == "cuda" else "gloo")
    if args.dtype == "auto":  # the first process decides: machines may differ
        bf16 = rank == 0 and bf16_is_native(device)
        args.dtype = "bf16" if all_reduce_sum(bf16, device=device)[0] else "fp32"
    dtype = DTYPES[args.dtype]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Compute(device, dtype, autocast, scaler, rank, world_size)


def join(backend):
    """Joins the other processes of a torchrun job; returns (rank, number of processes)."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group(backend)
    return dist.get_rank(), dist.get_world_size()


def pick_device(name, deterministic=False):
    """The torch.device of --device; auto takes an NVIDIA or Apple GPU where there is one.

    A CPU computes the same bits each time; a GPU does so with deterministic.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """The torch.dtype of --dtype; auto takes bf16 where the processor computes it natively."""
    if name == "auto":
        name = "bf16" if bf16_is_native(device) else "fp32"
    return DTYPES[name]


def bf16_is_native(device):
    """Whether the processor has bf16 instructions; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # since torch 2.6
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def keep_freed_memory():
    """Makes glibc keep what is freed. It returns large blocks to the system, and a training step,
    which takes the same blocks again and again, then waits for every page to be zeroed.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def all_reduce_sum(*values, device="cpu"):
    """Each number summed over all processes, as floats."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def barrier():
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


def end():
    """Leaves the job; the first process waits for all."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def report_lost_process():
    """Around a script's main(): turns the error of a process that lost another one into a
    UserError, and ends the processes of a job without waiting for each other.
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
        raise UserError(
            f"process {dist.get_rank()} lost another one of this job ({reason}). See what that one "
            "printed; go on from the last checkpoint with --from_resume 1"
        ) from None
    if "RANK" in os.environ:
        # DDP and fully_shard keep references to the group that outlive it. A gloo thread that is
        # still there when Python exits now and then aborts.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def parallelise(model, mode, dtype):
    """The model as the processes of a job run it together.

    ddp    every process holds all of it, and gradients are averaged (torch's DDP)
    fsdp   each holds a slice of the weights, their gradients and the optimizer's state, and
           gathers a layer when it computes it (arXiv:2304.11277; torch's `fully_shard`)
    """
    if not dist.is_initialized():
        return model
    if mode == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def sync_gradients(learner, now):
    """A context in which a backward pass averages gradients over the processes only if now."""
    if hasattr(learner, "set_requires_gradient_sync"):  # fsdp
        learner.set_requires_gradient_sync(now)
    elif not now and hasattr(learner, "no_sync"):  # ddp
        return learner.no_sync()
    return nullcontext()
