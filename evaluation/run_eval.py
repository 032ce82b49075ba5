"""Asks a model every problem of a task and reports how many it solved.

    python evaluation/run_eval.py --task tiny_world --weight full_sft
    python evaluation/run_eval.py --task gsm8k --data_path out/gsm8k/test.jsonl --limit 200
    python evaluation/run_eval.py --rescore out/eval/gsm8k/full_sft.json      # judges again
    python evaluation/run_eval.py --compare A.json B.json                     # what flipped

Every prompt, answer and verdict goes to out/eval/TASK/RUN.json, a report beside it. A run that was
stopped goes on where it was when the same command is given again. What another run left under the
same name is never overwritten.
"""

import argparse
import hashlib
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
import numpy as np
from tqdm import tqdm

from common import ROOT, STOP
from dataset.chat_template import render
from dataset.tiny_world.generate import EVAL
from evaluation import report
from evaluation.answers import Part, keep_previous, read_result, require_same_run
from evaluation.tasks import PROMPTS, TASKS, held_to, judge, read_problems, same_answer
from model.generation import generate
from trainer import checkpoint
from trainer.arguments import Parser, number, stop_at, wrong_values
from trainer.distributed import pick_device, pick_dtype
from trainer.optimizer import require_compiler
from trainer.trainer_utils import init_model


def parse(argv):
    parser = answering_parser(__doc__)
    add = parser.add_argument
    answering_flags(add, batch_size=16, max_new_tokens=512, temperature=0.0)
    add("--task", choices=TASKS, default="tiny_world")
    add("--data_path", type=Path, help="problems, official or prepared; default: Tiny World's")
    add("--prompt_style", default="zero_shot", help=f"a table of evaluation/{PROMPTS.name}")
    add("--shots_path", type=Path, help="solved problems, for few_shot")
    add("--num_samples", type=number(int, 1), default=1, help="answers to each problem")
    add("--run", help="name of the result; default: that of the weights, and what is unusual")
    add("--rescore", type=Path, metavar="FILE", help="judge a stored run again, without the model")
    two = {"nargs": 2, "type": Path, "metavar": ("OLD", "NEW")}
    add("--compare", **two, help="what flipped between two stored runs")
    args = parser.parse_args(argv)
    stop_at(wrong_values(args))
    if args.num_samples > 1 and args.temperature == 0:
        parser.error(f"--num_samples {args.num_samples} are all the same at --temperature 0")
    return args


def answering_parser(doc):
    how = argparse.ArgumentDefaultsHelpFormatter
    return Parser(description=doc.splitlines()[0], formatter_class=how)


def answering_flags(add, **defaults):
    """The flags that `open_model` and `answer_all` read, but for --num_samples."""
    newest = "name in --save_dir, or a path; without it full_sft, or what is under --lora"
    add("--weight", dest="from_weight", help=newest)
    add("--lora", metavar="NAME", help="adapters to lay on the weights: lora_NAME_512.pth")
    add("--hidden_size", type=int, help="only where several sizes have the name")
    add("--save_dir", type=Path, default=ROOT / "out", help="of weights and results")
    add("--limit", type=number(int, 0), default=0, help="the first so many problems; 0: all")
    at_once, longest = defaults["batch_size"], defaults["max_new_tokens"]
    positive = number(int, 1)
    add("--batch_size", type=positive, default=at_once, help="answers written at once")
    add("--max_new_tokens", type=positive, default=longest, help="longest answer")
    likeliest = "0: always the likeliest token"
    add(
        "--temperature", type=number(float, 0, 100), default=defaults["temperature"], help=likeliest
    )
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=1,
        help="of the draws, above temperature 0",
    )
    add("--device", default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="fp32")
    add("--use_compile", type=int, choices=[0, 1], default=0)


def open_model(args):
    """(model, tokenizer, {"weights", "weights_sha256"}) of --weight and --lora."""
    device = pick_device(args.device)
    if args.use_compile:
        require_compiler(device)
    args.from_weight = checkpoint.weights_to_start_from(args)
    if args.from_weight == "none":
        raise UserError("--weight none: only trained weights can answer; give a name or a path")
    model, tokenizer, _ = init_model(args, device)
    paths = [checkpoint.find(args.save_dir, args.from_weight, args.hidden_size)]
    if args.lora:
        paths.append(checkpoint.merge_adapters(model, args))
    model.to(pick_dtype(args.dtype, device))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    return model, tokenizer, {"weights": " + ".join(map(str, paths)), "weights_sha256": digest}


