"""Files of another kind than JSONL: the kind and the remedy in one sentence, before any work. And
byte-order marks, which editors on Windows write, wherever a person writes a file.
"""

import gzip
import json
import shutil

import pytest

from common import UserError
from dataset.jsonl import read_records
from dataset.lm_dataset import SFTDataset
from model.tokenizer import load_tokenizer
from tests.conftest import ROOT, chat, run_here, write_jsonl
from tests.test_errors import refused

RECORD = {"text": "one two"}
CSV = "question,answer\n1+1?,2\n2+2?,4\n"
FILES = {  # name: (content, what the sentence says)
    "x.parquet": (b"PAR1\x15\x04\x15", "a Parquet file; convert it, e.g. by pandas.read_parquet"),
    "x.arrow": (b"ARROW1\0\0", "an Arrow file"),
    "x.xlsx": (b"PK\x03\x04\x14\0", "a zip archive or an Excel sheet"),
    "x.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04", "compressed with zstd; decompress it"),
    "x.jsonl.bz2": (b"BZh91AY", "compressed with bzip2"),
    "x.jsonl.xz": (b"\xfd7zXZ\0", "compressed with xz"),
    "x.pdf": (b"%PDF-1.7", "a PDF file"),
    "utf-16.jsonl": (json.dumps(RECORD).encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "page.jsonl": (b"\n<!DOCTYPE html>\n<html>", "a web page"),
    "x.csv": (CSV.encode(), "CSV; convert it, e.g. by pandas.read_csv"),
    "csv.jsonl": (CSV.encode(), "CSV"),
    "quoted.csv": (b'"prompt","completion"\n"a","b"\n', "CSV"),
    "x.tsv": (b"prompt\tcompletion\na\tb\n", "CSV; convert it, e.g. by pandas.read_table"),
    "x.txt": (b"Once upon a time\nthere was", "plain text; for pretraining, write each document"),
    "pretty.json": (json.dumps(RECORD, indent=2).encode(), "spread over several lines"),
    "inside.json": (
        json.dumps({"data": [RECORD]}, indent=2).encode(),
        '"data" holds a list of records',
    ),
    "line.json": (
        json.dumps({"version": 1, "data": [RECORD]}).encode(),
        '"data" holds a list of records',
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_named_by_each_reader(tmp_path, name):
    content, says = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    train = ["--data_path", path, "--from_weight", "none", "--hidden_size", 32]
    refused(run_here("trainer/train_pretrain.py", *train, "--save_dir", tmp_path), path.name, says)
    if name != "line.json":  # which may be split: it is a record, if of no known format
        done = run_here("dataset/prepare.py", "split", path, "--out", tmp_path / "parts")
        assert len(refused(done, path.name, says).splitlines()) == 1
    task = ["--task", "gsm8k", "--data_path", path, "--save_dir", tmp_path]
    refused(run_here("evaluation/run_eval.py", *task), path.name, says)


def test_one_bad_line_is_still_only_a_bad_line(tmp_path):
    for name, first in (("x.jsonl", '{"text": "a"'), ("x.jsonl", "c, d"), ("x.txt", "c")):
        path = tmp_path / name
        path.write_text(f'{first}\n{{"text": "b"}}\nc, d\n', encoding="utf-8")
        assert [type(record) for _, record in read_records(path)] == [ValueError, dict, ValueError]


def test_a_file_packed_with_gzip_is_read(tmp_path, data):
    text = (data / "sft.jsonl").read_bytes()
    for name, content in (
        ("x.jsonl.gz", gzip.compress(text)),
        ("cut.gz", gzip.compress(text)[:-99]),
    ):
        (tmp_path / name).write_bytes(content)
    plain = SFTDataset(data / "sft.jsonl", load_tokenizer())
    packed = SFTDataset(tmp_path / "x.jsonl.gz", load_tokenizer(), cache_dir=tmp_path / "cache")
    assert packed.files[0].ids.tolist() == plain.files[0].ids.tolist()
    with pytest.raises(UserError, match="cut.gz cannot be read"):
        SFTDataset(tmp_path / "cut.gz", load_tokenizer())


def with_mark(path, text):
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    return path


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, trained, data, monkeypatch):
    """Of tokens.txt, a config, a tokenizer, and what is piped into the chat."""
    tokens = with_mark(tmp_path / "tokens.txt", "<a>\n<b>\n")
    flags = ["--from_weight", trained / "full_sft_32.pth", "--data_path", data / "sft.jsonl"]
    flags += ["--save_dir", tmp_path, "--max_seq_len", 96]
    config = with_mark(tmp_path / "c.toml", "val_split = 0\nepochs = 1\n")
    done = run_here(
        "trainer/train_full_sft.py", *flags, "--config", config, "--extend_tokens", tokens
    )
    assert done.returncode == 0 and "2 new tokens; the vocabulary has 2050" in done.stdout
    written = (ROOT / "model" / "tokenizer.json").read_text(encoding="utf-8")
    marked = load_tokenizer(with_mark(tmp_path / "t.json", written))
    assert marked.to_str() == load_tokenizer().to_str()


def test_a_byte_order_mark_in_what_recipes_and_converters_read(tmp_path, lora_run):
    traces = [{name: "x" for name in ("question", "correct", "incorrect", "cot", "misconception")}]
    path = write_jsonl(tmp_path / "traces.jsonl", traces * 20)
    shutil.copy(ROOT / "recipes" / "misconceptions.toml", tmp_path / "plain.toml")
    text = (tmp_path / "plain.toml").read_text(encoding="utf-8")
    with_mark(tmp_path / "marked.toml", text)
    for name in ("plain", "marked"):
        more = ["--templates", tmp_path / f"{name}.toml", "--out", tmp_path / name]
        done = run_here("recipes/misconceptions.py", path, *more)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain/train.jsonl").read_bytes() == (
        tmp_path / "marked/train.jsonl"
    ).read_bytes()
    pytest.importorskip("safetensors")
    peft, adapters = tmp_path / "peft", ["--save_dir", lora_run, "--lora", "full_sft"]
    assert run_here("convert/peft.py", *adapters, "--to_peft", peft).returncode == 0
    config = peft / "adapter_config.json"
    with_mark(config, config.read_text(encoding="utf-8"))
    back = ["--from_peft", peft, "--weight", lora_run / "pretrain_32.pth", "--save_weight", "back"]
    done = run_here("convert/peft.py", *back, "--save_dir", tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_conversation_with_a_key_twice_is_noted_in_a_run(tmp_path):
    record = json.dumps(chat("Hi", "Ho"))
    path = tmp_path / "x.jsonl"
    path.write_text(f'{record[:-1]}, "id": 1, "id": 2}}\n{record}\n' * 3, encoding="utf-8")
    flags = ["--data_path", path, "--from_weight", "none", "--hidden_size", 32, "--max_seq_len", 64]
    done = run_here("trainer/train_full_sft.py", *flags, "--save_dir", tmp_path)
    assert done.returncode == 0 and "3 records with a repeated key" in done.stdout
