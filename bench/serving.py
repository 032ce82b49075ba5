"""The server under load, and beside llama.cpp's own server on the same weights.

    python bench/serving.py                   # some ten minutes; needs gguf and xllamacpp
    python bench/serving.py --requests 100

First, 1,000 requests of 16 clients at once, of mixed lengths, a tenth of them cancelled half-way:
each other one must get the tokens that `complete` gives to its prompt alone. Then tokens per second
with 1 and 16 clients, both servers in turn, medians of three. The weights are random: what a step
costs does not depend on them. Ends with code 1 if an answer was lost or wrong.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import ROOT
from convert import to_gguf
from model.causal_lm import CausalLM, ModelConfig
from model.generation import complete
from model.tokenizer import load_tokenizer
from model.weights import write_weights

SHAPES = {"the demo's model": (256, 3), "512 wide, 8 layers": (512, 8)}
CLIENTS = 16
LLAMA = """
import sys, time, xllamacpp as llama
p = llama.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.port, p.verbosity = sys.argv[1], 16 * 512, 16, 0, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[2])
server = llama.Server(p)
print(server.listening_address, flush=True)
time.sleep(3600)
"""


@contextmanager
def started(*command):
    """The address that a server prints, while it runs."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield next(
            found[0] for line in process.stdout if (found := re.findall(r"http://[\d.:]+", line))
        )
    finally:
        process.terminate()
        process.wait()


def post(address, route, **body):
    """The open answer to a request."""
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + route, json.dumps(body).encode(), header)
    return urllib.request.urlopen(request, timeout=300)


def ask(address, prompt, count, cancel):
    """The text of an answer; None for one that is cancelled after half of it."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0}
    if not cancel:
        with post(address, "/v1/completions", **body) as answer:
            return json.loads(answer.read())["choices"][0]["text"]
    with post(address, "/v1/completions", stream=True, **body) as answer:
        for _ in range(count):  # an event is two lines
            answer.readline()
    return None


def soak(address, model, tokenizer, number):
    """Sends the requests of mixed lengths; returns how many answers were lost or wrong."""
    rng = random.Random(1)
    asked = []
    for index in range(number):
        prompt = [rng.randrange(16, 2048) for _ in range(rng.choice([1, 8, 40, 200, 400]))]
        asked.append((prompt, rng.choice([1, 10, 40, 120]), index % 10 == 9))
    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        waiting = [pool.submit(ask, address, *request) for request in asked]
    seconds = time.perf_counter() - began
    lost = wrong = 0
    for (prompt, count, cancelled), future in zip(asked, waiting, strict=True):
        if future.exception():
            lost += 1
            print(f"lost: {future.exception()!r}")
        elif not cancelled:
            (ids,) = complete(model, [prompt], max_new_tokens=count, temperature=0)
            wrong += future.result() != tokenizer.decode(ids, skip_special_tokens=False)
    cancelled = sum(cancel for *_, cancel in asked)
    print(
        f"{number} requests of {CLIENTS} clients in {seconds:.0f} s: {cancelled} cancelled, "
        f"{number - cancelled - lost - wrong} as alone, {lost} lost, {wrong} wrong",
        flush=True,
    )
    with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
        assert answer.status == 200
    return lost + wrong


def rate(address, clients, rng, **more):
    """Tokens per second of this many clients, each with four requests of 64 tokens after 64."""
    prompts = [[rng.randrange(16, 2048) for _ in range(64)] for _ in range(4 * clients)]
    body = {"max_tokens": 64, "temperature": 0} | more

    def one(prompt):
        with post(address, "/v1/completions", prompt=prompt, **body) as answer:
            return json.loads(answer.read())["usage"]["completion_tokens"]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        count = sum(pool.map(one, prompts))
    return count / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = os.cpu_count()
    print(f"{platform.processor() or platform.machine()}, {cores} cores, torch {torch.__version__}")
    torch.set_num_threads(1)  # of this process, whose clients share the cores with the servers
    tokenizer, failed = load_tokenizer(), 0
    for name, (width, layers) in SHAPES.items():
        torch.manual_seed(1)
        config = ModelConfig(hidden_size=width, num_hidden_layers=layers)
        model = CausalLM(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            file, gguf = Path(folder) / "random.pth", Path(folder) / "random.gguf"
            write_weights(file, model.state_dict(), config, tokenizer, "pretrain", training={})
            to_gguf.main(["--weight", str(file), "--out", str(gguf)])
            flags = ["--weight", file, "--dtype", "fp32", "--max_batch", CLIENTS, "--serve", 0]
            ours = started(ROOT / "eval_llm.py", *flags)
            theirs = started("-c", LLAMA, gguf, cores)
            with ours as our_address, theirs as their_address:
                if name == "the demo's model":
                    failed = soak(our_address, model, tokenizer, args.requests)
                found = {}
                for number in range(args.rounds + 1):  # the first does not count
                    for clients in (1, CLIENTS):
                        for side, address in (("ours", our_address), ("theirs", their_address)):
                            more = {"ignore_eos": True} if side == "theirs" else {}
                            of_side = rate(address, clients, random.Random(number), **more)
                            found.setdefault((clients, side), []).append(of_side)
        for clients in (1, CLIENTS):
            ours, theirs = (median(found[clients, side][1:]) for side in ("ours", "theirs"))
            print(f"{name}, {clients} clients: {ours:.0f} tokens/s, llama.cpp {theirs:.0f}",
                  flush=True)  # fmt: skip
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
