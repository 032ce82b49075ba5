"""dataset/prepare.py: what it says of data is what stands in it."""

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from dataset import prepare
from dataset.jsonl import read_records
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import best_fit_decreasing
from dataset.step_plan import epoch_plan
from model.chat_template import render
from model.tokenizer import load_tokenizer
from recipes.prepare_math import official_files, read_official
from tests.conftest import ROOT, chat, run, run_here, write_jsonl


@pytest.fixture
def mixed(tmp_path):
    """Ten good records, one of them twice; two bad ones; an answer that nobody asked for."""
    path = tmp_path / "mixed.jsonl"
    talks = [chat(f"What is {i}?", f"It is {i}.", "Sure?", "Yes.") for i in range(8)]
    unasked = {
        "conversations": [{"role": "assistant", "content": "Hello."}, *talks[0]["conversations"]]
    }
    lines = [*map(json.dumps, talks), "{", json.dumps(talks[3]), '{"conversations": [7]}']
    path.write_text("\n".join([*lines, json.dumps(unasked)]), encoding="utf-8")
    return path


def test_check_reports_what_is_in_the_file(mixed):
    done = run("dataset/prepare.py", "check", "--data_path", mixed, "--json")
    assert done.returncode == 1, done.stderr  # for there are bad records
    (table,) = json.loads(done.stdout)
    assert (table["format"], table["records"], table["bad"]) == ("conversations", 10, 2)
    assert [number for number, _ in table["bad_lines"]] == [9, 11]
    assert table["duplicates"] == [10]
    assert table["notes"] == {"leading assistant turns dropped": 1}
    assert table["roles"] == {"user": 20, "assistant": 20}
    assert table["answers_per_conversation"] == {"2": 10}
    talks = [talk for _, talk in read_records(mixed) if isinstance(talk, dict)]
    rendered = [render(t["conversations"][-4:]) for t in talks if t["conversations"] != [7]]
    assert table["tokens"] == sum(len(ids) for ids, _ in rendered)
    supervised = sum(sum(mask) for _, mask in rendered)
    assert table["supervised"] == pytest.approx(supervised / table["tokens"])
    assert table["length_quantiles"]["1"] == max(len(ids) for ids, _ in rendered)
    assert table["length_quantiles"]["0"] == min(len(ids) for ids, _ in rendered)


def test_check_of_good_data_ends_with_0_and_reads_as_a_table(data):
    files = [data / "sft.jsonl", data / "pretrain.jsonl"]
    done = run_here("dataset/prepare.py", "check", "--data_path", *files)
    assert done.returncode == 0, done.stderr
    tables = [dict(re.findall(r"(\w+) +(.*)", table)) for table in done.stdout.split("\n\n")]
    found = [(table["format"], table["records"], table["bad"]) for table in tables]
    assert found == [("conversations", "40", "0"), ("text", "60", "0")]
    for table, path in zip(tables, files, strict=True):
        (expected,) = json.loads(
            run_here("dataset/prepare.py", "check", "--data_path", path, "--json").stdout
        )
        assert table["file"] == str(path)
        assert table["packed_rows"] == str(expected["packed_rows"])
        assert table["packing_efficiency"] == f"{expected['packing_efficiency']:.3f}"


