"""What of loaded weights learns: new tokens, adapters, all but some."""

import re
from dataclasses import asdict

import torch

from dataset.errors import UserError
from model.extend_vocab import extend_vocab, freeze_base, read_tokens
from model.lora import add_lora


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
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target)
    if args.freeze_base:
        if args.parallel == "fsdp":
            raise UserError("--freeze_base 1 needs whole matrices; use --parallel ddp")
        freeze_base(model)
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


def description(model):
    """What a file says of a model beyond its config: adapters, first new token, projections."""
    found = {"first_new_token": getattr(model, "first_new_token", None)}
    found["lora"] = asdict(model.lora) if getattr(model, "lora", None) else None
    if projections := getattr(model, "projections", None):
        found["projections"] = [projections[0].out_features, len(projections)]
    return {name: value for name, value in found.items() if value is not None}
