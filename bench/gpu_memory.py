"""How much memory each GPU needs for the shipped configs, with ddp and with fsdp.

    python bench/gpu_memory.py --processes 1 2 4 8

State is counted: weights, gradients and AdamW's two moments in fp32, 4 bytes each; so are the
logits of the loss. What a forward pass keeps for the backward one is measured, for one and two
layers and a few tokens on this machine, and multiplied; a GPU's attention keeps less, so it is an
upper bound.
"""

import argparse
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import ROOT
from model.causal_lm import CausalLM, ModelConfig
from model.loss import CHUNK
from model.weights import SHAPE

GIB = 2**30
TOKENS = 256  # of a row of the measured pass


def kept(config, rows):
    """Bytes that autograd keeps after a bf16 forward pass and the loss of rows of TOKENS tokens,
    weights aside.
    """
    model, seen = CausalLM(config), {}
    for weight in model.parameters():
        seen[weight.untyped_storage().data_ptr()] = 0

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    input_ids = torch.randint(config.vocab_size, (rows, TOKENS))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = model(input_ids, labels=input_ids)
    casts = 2 * sum(weight.numel() for name, weight in model.named_parameters() if weight.dim() > 1)
    del loss
    return sum(seen.values()) - casts  # autocast's bf16 copies of the matrices


def measure(values, vocab_size):
    """(parameters, those of one layer, bytes that a micro-batch takes beside the state)."""
    shape = {name: int(values[name]) for name in SHAPE if name in values}

    def of(layers):
        return ModelConfig(vocab_size, **(shape | {"num_hidden_layers": layers}))

    with torch.device("meta"):
        count = [sum(w.numel() for w in CausalLM(of(layers)).parameters()) for layers in (0, 1)]
    layers = shape["num_hidden_layers"]
    layer = count[1] - count[0]
    # Per token, as a row more shows; the gradient of the output layer is there in any case.
    one, deeper, wider = kept(of(1), 1), kept(of(2), 1), kept(of(1), 2)
    per_layer, per_token = (deeper - one) / TOKENS, (wider - one) / TOKENS
    rest = per_token - per_layer
    tokens = int(values["batch_size"]) * int(values["max_seq_len"])
    # The logits of a chunk in bf16 and fp32, and their gradients in bf16.
    loss = 4 * vocab_size * shape["hidden_size"] + 8 * vocab_size * min(tokens, 8 * CHUNK)
    return count[0] + layers * layer, layer, tokens * (layers * per_layer + rest) + loss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--vocab_size", type=int, default=32000)
    args = parser.parse_args()
    print(f"GiB per GPU, bf16, vocabulary {args.vocab_size}")
    print(f"{'config':10}{'parameters':>11}{'rows':>14}{'kept':>7}  {'mode':6}", end="")
    print("".join(f"{f'{n} GPU' + 's' * (n > 1):>9}" for n in args.processes))
    configs = {}
    for path in ROOT.glob("trainer/configs/*.toml"):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        configs[path.stem] = content.get("model", {}) | content.get("training", {})
    configs = {
        stem: values
        for stem, values in configs.items()
        if "hidden_size" in values and "cpu" not in stem
    }
    for stem, values in sorted(configs.items(), key=lambda item: int(item[1]["hidden_size"])):
        total, layer, activations = measure(values, args.vocab_size)
        rows, length = int(values["batch_size"]), int(values["max_seq_len"])
        for mode in ("ddp", "fsdp"):
            if mode == "ddp":
                head = f"{stem:10}{total / 1e6:9.0f} M{f'{rows} x {length}':>14}"
                print(f"{head}{activations / GIB:7.1f}", end="")
            else:
                print(" " * 42, end="")
            print(f"  {mode:6}", end="")
            for processes in args.processes:
                # AdamW's moments, weights, gradients: 16 bytes; the bf16 copy that computes: 2.
                state = 18 * total
                if mode == "fsdp":
                    # Gathered: embeddings and output layer in fp32, two layers in bf16; gradients
                    # that wait for the last micro-batch of a step are whole, in fp32.
                    outside = total - int(values["num_hidden_layers"]) * layer
                    waiting = 4 * total if int(values.get("accumulation_steps", 1)) > 1 else 0
                    state = 16 * total / processes + 4 * outside + 4 * layer + waiting
                print(f"{(state + activations) / GIB:9.1f}", end="")
            print()


if __name__ == "__main__":
    main()
