"""Rejection sampling: sample several answers to each problem and keep those the task's judge
accepts, as training data.

    python recipes/rejection_sample.py --task gsm8k --weight gsm8k --data_path out/gsm8k/train.jsonl
    python trainer/train_full_sft.py --from_weight gsm8k --data_path out/accepted.jsonl

Running the same command again continues an interrupted run. The results of another run in --out are
never overwritten.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, choose_from, number
from common import ROOT, atomic_write, report_user_errors
from evaluation.generate_answers import PartialResults, answer_all, require_same_run
from evaluation.run_eval import answering_flags, answering_options, hash_of_files
from evaluation.tasks import is_right, judge, read_problems
from model.weights import open_model

SETTINGS = """task temperature seed num_samples batch_size max_new_tokens limit keep dtype
    use_compile""".split()  # identify a run


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.group("the data")
    add("task", "gsm8k", "tiny_world, gsm8k or math", choose_from("tiny_world", "gsm8k", "math"))
    add("data_path", None, "problems with their answers", Path, required=True)
    add("num_samples", 8, "answers per problem", number(int, 1))
    add("keep", 4, "maximum number of distinct right answers per problem", number(int, 1))
    add("out", ROOT / "out" / "accepted.jsonl", "file of conversations to write", Path)
    answering_flags(parser, batch_size=64, max_new_tokens=256, temperature=0.8)
    args = parser.parse_args(argv)
    if args.temperature == 0:
        parser.error("--temperature 0: all samples would be identical; give a number above 0")

    problems = read_problems(args.task, args.data_path)[: args.limit or None]
    trained = open_model(args)
    source = {name: getattr(args, name) for name in SETTINGS}
    source["weights_sha256"] = hash_of_files(trained.paths)
    source["data_sha256"] = hash_of_files([args.data_path])
    if args.out.exists() and args.out.stat().st_size:
        with args.out.open(encoding="utf-8", errors="replace") as file:
            head = file.readline()
        require_same_run(args.out, head, source, "--out FILE")
    part = PartialResults(args.out.with_suffix(".part"), source, args.batch_size, "--out FILE")
    options = answering_options(args)
    rows = answer_all(problems, trained.model, trained.tokenizer, part=part, **options)

    accepted_rows = accepted(rows, args.task, args.keep)
    with atomic_write(args.out) as file:
        for row in accepted_rows:
            answer = {"role": "assistant", "content": row["output"].strip()}
            if row.get("reasoning"):
                answer["reasoning_content"] = row["reasoning"]
            origin = {"problem": row["problem"], "sample": row["sample"]}
            record = {"conversations": [*row["prompt"], answer], "source": source | origin}
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
    part.path.unlink()
    solved = len({row["problem"] for row in accepted_rows})
    counts = f"{len(accepted_rows)} of {len(rows)}"
    print(f"kept {counts} answers (correct, deduplicated per problem)")
    print(f"{solved} of {len(problems)} problems have one")
    print(f"written: {args.out}")


def accepted(rows, task, keep):
    """Return the rows with correct and complete answers, without duplicates, at most keep per
    problem.
    """
    result, seen = [], {}
    for row in rows:
        texts = seen.setdefault(row["problem"], set())
        text = " ".join(row["output"].split())
        if row["truncated"] or text in texts or len(texts) >= keep:
            continue
        if is_right(judge(task, row["output"], row["gold"], row["truncated"])):
            texts.add(text)
            result.append(row)
    return result


if __name__ == "__main__":
    with report_user_errors():
        main()
