"""Which weights of a model are trained: all, those of adapters, or those of new tokens."""

import json

import torch

from common import UserError
from model.extend_vocab import extend_vocab, freeze_base
from model.lora import add_lora


def choose_trainable(model, tokenizer, args, saved=None):
    """Adds new tokens and adapters to a model, and freezes weights, as --extend_tokens, --use_lora
    and --freeze_base say. A saved checkpoint has its tokens and adapters already.

    Raises UserError where flags contradict each other.
    """
    if args.use_lora and (args.freeze_base or args.extend_tokens):
        raise UserError(
            "--use_lora 1 keeps all weights as they are, so it excludes --extend_tokens and "
            "--freeze_base 1; add the tokens in a run of their own first"
        )
    if args.freeze_base and args.parallel == "fsdp":
        raise UserError("--freeze_base 1 needs whole matrices; use --parallel ddp")
    if args.extend_tokens and not saved:
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
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if args.freeze_base:
        rows = {weight[weight.first_row :] for weight in model.parameters() if weight.requires_grad}
        trained = sum(weight.numel() for weight in rows)
    total = sum(weight.numel() for weight in model.parameters())
    if trained < total:
        print(f"{trained:,} of {total:,} parameters are trained ({trained / total:.1%})")


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