def test_check_names_the_lines_of_bad_records_and_of_duplicates(mixed):
    done = run_here("dataset/prepare.py", "check", "--data_path", mixed)
    assert done.returncode == 1
    assert re.findall(r"^  line (\d+): (?:not JSON|message 1)", done.stdout, re.MULTILINE) == [
        "9",
        "11",
    ]
    assert re.search(r"^duplicates +records: 1, lines: \[10\]$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_check_says_what_a_run_would_do(data, name):
    """Its rows and steps are those of the plan; its shares are those of the batches."""
    path, size = data / f"{name}.jsonl", 3
    flags = ["--data_path", path, "--max_seq_len", 40, "--batch_size", size, "--json"]
    (table,) = json.loads(run_here("dataset/prepare.py", "check", *flags).stdout)
    kind = SFTDataset if name == "sft" else PretrainDataset
    dataset, whole = (kind(path, load_tokenizer(), length) for length in (40, 1000))
    how = {"seed": 1, "packing": True, "max_seq_len": 40, "batch_size": size}
    args = SimpleNamespace(**how, accumulation_steps=1, num_workers=0)
    plan = epoch_plan(dataset, range(len(dataset)), args, 0)
    rows = best_fit_decreasing(dataset.lengths.tolist(), 40)
    assert (table["samples"], table["packed_rows"]) == (len(dataset), len(rows))
    assert table["steps_per_epoch"] == len(plan) == -(-len(rows) // size)
    assert table["packing_efficiency"] == pytest.approx(sum(dataset.lengths) / len(rows) / 40)
    assert table["longer"] == sum(whole.lengths > 40) and table["dropped"] == dataset.num_dropped
    lengths, labels = sum(whole.lengths), [labels[1:] for _, labels in whole]
    assert table["tokens"] == lengths
    assert table["supervised"] == pytest.approx(sum(int((x >= 0).sum()) for x in labels) / lengths)
    assert table["length_quantiles"]["1"] == max(whole.lengths)
    assert table["length_quantiles"]["0"] == min(whole.lengths)
    words = load_tokenizer().decode([int(i) for ids, _ in whole for i in ids])
    assert table["characters_per_token"] == pytest.approx(len(words) / lengths, rel=0.1)


def green(shown):
    return "".join(re.findall(r"\033\[32m(?:\033\[4m)?(.*?)\033\[0m", shown, re.DOTALL))


def test_show_of_text_leaves_out_the_first_token_and_shows_whole_characters(tmp_path):
    for text in ("one two", "日 🙂 naïve"):
        path = write_jsonl(tmp_path / "x.jsonl", [{"text": text}, {"text": "second"}])
        shown = shown_in_a_terminal("--data_path", path, "-n", 1)
        first = load_tokenizer().decode(load_tokenizer().encode(text).ids[:1])
        first = first.strip(
            "\N{REPLACEMENT CHARACTER}"
        )  # a part of a character is shown by its last
        assert green(shown) == text.removeprefix(first) + "<|endoftext|>"
        assert "second" not in shown


def shown_in_a_terminal(*flags):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        assert prepare.main(["show", *map(str, flags)]) == 0
    return terminal.getvalue()


def test_show_colours_what_is_supervised(data):
    shown = shown_in_a_terminal("--data_path", data / "sft.jsonl", "-n", 1)
    assert green(shown) == "It is a number. <|im_end|>" and "[brackets]" not in shown
    plain = re.sub(r"\033\[\d+m", "", shown)
    assert "<|im_start|>user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n" in plain


def test_show_writes_no_escape_codes_into_a_pipe_or_where_no_color_is_set(data, monkeypatch):
    flags = ["--data_path", data / "sft.jsonl", "-n", 1]
    piped = run_here("dataset/prepare.py", "show", *flags).stdout
    assert "supervised tokens are in [brackets]" in piped
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown_in_a_terminal(*flags) == piped
    assert "\033" not in piped and "brackets" in piped
    assert (
        "user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n[It is a number. <|im_end|>]" in piped
    )


def test_show_writes_a_page_that_is_whole_and_escaped(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [chat("<script>alert(1)</script> für", "é & <b>")])
    page = tmp_path / "page.html"
    flags = ["--data_path", path, "--html", page, "--ids", "--packing", 1]
    assert run_here("dataset/prepare.py", "show", *flags).returncode == 0

    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.seen, self.text = Counter(), ""

        def handle_starttag(self, tag, attributes):
            self.seen[tag] += 1
            assert not {"src", "href"} & {name for name, _ in attributes}  # needs nothing else

        def handle_data(self, text):
            self.text += text

    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    assert tags.seen["script"] == 0 and tags.seen["section"] == 1
    written = re.sub(r"\[\d+\]", "", tags.text)  # without the ids of the tokens
    assert "<script>alert(1)</script> für" in written and "é & <b>" in written
    # Each sign is escaped, and none is read as text by chance.
    assert page.read_text(encoding="utf-8").count("&lt;") == tags.text.count("<") > 3


def test_split_takes_every_record_once_and_keeps_the_shares(tmp_path):
    records = [{"text": f"é {i}", "kind": "rare" if i % 5 == 0 else "common"} for i in range(100)]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    command = ["dataset/prepare.py", "split", "--stratify", "kind", path, "--out"]
    for name in ("a", "b"):
        assert run_here(*command, tmp_path / name).returncode == 0
    parts = {}
    for name in ("train", "valid", "test"):
        file = tmp_path / "a" / f"{name}.jsonl"
        assert file.read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
        parts[name] = [record for _, record in read_records(file)]
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 80,
        "valid": 10,
        "test": 10,
    }
    assert all(sum(r["kind"] == "rare" for r in part) * 5 == len(part) for part in parts.values())
    assert sorted(r["text"] for part in parts.values() for r in part) == sorted(
        record["text"] for record in records
    )
    manifest = json.loads((tmp_path / "a/manifest.json").read_text(encoding="utf-8"))
    assert manifest["files"]["valid.jsonl"]["records"] == 10 and manifest["seed"] == 1
    for name, said in manifest["files"].items():
        assert said["sha256"] == hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest()


def test_a_part_of_ratio_0_is_left_empty(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"{i}"} for i in range(20)])
    command = ["dataset/prepare.py", "split", path, "--out", tmp_path, "--ratios", "8:0:2"]
    assert run_here(*command).returncode == 0
    sizes = {file.stem: sum(1 for _ in file.open()) for file in tmp_path.glob("t*.jsonl")}
    assert sizes == {"train": 16, "test": 4}
    valid = tmp_path / "valid.jsonl"
    assert not valid.exists() or valid.read_bytes() == b""


