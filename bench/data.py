"""What the data side costs: preparation and packing, each beside what people do without it.

    python bench/data.py GSM8K_train.jsonl            # needs transformers and jinja2

Prints conversations/s of tokenising with a mask against transformers' apply_chat_template in a
loop, how full the packed rows are, and real tokens/s of training packed against unpacked.
Both sides of each comparison run in turn, several times; the medians count.
"""

import argparse
import platform
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.formats import detect_format, to_conversation
from dataset.jsonl import read_records
from dataset.lm_dataset import SFTDataset
from dataset.packing import best_fit_decreasing, collate, pad
from model.causal_lm import CausalLM, ModelConfig
from model.device import keep_freed_memory, pick_dtype
from model.tokenizer import CONTROL_TOKENS, load_tokenizer

TEMPLATE = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{%- if m.role == 'assistant' -%}"
    "{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}{%- else -%}"
    "{{- m.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_path", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="training steps of a round")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    tokenizer = trained_on(args.data_path)
    prepare(args, tokenizer)
    train(args, tokenizer)


def trained_on(path, size=8192):
    """A tokenizer of the size that people use for such data."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=CONTROL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [str(v) for _, record in read_records(path) for v in record.values()]
    tokenizer.train_from_iterator(texts, trainer)
    return load_tokenizer(json_text=tokenizer.to_str())


def prepare(args, tokenizer):
    from transformers import PreTrainedTokenizerFast

    judge = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()))
    judge.chat_template = TEMPLATE

    def theirs():
        for _, record in read_records(args.data_path):
            messages, _ = to_conversation(record, detect_format(record), Counter())
            judge.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )

    def ours():
        SFTDataset(args.data_path, tokenizer)

    count = len(SFTDataset(args.data_path, tokenizer))
    one, other = alternately(args.rounds, ours, theirs)
    print(f"preparation   {count / one:,.0f} conversations/s, transformers in a loop "
          f"{count / other:,.0f}: {other / one:.1f} times")  # fmt: skip


def train(args, tokenizer, max_seq_len=512, batch_size=8):
    keep_freed_memory()
    data = SFTDataset(args.data_path, tokenizer, max_seq_len)
    rows = best_fit_decreasing(data.lengths.tolist(), max_seq_len)
    full = data.lengths.sum() / (len(rows) * max_seq_len)
    print(f"packed rows   {full:.2%} full at {max_seq_len} tokens")
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": tokenizer.get_vocab_size()}
    model = CausalLM(ModelConfig(**shape))
    dtype = pick_dtype("auto", torch.device("cpu"))
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = Counter()

    def steps(name, batches):
        for ids, labels, *where in batches:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(ids, *where, labels=labels)
            loss.backward()
            model.zero_grad()
            tokens[name] += int((where[1] >= 0).sum())

    def packed():
        chosen = [order.pop() for _ in range(args.steps * batch_size // 2)]
        groups = [
            chosen[at : at + batch_size // 2] for at in range(0, len(chosen), batch_size // 2)
        ]
        batches = [[[data[i] for i in rows[r]] for r in group] for group in groups]
        steps("packed", [collate(batch, max_seq_len, 64) for batch in batches])

    def unpacked():
        chosen = [drawn.pop() for _ in range(args.steps * batch_size)]
        groups = [chosen[at : at + batch_size] for at in range(0, len(chosen), batch_size)]
        steps("unpacked", [pad([data[i] for i in g]) for g in groups])

    packed(), unpacked()
    tokens.clear()
    seconds = alternately(args.rounds, packed, unpacked, total=True)
    one, other = (tokens[k] / s for k, s in zip(("packed", "unpacked"), seconds, strict=True))
    print(f"training      {one:,.0f} real tokens/s packed, {other:,.0f} unpacked "
          f"(padded to the longest of {batch_size}): {one / other:.2f} times")  # fmt: skip


def alternately(rounds, *jobs, total=False):
    """The median seconds of each job, or their sum, the jobs taking turns."""
    seconds = [[] for _ in jobs]
    for _ in range(rounds):
        for job, taken in zip(jobs, seconds, strict=True):
            start = time.perf_counter()
            job()
            taken.append(time.perf_counter() - start)
    return [sum(taken) if total else statistics.median(taken) for taken in seconds]


if __name__ == "__main__":
    main()
