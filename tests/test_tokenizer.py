"""The tokenizer: fixed control ids, nothing lost, and text that never becomes control."""

import json
import random

import pytest
from tokenizers import Regex, pre_tokenizers, trainers

from common import UserError
from model import chat_template
from model.chat_template import encode_all
from model.tokenizer import CONTROL_TOKENS, load_tokenizer
from tests.conftest import chat, run, run_here, write_jsonl
from trainer.train_tokenizer import train, without_endless_words


def test_control_tokens_have_their_fixed_ids():
    tokenizer = load_tokenizer()
    assert [tokenizer.token_to_id(token) for token in CONTROL_TOKENS] == list(range(16))
    assert CONTROL_TOKENS[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_any_text_round_trips():
    tokenizer, rng = load_tokenizer(), random.Random(0)
    texts = ["", "naïve 日本語 🙂\r\n\t x  y\u2028z\x00", "It's 1234+5=1239.\n\n  end "]
    for _ in range(200):
        points = [rng.choice([rng.randrange(0x20), rng.randrange(0x3000)]) for _ in range(30)]
        texts.append("".join(map(chr, points)))
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_text_that_looks_like_a_control_token_stays_text(token):
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(f"a{token} b").ids
    assert min(ids) >= len(CONTROL_TOKENS)
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{token} b"
    again = load_tokenizer(json_text=tokenizer.to_str())  # as it comes out of a weights file
    assert again.encode(f"a{token} b").ids == ids


def test_text_is_cut_as_qwen2_does():
    """With our vocabulary and merges, transformers' tokenizer of Qwen2 gives the same ids."""
    transformers = pytest.importorskip("transformers")
    tokenizer, rng = load_tokenizer(), random.Random(1)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    judge = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merges)
    texts = [
        "31+205\n\n",
        "It's I'LL we'Re 'tis",
        '"Bring it," he said.\n\n  \tx\r\n y  ',
        "a\u3000b",
    ]
    marks = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'",
        '."',
        "-",
        "(",
        "7",
        "42",
        "Nelina",
        "mill",
        "é",
    ]
    texts += ["".join(rng.choices(marks, k=20)) for _ in range(300)]
    for text in texts:
        assert tokenizer.encode(text).ids == judge.encode(text), text
    assert tokenizer.encode("31+205").tokens == list("31+205")


