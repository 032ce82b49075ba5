"""Evaluate a model on a task: answer every problem and report the accuracy.

    python evaluation/run_eval.py --task tiny_world --weight full_sft
    python evaluation/run_eval.py --task gsm8k --data_path out/gsm8k/test.jsonl --limit 200
    python evaluation/run_eval.py --rescore out/eval/gsm8k/full_sft.json      # judge again
    python evaluation/run_eval.py --compare A.json B.json                     # compare two runs

Writes every prompt, answer and verdict to out/eval/TASK/RUN.json, with a report next to it. Running
the same command again continues an interrupted run. Results of another run are never overwritten.
"""

import hashlib
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
from cli import Parser, choose_from, number, switch
from dataset.tiny_world import EVAL
from evaluation import competition_math, report
from evaluation.generate_answers import PartialResults, answer_all, read_result, require_same_run
from evaluation.tasks import TASKS, decoding_constraint, judge, read_problems
from model.generation import SamplingParams
from model.weights import open_model


def parse(argv):
    """Return (the flags, their parser)."""
    parser = Parser(__doc__)
    add = parser.group("the evaluation")
    add("task", "tiny_world", f"one of {'|'.join(TASKS)}", choose_from(*TASKS))
    add("data_path", None, "problems, written by a recipe; default: Tiny World's", Path)
    add("num_samples", 1, "answers to each problem", number(int, 1))
    name = "name of the result; default: the weights' name plus every non-default option"
    add("run", None, name)
    add("rescore", None, "judge a stored run again without the model", Path, metavar="FILE")
    add("compare", None, "compare two stored runs", Path, nargs=2, metavar=("OLD", "NEW"))
    answering_flags(parser, batch_size=16, max_new_tokens=512, temperature=0.0)
    args = parser.parse_args(argv)
    if args.num_samples > 1 and args.temperature == 0:
        parser.error(f"--num_samples {args.num_samples} are identical at --temperature 0")
    return args, parser


def answering_flags(parser, **defaults):
    """Add the flags for `open_model` and `answering_options`, except --num_samples."""
    add = parser.group("the model and its answers")
    newest = "a name in --save_dir, or a path; default: full_sft, or the weights of --lora"
    add("weight", None, newest, dest="from_weight")
    add("lora", None, "adapters to merge into the weights: lora_NAME_512.pth", metavar="NAME")
    add("hidden_size", None, "only where several sizes have the name", number(int, 1))
    add("save_dir", ROOT / "out", "folder of weights and results", Path)
    add("limit", 0, "number of problems; 0: all", number(int, 0))
    add("batch_size", defaults["batch_size"], "batch size", number(int, 1))
    longest = "maximum length of an answer, in tokens"
    add("max_new_tokens", defaults["max_new_tokens"], longest, number(int, 1))
    sampling = "sampling temperature; 0: greedy"
    add("temperature", defaults["temperature"], sampling, number(float, 0, 100))
    add("seed", 1, "sampling seed, if the temperature is above 0", number(int, 0, 2**63 - 1))
    add("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("dtype", "fp32", "auto, fp32, bf16 or fp16", choose_from("auto", "fp32", "bf16", "fp16"))
    add("use_compile", 0, "1: use torch.compile for decoding", switch)


def answering_options(args):
    """Return the options of `answer_all` that are flags."""
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    names = ("num_samples", "batch_size", "seed", "use_compile")
    return {"params": params} | {name: getattr(args, name) for name in names}


def hash_of_files(paths):
    """Return the sha256 of files, or of the weights in folders of published models, one after the
    other.
    """
    digest = hashlib.sha256()
    for path in paths:
        for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def main(argv=None):
    args, parser = parse(argv)
    typed = map(str, sys.argv[1:] if argv is None else argv)
    if args.compare:
        print("\n".join(report.compare(*map(read_result, args.compare))))
        return None
    if args.rescore:
        return judge_and_report(read_result(args.rescore), args.rescore)

    problems = read_problems(args.task, args.data_path)
    problems = problems[: args.limit or None]
    trained = open_model(args)
    data = args.data_path or EVAL
    settings = ("num_samples", "temperature", "batch_size", "max_new_tokens", "seed")
    settings += ("dtype", "use_compile", "limit")
    result = {
        "task": args.task,
        "run": args.run or run_name(trained.name, args, parser),
        "command": shlex.join(["python", "evaluation/run_eval.py", *typed]),
        "weights": " + ".join(map(str, trained.paths)),
        "weights_sha256": hash_of_files(trained.paths),
        "data": str(data),
        "data_sha256": hash_of_files([data]),
        "params": sum(weight.numel() for weight in trained.model.parameters()),
        "settings": {name: getattr(args, name) for name in settings},
    }
    path = args.save_dir / "eval" / args.task / f"{result['run']}.json"
    if path.exists():
        require_same_run(path, path.read_text("utf-8", "replace"), result, "--run NAME")
    part = PartialResults(path.with_suffix(".part"), result, args.batch_size, "--run NAME")
    options = answering_options(args)
    options["allowed_ids"] = decoding_constraint(args.task, data, trained.tokenizer)
    rows = answer_all(problems, trained.model, trained.tokenizer, part=part, **options)
    result["seconds"] = round(sum(row["seconds"] for row in rows), 1)
    scores = judge_and_report(result | {"problems": rows}, path)
    part.path.unlink()
    return scores


def run_name(name, args, parser):
    """Return the default name of a run: the weights' name plus every non-default option."""
    words = [Path(name).stem]
    words += [f"lora_{Path(args.lora).stem.removeprefix('lora_')}"] if args.lora else []
    for flag in ("num_samples", "temperature", "limit", "dtype", "use_compile"):
        value = getattr(args, flag)
        words += [f"{flag}_{value}"] if value != parser.get_default(flag) else []
    return "_".join(words)


def judge_and_report(result, path):
    """Judge all rows of a result, write it and its report to path, and print the scores."""
    task, rows = result["task"], result["problems"]
    for row in rows:
        row |= judge(task, row["output"], row["gold"], row["truncated"])
    if task == "math":
        result["lenient_judge"] = competition_math.lenient_judge()
    totals = report.compute_metrics(rows, TASKS[task].same_answer)
    is_lenient = totals["accuracy"] is not None
    scores = {"overall": totals["accuracy"] if is_lenient else totals["strict_accuracy"]}
    parts = totals["by_type"] | totals["by_level"]
    scores |= {part: right / n for part, (right, n) in parts.items()}
    result |= {"totals": totals, "scores": scores}
    report.write_report(path, result)
    report.print_report(result)
    print(f"report: {path.with_suffix('.md')}\nevery answer: {path}")
    return scores


if __name__ == "__main__":
    with report_user_errors():
        main()
