"""Asks a model every held-out question and prints how many it got right, by category.

    python evaluation/run_eval.py --task tiny_world --weight full_sft

Every prompt, answer and verdict goes to out/eval/tiny_world/NAME.json.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from dataset.chat_template import render
from dataset.errors import UserError, mistakes_in_plain_words
from dataset.files import replacing
from dataset.tiny_world import EVAL, write_missing
from evaluation.tiny_world import is_correct
from model.generation import complete
from trainer.arguments import ROOT
from trainer.compiling import require_compiler
from trainer.trainer_utils import init_model, pick_device, pick_dtype


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", choices=["tiny_world"], default="tiny_world")
    parser.add_argument(
        "--weight", dest="from_weight", default="full_sft", help="name in --save_dir, or a path"
    )
    parser.add_argument("--data_path", type=Path, default=EVAL)
    parser.add_argument("--save_dir", type=Path, default=ROOT / "out")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=120)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--use_compile", type=int, choices=[0, 1], default=0)
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    if args.use_compile:
        require_compiler(device)
    model, tokenizer, _ = init_model(args, device)
    model.to(pick_dtype(args, device))
    start = time.perf_counter()
    problems = read(write_missing(args.data_path))
    options = {"max_new_tokens": args.max_new_tokens, "use_compile": bool(args.use_compile)}
    answer_all(problems, model, tokenizer, args.batch_size, **options)
    verdicts = defaultdict(list)
    for problem in problems:
        verdicts[problem["category"]].append(problem["correct"])
    scores = {"overall": sum(problem["correct"] for problem in problems) / len(problems)}
    scores |= {category: sum(marks) / len(marks) for category, marks in verdicts.items()}

    counts = {category: len(marks) for category, marks in verdicts.items()}
    for category, score in scores.items():
        print(f"{category:12} {score:6.1%} of {counts.get(category, len(problems)):4}")
    path = args.save_dir / "eval" / args.task / f"{Path(args.from_weight).stem}.json"
    with replacing(path) as file:
        seconds = round(time.perf_counter() - start, 1)
        params = sum(weight.numel() for weight in model.parameters())
        result = {"weight": args.from_weight, "params": params, "seconds": seconds}
        result |= {"scores": scores}
        text = json.dumps(result | {"problems": problems}, ensure_ascii=False, indent=1)
        file.write(text.encode("utf-8"))
    print(f"every answer: {path}")
    return scores


def answer_all(problems, model, tokenizer, batch_size=50, max_new_tokens=120, use_compile=False):
    """Adds to each problem the model's "answer", and whether it is "correct"."""
    options = {"max_new_tokens": max_new_tokens, "temperature": 0, "use_compile": use_compile}
    prompts = [
        render(problem["conversations"], add_generation_prompt=True, tokenizer=tokenizer)[0]
        for problem in problems
    ]
    # Prompts of similar length go together: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in tqdm(range(0, len(order), batch_size), unit="batch", leave=False, disable=None):
        chosen = order[first : first + batch_size]
        batch = [prompts[i] for i in chosen]
        written = complete(model, batch, **options)
        for i, answer in zip(chosen, map(tokenizer.decode, written), strict=True):
            correct = is_correct(answer, problems[i]["expected"])
            problems[i] |= {"answer": answer, "correct": correct}


def accuracy(task, model, tokenizer):
    """The share of a task's held-out questions that a model answers right."""
    problems = read(write_missing({"tiny_world": EVAL}[task]))
    answer_all(problems, model, tokenizer)
    return sum(problem["correct"] for problem in problems) / len(problems)


def read(path):
    """The problems of a JSONL file: {"category", "conversations", "expected"} each."""
    problems = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                problems.append(json.loads(line))
                missing = {"category", "conversations", "expected"} - set(problems[-1])
                if missing:
                    raise UserError(f"{path}, line {number}: {', '.join(missing)} is missing")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--data_path {path} cannot be used: {error}") from None
    if not problems:
        raise UserError(f"--data_path {path} is empty")
    return problems


if __name__ == "__main__":
    with mistakes_in_plain_words():
        main()
