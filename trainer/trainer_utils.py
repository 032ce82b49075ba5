"""What the train scripts and the chat share: a model to begin with, data, what is trained, and the
validation loss. Each is called; none calls back.
"""

import json
import math
import re

import numpy as np
import torch
from tqdm import tqdm

from common import UserError
from dataset.lm_dataset import PretrainDataset
from dataset.loader import Source, batches, epoch_plan, mix, split_samples
from dataset.tiny_world.generate import PRETRAIN, write_missing
from dataset.tokenizer import SHIPPED_TOKENIZER, load_tokenizer
from model.causal_lm import CausalLM, ModelConfig
from model.extend_vocab import extend_vocab, freeze_base
from model.lora import add_lora
from model.loss import supervised_tokens
from trainer import checkpoint
from trainer.arguments import SHAPE
from trainer.distributed import first_process_first, is_first, pick_device, pick_dtype
from trainer.optimizer import require_compiler


def init_model(args, device="cpu", saved=None):
    """The model to begin with: returns (model on device, tokenizer, the rest of its file or None).

    Three cases, each printed:
      saved                    the checkpoint of this run, as `checkpoint.load_latest` returns it
      args.from_weight NAME    the weights of another stage, out/NAME_*.pth or a path
      neither, or "none"       from scratch: random weights, drawn with args.seed

    Shape flags that the user gave must agree with the file; those left out come from it.
    Raises UserError, with the remedy, if there is no such file or if it does not fit.
    """
    name, dropout = checkpoint.weights_to_start_from(args), getattr(args, "dropout", 0.0)
    if saved:
        content, path = saved, saved["path"]
        origin = f"resuming {path} at step {content['run']['step']}"
    elif name in (None, "none"):
        content, origin = None, "starting from scratch"
        model, tokenizer = new_model(args)
        expected = math.log(model.config.vocab_size) + 0.5
        print(f"the first loss of a new model is near ln V + 1/2 = {expected:.2f}")
    else:
        path = checkpoint.find(
            args.save_dir, name, args.hidden_size, getattr(args, "use_moe", None)
        )
        content = checkpoint.load(path) | {"path": path}
        origin = f"starting from the {content['stage']} weights {path}"
    if content:
        model, tokenizer = checkpoint.build_model(content, path, dropout)
        require_same_shape(args, model.config, tokenizer, path)
        del content["model"]  # not kept in memory
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{origin}: {parameters / 1e6:.2f} M parameters, vocabulary {model.config.vocab_size}")
    return model.to(device), tokenizer, content


def open_trained(args):
    """(model, tokenizer, the rest of its file, the paths of its files): the weights of --weight
    with the adapters of --lora, on --device and in --dtype. Raises UserError if there are none.
    """
    device = pick_device(args.device)
    if args.use_compile:
        require_compiler(device)
    if args.from_weight == "none":
        raise UserError("--weight none: only trained weights can answer; give a name or a path")
    model, tokenizer, content = init_model(args, device)
    paths = [content["path"]]
    if args.lora:
        paths.append(checkpoint.merge_adapters(model, args))
    return model.to(pick_dtype(args.dtype, device)), tokenizer, content, paths


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


