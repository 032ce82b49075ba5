"""New tokens: what they begin as, that nothing else moves; recommendation data that uses them."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from common import UserError
from dataset.jsonl import read_records
from dataset.lm_dataset import SFTDataset
from evaluation import run_eval
from evaluation.tasks import TokenTrie, read_problems
from model.causal_lm import CausalLM, ModelConfig
from model.extend_vocab import extend_vocab, freeze_base
from model.generation import complete
from model.tokenizer import load_tokenizer
from model.weights import build_model, load
from recipes import sid
from tests.conftest import run_here, sft, write_jsonl
from trainer.parameters import read_tokens

TOKENS = ["<a_1>", "<a_2>", "<b_1>"]


def small(tokenizer, **more):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CausalLM(ModelConfig(vocab_size=tokenizer.get_vocab_size(), **shape, **more))


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_the_mean_and_the_old_logits_stay(tied):
    tokenizer = load_tokenizer()
    old, model = tokenizer.get_vocab_size(), small(tokenizer, tie_word_embeddings=tied)
    ids = torch.tensor([[5, 70, 9, 300]])
    before, rows = model(ids), model.lm_head.weight.clone()
    new = dict.fromkeys(["<b_1>", "<a_1>", "a"], "")  # "a" was there before
    assert extend_vocab(model, tokenizer, new) == 2
    assert model.config.vocab_size == old + 2 == tokenizer.get_vocab_size()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(ids)[..., :old], before)
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        assert torch.allclose(weight[old:].mean(dim=0), weight[:old].mean(dim=0), atol=1e-6)
    assert torch.equal(model.lm_head.weight[:old], rows)
    assert tokenizer.encode("buy <a_1><b_1> now").tokens[1:-1].count("<a_1>") == 1
    assert tokenizer.encode("<|im_start|>").ids != [1]  # text is still no control token


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_the_mean_of_its_description(tied):
    tokenizer = load_tokenizer()
    old, model = tokenizer.get_vocab_size(), small(tokenizer, tie_word_embeddings=tied)
    words = tokenizer.encode("blue paper").ids
    extend_vocab(model, tokenizer, {"<a_1>": "blue paper", "<b_1>": ""})
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        expected = sum(weight[word] for word in words) / len(words)
        torch.testing.assert_close(weight[old], expected)
        torch.testing.assert_close(weight[old + 1], weight[:old].mean(dim=0))


def test_tokens_of_each_kind_of_file(tmp_path):
    index = tmp_path / "x.index.json"
    index.write_text(json.dumps({"7": ["<b_1>", "<a_2>"], "9": ["<b_1>", "<a_1>"]}))
    lines = tmp_path / "x.txt"
    lines.write_text("<b_1>\n\n<a_2>\n<a_1>\n<a_1>\n", encoding="utf-8")
    assert read_tokens(index) == read_tokens(lines) == dict.fromkeys(TOKENS, "")
    index.write_text(json.dumps({"<b_1>": "a pen", "7": ["<a_2>"]}))
    assert read_tokens(index) == {"<a_2>": "", "<b_1>": "a pen"}
    lines.write_text("\n")
    for path in (lines, tmp_path / "no.txt"):
        with pytest.raises(UserError, match="--extend_tokens"):
            read_tokens(path)


def questions(folder):
    """{part: the questions of its conversations}."""
    return {
        path.stem: [record["conversations"][0]["content"] for _, record in read_records(path)]
        for path in folder.glob("*.jsonl")
    }


def test_official_parts_of_a_shop_stay_what_they_are(shop, tmp_path):
    head, *lines = (shop / "Shop.valid.csv").read_text(encoding="utf-8").splitlines()
    for name, part in (("train", lines[:10]), ("valid", lines[10:16]), ("test", lines[16:])):
        text = "\n".join([head, *part]) + "\n"
        (tmp_path / f"Shop.{name}.csv").write_text(text, encoding="utf-8")
    for path in shop.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    done = run_here("recipes/sid.py", "--raw", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    asked = questions(tmp_path / "out")
    for name, count in (("train", 10), ("valid", 6), ("test", 14)):
        assert sum("Which item is next" in text and "<a_" in text for text in asked[name]) == count


def test_a_customer_is_in_one_part_only(shop, tmp_path):
    """30 histories of 6 customers."""
    text = (shop / "Shop.valid.csv").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^U(\d+),", lambda user: f"U{int(user[1]) % 6},", text)
    (tmp_path / "Shop.csv").write_text(text, encoding="utf-8")
    for path in shop.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = list(csv.DictReader(text.splitlines()))
    for seed in (1, 2, 3):
        args = SimpleNamespace(raw=tmp_path, seed=seed)
        parts = {}
        for part, row in sid.split(args):
            parts.setdefault(row["user_id"], set()).add(part)
        assert len(parts) == 6 and all(len(found) == 1 for found in parts.values())
        assert len(sid.split(args)) == len(rows) == 30


def test_freezing_without_new_tokens_is_refused():
    with pytest.raises(ValueError, match="no new tokens"):
        freeze_base(small(load_tokenizer()))


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "name, before, after, says",
    [
        ("csv", b"Pen 1, new", b"Pen \xe9, new", "Shop.valid.csv is not UTF-8"),
        ("csv", b"Pen 1, new", b"Pen " + b"1" * 200_000, "valid.csv, after line 2: field"),
        ("csv", b"['<a_0><b_0>']", b"[None]", "line 2: ValueError"),
        ("csv", b"['<a_0><b_0>']", b"[" * 10_000, "line 2: "),
        ("csv", b",<a_1><b_0>\n", b"\n", "line 2: "),
        ("item", b'"Pen 1"', b"null", "item 1"),
        ("item", b'"Pen 1"', b"7", "item 1"),
        ("item", b'"It writes. 1"', b"[7]", "item 1"),
        ("item", b'{"title": "Pen 1", "description": "It writes. 1"}', b"null", "item 1"),
        ("item", b"}}", b"}", "Shop.item.json isn't JSON"),
        ("item", b'"Pen 1"', b'"Pen \xe9"', "Shop.item.json isn't JSON"),
        ("item", None, b"[1]", "Shop.item.json isn't a JSON object"),
        ("item", None, b"[]", "Shop.item.json isn't a JSON object"),
        ("index", b'["<a_1>", "<b_0>"]', b"null", "item 1"),
        ("index", b'["<a_1>", "<b_0>"]', b"[]", "item 1"),
        ("index", b'["<a_1>", "<b_0>"]', b'["<a_1>", null]', "item 1"),
        ("index", b'["<a_1>", "<b_0>"]', b'"<a_1>"', "item 1"),
    ],
)
def test_a_shop_that_cannot_be_read_is_told_in_a_sentence(
    shop, tmp_path, name, before, after, says
):
    for path in shop.iterdir():
        content = path.read_bytes()
        if name in path.name:
            assert before is None or before in content
            content = after if before is None else content.replace(before, after, 1)
        (tmp_path / path.name).write_bytes(content)
    done = run_here("recipes/sid.py", "--raw", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and says in done.stderr, (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 600
    assert not (tmp_path / "out").exists()


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_items_with_the_same_tokens_are_told(shop, tmp_path):
    for path in shop.iterdir():
        text = path.read_text(encoding="utf-8")
        text = text.replace('"4": ["<a_1>", "<b_1>"]', '"4": ["<a_0>", "<b_0>"]')
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    done = run_here("recipes/sid.py", "--raw", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert "warning: 2 items share their tokens with another, e.g. 0, 4 <a_0><b_0>" in done.stdout
    shutil.copy(tmp_path / "Shop.item.json", tmp_path / "More.item.json")
    done = run_here("recipes/sid.py", "--raw", tmp_path, "--out", tmp_path / "out")
    assert "warning: 5 items are in several *.item.json; using" in done.stdout
    assert (
        "warning" not in run_here("recipes/sid.py", "--raw", shop, "--out", tmp_path / "o").stdout
    )


def test_histories_become_conversations(shop, shop_data):
    train, test = read(shop_data / "train.jsonl"), read(shop_data / "test.jsonl")
    assert {record["task"] for record in test} == {"next_id"} and len(test) == 3
    kinds = {record["task"] for record in train}
    assert kinds == {
        *("next_id", "next_title", "next_description", "titles_to_next_id"),
        *("id_to_title", "title_to_id"),
    }
    asked = [r["conversations"][0]["content"] for r in train if r["task"] == "next_id"]
    assert max(text.count("<a_") for text in asked) == 3  # of up to 4, the latest
    index = [f"<a_{i % 3}><b_{i // 3}>" for i in range(6)]
    for record in train + test:
        if record["task"] == "next_id":  # the items follow one another in this shop
            question, answer = (turn["content"] for turn in record["conversations"])
            bought = [index.index(item) for item in re.findall(r"<a_.><b_.>", question)]
            assert bought == [(index.index(answer) - n) % 6 for n in range(len(bought), 0, -1)]
    assert sum(r["task"] == "title_to_id" for r in train) == 5
    assert list(read_tokens(shop_data / "tokens.txt")) == [
        "<a_0>",
        "<a_1>",
        "<a_2>",
        "<b_0>",
        "<b_1>",
    ]
    assert len(json.loads((shop_data / "sids.json").read_text())) == 6
    manifest = json.loads((shop_data / "manifest.json").read_text())
    assert (manifest["task"], manifest["seed"], manifest["max_history"]) == ("sid", 1, 3)
    items = json.loads((shop / "Shop.item.json").read_text())
    descriptions = {item["description"] for item in items.values()}
    asked = [
        r for _, r in read_records(shop_data / "train.jsonl") if r["task"] == "next_description"
    ]
    answers = {record["conversations"][-1]["content"] for record in asked}
    assert answers and answers <= descriptions  # an item without one, number 5, isn't asked for


def test_nothing_but_the_new_rows_moves(extended, trained):
    before = load(trained / "pretrain_32.pth")["model"]
    after = load(extended / "full_sft_32.pth")
    for name, weight in before.items():
        assert torch.equal(after["model"][name][: len(weight)], weight), name
    old = len(before["lm_head.weight"])
    new = after["model"]["lm_head.weight"][old:]
    assert len(new) == 5 and after["first_new_token"] == old
    mean = before["lm_head.weight"].mean(dim=0)
    assert ((new - mean).abs().amax(dim=1) > 1e-3).all()  # and all of these do


def test_a_later_run_goes_on_with_them(extended, shop_data, tmp_path):
    weights = extended / "full_sft_32.pth"
    data = ["--data_path", shop_data / "train.jsonl"]
    sft(tmp_path, *data, "--from_weight", weights, "--freeze_base", 1)
    one, other = (load(out / "full_sft_32.pth")["model"] for out in (extended, tmp_path))
    old = load(weights)["first_new_token"]
    assert torch.equal(one["lm_head.weight"][:old], other["lm_head.weight"][:old])
    assert not torch.equal(one["lm_head.weight"][old:], other["lm_head.weight"][old:])


def test_what_contradicts_itself_is_refused(trained, shop_data, tmp_path, capsys):
    start = ["--from_weight", trained / "pretrain_32.pth"]
    tokens = ["--extend_tokens", shop_data / "tokens.txt"]
    data = ["--data_path", shop_data / "train.jsonl"]
    for flags, says in (
        ([*start, "--freeze_base", 1], "--extend_tokens"),
        ([*start, *tokens, "--use_lora", 1], "can't be combined"),
        (["--from_weight", "none", *tokens], "--from_weight"),
    ):
        with pytest.raises((UserError, SystemExit)) as error:
            sft(tmp_path, *data, *flags)
        assert says in f"{error.value} {capsys.readouterr().err}", flags


def test_recommendations_are_items_that_exist(extended, shop_data, tmp_path):
    flags = ["--task", "sid", "--data_path", shop_data / "test.jsonl", "--save_dir", tmp_path]
    flags += ["--weight", extended / "full_sft_32.pth", "--device", "cpu"]
    scores = run_eval.main(list(map(str, flags)))
    result = json.loads((tmp_path / "eval" / "sid" / "full_sft_32.json").read_text())
    exist = json.loads((shop_data / "sids.json").read_text())
    assert all(row["output"] in exist for row in result["problems"])
    assert scores["overall"] == sum(r["output"] == r["gold"] for r in result["problems"]) / 3
    gold = [record["conversations"][-1]["content"] for record in read(shop_data / "test.jsonl")]
    assert [p["gold"] for p in read_problems("sid", shop_data / "test.jsonl")] == gold


def test_answers_held_to_some_texts_are_the_likeliest_of_them(extended):
    """Against the score of each text, when the tree leaves a choice at the first token alone."""
    content = load(extended / "full_sft_32.pth")
    model, tokenizer = build_model(content, extended)
    prompt = tokenizer.encode("Which item?").ids
    texts = [f"<a_{i}><b_0>" for i in range(3)]
    options = {"max_new_tokens": 5, "temperature": 0, "allowed_ids": TokenTrie(texts, tokenizer)}
    (answer,) = complete(model, [prompt], **options)
    first = [tokenizer.token_to_id(f"<a_{i}>") for i in range(3)]
    with torch.no_grad():
        likeliest = first[int(model(torch.tensor([prompt]))[0, -1, first].argmax())]
    assert answer == [likeliest, tokenizer.token_to_id("<b_0>")]


def test_new_tokens_are_one_token_in_the_data(extended, shop_data):
    content = load(extended / "full_sft_32.pth")
    _, tokenizer = build_model(content, extended)
    data = SFTDataset(shop_data / "test.jsonl", tokenizer, 96)
    _, labels = data[0]
    assert (labels != -100).sum() == 3  # two of the item, and the end of the turn


def test_a_broken_history_is_named(shop, tmp_path):
    for path in shop.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "Shop.valid.csv").read_text()
    assert "['<a_0><b_0>']" in text
    (tmp_path / "Shop.valid.csv").write_text(text.replace("['<a_0><b_0>']", "exit(0)", 1))
    done = run_here("recipes/sid.py", "--raw", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and "line " in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "Shop.valid.csv").write_bytes((shop / "Shop.valid.csv").read_bytes())
    (tmp_path / "Shop.item.json").write_text('{"0": {"description": "no title"}}')
    done = run_here("recipes/sid.py", "--raw", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and "item 0" in done.stderr
    assert not (tmp_path / "out").exists()
    write_jsonl(tmp_path / "x.jsonl", [{"source": "gsm8k"}])
    with pytest.raises(UserError, match="line 1"):
        read_problems("sid", tmp_path / "x.jsonl")


def test_rows_that_no_token_uses_become_those_of_new_tokens():
    """Published weights have more rows than their tokenizer has tokens."""
    tokenizer = load_tokenizer()
    old = tokenizer.get_vocab_size()
    model = small(SimpleNamespace(get_vocab_size=lambda: old + 5))
    before = model.lm_head.weight.detach().clone()
    assert extend_vocab(model, tokenizer, {"<a>": "", "<b>": ""}) == 2
    assert model.config.vocab_size == len(model.lm_head.weight) == old + 5
    assert tokenizer.token_to_id("<a>") == old and model.first_new_token == old
    assert torch.equal(model.lm_head.weight[:old], before[:old])
    mean = before[:old].mean(dim=0)
    torch.testing.assert_close(model.lm_head.weight[old:], mean.expand(5, -1))
    assert extend_vocab(model, tokenizer, dict.fromkeys("<c> <d> <e> <f>".split(), "")) == 4
    assert model.config.vocab_size == old + 6 == tokenizer.get_vocab_size()