def main(argv=None):
    args, typed = parse(argv), list(map(str, sys.argv[1:] if argv is None else argv))
    if args.compare:
        print("\n".join(report.compare(*map(read_result, args.compare))))
        return None
    if args.rescore:
        return finish(read_result(args.rescore), args.rescore)

    problems = read_problems(args.task, args.data_path, args.prompt_style, args.shots_path)
    problems = problems[: args.limit or None]
    model, tokenizer, weights = open_model(args)
    data = args.data_path or EVAL
    how = ("prompt_style", "num_samples", "temperature", "batch_size", "max_new_tokens", "seed")
    result = {
        "task": args.task,
        "run": args.run or run_name(args),
        "command": shlex.join(["python", "evaluation/run_eval.py", *typed]),
        **weights,
        "data": str(data),
        "data_sha256": sha256_of(data),
        "shots_sha256": sha256_of(args.shots_path),
        "params": sum(weight.numel() for weight in model.parameters()),
        "settings": {name: getattr(args, name) for name in (*how, "dtype", "use_compile", "limit")},
    }
    path = args.save_dir / "eval" / args.task / f"{result['run']}.json"
    args.allowed = held_to(args.task, data, tokenizer)
    keep_previous(path, result)
    if path.exists():
        require_same_run(path, path.read_text("utf-8", "replace"), result, "--run NAME")
    part = Part(path.with_suffix(".part"), result, args.batch_size, "--run NAME")
    rows = answer_all(problems, model, tokenizer, args, part)
    result["seconds"] = round(sum(row["seconds"] for row in rows), 1)
    scores = finish(result | {"problems": rows}, path)
    part.path.unlink()
    return scores


def sha256_of(path):
    """The hash of a file; None where no file was given."""
    return path and hashlib.sha256(path.read_bytes()).hexdigest()


def run_name(args):
    """That of the weights, with what sets this run apart from the usual one of theirs."""
    unusual = [f"lora_{args.lora}"] if args.lora else []
    unusual += [args.prompt_style] if args.prompt_style != "zero_shot" else []
    unusual += [f"{args.num_samples}_samples"] if args.num_samples > 1 else []
    unusual += [f"temperature_{args.temperature:g}"] if args.temperature else []
    unusual += [f"limit_{args.limit}"] if args.limit else []
    unusual += [args.dtype] if args.dtype != "fp32" else []
    unusual += ["compiled"] if args.use_compile else []
    return "_".join([Path(args.from_weight).stem, *unusual])


def finish(result, path):
    """Judges all rows of a result, writes it with its report to path, and prints its scores."""
    task, rows = result["task"], result["problems"]
    for row in rows:
        row |= judge(task, row["output"], row["gold"], row["truncated"])
    found = report.totals(rows, lambda a, b: same_answer(task, a, b))
    scores = {"overall": found["accuracy"]}
    scores |= {kind: right / n for kind, (right, n) in found["by_type"].items()}
    report.write(path, result | {"totals": found, "scores": scores, "problems": rows})

    counts = {kind: n for kind, (_, n) in found["by_type"].items()}
    for kind, score in scores.items():
        print(f"{kind:24} {score:6.1%} of {counts.get(kind, len(rows)):4}")
    interval = report.percent(found["accuracy"], found["accuracy_95"])
    print(f"lenient {interval}, strict {found['strict_accuracy']:.1%}; 95 % intervals")
    for k, share in found.get("pass_at", {}).items():
        print(f"pass@{k:19} {share:6.1%}")
    if "majority" in found:
        print(f"{'majority vote':24} {found['majority']:6.1%}")
    print(f"report: {path.with_suffix('.md')}\nevery answer: {path}")
    return scores


def answer_all(problems, model, tokenizer, args, part=None):
    """A row for each sample of each problem: {"problem", "sample", "output", "truncated", "tokens",
    "seconds"} and what the problem holds. part: where they are kept on the way.

    seconds: an even share of its batch's.
    """
    prompts = [
        render(problem["prompt"], add_generation_prompt=True, tokenizer=tokenizer)[0]
        for problem in problems
    ]
    room = model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if len(prompt) >= room:
            raise UserError(
                f"problem {index} has {len(prompt)} tokens, and the model's context is {room}; "
                "leave it out, or show fewer examples"
            )
    # Prompts of similar length go together: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    asked = [(index, sample) for index in order for sample in range(args.num_samples)]
    rows = list(part.rows) if part else []
    bar = tqdm(total=len(asked), initial=len(rows), unit="answer", leave=False, disable=None)
    for first in range(len(rows), len(asked), args.batch_size):
        chosen = asked[first : first + args.batch_size]
        began = time.perf_counter()
        batch = write_answers([prompts[index] for index, _ in chosen], first, model, args)
        seconds = round((time.perf_counter() - began) / len(chosen), 3)
        new = [
            {
                "problem": index,
                "sample": sample,
                "output": tokenizer.decode(ids),
                "truncated": not ended,
                "tokens": len(ids),
                "seconds": seconds,
            }
            for (index, sample), (ids, ended) in zip(chosen, batch, strict=True)
        ]
        rows += new
        bar.update(len(new))
        if part:
            part.add(new)
    bar.close()
    rows = sorted(rows, key=lambda row: (row["problem"], row["sample"]))
    return [{**problems[row["problem"]], **row} for row in rows]


def write_answers(prompts, first, model, args):
    """(ids, whether it came to an end) of the answer to each prompt."""
    seed = int(np.random.SeedSequence([args.seed, first]).generate_state(1)[0])
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    options["allowed"] = getattr(args, "allowed", None)
    answers, ended = [[] for _ in prompts], [False] * len(prompts)
    use_compile = bool(args.use_compile)
    for step in generate(model, prompts, **options, seed=seed, use_compile=use_compile):
        for place, token in enumerate(step):
            if token in STOP:
                ended[place] = True
            elif token is not None:
                answers[place].append(token)
    return list(zip(answers, ended, strict=True))


if __name__ == "__main__":
    with report_user_errors():
        main()
