"""What the train scripts and the chat share: a model to begin with, data, and the validation loss.
Each is called; none calls back.
"""

import math
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import UserError
from dataset.lm_dataset import FILE, PretrainDataset
from dataset.step_plan import Source, batches, epoch_plan, mix, split_samples, to_device
from dataset.tiny_world import PRETRAIN, write_missing
from model.causal_lm import CausalLM, ModelConfig
from model.chat_template import render
from model.loss import supervised_tokens
from model.tokenizer import SHIPPED_TOKENIZER, load_tokenizer
from model.weights import (
    SHAPE,
    build_model,
    find_weights,
    load,
    print_summary,
    require_same_shape,
)
from trainer.checkpoint import build_resumed
from trainer.runtime import first_process_first


def init_model(args, device="cpu", saved=None):
    """The model to begin with: returns (model on device, tokenizer, the rest of its file or None).

    Three cases, each printed:
      saved                    the checkpoint of this run, as `checkpoint.load_latest` returns it
      args.from_weight NAME    the weights of another stage, out/NAME_*.pth or a path
      neither, or "none"       from scratch: random weights, drawn with args.seed

    Shape flags that the user gave must agree with the file; those left out come from it.
    Raises UserError, with the remedy, if there is no such file or if it does not fit.
    """
    name = args.from_weight
    if saved:
        content, path = saved, saved["path"]
        origin = f"resuming {path} at step {content['run']['step']}"
    elif name in (None, "none"):
        content, origin = None, "starting from scratch"
        model, tokenizer = new_model(args)
        expected = math.log(model.config.vocab_size) + 0.5
        print(f"the first loss of a new model is near ln V + 1/2 = {expected:.2f}")
    else:
        path = find_weights(args.save_dir, name, args.hidden_size, args.use_moe)
        if path == Path(name):  # not a name but a path, wherever the run is resumed from
            args.from_weight = str(path.resolve())
        content = load(path) | {"path": path}
        origin = f"starting from the {content['stage']} weights {path}"
    if content:
        build = build_resumed if saved else build_model
        model, tokenizer = build(content, path, args.dropout)
        require_same_shape(args, model.config, path)
        require_same_tokenizer(args, tokenizer, path)
        del content["model"]  # not kept in memory
    print_summary(origin, model)
    return model.to(device), tokenizer, content


def new_model(args):
    """(a model with random weights, its tokenizer). Raises UserError for an impossible shape."""
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer_path or SHIPPED_TOKENIZER)
    shape = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    try:
        config = ModelConfig(tokenizer.get_vocab_size(), dropout=args.dropout, **shape)
    except ValueError as error:
        raise UserError(str(error)) from None
    config.max_position_embeddings = max(config.max_position_embeddings, args.max_seq_len)
    return CausalLM(config), tokenizer


def require_same_tokenizer(args, tokenizer, path):
    """Raise UserError where --tokenizer_path isn't the tokenizer of a weights file."""
    if args.tokenizer_path and load_tokenizer(args.tokenizer_path).to_str() != tokenizer.to_str():
        raise UserError(
            f"--tokenizer_path {args.tokenizer_path} is not the tokenizer that {path} was trained "
            "with; its vocabulary would not fit. Leave the flag out, or start from scratch"
        )


def open_data(kind, args, tokenizer, default, **options):
    """(dataset, its samples to train on, validation dataset, its samples), samples as numbers.

    kind is PretrainDataset or SFTDataset, default the file that is read without --data_path, and
    options are those of kind alone. Without --val_data_path, a part of the data is held out.
    """
    sources = args.data_path or [Source(default)]
    options |= reading(args)
    with first_process_first():
        paths = [write_missing(source.path) for source in sources]
        dataset = val_dataset = kind(paths, tokenizer, **options)
        train, val = split_samples(dataset, args.val_split, args.seed)
        if args.val_data_path:
            val_dataset = kind(args.val_data_path, tokenizer, **options)
            train, val = range(len(dataset)), range(len(val_dataset))
    return dataset, mix(train, dataset, sources, args.seed), val_dataset, val


def conversation_options(args):
    """The flags of conversations that SFTDataset takes, as its arguments."""
    names = ("overlong", "keep_think", "data_format")
    return {name: getattr(args, name) for name in names}


def replay(dataset, train, args, tokenizer):
    """Adds pretraining text to a dataset of conversations, whose training samples are train;
    returns the numbers of the new samples. Conversations alone make a model forget the rest.
    """
    path = args.replay_path or (None if args.data_path else PRETRAIN)
    if not path or not args.replay_share:
        return []
    with first_process_first():
        documents = PretrainDataset(write_missing(path), tokenizer, **reading(args))
    tokens = args.replay_share * int(dataset.lengths[train].sum())
    return dataset.add_replay(documents, tokens, args.max_seq_len, args.seed)