def test_training_is_deterministic_and_of_the_size_asked_for(tmp_path, data):
    for name in ("a.json", "b.json"):
        out = ["--out", tmp_path / name, "--data_path", data / "pretrain.jsonl", data / "sft.jsonl"]
        done = run("trainer/train_tokenizer.py", *out, "--vocab_size", 300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert load_tokenizer(tmp_path / "a.json").get_vocab_size() == 300


def test_another_programs_tokenizer_is_refused_with_the_remedy(tmp_path):
    text = load_tokenizer().to_str().replace("<|im_start|>", "<|turn|>")
    (tmp_path / "other.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="im_start.*train_tokenizer.py"):
        load_tokenizer(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text(text[:100], encoding="utf-8")
    with pytest.raises(UserError, match="broken.json.*train_tokenizer.py"):
        load_tokenizer(tmp_path / "broken.json")


def test_a_tokenizer_of_little_data_keeps_all_text_and_each_digit(tmp_path):
    texts = ["1234 1234 12341234 and the theatre " * 9] * 20
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    out = tmp_path / "t.json"
    flags = ["--data_path", path, "--vocab_size", 300, "--out", out]
    assert run_here("trainer/train_tokenizer.py", *flags).returncode == 0
    tokenizer = load_tokenizer(out)
    assert tokenizer.encode("91234").tokens == list("91234")
    assert len(tokenizer.encode(" theatre").ids) < len("theatre")
    assert [tokenizer.token_to_id(token) for token in CONTROL_TOKENS] == list(range(16))
    for text in ("naïve 日本語 🙂\r\n\t x  y\u2028z\x00", " ", "ZQ~", "<|im_end|>", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_tokenizer_learns_from_all_sides_of_a_conversation(tmp_path):
    talks = [
        {"messages": [{"role": "system", "content": "zebra " * 50}] + turns}
        for turns in [chat("quokka " * 50, "yonder " * 50)["conversations"]]
    ]
    path, out = write_jsonl(tmp_path / "x.jsonl", talks), tmp_path / "t.json"
    flags = ["--data_path", path, "--vocab_size", 320, "--out", out]
    assert run_here("trainer/train_tokenizer.py", *flags).returncode == 0
    for word in (" zebra", " quokka", " yonder"):
        assert len(load_tokenizer(out).encode(word).ids) == 1


def test_the_role_of_a_message_is_one_token(tmp_path):
    """In the shipped tokenizer, and in one that is trained on conversations."""
    path, out = write_jsonl(tmp_path / "x.jsonl", [chat("Hi", "Ho")] * 9), tmp_path / "t.json"
    flags = ["--data_path", path, "--vocab_size", 320, "--out", out]
    assert run_here("trainer/train_tokenizer.py", *flags).returncode == 0
    for tokenizer in (load_tokenizer(), load_tokenizer(out)):
        for role in ("user", "assistant"):
            assert len(tokenizer.encode(f"{role}\n").ids) == 2


NO_CONTENT = json.dumps({"messages": [{"role": "user", "content": ""}]}) + "\n"


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n', NO_CONTENT])
def test_a_file_without_text_makes_no_tokenizer(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content, encoding="utf-8")
    (tmp_path / "t.json").write_text("before", encoding="utf-8")
    flags = ["--data_path", tmp_path / "x.jsonl", "--out", tmp_path / "t.json"]
    done = run_here("trainer/train_tokenizer.py", *flags)
    assert done.returncode == 2 and "x.jsonl: it has no text" in done.stderr
    assert (tmp_path / "t.json").read_text(encoding="utf-8") == "before"


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--vocab_size", 271], "--vocab_size 271: give a whole number from 272"),
        (["--vocab_size", "x"], "--vocab_size x: give a whole number from 272"),
        (["--vocab", 300], "unrecognized arguments: --vocab"),
        (["--data_path"], "--data_path: expected at least one argument"),
    ],
)
def test_flags_that_cannot_be_meant_are_told_in_a_sentence(tmp_path, data, flags, says):
    out = tmp_path / "t.json"
    files = [] if "--data_path" in flags else ["--data_path", data / "sft.jsonl"]
    done = run_here("trainer/train_tokenizer.py", "--out", out, *files, *flags)
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not out.exists()


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
LLAMA3 = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {  # how published tokenizers split a text before they merge bytes
    "ours": None,
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([DIGITS, GPT2]),
    "llama 3": pre_tokenizers.Sequence([pre_tokenizers.Split(LLAMA3, "isolated"), BYTES]),
    "nothing": BYTES,  # which merges across words
    "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
}


@pytest.mark.parametrize("name", [*SPLITS, "added"])
def test_a_long_text_in_parts_has_the_ids_of_the_whole(monkeypatch, name):
    rng, words = random.Random(2), ["It's", "naïve", "日本語", "x²", "12345", "a_b", "don't", "ab"]
    words += ["e\u0301", "ofNew", "York", "🙂"]
    marks = [" ", "  ", "\n", "\n\n", ", ", ". ", "。", "，", "", " \t", "\r\n", "_.", "- "]
    texts = ["".join(rng.choice(words) + rng.choice(marks) for _ in range(80)) for _ in range(50)]
    tokenizer = train(texts, 700)
    if SPLITS.get(name):
        tokenizer.pre_tokenizer = SPLITS[name]
    if name == "nothing":
        tokenizer.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=900, show_progress=False)
        )
    if name == "added":
        tokenizer.add_tokens(["New York", "ofNew York"])
    expected = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts}
    parts, cut = [], chat_template.parts_to_encode
    count = lambda *given: parts.append(cut(*given)) or parts[-1]  # noqa: E731
    monkeypatch.setattr(chat_template, "parts_to_encode", count)
    monkeypatch.setattr(chat_template, "PART_CHARACTERS", 20)
    monkeypatch.setattr(chat_template, "BATCH_CHARACTERS", 1000)
    assert {text: list(ids) for text, ids in encode_all(texts, tokenizer).items()} == expected
    assert all("".join(part) == text for part, text in zip(parts, texts, strict=True))
    is_cut = max(map(len, parts)) > 5
    assert is_cut == (name not in ("nothing", "prefix", "added"))


def test_an_endless_word_is_trained_on_in_pieces():
    """Its time grew with the square of the length: hours for a megabyte of DNA."""
    rng = random.Random(0)
    dna = "".join(rng.choice("ACGT") for _ in range(500_000))
    for endless in (dna, "_-" * 250_000, "日本" * 250_000):
        parts = list(without_endless_words([f"a word {endless} and", "short"]))
        assert "".join(parts) == f"a word {endless} andshort" and "a word " in parts
        assert max(map(len, parts)) == 1000
    assert train([dna], 300).get_vocab_size() == 300


def test_a_tokenizer_that_is_missing_is_an_error_that_names_its_file(tmp_path):
    with pytest.raises(UserError, match="no.json: No such file or directory"):
        load_tokenizer(tmp_path / "no.json")
