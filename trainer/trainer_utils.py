"""Loading models and data, validation, and sampling, shared by the train scripts."""

import math
from contextlib import ExitStack, contextmanager
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
from model.loss import count_supervised
from model.tokenizer import SHIPPED_TOKENIZER, load_tokenizer
from model.weights import SHAPE, build_model, find_weights, load, print_summary, require_same_shape
from trainer.checkpoint import build_resumed
from trainer.runtime import is_sharded, rank_zero_first


def init_model(args, device="cpu", saved=None):
    """Create or load the model. Returns (model on device, tokenizer).

      saved                    resume from this checkpoint, as returned by `checkpoint.load_latest`
      args.from_weight NAME    start from the weights of another stage, out/NAME_*.pth or a path
      neither, or "none"       start from scratch: random weights, seeded with args.seed

    Flags for the model's shape must agree with the file. Raises UserError, with a hint, if the file
    is missing or doesn't match.
    """
    path = None
    if saved:
        path = saved["path"]
        model, tokenizer = build_resumed(saved, path, args.dropout)
        del saved["model"]  # free the memory
        origin = f"resuming {path} at step {saved['run']['step']}"
    elif args.from_weight in (None, "none"):
        model, tokenizer = new_model(args)
        origin = "starting from scratch"
        # The logits have a variance of about 1, so the log of their summed exponentials is about
        # ln V + 1/2.
        print(f"expected initial loss: ln V + 1/2 = {math.log(model.config.vocab_size) + 0.5:.2f}")
    else:
        path = find_weights(args.save_dir, args.from_weight, args.hidden_size, args.use_moe)
        if path == Path(args.from_weight):  # a path: the run may be resumed from another folder
            args.from_weight = str(path.resolve())
        content = load(path)
        model, tokenizer = build_model(content, path, args.dropout)
        del content["model"]
        origin = f"starting from the {content['stage']} weights {path}"
    if path:
        require_same_shape(args, model.config, path)
        require_same_tokenizer(args, tokenizer, path)
    print_summary(origin, model)
    return model.to(device), tokenizer


def new_model(args):
    """Return (a model with random weights, its tokenizer). Raises UserError for invalid shapes."""
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
    """Raise UserError if --tokenizer_path isn't the tokenizer of a weights file."""
    if args.tokenizer_path and load_tokenizer(args.tokenizer_path).to_str() != tokenizer.to_str():
        raise UserError(
            f"--tokenizer_path {args.tokenizer_path} isn't the tokenizer that {path} was trained "
            "with, so token ids wouldn't match. Omit the flag, or start from scratch"
        )


def open_data(dataset_class, args, tokenizer, default, **options):
    """Open the training and validation data. Returns (dataset, training samples, validation
    dataset, validation samples), samples as indices.

    default is the file used without --data_path; options are further arguments of dataset_class.
    Without --val_data_path, a part of the data is held out for validation.
    """
    sources = args.data_path or [Source(default)]
    options |= reading_options(args)
    with rank_zero_first():
        paths = [write_missing(source.path) for source in sources]
        dataset = val_dataset = dataset_class(paths, tokenizer, **options)
        train, val = split_samples(dataset, args.val_split, args.seed)
        if args.val_data_path:
            val_dataset = dataset_class(args.val_data_path, tokenizer, **options)
            train, val = range(len(dataset)), range(len(val_dataset))
    return dataset, mix(train, dataset, sources, args.seed), val_dataset, val


def conversation_options(args):
    """Return the arguments of SFTDataset that are flags of conversations."""
    names = ("overlong", "keep_think", "data_format")
    return {name: getattr(args, name) for name in names}


def replay(dataset, train, args, tokenizer):
    """Add pretraining text to a dataset of conversations, in proportion to the samples of train.
    Returns the indices of the new samples. Without it, the model forgets what it was pretrained on.
    """
    path = args.replay_path or (None if args.data_path else PRETRAIN)
    if not path or not args.replay_share:
        return []
    with rank_zero_first():
        text = PretrainDataset(write_missing(path), tokenizer, **reading_options(args))
    num_tokens = args.replay_share * int(dataset.lengths[train].sum())
    return dataset.add_replay(text, num_tokens, args.max_seq_len, args.seed)


def reading_options(args):
    """Return the arguments of a dataset for reading files."""
    return {
        "max_length": args.max_seq_len,
        "strict": args.strict_data,
        "cache_dir": args.cache_dir or args.save_dir / "cache",
    }


