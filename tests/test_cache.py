"""The cache of tokenised files: the same samples, made once, whole or not there."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import UserError
from dataset import token_cache
from dataset.formats import KEYS
from dataset.jsonl import read_records
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.preference_pairs import PairDataset
from model.tokenizer import load_tokenizer
from tests.conftest import ROOT, chat, run, write_jsonl
from trainer.train_tokenizer import train


def make_samples(dataset):
    return [[part.tolist() for part in dataset[i]] for i in range(len(dataset))]


@pytest.mark.parametrize(
    "kind, name", [(SFTDataset, "sft.jsonl"), (PretrainDataset, "pretrain.jsonl")]
)
def test_cached_and_uncached_give_the_same_and_the_file_is_read_once(
    data, tmp_path, monkeypatch, kind, name
):
    plain = kind(data / name, load_tokenizer(), 40)
    first = kind(data / name, load_tokenizer(), 40, cache_dir=tmp_path)
    monkeypatch.setattr(token_cache, "render_batch", None)  # tokenises nothing from here on
    again = kind(data / name, load_tokenizer(), 40, cache_dir=tmp_path)
    assert make_samples(plain) == make_samples(first) == make_samples(again)
    assert len({path.name for path in tmp_path.iterdir()}) == 1
    with pytest.raises(TypeError):
        kind(data / name, load_tokenizer(), 40, cache_dir=tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())  # nothing half-made is left


def test_other_content_options_or_tokenizer_are_another_cache(data, tmp_path):
    for options in ({}, {"keep_think": "none"}, {"data_format": "conversations"}):
        SFTDataset(data / "sft.jsonl", load_tokenizer(), cache_dir=tmp_path, **options)
    other = load_tokenizer()
    other.add_tokens(["What"])
    SFTDataset(data / "sft.jsonl", other, cache_dir=tmp_path)
    text = (data / "sft.jsonl").read_text(encoding="utf-8")
    copy = tmp_path / "renamed.txt"
    copy.write_text(text, encoding="utf-8")
    SFTDataset(copy, load_tokenizer(), cache_dir=tmp_path)  # the same content: the same cache
    copy.write_text(text + json.dumps(chat("More?", "More.")), encoding="utf-8")
    SFTDataset(copy, load_tokenizer(), cache_dir=tmp_path)
    copy.unlink()
    assert len(list(tmp_path.iterdir())) == 5


def test_bad_records_and_notes_are_remembered(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(chat("Hi", "Ho")) + "\n{\n", encoding="utf-8")
    for _ in range(2):
        dataset = SFTDataset(path, load_tokenizer(), cache_dir=tmp_path / "cache")
        assert dataset.files[0].report["bad_lines"][0][0] == 2
    with pytest.raises(UserError, match="line 2"):
        SFTDataset(path, load_tokenizer(), cache_dir=tmp_path / "cache", strict=True)


FILES = ["ids.bin", "mask.bin", "offsets.npy", "supervised.npy", "lines.npy", "report.json"]


@pytest.mark.parametrize("name", [*FILES, "sizes.json"])
def test_a_damaged_cache_is_made_again_with_a_word(data, tmp_path, name, capsys):
    few = [record for _, record in read_records(data / "sft.jsonl")][:4]
    path = write_jsonl(tmp_path / "path.jsonl", few)

    def samples():
        return make_samples(SFTDataset(path, load_tokenizer(), 40, cache_dir=tmp_path / "cache"))

    expected = samples()
    (folder,) = (tmp_path / "cache").iterdir()
    assert {file.name for file in folder.iterdir()} == {*FILES, "sizes.json"}
    assert samples() == expected and capsys.readouterr().out == ""
    file, content = folder / name, (folder / name).read_bytes()
    for harm in (
        file.unlink,
        lambda: (file.unlink(), file.mkdir()),
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(content[:-1]),
        lambda: file.write_bytes(content[: len(content) // 2] + b"{"),
        lambda: file.write_bytes(b"[1]"),
    ):
        harm()
        assert samples() == expected
        said = capsys.readouterr().out
        assert len(said.splitlines()) == 1 and f"{folder} is damaged" in said
        assert samples() == expected and capsys.readouterr().out == ""


BUILD = """
import sys
from dataset.lm_dataset import SFTDataset
from model.tokenizer import load_tokenizer
print(len(SFTDataset(sys.argv[1], load_tokenizer(), cache_dir=sys.argv[2])))
"""


@pytest.fixture
def many(tmp_path):
    records = [chat(f"What is {i}?", f"The number {i * i}. " * 20) for i in range(4000)]
    return write_jsonl(tmp_path / "many.jsonl", records)


def test_two_processes_that_build_the_same_cache_do_not_harm_each_other(many, tmp_path):
    command = [sys.executable, "-c", BUILD, many, tmp_path / "cache"]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in both] == ["4000\n"] * 2
    (folder,) = (tmp_path / "cache").iterdir()
    assert not folder.name.startswith(".")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_build_leaves_nothing_that_is_taken_for_a_cache(many, tmp_path):
    folder = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", BUILD, many, folder], cwd=ROOT)
    while not list(folder.glob(".*/ids.bin")):
        time.sleep(0.01)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not [path for path in folder.iterdir() if not path.name.startswith(".")]
    done = run("-c", BUILD, many, folder, cwd=ROOT)
    assert done.stdout == "4000\n"


SHIPPED = load_tokenizer()
# The hash of what `every_kind_of_record` becomes, for the version of the cache that makes it so.
# Where the first differs, the code makes other tokens than before: raise token_cache.VERSION, so
# that no cache of an earlier version is read, and write the new pair down here.
TOKENS_OF_VERSION = (3, "5896fe24821769884735779205e5cd738d558e79fb5fff10ad553809d288ff7c")


def every_kind_of_record():
    """(kind of dataset, its options, records): each format, role, mask and way to leave out."""
    asked, said = ({"role": r, "content": f"{r}: é 1"} for r in ("user", "assistant"))
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    result = {"role": "tool", "content": "7"}
    thought = said | {"reasoning_content": "hm"}
    record = {"messages": [asked, call, result, thought, asked, said | {"train": False}]}
    by_format = {
        "alpaca": {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
        "conversations": record | {"tools": [{"name": "f"}], "system": "s"},
        "sharegpt": {"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": 2}]},
        "openai": {"messages": [said, asked, said | {"content": ""}, said]},
        "prompt": {"prompt": [asked], "completion": [said]},
    }
    by_format["conversations"]["conversations"] = by_format["conversations"].pop("messages")
    for key, names in KEYS.items():
        if key not in ("preference", "text", *by_format):
            by_format[key] = {name: ["x", "y"] if len(names) == 1 else name for name in names}
    for key, one in by_format.items():
        for keep in ("all", "last", "none"):
            yield SFTDataset, {"data_format": key, "keep_think": keep}, [one, {"bad": 1}]
    yield PretrainDataset, {}, [{"text": "one two 日本"}, {"text": ""}, {"text": "é" * 300_000}]
    yield PairDataset, {}, [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def test_the_version_of_the_cache_follows_the_tokens(tmp_path):
    tokenizer, digest = train([], 272), hashlib.sha256()  # bytes alone: the shipped one may change
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    for number, (kind, options, records) in enumerate(every_kind_of_record()):
        data = write_jsonl(tmp_path / f"{number}.jsonl", records)
        (tokens,) = kind(data, load_tokenizer(path), 10**6, **options).files
        for array in (tokens.ids, tokens.mask, tokens.offsets, tokens.supervised, tokens.lines):
            digest.update(array.tobytes())
        digest.update(json.dumps(tokens.report, sort_keys=True).encode())
    assert (token_cache.VERSION, digest.hexdigest()) == TOKENS_OF_VERSION


def test_the_version_is_in_the_key(monkeypatch):
    key = token_cache.cache_key("content", SHIPPED, [])
    monkeypatch.setattr(token_cache, "VERSION", token_cache.VERSION + 1)
    assert token_cache.cache_key("content", SHIPPED, []) != key


def test_an_edited_comment_leaves_the_cache(monkeypatch):
    monkeypatch.setattr(Path, "read_text", None)  # the source of no module is read
    assert token_cache.cache_key("content", SHIPPED, []) == token_cache.cache_key(
        "content", SHIPPED, []
    )


def test_a_cache_that_cannot_be_written_is_said_in_a_sentence(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --save_dir or --cache_dir"):
        SFTDataset(data / "sft.jsonl", load_tokenizer(), cache_dir=tmp_path / "file" / "cache")


def test_an_endless_document_and_many_short_ones_are_the_same_tokens(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "one two " * n} for n in (1, 400, 2)])
    dataset = PretrainDataset(path, load_tokenizer(), 16, cache_dir=tmp_path / "cache")
    seen = torch.cat([dataset[i][0][1:] for i in range(len(dataset))]).tolist()
    tokenizer = load_tokenizer()
    expected = [tokenizer.encode("one two " * n).ids[1:] + [0] for n in (1, 400, 2)]
    assert seen == sum(expected, [])