def reading(args):
    """The flags that say how a dataset reads its files, as its arguments."""
    return {
        "max_length": args.max_seq_len,
        "strict": args.strict_data,
        "cache_dir": args.cache_dir or args.save_dir / "cache",
    }


def describe(dataset, train, val, args):
    """Prints figures of the data, and what could not be used of it."""
    tokens = int(dataset.lengths[train].sum())
    print(f"{len(train)} samples of {tokens / len(train):.0f} tokens to train on,", end=" ")
    print(f"{len(val)} to validate on")
    if dataset.cut:
        print(f"{dataset.cut} records are longer than --max_seq_len {args.max_seq_len}")
    if dataset.dropped:
        print(f"{dataset.dropped} records dropped: nothing supervised within --max_seq_len")
    for file in dataset.files:
        for note, count in file.report["notes"].items():
            print(f"{count} {note}")
        if file.report["bad"]:
            print(f"{file.report['bad']} bad records left out (--strict_data 1 stops at them):")
            for number, reason in file.report["bad_lines"][:5]:
                print(f"  line {number}: {reason}")


@torch.no_grad()
def validation_loss(model, dataset, samples, args, runtime):
    """{"val_loss": mean loss per supervised token of the samples, in nats}; where they come from
    several files also {"val_losses": {file: its mean}}. Each process computes its share.
    """
    samples, sums = np.asarray(samples), {}
    file_of = dataset.samples[samples, FILE]
    model.eval()
    for file in np.unique(file_of).tolist():
        own = samples[file_of == file]
        plan = epoch_plan(dataset, own, args, 0, runtime.rank, runtime.world_size)
        micro_batches = [micro_batch for step in plan for micro_batch in step]
        total, count = 0.0, 0
        for batch in batches(dataset, micro_batches, args, runtime.device):
            input_ids, labels, *where = to_device(batch, runtime.device)
            with runtime.autocast:
                total += model(input_ids, *where, labels=labels).item()
            count += supervised_tokens(labels)
        sums[file] = runtime.sum(total, count)
    model.train()
    total, count = (sum(numbers) for numbers in zip(*sums.values(), strict=True))
    found = {"val_loss": total / max(1, count)}
    if len(sums) > 1:
        paths = [dataset.files[file].path for file in sums]
        alike = len({path.name for path in paths}) < len(paths)
        names = [str(path) if alike else path.name for path in paths]
        means = [float(f"{total / max(1, count):.6g}") for total, count in sums.values()]
        found["val_losses"] = dict(zip(names, means, strict=True))
        each = ", ".join(f"{name} {loss:.3f}" for name, loss in found["val_losses"].items())
        tqdm.write(f"validation of {each}")
    return found


@contextmanager
def generating(model, runtime):
    """Inside, a model in training may generate text. Compiled layers run as they are: each length
    would be compiled again. The layers of a sharded model are gathered in the dtype of autocast;
    what a step gathered is released before, and what generation gathered after.
    """
    compiled = any(layer._compiled_call_impl for layer in model.model.layers)
    stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    sharded = hasattr(model, "reshard")
    reshard = model.reshard if sharded else lambda: None
    reshard()
    with stance, runtime.autocast if sharded else nullcontext():
        yield
    reshard()


def show_sample(model, tokenizer, args, runtime, chat):
    """Prints how the model continues --sample_prompt, or, in a chat, what it answers to it."""
    from model.generation import complete  # here: training without samples needs none of it

    prompt = tokenizer.encode(args.sample_prompt).ids
    if chat:
        messages = [{"role": "user", "content": args.sample_prompt}]
        prompt, _ = render(messages, add_generation_prompt=True, tokenizer=tokenizer)
    with generating(model, runtime):
        (answer,) = complete(model, [prompt], max_new_tokens=60, temperature=0)
    text = tokenizer.decode(answer if chat else prompt + answer)
    tqdm.write(f"  {args.sample_prompt} -> {text}" if chat else f"  {text}")


def selection_score(model, tokenizer, task, val_loss, runtime):
    """Return what makes weights the best, the same on all processes: the share of a task's problems
    that they solve, or minus the validation loss where there is no task. Each process answers its
    share of the problems; where a model is sharded, all generate the same number of tokens, so each
    answers all.
    """
    if not task:
        return runtime.sum(-val_loss)[0] / runtime.world_size
    sharded = hasattr(model, "reshard")
    share = (0, 1) if sharded else (runtime.rank, runtime.world_size)
    with generating(model, runtime):
        solved = runtime.sum(task.count_solved(model, tokenizer, *share))[0]
    return solved / len(task.problems) / (runtime.world_size if sharded else 1)
