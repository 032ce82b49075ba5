"""Select trainable parameters: all, LoRA adapters, or new embeddings."""

import json

import torch

from common import UserError
from model.extend_vocab import extend_vocab, freeze_base
from model.lora import add_lora


def choose_trainable(model, tokenizer, args, saved=None):
    """Add new tokens and adapters to a model and freeze weights, according to --extend_tokens,
    --use_lora and --freeze_base. A saved checkpoint already has its tokens and adapters.

    Raises UserError if flags contradict each other.
    """
    if args.use_lora and (args.freeze_base or args.extend_tokens):
        raise UserError(
            "--use_lora 1 freezes all weights, so it can't be combined with --extend_tokens or "
            "--freeze_base 1; add the tokens in a separate run first"
        )
    if args.freeze_base and args.parallel == "fsdp":
        raise UserError("--freeze_base 1 needs unsharded weights; use --parallel ddp")
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
        if args.use_lora:
            raise UserError(f"--lora_target {error}") from None
        raise UserError(f"--freeze_base 1: {error}; add some with --extend_tokens") from None
    num_trained = 0
    for weight in model.parameters():
        if weight.requires_grad:
            first_row = getattr(weight, "first_row", 0)  # of new tokens: see `freeze_base`
            num_trained += weight[first_row:].numel()
    num_total = sum(weight.numel() for weight in model.parameters())
    if num_trained < num_total:
        share = num_trained / num_total
        print(f"{num_trained:,} of {num_total:,} parameters are trained ({share:.1%})")


def read_tokens(path):
    """Read new tokens as {token: description or ""}, sorted, from JSON {item: tokens} or
    {token: description}, or from a file with one token per line.

    Raises UserError for other files.
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
            f"--extend_tokens {path}: {error}; give JSON of item to tokens or of token to "
            "description, or one token per line"
        ) from None
    if not tokens:
        raise UserError(f"--extend_tokens {path}: it has no token")
    return tokens
