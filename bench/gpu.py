"""What one NVIDIA GPU reaches: training beside transformers, where the time of a step goes, packed
rows, memory and decoding. About ten minutes.

    python bench/gpu.py                    # transformers' rows need: pip install transformers
    python bench/gpu.py --models 26m       # of trainer/configs/

Sides of a row run in turn; the medians of five count. The peak is that of a bf16 matrix product of
8,192, measured first. Leaves out/bench_gpu.json.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from bench.gpu_memory import GIB, measure
from bench.speed import transformers_twin
from common import ROOT, atomic_write
from model import attention
from model.causal_lm import CausalLM, ModelConfig
from model.generation import complete
from model.weights import SHAPE
from trainer.optimizer import compile_layers

VOCABULARY = 32_000
GPU = torch.device("cuda", 0)
FIGURES = {}


def timed(actions, rounds=5):
    """{name: median seconds} of actions, called in turn, after two calls each that do not count."""
    seconds = {name: [] for name in actions}
    for number in range(rounds + 2):
        for name, action in actions.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            action()
            torch.cuda.synchronize()
            if number > 1:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def note(name, value, unit, more=""):
    FIGURES[name] = {"value": value, "unit": unit, "more": more}
    print(f"{name:58}{value:12,.4g} {unit:10}{more}", flush=True)


def peak_rate():
    """FLOP/s of a bf16 matrix product."""
    a, b = torch.randn(2, 8192, 8192, device=GPU, dtype=torch.bfloat16)
    return 2 * 8192**3 / timed({"product": lambda: a @ b})["product"]


def values_of(stem):
    content = tomllib.loads((ROOT / f"trainer/configs/{stem}.toml").read_text(encoding="utf-8"))
    return content["model"] | content["training"]


def model_of(values, **more):
    torch.manual_seed(0)
    shape = {name: int(values[name]) for name in SHAPE if name in values}
    with GPU:
        return CausalLM(ModelConfig(VOCABULARY, **(shape | more)))


def stepper(model, loss_of, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def own(model, input_ids, labels, position_ids, document_ids):
    return model(input_ids, position_ids, document_ids, labels=labels) / labels.numel()


def theirs(model, input_ids, *_):
    return model(input_ids, labels=input_ids, use_cache=False).loss


def full_rows(B, T, documents=1):
    """A batch of rows without padding, each of as many documents of one length."""
    ids = torch.randint(9, VOCABULARY, (B, T))
    length = T // documents
    positions, numbers = torch.arange(T) % length, torch.arange(T) // length
    where = [part.expand(B, T).contiguous().to(GPU) for part in (positions, numbers)]
    return ids.to(GPU), ids, *where


def training(stem, peak):
    values = values_of(stem)
    B, T = int(values["batch_size"]), int(values["max_seq_len"])
    batch, sides = full_rows(B, T), {}
    models = {"eager": model_of(values), "compiled": model_of(values)}
    compile_layers(models["compiled"])
    for name, model in models.items():
        sides[name] = stepper(model, own, batch)
        began = time.perf_counter()
        sides[name]()
        torch.cuda.synchronize()
        note(f"{stem}, {name}: first step", time.perf_counter() - began, "s")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    sides["eager"]()
    most = (torch.cuda.max_memory_allocated() - held) / GIB
    total, _, activations = measure(values, VOCABULARY)
    # Weights and moments are there before; gradients and bf16 copies of the weights are not.
    predicted = (6 * total + activations) / GIB
    note(f"{stem}: memory that a step takes", most, "GiB", f"predicted {predicted:.1f}, at most")
    try:
        twin = transformers_twin(models["eager"]).to(GPU)
        sides["transformers"] = stepper(twin, theirs, batch)
    except ImportError:
        print("(transformers is not installed: its side is left out)")
    seconds = timed(sides)
    config = models["eager"].config
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    flops = (6 * total + 6 * heads * T) * B * T
    for name, each in seconds.items():
        share = f"{flops / each / peak:.0%} of the peak"
        if "transformers" in seconds:
            share += f", {seconds['transformers'] / each:.2f} x transformers"
        note(f"{stem}, {B} x {T}, {name}", B * T / each, "tokens/s", share)
    parts_of(stem, models["eager"], batch)


def parts_of(stem, model, batch):
    """Prints the share of each kind of kernel in a step."""
    step = stepper(model, own, batch)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kinds = {"attention": ("flex", "fmha", "flash"), "optimizer": ("adam", "multi_tensor")}
    kinds["matrix products"] = ("gemm", "cutlass", "xmma", "nvjet")  # flash kernels name cutlass
    spent = dict.fromkeys([*kinds, "the rest"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in kinds.items() if any(w in name for w in words)), None)
        spent[kind or "the rest"] += event.self_device_time_total
    total = sum(spent.values()) or 1
    print("  of a step: " + ", ".join(f"{kind} {part / total:.0%}" for kind, part in spent.items()))


def packed_rows():
    """Rows of 2,048 tokens, of one document and of 16, forward and backward."""
    B, H, T, d = 16, 12, 2048, 64
    q, k, v = torch.randn(3, B, H, T, d, device=GPU, dtype=torch.bfloat16).requires_grad_()
    out_grad = torch.randn(B, H, T, d, device=GPU, dtype=torch.bfloat16)

    def both(mask):
        if mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = attention.attend(q, k, v, mask)
        torch.autograd.grad(out, (q, k, v), out_grad)

    for documents in (1, 16):
        ids = full_rows(B, T, documents)[3]
        masks = {"dense causal": None, "masked kernel": attention.causal_mask(0, T, ids, GPU)}
        if attention.flex_available(GPU, d):
            masks["FlexAttention"] = attention.document_block_mask(ids)
        seconds = timed({name: lambda mask=mask: both(mask) for name, mask in masks.items()})
        for name, each in seconds.items():
            more = f"{seconds['dense causal'] / each:.2f} x dense causal"
            note(f"attention, {documents} documents a row, {name}", each * 1e3, "ms", more)


def decoding(stem, new=128):
    model = model_of(values_of(stem)).to(torch.bfloat16).eval()
    for batch in (1, 16, 64):
        prompts = torch.randint(9, VOCABULARY, (batch, 32)).tolist()
        options = {"max_new_tokens": new, "temperature": 0, "stop_ids": ()}
        answer = partial(complete, model, prompts, **options)
        ways = {"eager": answer, "compiled": partial(answer, use_compile=True)}
        for way, seconds in timed(ways, rounds=3).items():
            note(f"{stem}, decoding {batch} rows, {way}", batch * new / seconds, "tokens/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["26m", "104m"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no NVIDIA GPU here")
    print(f"{torch.cuda.get_device_name(GPU)}, torch {torch.__version__}, {time.strftime('%F')}")
    peak = peak_rate()
    note("peak, bf16 matrix product", peak / 1e12, "TFLOP/s")
    parts = [partial(training, stem, peak) for stem in args.models] + [packed_rows]
    for part in [*parts, *(partial(decoding, stem) for stem in args.models)]:
        try:
            part()
        except torch.cuda.OutOfMemoryError as error:
            print(f"left out: {str(error).splitlines()[0]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        with atomic_write(ROOT / "out" / "bench_gpu.json") as file:
            file.write(json.dumps(FIGURES, indent=1).encode("utf-8"))


if __name__ == "__main__":
    main()
