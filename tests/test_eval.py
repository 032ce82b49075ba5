"""Evaluation: the same result whatever the batch size and however often it was killed; gold answers
are all right; the figures against their definitions."""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import END_THINK, THINK, UserError
from dataset import prepare
from evaluation import competition_math, generate_answers, report, run_eval, tasks
from evaluation.tasks import TASKS, judge, read_problems
from model import generation
from model.causal_lm import CausalLM, ModelConfig
from model.generation import SamplingParams
from model.tokenizer import load_tokenizer
from recipes.prepare_math import read_official
from tests.conftest import ROOT, run, run_here, write_jsonl
from tests.solutions import gsm8k_records, math_records
from trainer import trainer_utils

SHARED = ROOT.parent / "shared" / "data"


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate(trained, data, out, *flags):
    flags = ["--weight", trained / "full_sft_32.pth", "--max_new_tokens", 20, *flags]
    flags += ["--data_path", data, "--save_dir", out, "--device", "cpu"]
    return run_eval.main(list(map(str, flags)))


def without_times(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    for row in [result, *result["problems"]]:
        row.pop("seconds")
    return result


# ---------------------------------------------------------------------------------------- prepare


def test_gsm8k_is_prepared(gsm8k, gsm8k_raw, tmp_path):
    train, valid, test, text = (read(gsm8k / f"{n}.jsonl") for n in "train valid test text".split())
    assert (len(train), len(valid), len(test), len(text)) == (40, 5, 12, 40)
    official = read(gsm8k_raw / "test.jsonl")
    assert [record["question"] for record in test] == [record["question"] for record in official]
    asked = {record["question"] for record in train + valid}
    assert asked == {record["question"] for record in read(gsm8k_raw / "train.jsonl")}
    assert test[0] == {
        "conversations": [
            {"role": "user", "content": official[0]["question"]},
            {"role": "assistant", "content": "Tom has 45+0=45 eggs.\nThat is all.\n#### 45"},
        ],
        "question": official[0]["question"],
        "rationale": "Tom has 45+0=45 eggs.\nThat is all.",
        "final_answer": "45",
        "level": "2 steps",
        "type": "arithmetic",
        "source": "gsm8k",
    }
    steps = [sum(r["level"] == "2 steps" for r in part) / len(part) for part in (train, valid)]
    assert steps == pytest.approx([22 / 45, 22 / 45], abs=0.1)  # stratified
    manifest = json.loads((gsm8k / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["files"]["valid.jsonl"]["records"] == 5 and manifest["task"] == "gsm8k"
    options = [manifest[name] for name in ("seed", "calculator", "stratify")]
    assert options == [1, "strip", True]

    flags = ["--raw", gsm8k_raw, "--out", tmp_path, "--calculator", "keep"]
    assert run_here("recipes/prepare_math.py", "gsm8k", *flags).returncode == 0
    assert "<<45+0=45>>45" in read(tmp_path / "test.jsonl")[0]["rationale"]


def test_math_is_prepared_from_folders_too(tmp_path):
    for i, part in enumerate(["train/algebra"] * 9 + ["test/geometry"] * 2):
        folder = tmp_path / "raw" / part
        folder.mkdir(parents=True, exist_ok=True)
        problem = {"problem": f"What is ${i}$?", "level": "Level 1", "type": part.split("/")[1]}
        problem["solution"] = rf"It is $\boxed{{\frac{{{i}}}{{7}}}}$."
        (folder / f"{i}.json").write_text(json.dumps(problem, indent=1), encoding="utf-8")
    flags = ["--raw", tmp_path / "raw", "--out", tmp_path / "out"]
    done = run_here("recipes/prepare_math.py", "math", *flags)
    assert done.returncode == 0, done.stderr
    parts = {name: read(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 8, "valid": 1, "test": 2}
    assert [r["final_answer"] for r in parts["test"]] == [r"\frac{9}{7}", r"\frac{10}{7}"]
    assert parts["test"][0]["type"] == "geometry" and parts["test"][0]["level"] == "Level 1"


def test_the_rest_is_split_in_three_without_an_official_test(gsm8k_raw, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "all.jsonl").write_bytes((gsm8k_raw / "train.jsonl").read_bytes())
    flags = ["--raw", tmp_path / "raw", "--out", tmp_path, "--stratify", 0]
    assert run_here("recipes/prepare_math.py", "gsm8k", *flags).returncode == 0
    sizes = [len(read(tmp_path / f"{name}.jsonl")) for name in ("train", "valid", "test")]
    assert sum(sizes) == 45 and sizes[1] in (4, 5) and sizes[2] in (4, 5)


def test_unstratified_parts_are_drawn_from_all_problems_as_one(gsm8k_raw, tmp_path):
    total = [json.loads(line)["question"] for line in (gsm8k_raw / "train.jsonl").open()]
    parts = {}
    for stratify in (0, 1):
        flags = ["--raw", gsm8k_raw, "--out", tmp_path / str(stratify), "--stratify", stratify]
        assert run_here("recipes/prepare_math.py", "gsm8k", *flags).returncode == 0
        valid = read(tmp_path / str(stratify) / "valid.jsonl")
        parts[stratify] = {record["question"] for record in valid}
    drawn = prepare.assign_parts([""] * len(total), [8, 1], 1)
    assert parts[0] == {q for q, part in zip(total, drawn, strict=True) if part == 1}
    assert parts[0] != parts[1]


def test_a_record_of_something_else_is_named(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "What?", "answer": "It is 3."}])
    done = run_here(
        "recipes/prepare_math.py", "gsm8k", "--raw", tmp_path, "--out", tmp_path / "out"
    )
    assert done.returncode == 2 and "line 1" in done.stderr and "####" in done.stderr
    done = run_here("recipes/prepare_math.py", "gsm8k", "--raw", tmp_path / "no", "--out", tmp_path)
    assert done.returncode == 2 and "no such folder" in done.stderr


# ------------------------------------------------------------------------------------------- runs


def test_a_run_and_its_report(trained, gsm8k, tmp_path):
    evaluate(trained, gsm8k / "test.jsonl", tmp_path, "--task", "gsm8k", "--limit", 7)
    folder = tmp_path / "eval" / "gsm8k"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".md"]
    name = "full_sft_32_limit_7"
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    rows = result["problems"]
    assert [row["problem"] for row in rows] == list(range(7))
    assert result["totals"]["problems"] == 7 and result["scores"]["overall"] <= 1
    for row, record in zip(rows, read(gsm8k / "test.jsonl"), strict=False):
        assert row["prompt"] == [{"role": "user", "content": record["question"]}]
        assert row["gold"] == record["final_answer"]
        said = judge("gsm8k", row["output"], row["gold"], row["truncated"])
        assert said.items() <= row.items()
        assert row["tokens"] <= 20 and row["truncated"] == (row["tokens"] == 20)
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert result["weights_sha256"][:16] in text and result["command"] in text
    assert "python evaluation/run_eval.py --weight" in text and "--limit 7" in text


def test_greedy_answers_are_the_same_whatever_the_batch_size(trained, gsm8k, tmp_path):
    rows = []
    for size in (1, 5, 12):
        flags = ["--task", "gsm8k", "--batch_size", size, "--run", size]
        evaluate(trained, gsm8k / "test.jsonl", tmp_path, *flags)
        result = without_times(tmp_path / "eval" / "gsm8k" / f"{size}.json")
        rows.append(result["problems"])
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.8, "--num_samples", 3)])
def test_a_run_killed_on_the_way_ends_in_the_same_result(trained, gsm8k, tmp_path, sampling):
    flags = ["--task", "gsm8k", "--batch_size", 2, "--run", "it", *sampling]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    evaluate(trained, gsm8k / "test.jsonl", whole, *flags)
    weight = trained / "full_sft_32.pth"
    flags += ["--weight", weight, "--data_path", gsm8k / "test.jsonl", "--save_dir", killed]
    flags += ["--max_new_tokens", 20, "--device", "cpu"]
    command = [sys.executable, ROOT / "evaluation" / "run_eval.py", *flags]
    part = killed / "eval" / "gsm8k" / "it.part"
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if part.exists() and part.read_bytes().count(b"\n") > 4:
            process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            break
        time.sleep(0.005)
    process.wait()
    if part.exists():  # and a line that was only begun, as a machine that goes off may leave it
        with part.open("ab") as file:
            file.write(b'{"problem": 3, "sam')
    before = part.read_bytes() if part.exists() else b""
    done = run(*command[1:])
    assert done.returncode == 0, done.stderr
    name = "eval/gsm8k/it.json"
    one, other = without_times(whole / name), without_times(killed / name)
    assert one.pop("command") != other.pop("command")
    assert one == other
    assert not part.exists()
    assert before, "the run was over before it was killed; nothing was tested"


