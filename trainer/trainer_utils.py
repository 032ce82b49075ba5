"""What the train scripts and the chat share: a model to start from, device and precision, the
learning rate, figures on the data. Each is called; none calls back.
"""

import ctypes
import math
import os
import sys
import time

import numpy as np
import torch

from dataset.errors import UserError
from dataset.tokenizer import SHIPPED_TOKENIZER, load_tokenizer
from model.causal_lm import CausalLM, ModelConfig
from trainer import checkpoint
from trainer.arguments import SHAPE
from trainer.distributed import local_rank


def init_model(args, device="cpu", resume=None):
    """The model to go on with: returns (model on device, tokenizer, what its file holds or None).

    Three cases, each printed:
      resume                   the checkpoint of this run, (path, content)
      args.from_weight NAME    the weights of another stage, out/NAME_*.pth or a path
      neither, or "none"       from scratch: random weights, drawn from args.seed

    Shape flags that the user gave must agree with the file; those left out come from it.
    Raises UserError, with the remedy, if there is no such file or if it does not fit.
    """
    shape = {name: getattr(args, name, None) for name in SHAPE}
    shape = {name: value for name, value in shape.items() if value is not None}
    dropout, longest = getattr(args, "dropout", 0.0), getattr(args, "max_seq_len", 0)
    content = None
    if resume:
        path, content = resume
        how = f"resuming {path} at step {content['run']['step']}"
    elif (name := checkpoint.weights_to_start_from(args)) not in (None, "none"):
        size, moe = shape.get("hidden_size"), shape.get("use_moe")
        path = checkpoint.find(args.save_dir, name, size, moe)
        content = checkpoint.load(path)
        how = f"starting from the {content['stage']} weights {path}"
    else:
        torch.manual_seed(args.seed)
        tokenizer = load_tokenizer(args.tokenizer_path or SHIPPED_TOKENIZER)
        shape |= {"vocab_size": tokenizer.get_vocab_size(), "dropout": dropout}
        try:
            config = ModelConfig(**shape)
        except ValueError as error:
            raise UserError(str(error)) from None
        config.max_position_embeddings = max(config.max_position_embeddings, longest)
        model, how = CausalLM(config), "starting from scratch"
    if content:
        model, tokenizer = checkpoint.build(content, path, args)
        differ = [
            f"--{name} {value}, but {path} has {getattr(model.config, name)}"
            for name, value in shape.items()
            if value != getattr(model.config, name)
        ]
        if longest > model.config.max_position_embeddings:
            limit = model.config.max_position_embeddings
            differ.append(f"--max_seq_len {longest}, but {path} has a context of {limit}")
        if differ:
            raise UserError(f"{'; '.join(differ)}. Leave the flag out, or train such weights first")
        given = getattr(args, "tokenizer_path", None)
        if given and load_tokenizer(given).to_str() != tokenizer.to_str():
            raise UserError(
                f"--tokenizer_path {given} is not the tokenizer that {path} was trained with; "
                "its vocabulary would not fit. Leave the flag out, or start from scratch"
            )
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{how}: {parameters / 1e6:.2f} M parameters, vocabulary {model.config.vocab_size}")
    return model.to(device), tokenizer, content


def pick_device(name, deterministic=False):
    """The torch.device of --device; auto takes a GPU of NVIDIA's or Apple's where there is one.
    A CPU computes the same bits each time; a GPU does so when asked.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if name == "auto":
        if torch.cuda.is_available():
            name = f"cuda:{local_rank()}"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(args, device):
    """The torch.dtype to compute in; weights stay fp32. auto takes bf16 where it is faster, and
    what it took stands in args.dtype, so that a resumed run computes as it began.
    """
    if args.dtype == "auto" and device.type == "cuda":
        args.dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    elif args.dtype == "auto":
        faster = seconds_of_product(torch.bfloat16) * 1.3 < seconds_of_product(torch.float32)
        args.dtype = "bf16" if faster and device.type == "cpu" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]


def seconds_of_product(dtype):
    """The best of a few matrix products on the CPU: old ones emulate bf16, slower than fp32."""
    a, seconds = torch.ones(512, 512, dtype=dtype), []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def keep_freed_memory():
    """Tells glibc to keep what is freed. It gives large blocks back to the system, and a training
    step, which takes the same blocks again and again, then waits for every page to be zeroed.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def learning_rate(step, total_steps, args):
    """Of the given step, counted from 0: a linear rise to --learning_rate over --warmup_steps, then
    half a cosine down to --min_lr_ratio of it at the last step.
    """
    highest, warmup_steps = args.learning_rate, min(args.warmup_steps, total_steps - 1)
    if step < warmup_steps:
        return highest * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    floor = highest * args.min_lr_ratio
    return floor + (highest - floor) * 0.5 * (1 + math.cos(math.pi * done))


def describe(data, train_rows, eval_rows, args):
    """A line of figures on the data, and one on each thing that could not be used of it."""
    tokens = int(data.lengths[train_rows].sum())
    print(f"{len(train_rows)} rows of {tokens / len(train_rows):.0f} tokens to train on,", end=" ")
    print(f"{len(eval_rows)} to validate on")
    if data.cut:
        print(f"{data.cut} records are longer than --max_seq_len {args.max_seq_len}")
    if data.dropped:
        print(f"{data.dropped} records dropped: nothing to learn within --max_seq_len")
    for file in data.files:
        for note, count in file.report["notes"].items():
            print(f"{count} {note}")
        if file.report["bad"]:
            print(f"{file.report['bad']} bad records left out (--strict_data 1 stops at them):")
            for number, reason in file.report["bad_lines"][:5]:
                print(f"  line {number}: {reason}")


def seed_step(args, step, rank):
    """Makes the random numbers of a step (dropout) a function of its number: a resumed run draws
    what an uninterrupted one would have drawn.
    """
    torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))
