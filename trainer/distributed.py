"""One process or several: what a training loop needs to know of the others.

`torchrun` starts the processes and tells each its number through the environment. Without it
there is one process, and everything here does nothing.
"""

import io
import os
import re
import sys
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import UserError


def start(backend):
    """Joins the other processes of a torchrun job. Returns (rank, number of processes)."""
    if "RANK" not in os.environ:
        return 0, 1
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


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def all_reduce_sum(*values, device="cpu"):
    """Each number summed over all processes, as floats."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


@contextmanager
def first_process_first():
    """The first process does what is inside before the others do: they find its files."""
    if not is_first():
        barrier()
    try:
        yield
    finally:
        if is_first():
            barrier()


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def ending_in_plain_words():
    """Around a script's main(): a process that waits in vain for another says so and ends, and one
    that has done its part leaves at once.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search(
            "gloo|nccl|peer|timed? ?out", str(error), re.I
        ):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {dist.get_rank()} lost another one of this job ({reason}). See what that one "
            "says; go on from the last checkpoint with --from_resume 1"
        ) from None
    if "RANK" in os.environ:
        # DDP and fully_shard keep a reference to the group in places that outlive it. A gloo
        # thread that is still there while Python takes itself apart now and then aborts.
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


def sync_gradients(runner, now):
    """Whether the processes add up their gradients in this backward pass: in a step's last one."""
    if hasattr(runner, "set_requires_gradient_sync"):
        runner.set_requires_gradient_sync(now)
    elif not now and hasattr(runner, "no_sync"):
        return runner.no_sync()
    return nullcontext()


def whole(state):
    """A state dict with every sharded tensor gathered; all processes must call this together."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def load_optimizer(optimizer, state):
    """Gives an optimizer its whole state, of which each process takes what it shards."""
    if hasattr(optimizer, "parts"):
        for name, part in optimizer.parts.items():
            load_optimizer(part, state[name])
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        like = parameters[index]
        for key, value in values.items():
            if hasattr(like, "full_tensor") and value.shape == like.shape:
                from torch.distributed.tensor import distribute_tensor

                values[key] = distribute_tensor(
                    value.to(like.device), like.device_mesh, like.placements
                )
    optimizer.load_state_dict(state)