def print_data_summary(dataset, train, val, args):
    """Print statistics of the data, and which records can't be used."""
    tokens = int(dataset.lengths[train].sum())
    print(f"{len(train)} samples of {tokens / len(train):.0f} tokens to train on,", end=" ")
    print(f"{len(val)} to validate on")
    if dataset.num_too_long:
        print(f"{dataset.num_too_long} records are longer than --max_seq_len {args.max_seq_len}")
    if dataset.num_dropped:
        print(f"{dataset.num_dropped} records dropped: nothing supervised within --max_seq_len")
    for file in dataset.files:
        for note, count in file.report["notes"].items():
            print(f"{count} {note}")
        if file.report["bad"]:
            print(f"{file.report['bad']} bad records skipped (--strict_data 1 stops at them):")
            for number, reason in file.report["bad_lines"][:5]:
                print(f"  line {number}: {reason}")


@torch.no_grad()
def validation_loss(model, dataset, samples, args, runtime):
    """Return {"val_loss": mean loss per supervised token, in nats}; for several files also
    {"val_losses": {file: mean}}. Each process computes its share.
    """
    samples = np.asarray(samples)
    sums = {}  # file: (total loss, supervised tokens)
    file_of_sample = dataset.samples[samples, FILE]
    model.eval()
    for file in np.unique(file_of_sample).tolist():
        file_samples = samples[file_of_sample == file]
        plan = epoch_plan(dataset, file_samples, args, 0, runtime.rank, runtime.world_size)
        micro_batches = [micro_batch for step in plan for micro_batch in step]
        total, count = 0.0, 0
        for batch in batches(dataset, micro_batches, args, runtime.device):
            input_ids, labels, *inputs = to_device(batch, runtime.device)
            with runtime.autocast:
                total += model(input_ids, *inputs, labels=labels).item()
            count += count_supervised(labels)
        sums[file] = runtime.sum(total, count)
    model.train()
    loss_sum = sum(total for total, _ in sums.values())
    num_supervised = sum(count for _, count in sums.values())
    metrics = {"val_loss": loss_sum / max(1, num_supervised)}
    if len(sums) > 1:
        paths = [dataset.files[file].path for file in sums]
        have_unique_names = len({path.name for path in paths}) == len(paths)
        means = {}
        for path, (total, count) in zip(paths, sums.values(), strict=True):
            name = path.name if have_unique_names else str(path)
            means[name] = float(f"{total / max(1, count):.6g}")
        metrics["val_losses"] = means
        tqdm.write("validation of " + ", ".join(f"{name} {means[name]:.3f}" for name in means))
    return metrics


@contextmanager
def generating(model, runtime):
    """Context manager: allow generation during training. Compiled layers run in eager mode, because
    each new length would be compiled. FSDP gathers layers in the autocast dtype, so gathered
    weights are freed before and after.
    """
    with ExitStack() as stack:
        if any(layer._compiled_call_impl for layer in model.model.layers):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if is_sharded(model):
            model.reshard()
            stack.callback(model.reshard)
            stack.enter_context(runtime.autocast)
        yield


def show_sample(model, tokenizer, args, runtime, chat):
    """Print the model's continuation of --sample_prompt, or, with chat, its answer."""
    from model.generation import complete  # imported late: not needed without samples

    prompt = tokenizer.encode(args.sample_prompt).ids
    if chat:
        messages = [{"role": "user", "content": args.sample_prompt}]
        prompt, _ = render(messages, add_generation_prompt=True, tokenizer=tokenizer)
    with generating(model, runtime):
        (answer,) = complete(model, [prompt], max_new_tokens=60, temperature=0)
    text = tokenizer.decode(answer if chat else prompt + answer)
    tqdm.write(f"  {args.sample_prompt} -> {text}" if chat else f"  {text}")


def task_score(model, tokenizer, task, runtime):
    """Return the fraction of a task's problems that are solved, on all processes the same. Each
    answers its share; with FSDP each answers all, because all must generate the same number of
    tokens.
    """
    rank, world_size = runtime.rank, runtime.world_size
    if is_sharded(model):
        rank, world_size = 0, 1
    with generating(model, runtime):
        num_solved = task.count_solved(model, tokenizer, rank, world_size)
    if not is_sharded(model):
        (num_solved,) = runtime.sum(num_solved)
    return num_solved / len(task.problems)
