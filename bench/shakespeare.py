"""Tiny Shakespeare against the clock: how well is the last tenth predicted after N seconds?

    python bench/shakespeare.py --text tinyshakespeare.txt --seconds 100

The first 90 % of the characters train, the last 10 % validate, as in nanoGPT. The tokenizer is
trained on the first part, within the time, and so is everything else but the import of torch. Ends
with a line of JSON: {"seconds", "nats_per_char", "tokens"}; the nats of all validation tokens, each
predicted with real context, divided by the characters.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.causal_lm import CausalLM, ModelConfig
from trainer.optimizer import make_optimizer
from trainer.train_tokenizer import train as train_tokenizer
from trainer.trainer_utils import keep_freed_memory


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, required=True)
    add("--seconds", type=float, default=100)
    add("--vocab_size", type=int, default=1024)
    add("--hidden_size", type=int, default=256)
    add("--num_hidden_layers", type=int, default=6)
    add("--max_seq_len", type=int, default=256)
    add("--batch_size", type=int, default=8)
    add("--learning_rate", type=float, default=1.2e-2)
    add("--optimizer", default="muon")
    add("--dropout", type=float, default=0.0)
    add("--weight_decay", type=float, default=0.1)
    add("--seed", type=int, default=1)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(args.seed)
    began = time.perf_counter()

    text = args.text.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    tokenizer = train_tokenizer([text[:cut]], args.vocab_size)
    train = torch.tensor(tokenizer.encode(text[:cut]).ids)
    held_out = torch.tensor(tokenizer.encode(text[cut:]).ids)
    config = ModelConfig(
        tokenizer.get_vocab_size(), args.hidden_size, args.num_hidden_layers, dropout=args.dropout
    )
    model = CausalLM(config)
    optimizer = make_optimizer(model, SimpleNamespace(parallel="ddp", **vars(args)))
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{weights / 1e6:.1f} M parameters, {len(train)} tokens to train on", file=sys.stderr)

    T, tokens, steps, generator = args.max_seq_len, 0, 0, torch.Generator().manual_seed(args.seed)
    while (done := (time.perf_counter() - began) / args.seconds) < 1:
        # A short rise, then a straight line to 0 at the end of the time.
        rate = args.learning_rate * min(1.0, (steps + 1) / 20, 1.2 * (1 - done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - T, (args.batch_size,), generator=generator)
        ids = torch.stack([train[start : start + T] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids) / (args.batch_size * (T - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, tokens = steps + 1, tokens + args.batch_size * T
        if steps % 50 == 0:
            print(f"step {steps}: {loss.item():.3f} nats per token", file=sys.stderr)
    seconds = time.perf_counter() - began

    nats = total_nats(model, train[-T // 2 :], held_out, T)
    result = {"seconds": round(seconds, 1), "nats_per_char": round(nats / (len(text) - cut), 4)}
    print(json.dumps(result | {"tokens": tokens}))


@torch.no_grad()
def total_nats(model, before, held_out, T):
    """The nats of all held-out tokens; each is predicted from at least T / 2 tokens before it."""
    model.eval()
    ids, half, total = torch.cat([before, held_out]), T // 2, 0.0
    for start in range(0, len(held_out), half):
        window = ids[start : start + T]
        labels = window.clone()
        labels[:half] = -100
        with torch.autocast("cpu", torch.bfloat16):
            total += model(window[None], labels=labels[None]).item()
    assert math.isfinite(total)
    return total


if __name__ == "__main__":
    main()