def test_an_unfinished_run_is_gone_on_with_and_another_ones_answers_are_kept(tmp_path):
    part, rows = tmp_path / "it.part", [{"problem": i} for i in range(5)]

    def opened(command="x", **other):
        run = {"weights_sha256": "a", "command": command, "settings": {"limit": 0}}
        return run_eval.PartialResults(part, run | other, 2, "--run NAME")

    opened().add(rows)
    for _ in range(2):  # whole batches alone, and a second stop changes nothing
        assert opened(command="y").rows == rows[:4]
    for other, says in (
        ({"weights_sha256": "b"}, "weights_sha256 was a and is b"),
        ({"settings": {"limit": 3}}, "limit was 0 and is 3"),
    ):
        with pytest.raises(UserError, match=rf"it.part is from another run: {says}.*--run NAME"):
            opened(**other)
        assert opened().rows == rows[:4]
    text = part.read_text(encoding="utf-8").splitlines()
    part.write_text("\n".join([*text[:4], "{torn", text[4], ""]), encoding="utf-8")
    assert opened().rows == rows[:2]  # of three whole lines
    part.write_bytes(b"")
    assert opened().rows == []
    assert opened(settings={"limit": 3}).rows == []  # without answers, nothing would be lost
    for damaged in ("[1]\n1\n", "{\n{}\n", '{"settings": 1}\n{}\n', "[" * 100_000 + "\n[\n"):
        part.write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match="doesn't say which"):
            opened()
        assert part.read_text(encoding="utf-8") == damaged


