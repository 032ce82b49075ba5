"""What the train scripts and the chat share: a model to start from, device and precision, the
learning rate, figures on the data. Each is called; none calls back.
"""

import ctypes
import json
import math
import os
import re
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from common import UserError
from dataset.loader import batches, epoch_plan
from dataset.tokenizer import SHIPPED_TOKENIZER, load_tokenizer
from model.causal_lm import CausalLM, ModelConfig
from model.extend_vocab import extend_vocab, freeze_base
from model.lora import add_lora
from model.loss import supervised_tokens
from trainer import checkpoint
from trainer.arguments import SHAPE
from trainer.distributed import all_reduce_sum, local_rank


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
        model, tokenizer = checkpoint.build_model(content, path, dropout)
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


@torch.no_grad()
def validation_loss(model, dataset, rows, args, device, autocast, rank=0, world_size=1):
    """(mean loss per supervised token over the rows in nats, more for the log). Where the rows come
    from several files, that is {"val_losses": {file: its mean}}. Each process does its share.
    """
    rows, sums = np.asarray(rows), {}
    file_of = dataset.samples[rows, 0]
    model.eval()
    for file in np.unique(file_of).tolist():
        plan = epoch_plan(dataset, rows[file_of == file], args, 0, rank, world_size)
        micro_batches = [rows_of_batch for step in plan for rows_of_batch in step]
        total, count = 0.0, 0
        for batch in batches(dataset, micro_batches, args):
            input_ids, labels, *where = (part.to(device) for part in batch)
            with autocast:
                total += model(input_ids, *where, labels=labels).item()
            count += supervised_tokens(labels)
        sums[file] = all_reduce_sum(total, count, device=device)
    model.train()
    total, count = (sum(numbers) for numbers in zip(*sums.values(), strict=True))
    if len(sums) == 1:
        return total / max(1, count), {}
    paths = [dataset.files[file].path for file in sums]
    alike = len({path.name for path in paths}) < len(paths)
    names = [str(path) if alike else path.name for path in paths]
    means = [float(f"{total / max(1, count):.6g}") for total, count in sums.values()]
    losses = dict(zip(names, means, strict=True))
    tqdm.write("validation of " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    return total / max(1, count), {"val_losses": losses}


def choose_what_learns(model, tokenizer, args):
    """Does what the flags --extend_tokens, --use_lora, --freeze_base and --freeze say.

    Raises UserError where they leave nothing to learn, or contradict each other.
    """
    if args.use_lora and (args.freeze_base or args.extend_tokens):
        raise UserError(
            "--use_lora 1 keeps all weights as they are, so it excludes --extend_tokens and "
            "--freeze_base 1; add the tokens in a run of their own first"
        )
    if args.extend_tokens and args.from_resume:
        require_known(args.extend_tokens, tokenizer)
    elif args.extend_tokens:
        added = extend_vocab(model, tokenizer, read_tokens(args.extend_tokens))
        print(f"{added} new tokens; the vocabulary has {model.config.vocab_size} entries")
    if args.use_lora and not getattr(model, "lora", None):
        torch.manual_seed(args.seed)
        try:
            add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target)
        except ValueError as error:
            raise UserError(f"--lora_target {error}") from None
    if args.freeze_base:
        if args.parallel == "fsdp":
            raise UserError("--freeze_base 1 needs whole matrices; use --parallel ddp")
        try:
            freeze_base(model)
        except ValueError as error:
            raise UserError(
                f"--freeze_base 1 trains the rows of new tokens alone, and {error}; add some with "
                "--extend_tokens FILE, or leave the flag out"
            ) from None
    if args.freeze:
        try:
            found = [name for name, _ in model.named_parameters() if re.search(args.freeze, name)]
        except re.error as error:
            raise UserError(f"--freeze {args.freeze} is no regular expression: {error}") from None
        if not found:
            raise UserError(f"--freeze {args.freeze}: no weight has such a name")
        for name in found:
            model.get_parameter(name).requires_grad_(False)
    learn = [weight for weight in model.parameters() if weight.requires_grad]
    if not learn:
        raise UserError("nothing is left to learn; give --freeze fewer names")
    sizes = [sum(map(torch.numel, weights)) for weights in (learn, list(model.parameters()))]
    if args.freeze_base:
        sizes[0] = sum(weight[weight.first_row :].numel() for weight in learn)
    if sizes[0] < sizes[1]:
        print(f"{sizes[0]:,} of {sizes[1]:,} parameters learn ({sizes[0] / sizes[1]:.1%})")


def require_known(path, tokenizer):
    """Raises UserError if a file has tokens that the checkpoint of a run does not have. The run
    does not need the file any more, so it may be gone.
    """
    tokens = read_tokens(path) if path.is_file() else {}
    new = [token for token in tokens if tokenizer.token_to_id(token) is None]
    if new:
        raise UserError(
            f"--extend_tokens {path} has tokens that the run did not begin with, such as {new[0]}; "
            "give the file as it was, leave the flag out, or start a new run"
        )


def read_tokens(path):
    """{token: its description or ""}, sorted: of JSON, {item: its tokens} or {token: description},
    or of a file with a token a line.

    Raises UserError for a file that is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            tokens = {}
            for key, value in json.loads(text).items():
                tokens |= {key: value} if isinstance(value, str) else dict.fromkeys(value, "")
        else:
            tokens = dict.fromkeys(text.split("\n"), "")
        tokens = {token.strip(): tokens[token] for token in sorted(tokens) if token.strip()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"--extend_tokens {path}: {error}; give JSON of item to tokens, of token to its "
            "description, or a token a line"
        ) from None
    if not tokens:
        raise UserError(f"--extend_tokens {path}: there is no token in it")
    return tokens
