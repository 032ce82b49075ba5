"""Training, generation and start, side by side with what people use instead.

    python bench/speed.py                         # needs transformers; a few minutes
    python bench/speed.py --data GSM8K.jsonl      # SFT against trl too, see requirements-dev.txt
    python bench/speed.py --text shakespeare.txt  # what 20 and 100 seconds of training reach

Both sides of each row run in turn on this machine, several times; the medians count. Leaves
out/bench.json: a list of {"name", "ours", "other", "other_name", "ratio", "unit",
"fraction_of_peak"}. A row that cannot be measured says why, and has no number.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from common import ROOT, atomic_write
from model.causal_lm import CausalLM, ModelConfig
from model.device import keep_freed_memory
from model.generation import complete
from model.tokenizer import load_tokenizer
from model.weights import write_weights
from trainer.optimizer import compile_layers

SHAPE = dict(vocab_size=6400, hidden_size=512, num_hidden_layers=8, intermediate_size=1600)
ROWS = []


def alternate(rounds, **sides):
    """The median seconds of each side, called in turn, after one call each that does not count."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, action in sides.items():
            began = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def row(name, ours, other, other_name, unit, fraction_of_peak=None, higher=True):
    """Prints a row and keeps it; the ratio says how many times better ours is."""
    ratio = (ours / other if higher else other / ours) if other else None
    ROWS.append({
        "name": name, "ours": ours, "other": other, "other_name": other_name, "ratio": ratio,
        "unit": unit, "fraction_of_peak": fraction_of_peak,
    })  # fmt: skip
    beside = (
        f"{other:10,.4g} {other_name:24}{ratio:6.2f} x" if other else f"{'':10} {other_name:24}"
    )
    peak = f"{fraction_of_peak:7.0%} of peak" if fraction_of_peak else ""
    print(f"{name:44}{ours:10,.4g} {unit:10}{beside}{peak}", flush=True)


def peak_rate():
    """FLOP/s of a bf16 (M, K) @ (K, N): the best of the model's own shapes."""
    best = 0.0
    for M, K, N in ((4096, 512, 1600), (4096, 1600, 512), (2048, 2048, 2048)):
        a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
        for _ in range(20):
            began = time.perf_counter()
            a @ b
            best = max(best, 2 * M * K * N / (time.perf_counter() - began))
    return best