def test_another_question_never_replaces_stored_answers(trained, gsm8k, tmp_path):
    """Its name is another, or the command is refused; the same command goes on or runs again."""
    test, folder = gsm8k / "test.jsonl", tmp_path / "eval" / "gsm8k"
    evaluate(trained, test, tmp_path, "--task", "gsm8k")
    evaluate(trained, test, tmp_path, "--task", "gsm8k", "--limit", 3)
    evaluate(trained, test, tmp_path, "--task", "gsm8k", "--dtype", "bf16", "--limit", 1)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    names = ("full_sft_32", "full_sft_32_limit_1_dtype_bf16", "full_sft_32_limit_3")
    assert sorted(path.stem for path in folder.glob("*.json")) == list(names)
    other = write_jsonl(tmp_path / "other.jsonl", read(test)[:5])
    weights = shutil.copy(trained / "pretrain_32.pth", tmp_path / "full_sft_32.pth")
    for data, flags, says in (
        (other, [], "data_sha256 was"),
        (test, ["--weight", weights], "weights_sha256 was"),
        (test, ["--max_new_tokens", 7], "max_new_tokens was 20 and is 7"),
        (test, ["--batch_size", 3], "batch_size was 16 and is 3"),
        (test, ["--seed", 0], "seed was 1 and is 0"),
        (test, ["--run", "full_sft_32", "--limit", 3], "limit was 0 and is 3"),
    ):
        with pytest.raises(UserError, match=rf"full_sft_32.json is from .*{says}.*--run NAME"):
            evaluate(trained, data, tmp_path, "--task", "gsm8k", *flags)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (moved := tmp_path / "moved.jsonl").write_bytes(test.read_bytes())
    old = without_times(folder / "full_sft_32.json")
    evaluate(trained, moved, tmp_path, "--task", "gsm8k")
    assert without_times(folder / "full_sft_32.json")["problems"] == old["problems"]


@pytest.mark.parametrize("task", ["tiny_world", "gsm8k", "math"])
@pytest.mark.parametrize("source", ["own", "shared"])
def test_gold_answers_are_all_right(task, source, tmp_path):
    """With their own solutions instead of the model's; each but its own is wrong elsewhere."""
    own = {"gsm8k": gsm8k_records(), "math": math_records()}.get(task)
    official = own and write_jsonl(tmp_path / "official.jsonl", own)
    if source == "shared":
        official = SHARED / str(task) / "test.jsonl"
        if not official.exists():
            pytest.skip("needs the shared data")
    path = None
    if official:
        path = write_jsonl(tmp_path / "test.jsonl", read_official(task, [official]))
    problems = read_problems(task, path)
    if task == "tiny_world":
        golds = [problem["gold"] for problem in problems]
        solutions = [gold if isinstance(gold, str) else " ".join(gold) for gold in golds]
    else:
        solutions = [r.get("solution") or r["answer"] for r in read(official)]
    wrong, step = [], 1 + len(problems) // 500  # math-verify takes its time to tell two apart
    for index, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
        said = judge(task, solution, problem["gold"], truncated=False)
        assert said["verdict"] == said["strict_verdict"] == "correct" and said["error"] is None
        if index % step == 0:
            other = judge(task, solutions[index - 1], problem["gold"], truncated=False)
            wrong.append(other["verdict"] == "wrong" and other["error"] is not None)
    assert sum(wrong) > 0.8 * len(wrong)


def test_rescore_judges_again_without_the_model(trained, gsm8k, tmp_path, capsys):
    evaluate(trained, gsm8k / "test.jsonl", tmp_path, "--task", "gsm8k")
    path = tmp_path / "eval" / "gsm8k" / "full_sft_32.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    for row in result["problems"]:
        row["output"], row["verdict"] = f"The answer is {row['gold']}.", "wrong"
    path.write_text(json.dumps(result), encoding="utf-8")
    run_eval.main(["--rescore", str(path)])
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again["totals"]["accuracy"] == 1 and again["totals"]["strict_accuracy"] == 0
    assert "lenient 100.0%" in capsys.readouterr().out


