"""How soon a new model learns to repeat what it just read, by the size of its first weights.

    python bench/copying.py

Every document is a list of words, and the same list again; the loss on the second list falls from
about 1.9 to 0 once the model copies. Twice the same training: from ModelConfig's first weights, and
from GPT-2's, normal with a deviation of 0.02.
"""

import platform
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import IGNORE
from dataset.packing import best_fit_decreasing, collate
from dataset.tiny_world.world import words
from model.causal_lm import CausalLM, ModelConfig
from model.device import keep_freed_memory
from model.loss import count_supervised
from model.tokenizer import load_tokenizer

STEPS, EVERY, RATE = 600, 100, 1e-3
WORDS = [word for group in words.values.values() for word in group] + words.things


def rows(rng, tokenizer, count, second_only=False):
    """Documents as (input_ids, labels); with second_only, only the second list is graded."""
    documents = []
    for _ in range(count):
        article = rng.choice(["", "a "])
        said = ", ".join(article + word for word in rng.sample(WORDS, rng.randint(4, 9)))
        begun = f"The cook said: {said}. The children repeated:"
        ids = torch.tensor(tokenizer.encode(f"{begun} {said}.").ids)
        labels = ids.clone()
        labels[: len(tokenizer.encode(begun).ids) + 1 if second_only else 0] = IGNORE
        documents.append((ids, labels))
    return documents


def loss_of(model, documents):
    rows = best_fit_decreasing([len(ids) for ids, _ in documents], 256)
    ids, labels, *where = collate([[documents[i] for i in row] for row in rows], 256, 64)
    with torch.autocast("cpu", torch.bfloat16):
        return model(ids, *where, labels=labels) / count_supervised(labels)


def train(tokenizer, std, seed=1):
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(vocab_size=tokenizer.get_vocab_size()))
    if std:
        residual = std / (2 * model.config.num_hidden_layers) ** 0.5
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                torch.nn.init.normal_(weight, std=residual if small else std)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    rng, held_out, losses = random.Random(seed), rows(random.Random(0), tokenizer, 32, True), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50)
        loss_of(model, rows(rng, tokenizer, 16)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                losses.append(loss_of(model, held_out).item())
    return losses


if __name__ == "__main__":
    keep_freed_memory()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("loss on the repeated list after", ", ".join(map(str, range(EVERY, STEPS + 1, EVERY))))
    for name, std in (("ours", None), ("0.02", 0.02)):
        print(f"{name:>6}", *(f"{loss:.2f}" for loss in train(load_tokenizer(), std)), flush=True)
