"""Device and dtype selection."""

import ctypes
import os
import shutil
import sys

import torch
from torch.utils._triton import has_triton

from common import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name, deterministic=False):
    """Return the torch.device for --device; auto picks an NVIDIA or Apple GPU if available. With
    torchrun, each process gets its own NVIDIA GPU, and Apple GPUs aren't used.

    deterministic makes results on a GPU reproducible to the bit; on a CPU they always are. Raises
    UserError if the device isn't available.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if name == "auto":
        apple = torch.backends.mps.is_available() and "RANK" not in os.environ
        name = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try auto") from None
    if device.type == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--device mps: several processes cannot share an Apple GPU; give cpu")
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UserError(f"--device {name}: each process needs a GPU of its own; give cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """Return the torch.dtype of --dtype for inference. auto never picks fp16: it can overflow."""
    if name == "auto":
        name = "bf16" if auto_dtype(device) == "bf16" else "fp32"
    return DTYPES[name]


def auto_dtype(device):
    """Return the precision that --dtype auto picks for training: bf16 with hardware support
    (emulated, it is slower than fp32), fp16 on older NVIDIA GPUs, otherwise fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so may be missing
    has_bf16 = any(getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name))
    return "bf16" if device.type == "cpu" and has_bf16 else "fp32"


def keep_freed_memory():
    """Stop glibc from returning freed memory to the OS. A training step allocates the same large
    blocks again and again, and would wait for every page to be zeroed.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def require_compiler(device):
    """Raise UserError if torch.compile lacks a compiler for the device."""
    if device.type == "cuda" and not has_triton():
        raise UserError(
            "--use_compile 1 on a GPU needs Triton, which PyTorch ships only on Linux, and a GPU "
            "of 2017 or newer (Volta)"
        )
    for_c = (os.environ.get("CC", "gcc"), "gcc", "clang")
    if device.type == "cuda" and not any(map(shutil.which, for_c)):
        raise UserError("--use_compile 1 on a GPU needs a C compiler: install gcc, or set CC")
    if device.type == "mps" and torch.__version__ < "2.8":
        raise UserError("--use_compile 1 on an Apple GPU needs torch 2.8 or newer")
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(
            "--use_compile 1 needs a C++ compiler, and none is on the PATH: install g++ (Linux), "
            "the command line tools (macOS) or Visual Studio's (Windows), or leave the flag out"
        )