def store(folder, name, rows, **more):
    """A result as run_eval.py writes it."""
    result = dict.fromkeys(("command", "weights", "weights_sha256", "data", "data_sha256"), "x")
    result |= {"task": "gsm8k", "run": name, "params": 1, "seconds": 1.0}
    result |= {"totals": {"accuracy": 0.5}, "problems": rows, **more}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def test_compare_shows_what_flipped(tmp_path, capsys):
    paths = []
    for name, verdicts in (("a", "RRWWWW"), ("b", "RWRRRW")):
        rows = [
            {
                "problem": i,
                "sample": 0,
                "prompt": [{"role": "user", "content": "?"}],
                "verdict": "correct" if mark == "R" else "wrong",
                "extracted": mark,
                "gold": "g",
                **{"output": "", "truncated": False, "tokens": 1},
            }
            for i, mark in enumerate(verdicts)
        ]
        paths.append(store(tmp_path, name, rows, data_sha256="x"))
    run_eval.main(["--compare", *map(str, paths)])
    printed = capsys.readouterr().out
    assert "3 became better, 1 worse; p = 0.625" in printed  # 2 (1 + 4) / 16
    assert [line for line in printed.splitlines() if line[0] in "+-"] == [
        *(f"+ problem {i}: 'W' -> 'R', gold 'g'" for i in (2, 3, 4)),
        "- problem 1: 'R' -> 'W', gold 'g'",
    ]
    other = store(tmp_path, "other", rows, data_sha256="y")
    with pytest.raises(UserError, match="a and other have different data"):
        run_eval.main(["--compare", str(paths[0]), str(other)])
    other = store(tmp_path, "other", rows, data_sha256="x", lenient_judge="math-verify 1")
    with pytest.raises(UserError, match="a and other were judged differently"):
        run_eval.main(["--compare", str(paths[0]), str(other)])


def test_compare_counts_problems_and_not_samples_and_only_those_in_both(tmp_path, capsys):
    """Problem 0: two samples of three right, then one. Problem 1 is only in the first run."""
    paths = []
    for name, verdicts in (("a", ["RRW", "RRR"]), ("b", ["WWR"])):
        rows = [
            {
                "problem": problem,
                "sample": sample,
                "prompt": [{"role": "user", "content": "?"}],
                "verdict": "correct" if mark == "R" else "wrong",
                "extracted": mark,
                "gold": "g",
                **{"output": "", "truncated": False, "tokens": 1},
            }
            for problem, marks in enumerate(verdicts)
            for sample, mark in enumerate(marks)
        ]
        paths.append(store(tmp_path, name, rows, data_sha256="x"))
    run_eval.main(["--compare", *map(str, paths)])
    assert capsys.readouterr().out.splitlines() == [
        "1 problems in both; a 66.7%, b 33.3%",
        "0 became better, 1 worse; p = 1.000 (exact sign test)",
        "- problem 0: 'R', 'R', 'W' -> 'W', 'W', 'R', gold 'g'",
    ]


def test_a_question_of_a_long_chat_names_its_depth(tmp_path):
    problem = {"conversations": [{"role": "user", "content": "Who?"}], "expected": ["Nelina"]}
    problems = [problem | {"category": "about"}, problem | {"category": "recent", "depth": 8}]
    path = write_jsonl(tmp_path / "x.jsonl", problems)
    first, second = read_problems("tiny_world", path)
    assert (first.get("level"), first["type"]) == (None, "about")
    assert (second["level"], second["type"]) == ("after 8 exchanges", "recent")


def test_few_shot_prompts_show_the_same_solved_problems(gsm8k):
    problems = read_problems("gsm8k", gsm8k / "test_few_shot.jsonl")
    plain = read_problems("gsm8k", gsm8k / "test.jsonl")
    train = read(gsm8k / "train.jsonl")
    solved = {r["question"]: r["conversations"][-1]["content"] for r in train}
    for problem, same in zip(problems, plain, strict=True):
        *turns, last = problem["prompt"]
        assert len(turns) == 8 and turns == problems[0]["prompt"][:-1]
        asked, answered = turns[::2], turns[1::2]
        for question, answer in zip(asked, answered, strict=True):
            assert solved[question["content"]] == answer["content"]
        assert [last] == same["prompt"] and problem["gold"] == same["gold"]


def test_a_prompt_may_ask_for_the_steps(gsm8k):
    problems = read_problems("gsm8k", gsm8k / "test_chain_of_thought.jsonl")
    for problem, same in zip(problems, read_problems("gsm8k", gsm8k / "test.jsonl"), strict=True):
        (message,) = problem["prompt"]
        question = same["prompt"][0]["content"]
        assert message["content"] == (
            f"{question}\nThink step by step. Then write #### and the number."
        )


