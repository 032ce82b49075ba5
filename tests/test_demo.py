"""The stages of `make demo`, with scripts in their places that only write files."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

WRITER = """
import json, sys
from pathlib import Path
out = next(folder for folder in Path(__file__).parents if (folder / "demo.py").exists()) / "out"
log = out.parent / "log.txt"
with log.open("a") as file:
    file.write(f"{Path(__file__).stem} {' '.join(sys.argv[1:3])}\\n")
for name in (out / "eval" / "tiny_world", out / "logs", out / "checkpoints"):
    name.mkdir(parents=True, exist_ok=True)
stop = out.parent / "stop"
"""
TRAINING = """
(out / "checkpoints" / "{0}_256_resume.pth").write_text("")
if stop.exists() and stop.read_text() == "{0}":
    sys.exit(130)
(out / "{0}_256.pth").write_text(str(len(log.read_text())))
(out / "logs" / "{0}_256.jsonl").write_text(json.dumps({{"tokens": 1}}) + "\\n")
"""
EVALUATION = """
name = sys.argv[2]
weights = (out / f"{name}_256.pth").read_text()
path = out / "eval" / "tiny_world" / f"{name}.json"
part = path.with_suffix(".part")
for before in (path, part):
    if before.exists() and json.loads(before.read_text())["weights"] != weights:
        sys.exit(2)
result = {"weights": weights, "scores": {"overall": 1.0}, "params": 1}
problem = {"type": "greeting", "prompt": [{"role": "user", "content": "Good day"}]}
result["problems"] = 2 * [problem | {"output": f"I am {name}."}]
part.write_text(json.dumps(result))
if stop.exists() and stop.read_text() == "eval":
    sys.exit(130)
part.replace(path)
"""
SCRIPTS = {
    "dataset/tiny_world/generate.py": "for name in ('pretrain', 'sft', 'eval'):\n"
    "    (out.parent / 'dataset' / f'{name}_tiny.jsonl').write_text('')",
    "trainer/train_pretrain.py": TRAINING.format("pretrain"),
    "trainer/train_full_sft.py": TRAINING.format("full_sft"),
    "evaluation/run_eval.py": EVALUATION,
}


@pytest.fixture
def demo(tmp_path):
    """Runs demo.py in a folder of its own; returns (exit code, the scripts that it ran)."""
    (tmp_path / "out").mkdir()
    for name in ("demo.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name, body in SCRIPTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(WRITER + body, encoding="utf-8")

    def run(*flags, stop=""):
        (tmp_path / "stop").write_text(stop)
        (tmp_path / "log.txt").write_text("")
        command = [sys.executable, tmp_path / "demo.py", *flags]
        done = subprocess.run(command, capture_output=True, text=True, input="", timeout=60)
        assert "Traceback" not in done.stderr, done.stderr
        run.printed = done.stdout
        return done.returncode, (tmp_path / "log.txt").read_text().split("\n")[:-1]

    run.folder = tmp_path
    return run


EVAL = ["run_eval --weight pretrain", "run_eval --weight full_sft"]
SFT = ["train_full_sft --from_weight pretrain", *EVAL]
SCRIPTS_OF_ALL = 5


def test_a_stage_that_is_done_is_not_done_again(demo):
    code, ran = demo()
    assert code == 0 and len(ran) == SCRIPTS_OF_ALL and ran[2:] == SFT
    assert re.search(r"^overall +100\.0% +100\.0%$", demo.printed, re.MULTILINE)
    for line in ("user +Good day", "pretrained +I am pretrain.", "after SFT +I am full_sft."):
        assert len(re.findall(rf"^ +{line}$", demo.printed, re.MULTILINE)) == 1
    assert demo() == (0, [])
    report = json.loads((demo.folder / "out" / "demo.json").read_text(encoding="utf-8"))
    assert report["scores"]["full_sft"] == {"overall": 1.0} and report["tokens_trained"] == 2
    code, ran = demo("--fresh")
    assert code == 0 and len(ran) == SCRIPTS_OF_ALL


def test_another_seed_reaches_the_training_and_nothing_else(demo):
    (demo.folder / ".venv").mkdir()
    (demo.folder / ".venv" / "setup-seconds").write_text("41.7\n")
    code, ran = demo("--seed", "2")
    assert code == 0 and "train_pretrain --seed 2" in ran
    commands = re.findall(r"^\$ python (\S+).*?( --seed \d+)?$", demo.printed, re.MULTILINE)
    assert [script for script, seed in commands if seed == " --seed 2"] == [
        "trainer/train_pretrain.py",
        "trainer/train_full_sft.py",
    ]
    report = json.loads((demo.folder / "out" / "demo.json").read_text(encoding="utf-8"))
    assert report["seed"] == 2 and report["seconds"]["setup"] == 42
    assert re.search(r"^held-out score +pretrained +after SFT$", demo.printed, re.MULTILINE)
    assert demo("--seed", "2") == (0, []) and demo.printed.count("already done") == 4
    assert len(demo()[1]) == SCRIPTS_OF_ALL and "--seed" not in demo.printed


def test_new_weights_are_evaluated_anew_under_the_same_names(demo):
    demo()
    (demo.folder / "out" / "full_sft_256.pth").unlink()
    assert demo() == (0, SFT)
    (demo.folder / "out" / "pretrain_256.pth").unlink()
    assert demo() == (0, ["train_pretrain ", *SFT])


def test_an_evaluation_that_was_stopped_goes_on_and_one_of_earlier_weights_does_not(demo):
    assert demo(stop="eval")[0] == 130
    (part,) = (demo.folder / "out").rglob("*.part")
    before = part.read_text()
    assert demo(stop="eval") == (130, EVAL[:1]) and part.read_text() == before
    (demo.folder / "out" / "full_sft_256.pth").unlink()
    assert demo() == (0, SFT)
    demo("--fresh", stop="eval")
    assert demo("--fresh")[0] == 0


def test_training_that_was_stopped_goes_on(demo):
    assert demo(stop="full_sft")[0] == 130
    assert demo() == (0, ["train_full_sft --from_resume 1", *EVAL])


def test_a_retraining_that_was_stopped_is_not_taken_for_done(demo):
    """The weights and the scores of the demo before are still there."""
    demo()
    (demo.folder / "out" / "pretrain_256.pth").unlink()
    assert demo(stop="full_sft")[0] == 130
    assert demo() == (0, ["train_full_sft --from_resume 1", *EVAL])


def test_a_run_of_the_users_own_is_not_resumed(demo):
    """Training keeps it under another name, where it is not resumed."""
    own = demo.folder / "out" / "checkpoints" / "pretrain_256_resume.pth"
    own.parent.mkdir()
    own.write_text("")
    code, ran = demo(stop="pretrain")
    assert code == 130 and ran[1:] == ["train_pretrain "]
    assert demo()[1] == ["train_pretrain --from_resume 1", *SFT]  # that is the demo's own


def test_starting_over_deletes_no_weights(demo):
    """They may be of a run of the user's own; training keeps them under another name."""
    demo()
    weights = demo.folder / "out" / "pretrain_256.pth"
    weights.write_text("of the user")
    code, ran = demo("--fresh", stop="pretrain")
    assert code == 130 and ran[1:] == ["train_pretrain "]
    assert weights.read_text() == "of the user"