def transformers_twin(model):
    """transformers' Qwen3ForCausalLM with the same weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    names = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads"
    names += " head_dim intermediate_size rope_theta rms_norm_eps max_position_embeddings"
    shape = {name: getattr(model.config, name) for name in names.split()}
    twin = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    twin.load_state_dict(model.state_dict())
    return twin


def pretraining(rounds):
    """A step of 8 rows of 512 tokens, in bf16 with fp32 weights, AdamW and clipping."""
    B, T = 8, 512
    stream = torch.randint(SHAPE["vocab_size"], (2**20,))
    parts = dict.fromkeys(("data", "forward", "backward", "optimizer", "log"), 0.0)
    log = (ROOT / "out" / "bench.log").open("w", encoding="utf-8")

    def stepper(model, loss_of, parts=None):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            times = [time.perf_counter()]
            starts = torch.randint(len(stream) - T, (B,))
            input_ids = torch.stack([stream[start : start + T] for start in starts])
            times.append(time.perf_counter())
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, input_ids)
            times.append(time.perf_counter())
            loss.backward()
            times.append(time.perf_counter())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter())
            print(json.dumps({"loss": loss.item()}), file=log, flush=True)
            times.append(time.perf_counter())
            if parts is not None:
                for name, a, b in zip(parts, times, times[1:], strict=False):
                    parts[name] += b - a

        return step

    def own(model, input_ids):
        return model(input_ids, labels=input_ids) / (B * (T - 1))

    eager, fused = CausalLM(ModelConfig(**SHAPE)), CausalLM(ModelConfig(**SHAPE))
    eager_step = stepper(eager, own, parts)
    if resource:
        eager_step()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
        unit = 2**30 if sys.platform == "darwin" else 2**20
        print(f"(an eager step of ours takes {most / unit:.1f} GiB at most, torch included)")
    compile_layers(fused)
    theirs = transformers_twin(eager)
    steps = {
        "eager": eager_step,
        "compiled": stepper(fused, own),
        "theirs": stepper(theirs, lambda m, ids: m(ids, labels=ids, use_cache=False).loss),
    }
    began = time.perf_counter()
    steps["compiled"]()
    print(f"(compiling took {time.perf_counter() - began:.0f} s, once)")
    seconds = alternate(rounds, **steps)
    # 6 FLOPs per weight and token, and the scores and sums of causal attention.
    weights = sum(w.numel() for w in eager.parameters())
    config = eager.config
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    flops = 6 * weights * B * T + 6 * heads * T * B * T
    peak = peak_rate()
    print(f"(a bf16 matrix product reaches {peak / 1e9:.0f} GFLOP/s here)")
    for name in ("eager", "compiled"):
        row(
            f"pretraining, 512 x 8, 8 x 512, {name}",
            B * T / seconds[name],
            B * T / seconds["theirs"],
            "transformers bf16, eager",
            "tokens/s",
            flops / seconds[name] / peak,
        )
    total = sum(parts.values())
    print("  of a step: " + ", ".join(f"{name} {part / total:.1%}" for name, part in parts.items()))


def generation(rounds, new=256):
    """Greedy, 256 tokens after 32, weights in bf16 and fp32."""
    model = CausalLM(ModelConfig(**SHAPE)).eval()
    theirs = transformers_twin(model).eval()
    for dtype in (torch.bfloat16, torch.float32):
        model, theirs = model.to(dtype), theirs.to(dtype)
        for batch in (1, 16):
            prompts = torch.randint(9, SHAPE["vocab_size"], (batch, 32))

            def ours(model=model, prompts=prompts, **more):
                options = {"max_new_tokens": new, "temperature": 0, "stop_ids": ()} | more
                assert {len(a) for a in complete(model, prompts.tolist(), **options)} == {new}

            def other(theirs=theirs, prompts=prompts):
                with torch.inference_mode():
                    theirs.generate(
                        prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                        attention_mask=torch.ones_like(prompts), pad_token_id=0,
                    )  # fmt: skip

            began = time.perf_counter()
            ours(use_compile=True)
            print(f"(the first compiled answer took {time.perf_counter() - began:.0f} s)")
            seconds = alternate(
                rounds, eager=ours, compiled=partial(ours, use_compile=True), theirs=other
            )
            for way in ("eager", "compiled"):
                row(
                    f"generation, batch {batch}, {str(dtype)[6:]}, {way}",
                    batch * new / seconds[way],
                    batch * new / seconds["theirs"],
                    "transformers generate",
                    "tokens/s",
                )


def sft(path, rounds, rows=80):
    """Real tokens/s on conversations, packed in rows of 512, against trl's SFTTrainer."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from bench.data import TEMPLATE, trained_on
    from dataset.lm_dataset import SFTDataset
    from dataset.step_plan import best_fit_decreasing, collate

    tokenizer = trained_on(path, SHAPE["vocab_size"])
    data = SFTDataset(path, tokenizer, max_length=512)
    model, fused = CausalLM(ModelConfig(**SHAPE)), CausalLM(ModelConfig(**SHAPE))
    compile_layers(fused)
    theirs = transformers_twin(model)
    lengths = data.lengths[:rows].tolist()
    bins = best_fit_decreasing(lengths, 512)
    batches = [
        collate([[data[i] for i in row] for row in bins[at : at + 8]], 512, 64)
        for at in range(0, len(bins), 8)
    ]

    def trains(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def epoch():
            for ids, labels, *where in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(ids, *where, labels=labels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        return epoch

    judge = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    judge.chat_template = TEMPLATE
    lines = path.read_text(encoding="utf-8").splitlines()[:rows]
    records = [json.loads(line) for line in lines]
    messages = [[
        {"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}
    ] for r in records]  # fmt: skip
    config = SFTConfig(
        output_dir=str(ROOT / "out" / "trl"), per_device_train_batch_size=8, max_length=512,
        num_train_epochs=1, bf16=True, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, assistant_only_loss=True, learning_rate=1e-5,
        gradient_checkpointing=False, dataset_num_proc=None,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=theirs, args=config, processing_class=judge,
        train_dataset=Dataset.from_list([{"messages": m} for m in messages]),
    )  # fmt: skip
    seconds = alternate(rounds, eager=trains(model), compiled=trains(fused), theirs=trainer.train)
    real = sum(lengths)
    for way in ("eager", "compiled"):
        row(f"SFT on GSM8K, 512 x 8, {way}", real / seconds[way], real / seconds["theirs"],
            "trl SFTTrainer bf16", "tokens/s")  # fmt: skip


def start(rounds):
    def ours():
        subprocess.run([sys.executable, str(ROOT / "eval_llm.py"), "--help"], stdout=-3, check=True)

    def other():
        subprocess.run([sys.executable, "-c", "from transformers import Trainer"], check=True)

    seconds = alternate(rounds, ours=ours, theirs=other)
    row("start: eval_llm.py --help", seconds["ours"], seconds["theirs"],
        "import of transformers", "s", higher=False)  # fmt: skip


def first_token(rounds):
    """From the start of eval_llm.py to the first token of an answer, with untrained weights."""
    model, tokenizer = CausalLM(ModelConfig(**SHAPE)), load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "full_sft_512.pth"
        write_weights(path, model.state_dict(), model.config, tokenizer, "full_sft")
        command = [sys.executable, str(ROOT / "eval_llm.py"), "--weight", str(path)]
        command += ["--prompt", "Hello", "--max_new_tokens", "1"]
        seconds = alternate(
            rounds, ours=lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        )
    row("start: first token of an answer", seconds["ours"], None, "", "s", higher=False)


def shakespeare(path):
    """One run each, of our recipe and of nanoGPT's."""
    script = [sys.executable, str(ROOT / "bench/shakespeare.py"), "--text", str(path)]
    for seconds in (20, 100):
        reached = []
        for recipe in ("seedling", "nanogpt"):
            done = subprocess.run(
                [*script, "--seconds", str(seconds), "--recipe", recipe],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            reached.append(json.loads(done.stdout.splitlines()[-1])["nats_per_char"])
        row(f"Tiny Shakespeare after {seconds} s", *reached, "nanoGPT's recipe", "nats/char",
            higher=False)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="GSM8K's training file, for the row against trl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", type=Path, help="Tiny Shakespeare, for the rows on it")
    names = ["pretraining", "sft", "generation", "start", "first_token", "shakespeare"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    rooms = {"pretraining": pretraining, "generation": generation, "start": start}
    rooms |= {"first_token": first_token, "sft": lambda rounds: sft(args.data, rounds)}
    rooms["shakespeare"] = lambda rounds: shakespeare(args.text)
    for name in args.only:
        if name == "sft" and args.data is None:
            print("SFT against trl: not measured, give GSM8K's training file with --data")
            continue
        if name == "shakespeare" and args.text is None:
            print("Tiny Shakespeare: not measured, give the text with --text")
            continue
        try:
            rooms[name](args.rounds)
        except ImportError as error:
            print(f"{name}: not measured, {error}; pip install -r requirements-dev.txt")
        with atomic_write(ROOT / "out" / "bench.json") as file:
            file.write(json.dumps(ROWS, indent=1).encode())


if __name__ == "__main__":
    main()
