"""Which weights of a model are trained: all, those of adapters, of new tokens, or not of a name."""

import json
import re

import torch

from common import UserError
from model.extend_vocab import extend_vocab, freeze_base
from model.lora import add_lora


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
        text = path.read_text(encoding="utf-8-sig")
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
