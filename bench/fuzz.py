"""Feeds damaged files to every reader: each must give a value or one clear error, and soon.

    python bench/fuzz.py --seconds 60
    python bench/fuzz.py --seconds 600 --commands     # every command, on files of every kind

Prints a row for each reader, and ends with code 1 at the first other outcome, whose file it keeps.
"""

import argparse
import contextlib
import importlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, report_user_errors
from dataset.lm_dataset import PretrainDataset, SFTDataset
from evaluation.tasks import read_problems
from model.causal_lm import CausalLM, ModelConfig
from model.tokenizer import load_tokenizer
from model.weights import build_model, load, write_weights
from recipes.prepare_math import read_official
from trainer.flags import parse_args, training_parser

TOKENIZER = load_tokenizer()
CALL = {"name": "add", "arguments": {"a": 1, "b": [2, None]}}
TURNS = [
    {"role": "system", "content": "Be kind.", "tools": json.dumps([{"name": "add"}])},
    {"role": "user", "content": "One and two?"},
    {"role": "assistant", "content": "", "reasoning_content": "Add.", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "Three \u2028 \U0001f600."},
]
VALUE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
RECORDS = [
    {"conversations": TURNS},
    {"conversations": VALUE, "system": "x", "tools": None},
    {"messages": TURNS[1:2] + [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    {"instruction": "Say", "input": "x", "output": "y", "history": [["a", "b"]]},
    {"question": "1 + 1?", "answer": "2 #### 2"},
]


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def weights():
    config = ModelConfig(TOKENIZER.get_vocab_size(), hidden_size=8, num_hidden_layers=1)
    file = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.pth"
        write_weights(path, CausalLM(config).state_dict(), config, TOKENIZER, "full_sft")
        file.write(path.read_bytes())
    return file.getvalue()


def read_flags(path):
    parse_args(training_parser("", save_weight="x"), ["--config", str(path)])


QUESTIONS = [{"category": "x", "conversations": TURNS[:2], "expected": "Three"}]
PROBLEMS = [{"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}] * 3
FLAGS = b'hidden_size = 48\n[data]\ndata_path = "x.jsonl"\npacking = true\nlearning_rate = 1e-3\n'
READERS = {  # name: (what reads a path, a sample of what it reads)
    "conversations, JSONL": (lambda path: SFTDataset(path, TOKENIZER), lines(RECORDS)),
    "conversations, JSON": (lambda path: SFTDataset(path, TOKENIZER), json.dumps(RECORDS).encode()),
    "text, JSONL": (lambda path: PretrainDataset(path, TOKENIZER), lines([{"text": "a b"}] * 5)),
    "questions, JSONL": (lambda path: read_problems("tiny_world", path), lines(QUESTIONS)),
    "GSM8K, JSONL": (lambda path: read_official("gsm8k", [path]), lines(PROBLEMS)),
    "flags, TOML": (read_flags, FLAGS),
    "tokenizer, JSON": (lambda path: load_tokenizer(path), TOKENIZER.to_str().encode()),
    "weights, .pth": (lambda path: build_model(load(path), path), weights()),
}


# ------------------------------------------------------------------------------------- commands

TINY = "--hidden_size 32 --num_hidden_layers 1 --device cpu --dtype fp32 --batch_size 64"
TRAIN = f"{TINY} --save_dir OUT --save_weight fuzzed --early_stop_patience 0"
ANSWER = "--save_dir OUT --limit 2 --max_new_tokens 2 --device cpu"
COMMANDS = f"""
    dataset/prepare.py check --data_path FILE
    dataset/prepare.py show --data_path FILE
    dataset/prepare.py split --out OUT/split FILE
    recipes/misconceptions.py --out OUT/cot FILE
    recipes/prepare_math.py gsm8k --raw FOLDER --out OUT/gsm8k
    recipes/prepare_math.py math --raw FOLDER --out OUT/math
    recipes/sid.py --raw FOLDER --out OUT/sid
    trainer/train_tokenizer.py --data_path FILE --vocab_size 280 --out OUT/t.json
    trainer/train_pretrain.py {TRAIN} --data_path FILE
    trainer/train_pretrain.py {TRAIN} --config FILE
    trainer/train_pretrain.py {TRAIN} --data_path TEXT --tokenizer_path FILE
    trainer/train_full_sft.py {TRAIN} --from_weight none --data_path FILE
    trainer/train_full_sft.py {TRAIN} --from_weight none --data_path CHATS --replay_path FILE
    trainer/train_full_sft.py {TRAIN} --from_weight none --data_path CHATS --val_data_path FILE
    trainer/train_full_sft.py --save_dir OUT --device cpu --from_weight FILE --data_path CHATS
    trainer/train_full_sft.py --save_dir OUT --device cpu --from_weight WEIGHTS --data_path CHATS
        --extend_tokens FILE
    trainer/train_distillation.py {TRAIN} --from_weight none --data_path CHATS --teacher_weight FILE
    trainer/train_distillation.py {TRAIN} --from_weight none --offline_dir FOLDER
    recipes/export_hidden_states.py --teacher_weight WEIGHTS --save_dir OUT --offline_dir OUT/o
        --device cpu --data_path FILE
    convert/peft.py --from_peft FOLDER --weight WEIGHTS --save_weight m --save_dir OUT
    evaluation/run_eval.py --task tiny_world --weight WEIGHTS {ANSWER} --run r --data_path FILE
    evaluation/run_eval.py --task gsm8k --weight WEIGHTS {ANSWER} --run r --data_path FILE
    evaluation/run_eval.py --task math --weight WEIGHTS {ANSWER} --run r --data_path FILE
    evaluation/run_eval.py --task sid --weight WEIGHTS {ANSWER} --run r --data_path FILE
    evaluation/run_eval.py --task tiny_world --weight FILE {ANSWER} --run r --data_path QUESTIONS
    evaluation/run_eval.py --rescore FILE
    evaluation/run_eval.py --compare FILE FILE
    recipes/rejection_sample.py --weight WEIGHTS {ANSWER} --num_samples 2 --out OUT/a
        --data_path FILE
    eval_llm.py --device cpu --max_new_tokens 2 --prompt Hi --weight FILE
"""
COMMANDS = [line.split() for line in COMMANDS.replace("\n        ", " ").strip().splitlines()]
HISTORY = "history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
HISTORY += "\n\"['a']\",b,[0],1,\"['<a>']\",<b>\n"
RESULT = {"task": "gsm8k", "run": "r", "problems": [], "totals": {}, "data_sha256": "x"}
KINDS = {  # kind: (names under which a command looks for such a file, a sample)
    **{name: (["data.jsonl", "train.jsonl"], sample) for name, (_, sample) in READERS.items()},
    "weights, .pth": (["weights.pth", "adapter_model.safetensors"], READERS["weights, .pth"][1]),
    "histories, CSV": (["shop.csv"], HISTORY.encode()),
    "items, JSON": (["x.index.json", "x.item.json", "manifest.json"], b'{"0": ["<a>", "<b>"]}'),
    "adapters, JSON": (
        ["adapter_config.json"],
        b'{"r": 2, "lora_alpha": 4, "target_modules": "x"}',
    ),
    "a result, JSON": (["r.json"], json.dumps(RESULT).encode()),
    "tokens, text": (["tokens.txt"], b"<a>\n<b>\n"),
    "nothing": (["empty.jsonl"], b""),
}


def run_command(command, kind, content, folder):
    """What a command makes of a file of some kind; its folder holds other files that are whole."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names, _ = KINDS[kind]
    whole = {
        "TEXT": "text, JSONL",
        "CHATS": "conversations, JSONL",
        "QUESTIONS": "questions, JSONL",
    }
    whole |= {"WEIGHTS": "weights, .pth"}
    places = {"OUT": folder / "out", "FOLDER": folder / "raw", "FILE": folder / "raw" / names[0]}
    places["FOLDER"].mkdir()
    for name in names:
        (places["FOLDER"] / name).write_bytes(content)
    for word, name in whole.items():
        places[word] = folder / f"{word}.{'pth' if word == 'WEIGHTS' else 'jsonl'}"
        places[word].write_bytes(READERS[name][1])
    script, *words = command
    words = [str(places[word]) if word in places else word for word in words]
    words = [word.replace("OUT/", f"{folder / 'out'}/") for word in words]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return outcome(module.main, words)


def try_commands(seconds, rng, folder):
    """Runs every command on a file of every kind, whole and then damaged."""
    print(f"{'command':60}{'runs':>6}{'values':>8}{'errors':>8}")
    for command in COMMANDS:
        counts, end = {"value": 0, "error": 0}, time.perf_counter() + seconds / len(COMMANDS)
        whole = list(KINDS)
        while whole or time.perf_counter() < end:
            kind = whole.pop() if whole else rng.choice(list(KINDS))
            content = KINDS[kind][1]
            if not whole and content:
                content = damaged(content, rng)
            found = run_command(command, kind, content, folder)
            if found not in counts:
                sys.exit(f"{' '.join(command)}, on {kind} in {folder}, gives {found}")
            counts[found] += 1
        line = " ".join(command)
        print(f"{line[:58]:60}{sum(counts.values()):6}{counts['value']:8}{counts['error']:8}")


def damaged(content, rng):
    """The content with random bytes in some places, cut, doubled; or with other JSON values."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(400))
    if kind == 1:
        return content[: rng.randrange(len(content))]
    if kind == 2:
        with contextlib.suppress(ValueError):
            return b"\n".join(other_values(line, rng) for line in content.splitlines())
    content = bytearray(content)
    for _ in range(rng.choice([1, 3, 20])):
        if not content:
            break
        at = rng.randrange(len(content))
        if kind == 3:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 4:
            content[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        else:
            content[at:at] = content[at : at + rng.randrange(200)]
    return bytes(content)


def other_values(line, rng):
    """A line of JSON with one value in a hundred or so replaced by one of another type."""

    def change(value):
        if rng.random() < 0.1:
            return rng.choice([None, 0, -1, 1e308, "", "\ud800", [], {}, [[]], True, "a" * 999])
        if isinstance(value, dict):
            return {key: change(inner) for key, inner in value.items() if rng.random() > 0.02}
        return [change(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(change(json.loads(line))).encode()


def outcome(read, path):
    """What a reader makes of a file: value, error, or a traceback that should not be."""
    said = io.StringIO()
    try:
        quiet = contextlib.redirect_stderr(said), contextlib.redirect_stdout(said)
        with quiet[0], quiet[1], report_user_errors():
            read(path)
        return "value"
    except UserError as error:
        return "error" if str(error) else "an error without words"
    except SystemExit as end:
        return "error" if end.code == 2 and said.getvalue() else f"exit code {end.code}"
    except BaseException:  # a panic of the tokenizers library is no Exception
        return traceback.format_exc()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", action="store_true", help="all commands instead of readers")
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp())
    if args.commands:
        return try_commands(args.seconds, rng, folder / "commands")
    print(f"{'reader':22}{'files':>8}{'values':>8}{'errors':>8}{'slowest':>9}")
    for name, (read, sample) in READERS.items():
        counts, slowest = {"value": 0, "error": 0}, 0.0
        end = time.perf_counter() + args.seconds / len(READERS)
        while (began := time.perf_counter()) < end:
            path = folder / "file"
            path.write_bytes(damaged(sample, rng))
            found = outcome(read, path)
            if found not in counts:
                print(f"{name}: {path} gives {found}")
                sys.exit(1)
            counts[found] += 1
            slowest = max(slowest, time.perf_counter() - began)
        print(f"{name:22}{sum(counts.values()):8}", end="")
        print(f"{counts['value']:8}{counts['error']:8}{slowest:7.2f} s")


if __name__ == "__main__":
    main()
