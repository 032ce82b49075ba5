"""Entry point for `eval_llm.py --serve` and `--export`."""

import torch

from common import UserError
from model.causal_lm import CausalLM
from model.weights import open_model
from serving.page import export
from serving.server import Server
from serving.views import Served


def start(args, settings):
    """Run the server, or export the page; settings are the sampling parameters."""
    models, logs = open_models(args), args.save_dir / "logs"
    if args.export is None:
        names = [name.strip().partition(":")[0] for name in args.allowed_hosts.split(",")]
        Server(models, args.host, args.serve, args.max_batch, settings, logs, names).run()
        return
    export(models, args.export, args.prompt, settings, logs)


def open_models(args):
    """Open the comma-separated weights of --weight as {name: Served}; "none" means random weights
    with the first one's shape. Raises UserError for duplicates, and if their tokenizers differ.
    """
    names, models = args.from_weight.split(",") if args.from_weight else [None], {}
    if "" in names or len({*names}) < len(names):
        raise UserError(f"--weight {args.from_weight}: give different names, or one")
    if args.lora and len(names) > 1:
        raise UserError("--lora: give it with one --weight, or omit it")
    for name in names:
        if name == "none" and models:
            first = next(iter(models.values()))
            torch.manual_seed(1)
            model, weight = CausalLM(first.model.config), first.model.lm_head.weight
            tokenizer, chats, length = first.tokenizer, first.chats, first.trained_length
            model = model.to(weight.device, weight.dtype)
        else:
            trained = open_model(args, name)
            model, tokenizer = trained.model, trained.tokenizer
            chats, length = trained.chats, trained.trained_length
            path = trained.paths[-1]
            name = path.stem if path.stem not in models else str(path)
        models[name] = Served(name, model.eval(), tokenizer, chats, length)
    if len({served.tokenizer.to_str() for served in models.values()}) > 1:
        raise UserError(f"--weight {','.join(names)}: they have different tokenizers; give one")
    return models
