"""Every command and every block of code printed in README and docs runs, at toy scale; links, names
of functions, files, flags and defaults are right; the exercises can be solved.
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import tomllib
import urllib.request
from functools import cache
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import pytest

import serving.start  # noqa: F401  the package, before a script of bench/ puts its own on the path
from convert import peft as merge_lora
from dataset.tiny_world import generate as tiny_world
from model.causal_lm import CausalLM, ModelConfig
from model.tokenizer import SHIPPED_TOKENIZER, load_tokenizer
from model.weights import write_weights
from recipes import misconceptions
from tests.conftest import ROOT, TINY, run, run_here, write_jsonl

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    """The blocks of a language in a page, without the indentation that they have in a list."""
    pattern = rf"(?ms)^( *)```{language}\n(.*?)^\1```"
    found = re.findall(pattern, page.read_text(encoding="utf-8"))
    return [textwrap.dedent(text) for _, text in found]


def commands():
    """Each distinct command of a ```bash block that starts with python, as a list of words."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "bash"):
            block = re.sub(r"(?m)\s+#\s.*$", "", block)  # a comment behind a command
            for line in re.findall(r'^(?:python -c "\n.*?"|python .*?)$', block, re.M | re.S):
                found[line] = shlex.split(line)[1:]
    return found


TORCHRUN = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
BENCH = (
    "faults",
    "speed",
    "gsm8k",
    "misconceptions",
    "experiments",
    "pictures",
    "serving",
    "page",
    "rewards",
    "competing",
)
LONG = ("demo.py", "recipes/python_text.py", *(f"bench/{name}.py" for name in BENCH))
COMMANDS = commands()
IN_PROCESS = ("dataset/", "evaluation/", "trainer/", "recipes/", "convert/")
SEEN = set()  # scripts that ran as a user types them; from then on, in this process, it is quicker


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_runs(line, data, trained, evaluated, tmp_path, request):
    files = {"mine.jsonl": data / "sft.jsonl", "out/mine.jsonl": data / "sft.jsonl"}
    for name in ("text", "python"):
        files[f"out/{name}.jsonl"] = data / "pretrain.jsonl"
    for name in ("mine", "python", "small"):
        files[f"out/{name}.json"] = SHIPPED_TOKENIZER
    files |= {"out/nelina.jsonl": data / "sft.jsonl", "out/peft": tmp_path / "peft"}
    files["out/look.html"] = tmp_path / "look.html"
    files |= {f"out/eval/gsm8k/{name}.json": evaluated for name in ("gsm8k_limit_200", "other")}
    if "cot" in line or "out/misconceptions" in line:
        trace = dict.fromkeys(("question", "correct", "incorrect", "cot", "misconception"), "x y")
        files["traces.jsonl"] = write_jsonl(tmp_path / "traces.jsonl", [trace] * 10)
        there = tmp_path / "cot"
        misconceptions.main([str(files["traces.jsonl"]), "--out", str(there)])
        files |= {f"out/cot/{path.name}": path for path in there.iterdir()} | {"out/cot": there}
    if "out/misconceptions" in line:
        for name in ("train.jsonl", "train.jsonl:0.4", "tokens.txt"):
            files[f"out/misconceptions/with/{name}"] = f"{files['out/cot']}/{name}"
        files["dataset/sft_tiny.jsonl:0.6"] = f"{data / 'sft.jsonl'}:0.6"
        files["dataset/pretrain_tiny.jsonl"] = data / "pretrain.jsonl"
    if "out/sums" in line:
        for name, end in (("solved", b""), ("accepted", b"\n")):  # one file twice is refused
            path = files[f"out/sums/{name}.jsonl"] = tmp_path / f"{name}.jsonl"
            path.write_bytes((data / "sft.jsonl").read_bytes() + end)
        if not line.startswith("python trainer"):
            tiny_world.write_sums(tmp_path)
            for name in ("practice", "exam"):
                files[f"out/sums/{name}.jsonl"] = tmp_path / f"{name}.jsonl"
        files["out/sums"] = tmp_path
    if "out/offline" in line:
        files["out/offline"] = request.getfixturevalue("recorded")
    for folder, fixture, raw in (("gsm8k", "gsm8k", "gsm8k_raw"), ("sid", "shop_data", "shop")):
        if f"out/{folder}" in line or f" {folder} " in line:
            made = request.getfixturevalue(fixture)
            files |= {f"out/{folder}/{path.name}": path for path in made.iterdir()}
            files |= {"FOLDER": request.getfixturevalue(raw), f"out/{folder}": tmp_path / folder}
    if "out/gsm8k_run" in line:
        for path in request.getfixturevalue("gsm8k").iterdir():
            files[f"out/gsm8k_run/data/{path.name}"] = path
    if "train_dpo" in line:
        pair = {"prompt": "What is 1?", "chosen": "A number.", "rejected": "One."}
        pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair, {**pair, "prompt": "What is 2?"}])
    if "train_grpo" in line:
        asked = [{"role": "user", "content": "What is 1?"}]
        asked = {"conversations": asked, "expected": "1", "category": "sum"}
        pairs = write_jsonl(tmp_path / "asked.jsonl", [asked] * 4)
        files["out/sums/practice.jsonl"] = pairs
    if "--teacher_weight" in line:
        files["full_sft"] = trained / "full_sft_32.pth"
    if "train_pretrain" in line:
        files["mine.jsonl"] = data / "pretrain.jsonl"
    words = [str(files.get(word, word)) for word in COMMANDS[line]]
    script = words[0]
    if script == "bench/shakespeare.py":
        words = [str(PAGES[0]) if word == "tinyshakespeare.txt" else word for word in words]
        done = run(*words, "--seconds", 1)
        result = json.loads(done.stdout.splitlines()[-1])
        assert set(result) == {"seconds", "nats_per_char", "tokens"}, done.stderr
        assert 1 < result["nats_per_char"] < 6
        return
    if "--serve" in words:
        words[words.index("--serve") + 1] = "0"
        serve([*words, "--save_dir", trained])
        return
    if script in LONG:
        pytest.skip("long; its parts are tested on their own")
    if script == "bench/gpu_memory.py":
        words = [*words[: words.index("--processes") + 3], "--vocab_size", 512]
    if script == "bench/fuzz.py":
        words[-1] = "1"
    if script.startswith("trainer/train_") and script != "trainer/train_tokenizer.py":
        name = "pretrain.jsonl" if "pretrain" in script else "sft.jsonl"
        needs = not {"--data_path", "--offline_dir"} & set(words)
        given = ["--data_path", data / name] if needs else []
        if script in ("trainer/train_dpo.py", "trainer/train_grpo.py"):
            given = ["--data_path", pairs, "--val_split", 0.5] if needs else ["--val_split", 0.5]
        given += ["--max_new_tokens", 4] if "grpo" in script else []
        new = "pretrain.py" in script and "--from_weight" not in words
        scratch = new or "none" in words
        out = trained if "--from_resume" in words else tmp_path
        words += [
            *given,
            "--save_dir",
            out,
            "--batch_size",
            2,
            *([] if "grpo" in script else ["--max_seq_len", 96]),
            *(TINY if scratch else []),
        ]
        if not scratch and "--from_resume" not in words:
            words += ["--from_weight", trained / "pretrain_32.pth"]
    elif script == "dataset/tiny_world/generate.py":
        words += ["--out", tmp_path]
    elif script == "recipes/export_hidden_states.py":
        words += [
            "--teacher_weight",
            trained / "full_sft_32.pth",
            "--data_path",
            data / "sft.jsonl",
        ]
        words += ["--offline_dir", tmp_path / "offline", "--save_dir", tmp_path]
    elif script == "trainer/train_tokenizer.py":
        words += ["--out", tmp_path / "t.json"]
    elif script in ("eval_llm.py", "evaluation/run_eval.py"):
        words += ["--save_dir", trained, "--max_new_tokens", 4]
        words += ["--limit", 20, "--run", tmp_path.name] if "run_eval" in script else []
        words += ["--use_compile", 0]  # test_generation.py compiles, which takes half a minute
        named = {"gsm8k", "few", "round1", "all", "python", "mine", "half", "dpo", "grpo"} & set(
            words
        )
        if named and "--lora" not in words:
            words += ["--weight", trained / "full_sft_32.pth"]
        if "shop" in words:
            words += ["--weight", request.getfixturevalue("extended") / "full_sft_32.pth"]
        if "--lora" in words:
            words += ["--lora", "full_sft", "--save_dir", request.getfixturevalue("lora_run")]
    elif script == "convert/peft.py":
        words += ["--save_dir", request.getfixturevalue("lora_run")]
        if "--from_peft" in words:
            there = ["--lora", "full_sft", "--to_peft", tmp_path / "peft", *words[-2:]]
            merge_lora.main(list(map(str, there)))
    elif script == "recipes/rejection_sample.py":
        words += ["--weight", trained / "full_sft_32.pth", "--out", tmp_path / "sampled.jsonl"]
        words += ["--limit", 3, "--max_new_tokens", 8]
    elif script == "evaluation/show_loss.py":
        words += ["--save_dir", trained]
        words += [] if "--data_path" in words else ["--data_path", data / "sft.jsonl"]
    elif script.startswith("convert/"):
        words = [*words[:-1], tmp_path / Path(words[-1]).name, "--save_dir", trained]
        pytest.importorskip("gguf" if "gguf" in script else "safetensors")
    elif script == "-c":
        if "dataset/" in words[1]:
            tiny_world.write_tiny_world(tmp_path)
        for name in ("python", "small"):
            shutil.copy(SHIPPED_TOKENIZER, tmp_path / f"{name}.json")
        if "full_sft_256" in line:
            new, tokenizer = CausalLM(ModelConfig()), load_tokenizer()
            path = tmp_path / "full_sft_256.pth"
            write_weights(path, new.state_dict(), new.config, tokenizer, "full_sft")
        words = [re.sub(r"\b(out|dataset)/", f"{tmp_path.as_posix()}/", word) for word in words]
    elif "split" in words:
        words += ["--out", tmp_path]
    again = script in SEEN and (script.startswith(IN_PROCESS) or "--prompt" in words)
    SEEN.add(script)
    done = (run_here if again else run)(*words)
    assert done.returncode == 0, done.stderr
    if script == "-c":
        assert done.stdout.strip()


def serve(words):
    """Starts the server, asks whether it is there, and ends it with Ctrl-C."""
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        (line,) = islice((line for line in process.stdout if "http://" in line), 1)
        address = re.search(r"http://127.0.0.1:\d+", line)[0]
        with urllib.request.urlopen(f"{address}/health", timeout=60) as answer:
            assert json.loads(answer.read()) == {"status": "ok"}
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_there_are_commands_to_test():
    scripts = {words[0] for words in COMMANDS.values()}
    assert {"eval_llm.py", "trainer/train_pretrain.py", "trainer/train_full_sft.py"} <= scripts


def test_every_block_of_code_runs(data, tmp_path):
    """A block of Python that imports something is a program. It runs as printed, but for its data
    and its number of steps.
    """
    programs = [b for page in PAGES for b in blocks(page, "python") if b.startswith("import")]
    assert programs
    (tmp_path / "dataset").mkdir()
    shutil.copy(data / "pretrain.jsonl", tmp_path / "dataset/pretrain_tiny.jsonl")
    for program in programs:
        short, changed = re.subn(r"(?m)^steps = \d+$", "steps = 3", program)
        assert changed == 1
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", short],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"step 0: loss [78]\.\d\d\nstep 2: loss \d\.\d\d\n", done.stdout)


def test_what_a_printed_expression_gives_is_what_the_comment_says():
    examples = [b for page in PAGES for b in blocks(page, "python") if b.startswith("from")]
    assert examples
    for example in examples:
        names = {}
        for line in filter(None, example.splitlines()):
            if line.startswith("from"):
                exec(line, names)
            else:
                expression, expected = line.split("  # ")
                assert repr(eval(expression, names)) == expected, line


def without_docstrings(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return tree


def test_the_mutants_are_counted_and_fit_the_code():
    text = (ROOT / "tests/mutants.toml").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mutants = tomllib.loads(text)["mutant"]
    assert f"lists {len(mutants)} realistic mistakes" in readme
    for mutant in mutants:  # else the list does not follow the code
        code = (ROOT / mutant["file"]).read_text(encoding="utf-8")
        assert code.count(mutant["text"]) == 1, mutant["what"]


def test_each_script_finds_the_project_from_any_folder():
    """Other tests run scripts where it is found anyway."""
    found = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    ours, checked = {"common", *(path.name for path in ROOT.iterdir() if path.is_dir())}, 0
    for path in ROOT.glob("*/*.py"):
        text = path.read_text(encoding="utf-8")
        imported = [n for n in ast.parse(text).body if isinstance(n, ast.ImportFrom)]
        lines = [node.lineno for node in imported if node.module.split(".")[0] in ours]
        if '__name__ == "__main__"' in text and path.parent.name != "tests" and lines:
            assert found in "\n".join(text.splitlines()[: min(lines)]), path
            checked += 1
    assert checked > 25


def test_quoted_code_is_in_the_code():
    """The other blocks of Python are quoted: a function without its docstring, or lines of one."""
    sources = [p.read_text(encoding="utf-8") for p in ROOT.glob("*/*.py")]
    lines = {line.strip() for source in sources for line in source.splitlines()}
    every = [block for page in PAGES for block in blocks(page, "python")]
    quoted = [block for block in every if not block.startswith(("import", "from"))]
    assert len(quoted) > 5
    names = {block.removeprefix("def ").partition("(")[0] for block in quoted}
    functions = set()
    for source in sources:
        for node in ast.walk(without_docstrings(source)):
            if isinstance(node, ast.FunctionDef) and node.name in names:
                functions.add(ast.unparse(node))
    for block in quoted:
        if block.startswith("def "):
            assert ast.unparse(ast.parse(block)) in functions, block
        else:
            assert {line.strip() for line in block.splitlines()} <= lines, block


def names_in(path):
    """What a module defines at its top level, and the methods of its classes."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_are_right(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for name, target in re.findall(r"\[`([A-Za-z_]\w*)`\]\(([^)#:]+\.py)\)", text):
        assert name in names_in(page.parent / target), f"{name} in {target}"
    for path in set(re.findall(r"`([a-z_]+/[\w/]+\.(?:py|toml|json|svg|md))`", text)):
        if not path.startswith("out/"):
            assert (ROOT / path).exists(), path


@cache
def code():
    """All code of the project as one text."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")]
    return "".join(path.read_text(encoding="utf-8") for path in files)


@cache
def defaults():
    """{flag: the values that it has by default in one of the two train scripts}."""
    found = {}
    for script in ("pretrain", "full_sft"):
        shown = run_here(f"trainer/train_{script}.py", "--help").stdout
        text = " ".join(shown.split())
        for name, value in re.findall(
            r"--(\w+) [A-Z01|]+ (?:(?!--)[^()])*\(default: ([^)]+)\)", text
        ):
            found.setdefault(name, set()).add(value)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_their_defaults_are_right(page):
    text = page.read_text(encoding="utf-8")
    for flag in set(re.findall(r"--([a-z_]+)\b", text)) - TORCHRUN:
        assert f"--{flag}" in code() or f'"{flag}' in code(), flag
    known = defaults()
    for flag, value in re.findall(r"`--([a-z_]+)`\s+\(([\d.]+)\)", text):
        if flag in known:  # not of another script
            assert float(value) in map(float, known[flag]), f"--{flag} ({value})"
    config = ModelConfig()
    for number, what in (
        (config.hidden_size, r"([\d,]+)\s+numbers\s+(?:per|that describe a)\s+token"),
        (config.vocab_size, r"vocabulary\s+of\s+([\d,]+)"),
        (config.vocab_size, r"each\s+of\s+([\d,]+)\s+tokens"),
        (768, r"rows\s+(?:have|of)\s+(\d+)\s+tokens\b(?!.*bench)"),
    ):
        if page.name[0] in "1234567" and page.name[1] == "_":
            assert set(re.findall(what, text)) <= {f"{number:,}"}, what


def test_the_table_of_sizes_is_that_of_the_default_model():
    text = (ROOT / "docs/3_model.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| ([BTDHKdV]) \|[^|]*\| ([\d,]+) \|$", text))
    known, config = defaults(), ModelConfig()
    assert {letter: int(value.replace(",", "")) for letter, value in rows.items()} == {
        "B": int(*known["batch_size"]),
        "T": int(*known["max_seq_len"]),
        "D": config.hidden_size,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "d": config.head_dim,
        "V": config.vocab_size,
    }


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs/pictures").glob("*.svg")), ids=lambda p: p.name
)
def test_a_picture_is_small_shown_and_described(path):
    assert path.stat().st_size < 100_000
    root = ElementTree.parse(path).getroot()
    assert "prefers-color-scheme: dark" in root.findtext("{http://www.w3.org/2000/svg}style")
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    (alt,) = set(re.findall(rf"!\[([^\]]+)\]\((?:docs/)?pictures/{path.name}\)", pages))
    assert len(alt.split()) > 8


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs/pictures").glob("*.png")), ids=lambda p: p.name
)
def test_a_screenshot_is_small_shown_and_described(path):
    assert path.stat().st_size < 300_000
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    alts = re.findall(rf"!\[([^\]]+)\]\((?:docs/)?pictures/{path.name}\)", pages)
    assert alts and all(len(alt.split()) > 8 for alt in alts)


def test_the_exercises_fail_until_they_are_solved(tmp_path):
    """The code as it is does not pass; with the changes that the pages show, it passes."""
    exercises = sorted((ROOT / "tests/exercises").glob("*.py"))
    for part in ("model", "dataset", "tests", "trainer", "evaluation"):
        ignored = shutil.ignore_patterns("__pycache__", "*_tiny.jsonl")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    for name in ("common.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def failing():
        """The names of the exercises of which a test fails."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-q",
            "--tb=no",
            "-rfE",
        ]
        command += [f"tests/exercises/{path.name}" for path in exercises]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return set(re.findall(r"(?m)^(?:FAILED|ERROR) tests/exercises/(\w+\.py)", done.stdout))

    assert failing() == {path.name for path in exercises}
    for path in exercises:
        (page,) = [p for p in PAGES if f"exercises/{path.name}" in p.read_text(encoding="utf-8")]
        after = page.read_text(encoding="utf-8").split(f"tests/exercises/{path.name}")[1]
        apply(re.search(r"(?ms)^ *```diff\n(.*?)^ *```", after)[1], tmp_path)
    assert failing() == set()


def apply(diff, folder):
    """Makes the change of a ```diff block: each group of - lines becomes the + lines after it."""
    file, *lines = textwrap.dedent(diff).splitlines()
    path = folder / file.removeprefix("--- ")
    code, removed, added = path.read_text(encoding="utf-8"), "", ""
    for line in [*lines, "-"]:
        if line[0] == "-" and added:
            assert code.count(removed) == 1, removed
            code, removed, added = code.replace(removed, added), "", ""
        removed += f"{line[1:]}\n" if line[0] == "-" else ""
        added += f"{line[1:]}\n" if line[0] == "+" else ""
    path.write_text(code, encoding="utf-8")
