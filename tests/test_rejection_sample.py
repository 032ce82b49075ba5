"""Rejection sampling: what is kept is right, different, and says where it is from."""

import json

import pytest

from common import UserError
from dataset.lm_dataset import SFTDataset
from model.tokenizer import load_tokenizer
from recipes import rejection_sample
from tests.conftest import write_jsonl


def row(problem, output, truncated=False):
    return {"problem": problem, "output": output, "gold": "5", "truncated": truncated}


def test_what_is_kept():
    rows = [
        row(0, "2+3=5\n#### 5"),
        row(0, "2+3=5 \n #### 5 "),  # the same
        row(0, "#### 6"),
        row(0, "It is 5."),
        row(0, "So: 5"),  # a third one
        row(1, "It is 5.", truncated=True),
        row(1, "It is 5."),
    ]
    kept = rejection_sample.accepted(rows, "gsm8k", keep=2)
    assert kept == [rows[0], rows[3], rows[6]]


def test_a_run(trained, tmp_path):
    """A judge that accepts whatever holds no letter of these words leaves nearly all of it."""
    ask = {"category": "any", "expected": [], "conversations": [{"role": "user", "content": "Hi?"}]}
    data = write_jsonl(tmp_path / "problems.jsonl", [ask] * 3)
    flags = ["--task", "tiny_world", "--weight", trained / "full_sft_32.pth", "--data_path", data]
    flags += ["--max_new_tokens", 200, "--num_samples", 4, "--keep", 2, "--device", "cpu"]
    outs = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for out in outs:
        rejection_sample.main(list(map(str, [*flags, "--out", out])))
    assert outs[0].read_bytes() == outs[1].read_bytes()
    records = [json.loads(line) for line in outs[0].read_text(encoding="utf-8").splitlines()]
    assert 0 < len(records) <= 6
    for record in records:
        assert (
            record["source"]["task"] == "tiny_world" and len(record["source"]["data_sha256"]) == 64
        )
    texts = [(r["source"]["problem"], r["conversations"][-1]["content"]) for r in records]
    assert len(set(texts)) == len(texts)
    assert len(SFTDataset(outs[0], load_tokenizer(), 256)) > 0
    assert not list(tmp_path.glob("*.part"))
    again = tmp_path / "a.jsonl"
    rejection_sample.main(list(map(str, [*flags, "--out", again])))  # the same: it runs again
    assert again.read_bytes() == outs[1].read_bytes()
    for other in (["--limit", 1], ["--seed", 2], ["--keep", 1], ["--batch_size", 5]):
        says = f"a.jsonl is from another run: {other[0][2:]} was .* and is {other[1]}.*--out FILE"
        with pytest.raises(UserError, match=says):
            rejection_sample.main(list(map(str, [*flags, *other, "--out", again])))
    part = again.replace(tmp_path / "b.part")
    for out, file in ((tmp_path / "b.jsonl", part), (data, data)):
        outs[1].unlink(missing_ok=True)
        before = file.read_bytes()
        with pytest.raises(UserError, match=f"{file.name} is from another run"):
            rejection_sample.main(list(map(str, [*flags, "--seed", 2, "--out", out])))
        assert file.read_bytes() == before


def test_reasoning_is_saved_as_reasoning(trained, tmp_path, monkeypatch):
    ask = {
        "category": "any",
        "expected": "Yes.",
        "conversations": [{"role": "user", "content": "?"}],
    }
    data = write_jsonl(tmp_path / "problems.jsonl", [ask])
    answer = row(0, "Yes.") | {"sample": 0, "prompt": ask["conversations"], "reasoning": "Hm"}
    monkeypatch.setattr(
        rejection_sample, "answer_all", lambda *_, **options: [answer | {"gold": ask["expected"]}]
    )
    flags = ["--task", "tiny_world", "--weight", trained / "full_sft_32.pth", "--data_path", data]
    rejection_sample.main(list(map(str, [*flags, "--out", tmp_path / "out.jsonl"])))
    (record,) = (json.loads(line) for line in (tmp_path / "out.jsonl").open(encoding="utf-8"))
    message = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm"}
    assert record["conversations"][-1] == message


def test_samples_that_would_all_be_the_same_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        rejection_sample.main(["--data_path", str(tmp_path), "--temperature", "0"])
    assert "--temperature 0: all samples would be identical" in capsys.readouterr().err