def require_same_shape(args, config, tokenizer, path):
    """Raises UserError where flags differ from the weights of a file."""
    differ = []
    for name in SHAPE:
        value = getattr(args, name, None)
        if value not in (None, getattr(config, name)):
            differ.append(f"--{name} {value}, but {path} has {getattr(config, name)}")
    longest, limit = getattr(args, "max_seq_len", 0), config.max_position_embeddings
    if longest > limit:
        differ.append(f"--max_seq_len {longest}, but {path} has a context of {limit}")
    if differ:
        raise UserError(f"{'; '.join(differ)}. Leave the flag out, or train such weights first")
    given = getattr(args, "tokenizer_path", None)
    if given and load_tokenizer(given).to_str() != tokenizer.to_str():
        raise UserError(
            f"--tokenizer_path {given} is not the tokenizer that {path} was trained with; its "
            "vocabulary would not fit. Leave the flag out, or start from scratch"
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
    return {name: getattr(args, name) for name in ("overlong", "keep_think", "data_format")}


def replay(dataset, train, args, tokenizer):
    """Adds pretraining text to a dataset of conversations, whose training samples are train;
    returns the numbers of the new samples. Conversations alone make a model forget the rest.
    """
    path = args.replay_path or (None if args.data_path else PRETRAIN)
    if not path or not args.replay_share:
        return []
    with first_process_first():
        documents = PretrainDataset(write_missing(path), tokenizer, **reading(args))
    copies = len(train) / len(set(train))
    return dataset.mix_in(documents, args.replay_share * copies, args.seed)


def reading(args):
    """The flags that say how a dataset reads its files, as its arguments."""
    return {
        "max_length": args.max_seq_len,
        "strict": args.strict_data,
        "cache_dir": args.cache_dir or args.save_dir / "cache",
        "verify": is_first(),  # it opens the data before the others
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


def seed_step(args, step, rank):
    """Makes the random numbers of a step (dropout) a function of its number: a resumed run draws
    what an uninterrupted one would have drawn.
    """
    torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))


@torch.no_grad()
def validation_loss(model, dataset, samples, args, compute):
    """{"val_loss": mean loss per supervised token of the samples, in nats}; where they come from
    several files also {"val_losses": {file: its mean}}. Each process computes its share.
    """
    samples, sums = np.asarray(samples), {}
    file_of = dataset.samples[samples, 0]
    model.eval()
    for file in np.unique(file_of).tolist():
        own = samples[file_of == file]
        plan = epoch_plan(dataset, own, args, 0, compute.rank, compute.world_size)
        micro_batches = [micro_batch for step in plan for micro_batch in step]
        total, count = 0.0, 0
        for batch in batches(dataset, micro_batches, args):
            input_ids, labels, *where = (part.to(compute.device) for part in batch)
            with compute.autocast:
                total += model(input_ids, *where, labels=labels).item()
            count += supervised_tokens(labels)
        sums[file] = compute.sum(total, count)
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


def choose_trainable(model, tokenizer, args, saved=None):
    """Adds new tokens and adapters to a model, and freezes weights, as --extend_tokens, --use_lora,
    --freeze_base and --freeze say. A saved checkpoint has its tokens and adapters already.

    Raises UserError where nothing is left to train, or where flags contradict each other.
    """
    if args.use_lora and (args.freeze_base or args.extend_tokens):
        raise UserError(
            "--use_lora 1 keeps all weights as they are, so it excludes --extend_tokens and "
            "--freeze_base 1; add the tokens in a run of their own first"
        )
    if args.freeze_base and args.parallel == "fsdp":
        raise UserError("--freeze_base 1 needs whole matrices; use --parallel ddp")
    if args.extend_tokens and saved:
        require_known(args.extend_tokens, tokenizer)
    elif args.extend_tokens:
        added = extend_vocab(model, tokenizer, read_tokens(args.extend_tokens))
        print(f"{added} new tokens; the vocabulary has {model.config.vocab_size} entries")
    try:
        if args.use_lora and not saved:
            torch.manual_seed(args.seed)
            add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target)
        if args.freeze_base:
            freeze_base(model)
    except ValueError as error:
        flag = (
            "--lora_target" if args.use_lora else "--freeze_base 1: add some with --extend_tokens;"
        )
        raise UserError(f"{flag} {error}") from None
    if args.freeze:
        freeze(model, args.freeze)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if args.freeze_base:
        rows = {weight[weight.first_row :] for weight in model.parameters() if weight.requires_grad}
        trained = sum(weight.numel() for weight in rows)
    total = sum(weight.numel() for weight in model.parameters())
    if not trained:
        raise UserError("nothing is left to train; give --freeze fewer names")
    if trained < total:
        print(f"{trained:,} of {total:,} parameters are trained ({trained / total:.1%})")


def freeze(model, pattern):
    """Excludes the weights whose names a regular expression finds from training."""
    try:
        found = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--freeze {pattern} is no regular expression: {error}") from None
    if not found:
        raise UserError(f"--freeze {pattern}: no weight has such a name")
    for name in found:
        model.get_parameter(name).requires_grad_(False)


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
