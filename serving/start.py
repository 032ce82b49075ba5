"""What `eval_llm.py --serve` and `--export` do: they open the weights, then answer requests, or
write a page that needs no server.
"""

import torch

from common import UserError
from model.causal_lm import CausalLM
from model.weights import open_model
from serving.page import export
from serving.server import Server
from serving.views import Served


def start(args, settings):
    """Does what the flags of eval_llm.py say; settings are those of the sampling."""
    models, logs = opened(args), args.save_dir / "logs"
    if args.export is None:
        names = [name.strip().partition(":")[0] for name in args.allowed_hosts.split(",")]
        Server(models, args.host, args.serve, args.max_batch, settings, logs, names).run()
        return
    export(models, args.export, args.prompt, settings, logs)


def opened(args):
    """{name: Served} of the weights that --weight names, with commas between them; "none" are
    random weights of the first one's shape. Raises UserError if two are the same, or if they have
    different tokenizers.
    """
    names, found = args.from_weight.split(",") if args.from_weight else [None], {}
    if "" in names or len({*names}) < len(names):
        raise UserError(f"--weight {args.from_weight}: give different names, or one")
    if args.lora and len(names) > 1:
        raise UserError("--lora: give it with one --weight, or leave it out")
    for name in names:
        if name == "none" and found:
            first = next(iter(found.values()))
            torch.manual_seed(1)
            model, weight = CausalLM(first.model.config), first.model.lm_head.weight
            tokenizer, chats, length = first.tokenizer, first.chats, first.trained_length
            model = model.to(weight.device, weight.dtype)
        else:
            trained = open_model(args, name)
            model, tokenizer = trained.model, trained.tokenizer
            chats, length = trained.chats, trained.trained_length
            path = trained.paths[-1]
            name = path.stem if path.stem not in found else str(path)
        found[name] = Served(name, model.eval(), tokenizer, chats, length)
    if len({served.tokenizer.to_str() for served in found.values()}) > 1:
        raise UserError(f"--weight {','.join(names)}: they have different tokenizers; give one")
    return found
