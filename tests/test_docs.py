"""Every command printed in README and docs runs, at toy scale; every link leads somewhere."""

import json
import re
import shlex

import pytest

from dataset.tiny_world import generate as tiny_world
from dataset.tokenizer import SHIPPED_TOKENIZER
from recipes import misconceptions
from recipes import peft as merge_lora
from tests.conftest import ROOT, TINY, run, run_here, write_jsonl

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """Each distinct command of a ```bash block that starts with python, as a list of words."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            block = re.sub(r"(?m)\s+#\s.*$", "", block)  # a comment behind a command
            for line in re.findall(r'^(?:python -c "\n.*?"|python .*?)$', block, re.M | re.S):
                found[line] = shlex.split(line)[1:]
    return found


TORCHRUN = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
LONG = ("demo.py", *(f"bench/{n}.py" for n in ("faults", "speed", "gsm8k", "misconceptions")))
COMMANDS = commands()
SEEN = set()  # scripts that ran as a user types them; from then on, in this process, it is quicker


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_runs(line, data, trained, evaluated, tmp_path, request):
    files = {"mine.jsonl": data / "sft.jsonl", "out/mine.jsonl": data / "sft.jsonl"}
    files |= {"out/text.jsonl": data / "pretrain.jsonl", "out/forged.jsonl": data / "sft.jsonl"}
    files |= {"out/mine.json": SHIPPED_TOKENIZER, "out/peft": tmp_path / "peft"}
    files |= {f"out/eval/gsm8k/{name}.json": evaluated for name in ("gsm8k_limit_200", "other")}
    if "cot" in line or "out/misconceptions" in line:
        trace = dict.fromkeys(("question", "correct", "incorrect", "cot", "misconception"), "x y")
        files["traces.jsonl"] = write_jsonl(tmp_path / "traces.jsonl", [trace] * 10)
        there = tmp_path / "cot"
        misconceptions.main([str(files["traces.jsonl"]), "--out", str(there)])
        files |= {f"out/cot/{path.name}": path for path in there.iterdir()} | {"out/cot": there}
        files["out/loss_curve.svg"] = tmp_path / "curve.svg"
    if "out/misconceptions" in line:
        for name in ("train.jsonl", "train.jsonl*2", "tokens.txt"):
            files[f"out/misconceptions/with/{name}"] = f"{files['out/cot']}/{name}"
        files["dataset/sft_tiny.jsonl"] = data / "sft.jsonl"
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
    if "--teacher_weight" in line:
        files["full_sft"] = trained / "full_sft_32.pth"
    if "train_pretrain" in line:
        files["mine.jsonl"] = data / "pretrain.jsonl"
    words = [str(files.get(word, word)) for word in COMMANDS[line]]
    script = words[0]
    if script == "bench/shakespeare.py":
        text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        words = [str(tmp_path / "text.txt") if w == "tinyshakespeare.txt" else w for w in words]
        done = run(*words, "--seconds", 1)
        result = json.loads(done.stdout.splitlines()[-1])
        assert set(result) == {"seconds", "nats_per_char", "tokens"}, done.stderr
        assert 1 < result["nats_per_char"] < 6
        return
    if script in LONG:
        pytest.skip("minutes long; its parts are tested on their own")
    if script == "bench/gpu_memory.py":
        words = [*words[: words.index("--processes") + 3], "--vocab_size", 512]
    if script == "bench/fuzz.py":
        words[-1] = "1"
    if script.startswith("trainer/train_") and script != "trainer/train_tokenizer.py":
        name = "pretrain.jsonl" if "pretrain" in script else "sft.jsonl"
        needs = not {"--data_path", "--offline_dir"} & set(words)
        given = ["--data_path", data / name] if needs else []
        scratch = "pretrain.py" in script or "none" in words
        out = trained if "--from_resume" in words else tmp_path
        words += [
            *given,
            "--save_dir",
            out,
            "--batch_size",
            2,
            "--max_seq_len",
            96,
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
        named = {"sft_scratch", "gsm8k", "few", "round1", "all"} & set(words)
        if named and "--lora" not in words:
            words += ["--weight", trained / "full_sft_32.pth"]
        if "shop" in words:
            words += ["--weight", request.getfixturevalue("extended") / "full_sft_32.pth"]
        if "--lora" in words:
            words += ["--lora", "full_sft", "--save_dir", request.getfixturevalue("lora_run")]
    elif script == "recipes/peft.py":
        words += ["--save_dir", request.getfixturevalue("lora_run")]
        if "--from_peft" in words:
            there = ["--lora", "full_sft", "--to_peft", tmp_path / "peft", *words[-2:]]
            merge_lora.main(list(map(str, there)))
    elif script == "recipes/rejection_sample.py":
        words += ["--weight", trained / "full_sft_32.pth", "--out", tmp_path / "sampled.jsonl"]
        words += ["--limit", 3, "--max_new_tokens", 8]
    elif script == "-c":
        words = [word.replace("out/", f"{tmp_path.as_posix()}/") for word in words]
    elif "split" in words:
        words += ["--out", tmp_path]
    again = script in SEEN and script.startswith(("dataset/", "evaluation/", "trainer/"))
    SEEN.add(script)
    done = (run_here if again else run)(*words)
    assert done.returncode == 0, done.stderr
    if script == "-c":
        assert done.stdout.strip()


def test_there_are_commands_to_test():
    scripts = {words[0] for words in COMMANDS.values()}
    assert {"eval_llm.py", "trainer/train_pretrain.py", "trainer/train_full_sft.py"} <= scripts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    code = "".join(
        p.read_text(encoding="utf-8") for p in ROOT.glob("**/*.py") if ".venv" not in p.parts
    )
    for flag in set(re.findall(r"--([a-z_]+)\b", text)) - TORCHRUN:
        assert f"--{flag}" in code or f'"{flag}' in code, flag
