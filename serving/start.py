"""Entry point for `eval_llm.py --serve` and `--export`."""

import dataclasses

import torch

from common import UserError
from model.causal_lm import CausalLM
from model.weights import open_model
from serving.page import export
from serving.server import Server


def start(args, settings):
    """Run the server, or export the page; settings are the sampling parameters."""
    models = open_models(args)
    logs = args.save_dir / "logs"
    if args.export is not None:
        export(models, args.export, args.prompt, settings, logs)
        return
    # A port isn't part of the name.
    names = [name.strip().partition(":")[0] for name in args.allowed_hosts.split(",")]
    names = [name for name in names if name]
    Server(models, args.host, args.serve, args.max_batch, settings, logs, names).run()


def open_models(args):
    """Open the comma-separated weights of --weight as {name: OpenModel}; "none" means random
    weights with the first one's shape. Raises UserError for duplicates, and if their tokenizers
    differ.
    """
    names = args.from_weight.split(",") if args.from_weight else [None]
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"--weight {args.from_weight}: give different names, or one")
    if args.lora and len(names) > 1:
        raise UserError("--lora: give it with one --weight, or omit it")
    models = {}
    for name in names:
        if name == "none" and models:
            opened = with_random_weights(next(iter(models.values())))
        else:
            opened = open_model(args, name)
            path = opened.paths[-1]
            opened.name = path.stem if path.stem not in models else str(path)
        opened.model.eval()
        models[opened.name] = opened
    if len({opened.tokenizer.to_str() for opened in models.values()}) > 1:
        raise UserError(f"--weight {','.join(names)}: they have different tokenizers; give one")
    return models


def with_random_weights(opened):
    """Return a copy of an OpenModel with random weights, named none."""
    torch.manual_seed(1)
    weight = opened.model.lm_head.weight
    model = CausalLM(opened.model.config).to(weight.device, weight.dtype)
    return dataclasses.replace(opened, name="none", model=model)