@pytest.mark.parametrize("task, records", [("gsm8k", gsm8k_records()), ("math", math_records())])
def test_official_files_are_sent_to_the_recipe(task, records, tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", records)
    with pytest.raises(UserError, match="line 1: .* is missing; .* recipes/prepare_math.py"):
        read_problems(task, path)


def test_mistakes_are_told_in_a_sentence(trained, gsm8k, tmp_path, capsys):
    test = gsm8k / "test.jsonl"
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    for data, flags, says in (
        (test, ["--task", "gsm8k", "--num_samples", 3], "--temperature"),
        (test, ["--task", "gsm8k", "--batch_size", 0], "from 1 to"),
        (test, ["--task", "math"], "line 1: record is from gsm8k"),
        (test, ["--task", "tiny_world"], "line 1"),
        *((tmp_path / "empty.jsonl", ["--task", name], "is empty") for name in TASKS),
        (tmp_path / "no.jsonl", ["--task", "gsm8k"], "no.jsonl"),
        (test, ["--rescore", test], "a result of run_eval.py"),
    ):
        with pytest.raises((UserError, SystemExit)) as error:
            evaluate(trained, data, tmp_path, *flags)
        assert says in f"{error.value} {capsys.readouterr().err}", flags


@pytest.mark.parametrize("script", ["evaluation/run_eval.py", "recipes/rejection_sample.py"])
def test_wrong_numbers_of_the_draws_are_told_before_any_work(script, tmp_path):
    flags = ["--data_path", tmp_path / "none.jsonl", "--weight", "nowhere"]
    for name, value in (
        *(("temperature", text) for text in ("nan", "inf", "-1", "hot", "101")),
        *(("seed", text) for text in ("-1", "9" * 20, "1.5")),
        *(("limit", "-1"), ("batch_size", "0"), ("max_new_tokens", "0"), ("num_samples", "0")),
    ):
        done = run_here(script, *flags, f"--{name}", value)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"--{name} {value}: give a " in done.stderr
    done = run_here("evaluation/run_eval.py", "--weight", "none")
    assert done.returncode == 2 and "--weight none: an untrained model" in done.stderr


def test_extreme_draws_that_are_allowed_are_drawn(trained, gsm8k, tmp_path):
    """The coldest are greedy; the largest seed is a seed like any other."""
    test, options = gsm8k / "test.jsonl", ["--task", "gsm8k", "--limit", 3, "--run"]
    for name, more in (
        ("greedy", []),
        ("cold", ["--temperature", 1e-40]),
        ("seed", ["--temperature", 1, "--seed", 2**63 - 1]),
    ):
        evaluate(trained, test, tmp_path, *options, name, *more)
    greedy, cold, drawn = (
        [row["output"] for row in without_times(tmp_path / f"eval/gsm8k/{name}.json")["problems"]]
        for name in ("greedy", "cold", "seed")
    )
    assert greedy == cold != drawn


MALFORMED = [  # of a Tiny World problem: its field, what is in it, what is said
    *(("conversations", value, "a conversation is a list") for value in ([], "Hi", None, 5, {})),
    ("conversations", ["Hi"], "message 1 is not"),
    ("conversations", [{"role": "user", "content": 7}], "content 7, which is not text"),
    ("conversations", [{"role": "user", "content": "\ud800"}], "unpaired surrogate"),
    ("conversations", [{"role": ["user"], "content": "Hi"}], "has role"),
    *(("expected", value, "a valid gold answer") for value in (None, 5, {"a": 1}, [1], [["a"]])),
    *((name, ..., f"'{name}' is missing") for name in ("conversations", "expected", "category")),
]


@pytest.mark.parametrize(("field", "value", "says"), MALFORMED)
def test_a_malformed_problem_is_named_with_its_line(tmp_path, field, value, says):
    good = {"category": "any", "conversations": [{"role": "user", "content": "Hi?"}]}
    good |= {"expected": ["Hi"]}
    bad = {name: part for name, part in (good | {field: value}).items() if part is not ...}
    path = write_jsonl(tmp_path / "p.jsonl", [])
    path.write_text("\n".join(map(json.dumps, [good, bad])), encoding="utf-8")
    with pytest.raises(UserError, match=r"p.jsonl, line 2: ") as error:
        read_problems("tiny_world", path)
    assert says in str(error.value)


def test_kinds_of_problems_that_are_not_text_are_counted_as_text(tmp_path):
    """An evaluation of hours must not end in an error when it counts them."""
    record = {"category": 3, "expected": "x", "conversations": [{"role": "user", "content": "?"}]}
    path = write_jsonl(tmp_path / "p.jsonl", [record, record | {"category": [1]}])
    assert [problem["type"] for problem in read_problems("tiny_world", path)] == ["3", "[1]"]


@pytest.mark.parametrize("turns", [5, ["x"], [{"role": "user"}]])
def test_a_prompt_that_is_no_conversation_is_named(gsm8k, tmp_path, turns):
    problems = [record | {"prompt": turns} for record in read(gsm8k / "test.jsonl")]
    path = write_jsonl(tmp_path / "test.jsonl", problems)
    with pytest.raises(UserError, match="test.jsonl, line 1: "):
        read_problems("gsm8k", path)


@pytest.mark.parametrize(
    ("where", "field", "values"),
    [
        ("result", "task", ["sums", None, 5]),
        ("result", "totals", [None, 5, {}, {"accuracy": "all"}]),
        ("result", "problems", [[], None, 5, "x", {}, [5], [[]]]),
        *(("result", name, [None, 5]) for name in ("run", "data_sha256", "weights", "command")),
        *(("result", name, [None, "x"]) for name in ("params", "seconds")),
        *(("row", name, [None, "x", [5]]) for name in ("problem", "sample", "tokens", "prompt")),
        ("row", "gold", [None, 5, ["18"], {}]),
        ("row", "output", [None, 5, ["18"]]),
        ("row", "truncated", [None, "no"]),
        *(("row", name, [5, ["x"]]) for name in ("level", "type", "verdict")),
    ],
)
def test_a_result_that_was_tampered_with_is_refused(evaluated, tmp_path, where, field, values):
    result, path = json.loads(evaluated.read_text(encoding="utf-8")), tmp_path / "it.json"
    for value in values:
        row = result["problems"][0] | ({field: value} if where == "row" else {})
        crafted = result | {"problems": [row]} | ({field: value} if where == "result" else {})
        path.write_text(json.dumps(crafted), encoding="utf-8")
        for flags in (["--rescore", path], ["--compare", path, evaluated]):
            done = run_here("evaluation/run_eval.py", *flags)
            assert done.returncode == 2 and "it.json isn't a result of run_eval.py" in done.stderr
        assert json.loads(path.read_text(encoding="utf-8")) == crafted
    path.write_text(json.dumps(result), encoding="utf-8")
    assert run_here("evaluation/run_eval.py", "--rescore", path).returncode == 0


def test_an_answer_is_truncated_unless_it_came_to_its_stop_token(monkeypatch):
    """Its length says nothing: it may end at its last token, or fill the context before that."""
    steps = [[5, 6, 2, 0], [5, 2, None, None], [5, None, None, None]]
    monkeypatch.setattr(generation, "generate", lambda *a, **k: iter(steps))
    for longest in (3, 50):
        got = generation.generate_batch(None, [[3]] * 4, SamplingParams(longest))
        assert got == [([5, 5, 5], False), ([6], True), ([], True), ([], True)]


def test_reasoning_is_stored_apart_from_the_answer_and_not_judged(monkeypatch):
    """A model that thinks "18" and answers "It is 5.", and one that never stops thinking."""
    tokenizer = load_tokenizer()
    wrote = [
        [THINK, *tokenizer.encode("\n18\n").ids, END_THINK, *tokenizer.encode("\n\nIt is 5.").ids],
        [THINK, *tokenizer.encode("\nHm").ids],
    ]
    monkeypatch.setattr(
        generate_answers, "generate_batch", lambda *a, **k: [(wrote[0], True), (wrote[1], False)]
    )
    asked = [{"prompt": [{"role": "user", "content": "?"}], "gold": "It is 5."}] * 2
    options = {"num_samples": 1, "batch_size": 2, "seed": 1}
    model = CausalLM(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    rows = generate_answers.answer_all(asked, model, tokenizer, SamplingParams(), **options)
    assert [(row["output"], row["reasoning"]) for row in rows] == [("It is 5.", "18"), ("", "Hm")]
    assert judge("tiny_world", rows[0]["output"], "It is 5.", False)["verdict"] == "correct"


def test_each_batch_has_draws_of_its_own_and_a_repeated_one_the_same():
    model = CausalLM(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    asked = [{"prompt": [{"role": "user", "content": "Hm?"}], "gold": "x"}]
    options, params = {"num_samples": 6, "batch_size": 2}, SamplingParams(8, 5)

    def drawn(seed):
        rows = generate_answers.answer_all(
            asked, model, load_tokenizer(), params, seed=seed, **options
        )
        return [row["output"] for row in rows]

    assert drawn(1) == drawn(1) and len(set(drawn(1))) == 6
    assert not {*drawn(0)} & {*drawn(1)} and not {*drawn(1)} & {*drawn(2)}


# ---------------------------------------------------------------------------------------- figures


def test_wilson_against_the_equation_that_defines_it():
    """Its ends are the shares from which the one seen is 1.96 standard errors away."""
    for right, n in ((0, 10), (1, 10), (5, 10), (10, 10), (137, 200)):
        for end in report.wilson(right, n):
            error = (end * (1 - end) / n) ** 0.5
            assert abs(right / n - end) == pytest.approx(1.96 * error, abs=1e-9)


def test_pass_at_k_against_counting():
    marks = [True, True, False, False, False]
    for k in range(1, 6):
        draws = list(itertools.combinations(marks, k))
        share = sum(map(any, draws)) / len(draws)
        assert report.pass_at(k, 5, 2) == pytest.approx(share)


def test_expected_words_are_whole_words_and_all_of_them():
    for output, right in (
        ("She likes bells and red kites.", True),
        ("Bells, bells: bells and a red kite.", False),
        ("She likes doorbells and red kites.", False),
        ("bells", False),
    ):
        said = judge("tiny_world", output, ["bells", "red kites"], False)
        assert (said["verdict"] == "correct") is right
    assert judge("tiny_world", " It is 5. ", "It is 5.", False)["verdict"] == "correct"
    assert judge("tiny_world", "It is 5. Or 6.", "It is 5.", False)["verdict"] == "wrong"


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_kinds_of_error_say_what_is_wrong_with_an_answer(task):
    for output, truncated, error in (
        ("So it is \\boxed{18}", False, None),
        ("So it is \\boxed{18}", True, None),  # it is right all the same
        ("So it is \\boxed{19}", False, "wrong"),
        ("So it is \\boxed{19}", True, "truncated"),
        ("", False, "no_answer"),
        ("I wonder", True, "truncated"),
        ("I wonder", False, "no_answer"),
    ):
        assert judge(task, output, "18", truncated)["error"] == error
    assert judge("math", r"\boxed{(3, -4)}", "18", False)["error"] == "wrong"
    assert judge("math", r"\boxed{3 +}", "18", False)["error"] == "wrong"


def test_samples_without_an_answer_have_no_vote():
    def group(*extracted):
        rows = [{"extracted": text, "verdict": "wrong"} for text in extracted]
        return [row | ({"verdict": "correct"} if row["extracted"] == "1" else {}) for row in rows]

    def same(a, b):
        return float(a) == float(b)

    assert report.majority(group(None, None, None, "1"), same)
    assert report.majority(group("2", "1", "1", "2", "1"), same)
    assert not report.majority(group("1", "2", "2.0"), same)
    assert not report.majority(group(None, None), same)


def test_shares_are_counted_by_hand():
    rows = [("Level 2", True), ("Level 10", False), ("Level 2", False), (None, True)]
    verdicts = {True: "correct", False: "wrong"}
    rows = [{"level": level, "verdict": verdicts[right]} for level, right in rows]
    assert report.accuracy_by(rows, "level") == {"Level 2": [1, 2], "Level 10": [0, 1]}
    assert list(report.accuracy_by(rows, "level")) == ["Level 2", "Level 10"]
    assert report.accuracy_by(rows[:0], "level") == {}


def test_totals_of_several_samples():
    def row(problem, sample, extracted, gold="1"):
        verdict = "correct" if extracted == gold else "wrong"
        more = {"error": None if verdict == "correct" else "wrong", "truncated": False}
        more |= {"strict_verdict": verdict, "tokens": 10, "level": None, "type": None}
        said = {"extracted": extracted, "verdict": verdict}
        return {"problem": problem, "sample": sample} | said | more

    rows = [row(0, i, answer) for i, answer in enumerate("1221")]  # a tie: the earliest wins
    rows += [row(1, i, answer) for i, answer in enumerate("1222")]
    rows += [row(2, i, answer) for i, answer in enumerate("1131")]
    found = report.compute_metrics(rows, lambda a, b: a == b)
    assert found["accuracy"] == 6 / 12 and found["problems"] == 3
    assert found["majority"] == 2 / 3
    assert found["pass_at"]["4"] == 1 and found["pass_at"]["1"] == pytest.approx(0.5)
    assert found["pass_at"]["2"] == pytest.approx((5 / 6 + 3 / 6 + 6 / 6) / 3)
    # More samples of the same problems make no interval narrower: problems are what is drawn.
    more = [row | {"sample": row["sample"] + 4 * turn} for turn in range(9) for row in rows]
    again = report.compute_metrics(more, lambda a, b: a == b)
    for name in ("accuracy_95", "strict_accuracy_95"):
        assert again[name] == pytest.approx(found[name])
        assert found[name] == pytest.approx(report.wilson(1.5, 3))


def test_weights_are_hashed_without_being_held_in_memory_twice(
    trained, gsm8k, tmp_path, monkeypatch
):
    whole = (trained / "full_sft_32.pth").read_bytes()
    flags = ["--task", "gsm8k", "--data_path", gsm8k / "test.jsonl", "--save_dir", tmp_path]
    flags += ["--weight", trained / "full_sft_32.pth", "--limit", 1, "--max_new_tokens", 1]
    read = Path.read_bytes
    small = lambda path: read(path) if path.suffix != ".pth" else pytest.fail("read whole")  # noqa: E731
    monkeypatch.setattr(Path, "read_bytes", small)
    done = run_here("evaluation/run_eval.py", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "eval/gsm8k/full_sft_32_limit_1.json").read_text("utf-8"))
    assert result["weights_sha256"] == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("sharded", [False, True])
def test_each_process_answers_its_share_of_the_problems(gsm8k, monkeypatch, sharded):
    """A sharded model is gathered for each token, so there all answer everything."""
    task, asked = generate_answers.TaskScore("gsm8k", gsm8k / "test.jsonl"), []

    def answer_all(problems, *_, **options):
        asked.append([problem["gold"] for problem in problems])
        return [{**p, "output": f"#### {p['gold']}", "truncated": False} for p in problems[::2]]

    monkeypatch.setattr(generate_answers, "answer_all", answer_all)
    monkeypatch.setattr(trainer_utils, "generating", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(generate_answers, "is_right", lambda verdict: True)
    solved, model = [], SimpleNamespace(**{"reshard": None} if sharded else {})
    for rank in range(3):
        keep = lambda value: solved.append(value) or [value]  # noqa: E731
        compute = SimpleNamespace(rank=rank, world_size=3, sum=keep)
        trainer_utils.task_score(model, None, task, compute)
    golds = [problem["gold"] for problem in task.problems]
    assert asked == ([golds] * 3 if sharded else [golds[rank::3] for rank in range(3)])
    assert solved == ([] if sharded else [len(golds[rank::3][::2]) for rank in range(3)])
    everything = SimpleNamespace(rank=0, world_size=3, sum=lambda _: [sum(solved)])
    score = trainer_utils.task_score(model, None, task, everything)
    num_solved = len(golds[::2]) if sharded else sum(solved)
    assert score == pytest.approx(num_solved / len(golds))


def test_every_megabyte_of_weights_is_hashed(tmp_path, monkeypatch):
    """Of a file, and of the parts of a folder in the order of their names."""
    content = bytes(range(256)) * 10_000  # 2.6 MB
    (tmp_path / "x.pth").write_bytes(content)
    for name, part in (("b", content[:1_500_000]), ("a", content[1_500_000:])):
        (tmp_path / f"{name}.safetensors").write_bytes(part)
    for paths, expected in (
        ([tmp_path / "x.pth"], content),
        ([tmp_path], content[1_500_000:] + content[:1_500_000]),
        ([tmp_path / "x.pth", tmp_path / "x.pth"], content * 2),  # weights and adapters
    ):
        assert run_eval.hash_of_files(paths) == hashlib.sha256(expected).hexdigest()


def test_the_seconds_of_an_answer_are_an_even_share_of_its_batch(monkeypatch):
    """Three answers in batches of two: the first two share 6 s, the third has 6 s alone."""
    now = itertools.count(0, 6)
    monkeypatch.setattr(generate_answers.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(
        generate_answers,
        "generate_batch",
        lambda m, asked, *_, **more: [([9], True)] * len(asked),
    )
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=99))
    problem = {"prompt": [{"role": "user", "content": "Hm?"}], "gold": "x"}
    options = {"num_samples": 1, "batch_size": 2, "seed": 1}
    rows = generate_answers.answer_all(
        [problem] * 3, model, load_tokenizer(), SamplingParams(), **options
    )
    assert [row["seconds"] for row in rows] == [3.0, 3.0, 6.0]
    assert [row["problem"] for row in rows] == [0, 1, 2]
    assert all(row["tokens"] == 1 and not row["truncated"] for row in rows)


def test_a_run_is_named_after_its_weights_and_what_is_not_usual():
    usual = {"num_samples": 1, "temperature": 0.0, "limit": 0, "dtype": "fp32"}
    usual |= {"use_compile": False, "lora": None}
    parser = SimpleNamespace(get_default=usual.get)
    for changes, name in (
        ({}, "full_sft_32"),
        ({"lora": "out/lora_b_32.pth"}, "full_sft_32_lora_b_32"),
        ({"lora": "b", "limit": 5, "num_samples": 4}, "full_sft_32_lora_b_num_samples_4_limit_5"),
    ):
        args = SimpleNamespace(**usual | changes)
        assert run_eval.run_name("out/full_sft_32.pth", args, parser) == name


def test_without_math_verify_the_strict_score_is_the_overall_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(competition_math, "lenient_judge", lambda: None)
    prompt = [{"role": "user", "content": "?"}]
    row = {
        "prompt": prompt,
        "truncated": False,
        "tokens": 3,
        "seconds": 0.1,
        "level": "Level 1",
        "type": "Algebra",
    }
    answers = [(r"\boxed{2}", "2"), (r"\boxed{3}", "2"), (r"\boxed{4}", "4"), ("5", "5")]
    rows = [
        row | {"problem": n, "sample": sample, "output": output, "gold": gold}
        for n, (output, gold) in enumerate(answers)
        for sample in range(2)
    ]
    result = {"task": "math", "run": "x", "weights": "w", "data": "d", "settings": {}, "params": 1}
    result |= {"command": "c", "seconds": 1.0, "weights_sha256": "", "data_sha256": ""}
    scores = run_eval.judge_and_report(result | {"problems": rows}, tmp_path / "x.json")
    assert scores["overall"] == scores["Algebra"] == 0.5  # the last has no box
    printed = capsys.readouterr().out
    assert "pip install math-verify, then --rescore" in printed
    assert generate_answers.read_result(tmp_path / "x.json")["totals"]["accuracy"] is None
    assert re.search(r"^pass@2 +50.0%$", printed, re.M)


def test_the_ids_that_exist_are_needed_for_sid(tmp_path):
    for text in (None, "[", "5"):
        if text:
            (tmp_path / "sids.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="sids.json.*cannot be read"):
            tasks.decoding_constraint("sid", tmp_path / "test.jsonl", load_tokenizer())
    assert tasks.decoding_constraint("math", tmp_path / "test.jsonl", None) is None


def test_a_score_while_training_is_that_of_run_eval_on_the_first_200_problems(tmp_path):
    problem = {"problem": "What?", "solution": r"\boxed{1}", "level": "Level 1", "type": "Algebra"}
    path = write_jsonl(tmp_path / "raw.jsonl", [problem | {"problem": f"{i}?"} for i in range(230)])
    test = write_jsonl(tmp_path / "test.jsonl", read_official("math", [path]))
    task = generate_answers.TaskScore("math", test)
    assert len(task.problems) == 200
    assert task.params == SamplingParams(256, 0.0)
    tiny = generate_answers.TaskScore("tiny_world", None)
    assert len(tiny.problems) == 910 and tiny.params == SamplingParams(120, 0.0)
