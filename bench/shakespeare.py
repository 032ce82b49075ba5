"""Tiny Shakespeare against the clock: how well is the last tenth predicted after N seconds?

    python bench/shakespeare.py --text tinyshakespeare.txt --seconds 100
    python bench/shakespeare.py --text tinyshakespeare.txt --seconds 100 --recipe nanogpt

The first 90 % of the characters train, the last 10 % validate, as in nanoGPT. Everything but the
import of torch is within the time, training the tokenizer and compiling too. Ends with a line of
JSON: {"seconds", "nats_per_char", "tokens"}; the nats of all validation tokens, each predicted with
real context, divided by the characters. The shape and the optimizer's flags are those of
trainer/configs/shakespeare_cpu.toml. The recipe nanogpt is the one for processors of nanoGPT's
README, with transformers' GPT-2, by the same clock.
"""

import argparse
import json
import math
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import ROOT
from model.causal_lm import CausalLM, ModelConfig
from model.device import keep_freed_memory
from trainer.optimizer import compile_layers, make_optimizer
from trainer.train_tokenizer import train as train_tokenizer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    config = tomllib.loads((ROOT / "trainer/configs/shakespeare_cpu.toml").read_text("utf-8"))
    add = parser.add_argument
    add("--text", type=Path, required=True)
    add("--seconds", type=float, default=100)
    add("--recipe", choices=["seedling", "nanogpt"], default="seedling")
    add("--vocab_size", type=int, default=1024)
    for name, value in (config["model"] | config["training"]).items():
        add(f"--{name}", type=type(value), default=value)
    add("--dropout", type=float, default=0.0)
    add("--weight_decay", type=float, default=0.1)
    add("--use_compile", type=int, choices=[0, 1], default=0)
    add("--seed", type=int, default=1)
    if parser.parse_known_args()[0].seconds >= 200:
        # Time for one layer more, and for so many rounds that the text is learned by heart without.
        layers = config["model"]["num_hidden_layers"] + 1
        parser.set_defaults(dropout=0.2, num_hidden_layers=layers)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(args.seed)
    if args.recipe == "nanogpt":
        import transformers  # noqa: F401, its import is not in the time, as torch's is not
    began = time.perf_counter()

    text = args.text.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    make = nanogpt if args.recipe == "nanogpt" else seedling
    model, loss_of, optimizer, train, held_out = make(args, text[:cut], text[cut:])
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{weights / 1e6:.1f} M parameters, {len(train)} tokens to train on", file=sys.stderr)

    B, T = args.batch_size, args.max_seq_len
    tokens, steps, generator = 0, 0, torch.Generator().manual_seed(args.seed)
    while (done := (time.perf_counter() - began) / args.seconds) < 1:
        if args.recipe == "nanogpt":  # a cosine down to a tenth
            shape = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        else:  # level, then a straight line to 0
            shape = min(1.0, 1.2 * (1 - done))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((steps + 1) / args.warmup_steps, shape)
        starts = torch.randint(len(train) - T, (B,), generator=generator)
        ids = torch.stack([train[start : start + T] for start in starts])
        (loss_of(ids, ids) / (B * (T - 1))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, tokens = steps + 1, tokens + B * T
    seconds = time.perf_counter() - began

    model.eval()
    nats = total_nats(loss_of, train[-T // 2 :], held_out, T)
    result = {"seconds": round(seconds, 1), "nats_per_char": round(nats / (len(text) - cut), 4)}
    print(json.dumps(result | {"tokens": tokens}))


def seedling(args, text, held_out):
    tokenizer = train_tokenizer([text], args.vocab_size)
    shape = (tokenizer.get_vocab_size(), args.hidden_size, args.num_hidden_layers)
    model = CausalLM(ModelConfig(*shape, dropout=args.dropout))
    optimizer = make_optimizer(model, SimpleNamespace(parallel="ddp", **vars(args)))
    if args.use_compile:
        compile_layers(model)

    def loss_of(ids, labels):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, labels=labels)

    return (
        model,
        loss_of,
        optimizer,
        *(torch.tensor(tokenizer.encode(t).ids) for t in (text, held_out)),
    )


def nanogpt(args, text, held_out):
    """Sets its hyperparameters in args: characters, 4 layers, 128 wide, 12 rows of 64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    args.max_seq_len, args.batch_size, args.learning_rate, args.warmup_steps = 64, 12, 1e-3, 100
    characters = {c: i for i, c in enumerate(sorted(set(text + held_out)))}
    shape = dict(vocab_size=len(characters), n_positions=64, n_embd=128, n_layer=4, n_head=4)
    none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(GPT2Config(**shape, **none))
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))

    def loss_of(ids, labels):
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")

    return (
        model,
        loss_of,
        optimizer,
        *(torch.tensor([characters[c] for c in t]) for t in (text, held_out)),
    )


@torch.no_grad()
def total_nats(loss_of, before, held_out, T):
    """The nats of all held-out tokens; each is predicted from at least T / 2 tokens before it."""
    ids, half, total = torch.cat([before, held_out]), T // 2, 0.0
    for start in range(0, len(held_out), half):
        window = ids[start : start + T]
        labels = window.clone()
        labels[:half] = -100
        total += loss_of(window[None], labels[None]).item()
    assert math.isfinite(total)
    return total


if __name__ == "__main__":
    main()
