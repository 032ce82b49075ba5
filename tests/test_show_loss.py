"""The table of evaluation/show_loss.py, and the text of recipes/python_text.py."""

import json
import math
import re
import shutil
from pydoc_data.topics import topics

import torch

from common import IGNORE
from dataset.lm_dataset import SFTDataset
from evaluation import show_loss
from model.causal_lm import CausalLM, ModelConfig
from model.tokenizer import load_tokenizer
from model.weights import build_model, load, write_weights
from recipes import python_text
from tests.conftest import chat, run_here, write_jsonl


def rows_of(printed):
    """The lines of the table between its header and the losses, as lists of cells."""
    header, *lines = printed.splitlines()
    assert header.split()[:3] == ["reads", "predicts", "label"]
    return [
        re.split(r"\s{2,}", line.strip()) for line in lines if not line.startswith(("pr", "fu"))
    ]


def test_the_table_is_what_the_loss_computes(trained, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [chat("What is 1?", "A number."), chat("Hi?", "Ho.")])
    done = run_here(
        "evaluation/show_loss.py", "--data_path", path, "--record", 2, "--save_dir", trained
    )
    input_ids, labels = SFTDataset(path, load_tokenizer())[1]
    rows = rows_of(done.stdout)
    assert len(rows) == len(input_ids) - 1
    assert [row[2] for row in rows] == ["-" if n == -100 else str(n) for n in labels[1:].tolist()]
    file = trained / "pretrain_32.pth"
    model, _ = build_model(load(file), file)
    supervised = int((labels[1:] != -100).sum())
    with torch.inference_mode():
        loss = (model.eval()(input_ids[None], labels=labels[None]) / supervised).item()
        logits = model(input_ids[None])[0]
    assert f"pretrain: {loss:.3f} nats per supervised token" in done.stdout
    assert f"= {math.exp(-loss):.3f}" in done.stdout
    for place in range(len(rows)):
        probability = logits[place].softmax(dim=-1)[input_ids[place + 1]]
        assert abs(float(rows[place][3]) - probability) < 1e-3
    # The newline of the header has no loss, and predicts the first token of the answer.
    first = next(index for index, row in enumerate(rows) if row[2] != "-")
    assert rows[first][0] == r"'\n'" and rows[first - 1][2] == "-"


def test_a_terminal_shows_the_supervised_lines_in_colour(trained, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", [chat("What is 1?", "A number.")])
    monkeypatch.setattr(show_loss, "has_colours", lambda: True)
    done = run_here("evaluation/show_loss.py", "--data_path", path, "--save_dir", trained)
    green = re.findall(r"\033\[32m(.*?)\033", done.stdout)
    input_ids, labels = SFTDataset(path, load_tokenizer())[0]
    assert [int(line.split()[-3]) for line in green] == labels[labels != IGNORE].tolist()


def test_a_sample_that_is_not_there_is_an_error_of_one_sentence(trained, data):
    done = run_here(
        "evaluation/show_loss.py", "--save_dir", trained, "--data_path", data / "sft.jsonl",
        "--record", 41,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.endswith(f"--record 41: {data / 'sft.jsonl'} has 40 samples\n")


def test_the_text_of_python_has_its_docstrings_once(tmp_path, monkeypatch):
    """With a small library instead of Python's: the same package twice, and tests that are none."""
    library, none = tmp_path / "library", "A docstring of a test. " * 9
    for name in ("json", "copy_of_json"):
        shutil.copytree(json.__path__[0], library / name)
    (library / "test").mkdir()
    (library / "test/one.py").write_text(f'"""{none}"""', encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(library))
    out = tmp_path / "python.jsonl"
    run_here("recipes/python_text.py", "--out", out)
    texts = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(set(texts)) == len(texts) and min(map(len, texts)) >= 80
    assert next(python_text.docstrings(json.__path__[0] + "/__init__.py")).strip() in texts
    assert topics["if"] in texts and none.strip() not in texts


def test_the_shortest_context_of_several_models_limits_the_sample(tmp_path):
    for name, context in (("pretrain", 200), ("full_sft", 40)):
        config = ModelConfig(
            hidden_size=32, num_hidden_layers=1, max_position_embeddings=context
        )  # fmt: skip
        state = CausalLM(config).state_dict()
        write_weights(tmp_path / f"{name}_32.pth", state, config, load_tokenizer(), "full_sft")
    path = write_jsonl(tmp_path / "x.jsonl", [chat("Hi?", "A long answer. " * 20)])
    for names in (["pretrain", "full_sft"], ["full_sft", "pretrain"]):
        flags = ["--save_dir", tmp_path, "--data_path", path, "--weight", *names]
        done = run_here("evaluation/show_loss.py", *flags)
        assert done.returncode == 0, done.stderr
        assert len(rows_of(done.stdout)) == 39, names