def test_mistakes_are_told_in_a_sentence(tmp_path, data):
    for command, says in (
        (["check", "--data_path", tmp_path / "no.jsonl"], "no.jsonl"),
        (["split", "--ratios", "8:x", data / "sft.jsonl", "--out", tmp_path], "--ratios 8:x"),
        (["split", "--stratify", "no", data / "sft.jsonl", "--out", tmp_path], "line 1"),
    ):
        done = run_here("dataset/prepare.py", *command)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_final_numbers_of_gsm8k_have_no_commas(tmp_path):
    problem = {"question": "How many?", "answer": "He has 1,000+234.\n#### 1,234 "}
    path = write_jsonl(tmp_path / "test.jsonl", [problem])
    (record,) = read_official("gsm8k", [path])
    assert record["final_answer"] == "1234"
    assert record["rationale"] == "He has 1,000+234."  # of the rest, nothing is changed
    assert record["conversations"][1]["content"] == "He has 1,000+234.\n#### 1234"


def test_what_is_neither_to_train_on_nor_the_test_is_left_out(tmp_path):
    for name in ("test", "test_socratic", "manifest", "easy", "hard"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{}])
    names = {
        part: [path.stem for path in files] for part, files in official_files(tmp_path).items()
    }
    assert names == {"train": ["easy", "hard"], "test": ["test"]}
    write_jsonl(tmp_path / "train.jsonl", [{}])
    assert [path.stem for path in official_files(tmp_path)["train"]] == ["train"]


def test_reasoning_traces_keep_their_braces_and_mask_the_prompt(tmp_path):
    record = {
        "question": r"What is \frac{1}{2} of {correct}?",
        "correct": "{3}",
        "incorrect": r"\boxed{6}",
        "cot": "doubled {it}",
        "misconception": "half is twice",
    }
    example = {"question": "2+2?", "incorrect": "22", "reason": "joined {question}"}
    path = write_jsonl(tmp_path / "x.jsonl", [record, record | {"example_cots": [example]}] * 10)
    done = run_here("recipes/misconceptions.py", path, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = [r for name in ("train", "valid") for _, r in read_records(tmp_path / f"{name}.jsonl")]
    prompts = {record["conversations"][0]["content"] for record in found}
    sizes = [sum(1 for _ in read_records(tmp_path / f"{n}.jsonl")) for n in ("train", "valid")]
    assert sizes == [18, 2]
    assert len(found) == 20 and len(prompts) == 2  # a template for every second record
    plain, shown = sorted(prompts, key=len)
    assert plain.startswith(
        "Question: What is \\frac{1}{2} of {correct}?\nCorrect answer: {3}\n"
        "A student answered: \\boxed{6}\n"
    )
    assert shown.startswith("Question: 2+2?\nA student answered: 22\nReason: joined {question}\n\n")
    assert "A student was asked: What is" in shown  # the second template
    ids, mask = render(found[0]["conversations"])
    tokenizer = load_tokenizer()
    learned = [token for token, learns in zip(ids, mask, strict=True) if learns]
    expected = "<COT_START>doubled {it}<COT_END>half is twice"
    assert tokenizer.decode(learned, skip_special_tokens=False) == expected + "<|im_end|>"
    assert (tmp_path / "tokens.txt").read_text() == "<COT_START>\n<COT_END>\n"

    done = run_here(
        *["recipes/misconceptions.py", write_jsonl(path, [record | {"example_cots": ["one"]}])],
        *["--out", tmp_path],
    )
    assert done.returncode == 2 and "line 1" in done.stderr
    del record["cot"]
    done = run_here("recipes/misconceptions.py", write_jsonl(path, [record]), "--out", tmp_path)
    assert done.returncode == 2 and "line 1" in done.stderr and "cot" in done.stderr


SCRIPTS = {"cot": ["recipes/misconceptions.py"], "sid": ["recipes/sid.py"]}
SCRIPTS |= {name: ["recipes/prepare_math.py", name] for name in ("gsm8k", "math")}
SCRIPTS |= {name: ["dataset/prepare.py", name] for name in ("check", "show", "split")}


def prepare_by(name, *flags):
    return run_here(*SCRIPTS[name], *flags)


LINK = pytest.param(True, marks=pytest.mark.skipif(sys.platform == "win32", reason="links"))


def test_every_splitting_command_takes_its_seed(tmp_path, gsm8k_raw, shop):
    """The same seed gives the same parts, another seed others, of the same records."""
    traces = [
        {name: f"{i}" for name in ("question", "correct", "incorrect", "cot", "misconception")}
        for i in range(40)
    ]
    path = write_jsonl(tmp_path / "x.jsonl", traces)
    for command in (
        ["split", path],
        ["cot", path],
        ["gsm8k", "--raw", gsm8k_raw],
        ["sid", "--raw", shop],
    ):
        found = []
        for number, seed in enumerate((1, 1, 2)):
            out = tmp_path / f"{command[0]}{number}"
            flags = [*command, "--out", out, "--seed", seed]
            assert prepare_by(*flags).returncode == 0
            found.append([(out / f"{part}.jsonl").read_bytes() for part in ("train", "valid")])
            assert json.loads((out / "manifest.json").read_bytes())["seed"] == seed
        assert found[0] == found[1] and found[0][0] != found[2][0] and found[0][1] != found[2][1]


@pytest.mark.parametrize("link", [False, LINK])
def test_a_split_never_replaces_what_it_reads(tmp_path, link):
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": f"{i}"} for i in range(150)])
    before, given = path.read_bytes(), path
    if link:  # the same file under another name
        given = tmp_path / "mine.jsonl"
        given.symlink_to(path)
    done = run_here("dataset/prepare.py", "split", "--out", tmp_path, given)
    assert done.returncode == 2 and "another --out" in done.stderr, done.stderr
    assert path.read_bytes() == before and not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "valid.jsonl").exists()


def test_official_files_are_not_replaced(gsm8k_raw, tmp_path):
    for path in gsm8k_raw.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    done = run_here("recipes/prepare_math.py", "gsm8k", "--raw", tmp_path, "--out", tmp_path)
    assert done.returncode == 2 and "another --out" in done.stderr
    for path in gsm8k_raw.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    problem = {"problem": "1+1?", "solution": r"\boxed{2}", "level": "1", "type": "sums"}
    (tmp_path / "math").mkdir()
    path = write_jsonl(tmp_path / "math" / "train.jsonl", [problem])
    done = run_here("recipes/prepare_math.py", "math", "--raw", path.parent, "--out", path.parent)
    assert done.returncode == 2 and "another --out" in done.stderr
    trace = {name: "x" for name in ("question", "correct", "incorrect", "cot", "misconception")}
    path = write_jsonl(tmp_path / "valid.jsonl", [trace])
    done = run_here("recipes/misconceptions.py", path, "--out", tmp_path)
    assert done.returncode == 2 and "another --out" in done.stderr
    assert [record for _, record in read_records(path)] == [trace]


def test_parts_appear_all_or_none(tmp_path, monkeypatch):
    """The disk is full when the last file is written: no part has been replaced then."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"{i}"} for i in range(50)])
    out = tmp_path / "parts"
    command = ["dataset/prepare.py", "split", "--out", out, path]
    assert run_here(*command).returncode == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    write, written = prepare.json.dumps, []

    def fails_at_the_end(value, **how):
        written.append(value)
        if len(written) == 50:
            raise OSError(28, "No space left on device")
        return write(value, **how)

    monkeypatch.setattr(prepare.json, "dumps", fails_at_the_end)
    done = run_here(*command, "--seed", 2)
    assert done.returncode == 2 and "test.jsonl cannot be written: No space" in done.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


LONG = "x" * 300 + ".jsonl"


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            ["check", "--data_path", "F", "--max_seq_len", 1],
            "--max_seq_len 1: give a whole number from 2 to",
        ),
        (
            ["check", "--data_path", "F", "--batch_size", 0],
            "--batch_size 0: give a whole number from 1 to",
        ),
        (
            ["check", "--data_path", "F", "--batch_size", "x"],
            "--batch_size x: give a whole number from 1 to",
        ),
        (["show", "--data_path", "F", "-n", -1], "--n -1: give a whole number from 1 to"),
        (
            ["show", "--data_path", "F", "--max_seq_len", 0],
            "--max_seq_len 0: give a whole number from 2 to",
        ),
        (["split", "F", "--out", "O", "--seed", -1], "--seed -1: give a whole number from 0 to"),
        (["gsm8k", "--raw", "D", "--out", "O", "--seed", -1], "--seed -1: give a whole"),
        (["sid", "--raw", "D", "--out", "O", "--max_history", 0], "--max_history 0: give a whole"),
        (["cot", "F", "--out", "O", "--seed", 1.5], "--seed 1.5: give a whole"),
        (["split", "F", "--out", "O", "--ratios", "nan:1"], "--ratios nan:1"),
        (["split", "F", "--out", "O", "--ratios", "inf:1"], "--ratios inf:1"),
        (["split", "F", "--out", "O", "--ratios", "1e308:1e308"], "--ratios 1e308:1e308"),
        (["split", "F", "--out", "O", "--ratios", "2:-1"], "--ratios 2:-1"),
        (["split", "F", "--out", "O", "--ratios", "0:0"], "--ratios 0:0"),
        (["split", LONG, "--out", "O"], "xx.jsonl: File name too long"),
        (["check", "--data_path", LONG], "xx.jsonl: File name too long"),
        (["check", "--data_path", ""], "not a regular file"),
        (["check", "--data_path", "D"], "not a regular file"),
        (["cot", LONG, "--out", "O"], "File name too long"),
        (["gsm8k", "--raw", LONG, "--out", "O"], "there is no such folder"),
        (["sid", "--raw", LONG, "--out", "O"], "it has no *.index.json"),
    ],
)
def test_flags_that_cannot_be_meant_are_told_in_a_sentence(data, tmp_path, flags, says):
    if "too long" in says and sys.platform == "win32":
        pytest.skip("the words of Unix")
    places = {"F": data / "sft.jsonl", "D": data, "O": tmp_path / "out", LONG: tmp_path / LONG}
    done = prepare_by(*(places.get(flag, flag) for flag in flags))
    assert done.returncode == 2 and says in done.stderr, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    """Opening it would wait for somebody to write."""
    pipe, opened = tmp_path / "pipe.jsonl", Path.open
    os.mkfifo(pipe)

    def opens(path, *how, **more):
        assert not path.is_fifo(), f"{path} is opened"
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", opens)
    (tmp_path / "train.jsonl").symlink_to(pipe)
    for command in (
        ["dataset/prepare.py", "check", "--data_path", pipe],
        ["dataset/prepare.py", "split", pipe, "--out", tmp_path],
        ["recipes/misconceptions.py", pipe, "--out", tmp_path],
        ["recipes/prepare_math.py", "gsm8k", "--raw", tmp_path, "--out", tmp_path / "out"],
        ["trainer/train_tokenizer.py", "--data_path", pipe, "--out", tmp_path / "t.json"],
        ["trainer/train_full_sft.py", "--from_weight", "none", "--data_path", pipe],
        ["trainer/train_full_sft.py", "--from_weight", "none", "--data_path", f"{pipe}:0.5"],
    ):
        done = run_here(*command)
        assert done.returncode == 2 and "give a file" in done.stderr, done.stderr
        assert "not a regular file" in done.stderr and "Traceback" not in done.stderr
    for kind in ("index.json", "item.json"):
        (tmp_path / f"x.{kind}").symlink_to(pipe)
    done = run_here("recipes/sid.py", "--raw", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and "give a file" in done.stderr, done.stderr


def test_data_that_must_not_be_read_is_told_in_a_sentence(data, tmp_path, monkeypatch):
    path, stat = tmp_path / "x" / "x.jsonl", Path.stat

    def denied(self, *how, **more):
        if "x.jsonl" in str(self):
            raise PermissionError(13, "Permission denied")
        return stat(self, *how, **more)

    monkeypatch.setattr(Path, "stat", denied)  # as in a folder that must not be entered
    for command in (
        ["dataset/prepare.py", "check", "--data_path", path],
        ["dataset/prepare.py", "split", "--out", tmp_path, path],
        ["trainer/train_tokenizer.py", "--out", tmp_path / "t.json", "--data_path", path],
        ["trainer/train_full_sft.py", "--from_weight", "none", "--data_path", path],
        ["trainer/train_full_sft.py", "--from_weight", "none", "--data_path", f"{path}:0.5"],
    ):
        done = run_here(*command)
        assert done.returncode == 2 and f"{path}: Permission denied" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("given", ["", "x" * 300, "x" * 300 + ":0.5", ".", "no.jsonl"])
def test_files_to_train_on_that_are_none_are_told_in_a_sentence(given):
    done = run_here("trainer/train_full_sft.py", "--from_weight", "none", "--data_path", given)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"--data_path {given.removesuffix(':0.5') or '.'}" in done.stderr


def test_a_number_too_long_to_read_is_a_bad_record_of_each_reader(tmp_path):
    digits = "7" * 5000
    trace = f'{{"question": "?", "correct": {digits}}}\n'
    (tmp_path / "x.jsonl").write_text(trace, encoding="utf-8")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.json").write_text(f'{{"question": {digits}}}', encoding="utf-8")
    (tmp_path / "x.index.json").write_text(f'{{"1": {digits}}}', encoding="utf-8")
    for command in (
        ["cot", tmp_path / "x.jsonl"],
        ["split", tmp_path / "x.jsonl"],
        ["gsm8k", "--raw", tmp_path / "raw"],
        ["sid", "--raw", tmp_path],
    ):
        done = prepare_by(*command, "--out", tmp_path / "out")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "digits" in done.stderr and str(tmp_path) in done.stderr
    done = run_here("dataset/prepare.py", "check", "--data_path", tmp_path / "x.jsonl")
    assert done.returncode == 2 and "line 1: invalid JSON" in done.stderr
    assert "(4300 digits)" in done.stderr


def test_deeply_nested_json_is_told_in_a_sentence(tmp_path):
    nested = "[" * 10**5
    for name in ("x.jsonl", "x.index.json", "raw/train.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"a": {nested}', encoding="utf-8")
    for command in (
        ["cot", tmp_path / "x.jsonl"],
        ["gsm8k", "--raw", tmp_path / "raw"],
        ["sid", "--raw", tmp_path],
    ):
        done = prepare_by(*command, "--out", tmp_path / "out")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Unix")
def test_a_reader_that_has_gone_ends_a_command_with_code_1(data):
    """As in `python dataset/prepare.py show ... | head -n 1`."""
    command = [sys.executable, ROOT / "dataset/prepare.py", "show", "--data_path"]
    command += [data / "sft.jsonl", "-n", "40"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(list(map(str, command)), **pipes) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and b"Traceback" not in said


def test_show_shows_three_samples_if_not_told_otherwise(data):
    for flags, count in (([], 3), (["-n", 2], 2)):
        done = run_here("dataset/prepare.py", "show", "--data_path", data / "sft.jsonl", *flags)
        assert done.stdout.count("<|im_start|>user") == count


def test_the_first_record_decides_the_format(tmp_path):
    path = write_jsonl(tmp_path / "mixed.jsonl", [chat("Hi", "Hello."), {"text": "Once."}])
    done = run_here("dataset/prepare.py", "check", "--data_path", path, "--json")
    (table,) = json.loads(done.stdout)
    assert (table["format"], table["bad"]) == ("conversations", 1)


def test_ratios_may_be_shares_of_one(data, tmp_path):
    command = ["dataset/prepare.py", "split", data / "sft.jsonl", "--out", tmp_path / "a"]
    assert run_here(*command, "--ratios", "0.5:0.25:0.25").returncode == 0
    assert run_here(*command[:-1], tmp_path / "b", "--ratios", "2:1:1").returncode == 0
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
