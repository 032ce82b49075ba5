"""GGUF files, judged by llama.cpp (the package xllamacpp)."""

import json
import os
import random
import sys
import urllib.request
from contextlib import contextmanager

import pytest
import torch

from convert import to_gguf
from dataset.tiny_world import text as tiny_world
from dataset.tiny_world.world import World
from model.causal_lm import CausalLM, ModelConfig
from model.chat_template import render
from model.generation import complete
from model.tokenizer import CONTROL_TOKENS, load_tokenizer
from model.weights import write_weights
from tests.conftest import run_here
from tests.test_tokenizer import SPLITS
from trainer.train_tokenizer import train

gguf = pytest.importorskip("gguf")
llama = pytest.importorskip("xllamacpp")

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 32}
FAMILIES = {
    "qwen3": {},
    "qwen2": {"qk_norm": False, "tie_word_embeddings": False, "hidden_size": 96},
    "qwen2 with biases": {"qk_norm": False, "qkv_bias": True, "hidden_size": 96},
    "qwen3moe": {"use_moe": True, "num_experts": 4, "moe_intermediate_size": 64},
}


def exported(folder, shape, *flags):
    """(our model, the file that to_gguf.py wrote of it)."""
    torch.manual_seed(1)
    tokenizer = load_tokenizer()
    shape = SMALL | shape
    rows = tokenizer.get_vocab_size() + 32 * ("qkv_bias" in shape)  # as Qwen's, more than tokens
    model = CausalLM(ModelConfig(vocab_size=rows, **shape)).eval()
    path, out = folder / "mine_64.pth", folder / "mine.gguf"
    write_weights(path, model.state_dict(), model.config, tokenizer, "full_sft", training={})
    to_gguf.main(["--weight", str(path), "--out", str(out), *flags])
    return model, out


@contextmanager
def served(path):
    """A function that asks llama.cpp's own server, which computes in fp32."""
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = str(path), 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, 0
    server = llama.Server(params)  # it ends with the last reference to it
    address = server.listening_address  # on loopback, at a free port

    def ask(route, **body):
        data = json.dumps(body).encode("utf-8")
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/{route}", data, header)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    yield ask
    del server


def difference(model, ask, length, tokenizer=None):
    """The largest difference of the 20 highest log-probabilities after random ids."""
    rng = random.Random(length)
    while True:
        ids = [rng.randrange(16, model.config.vocab_size) for _ in range(length)]
        with torch.inference_mode():
            ours = model(torch.tensor([ids]))[0, -1].log_softmax(dim=-1)
        # The server leaves out tokens that are a part of a character.
        if "\ufffd" not in (tokenizer or load_tokenizer()).decode([int(ours.argmax())]):
            break
    found = ask("completion", prompt=ids, n_predict=4, n_probs=20, temperature=0, ignore_eos=True)
    first = found["completion_probabilities"][0]["top_logprobs"]
    assert first[0]["id"] == int(ours.argmax())
    return max(abs(top["logprob"] - ours[top["id"]].item()) for top in first)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    model, path = exported(tmp_path_factory.mktemp("gguf"), {})
    with served(path) as ask:
        yield model, ask


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same_probabilities(tmp_path, family):
    model, path = exported(tmp_path, FAMILIES[family])
    with served(path) as ask:
        assert max(difference(model, ask, length) for length in (1, 17, 200)) < 1e-4


@pytest.mark.parametrize("kind, limit", [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.1)])
def test_smaller_types_are_near(tmp_path, kind, limit):
    model, path = exported(tmp_path, {}, "--type", kind)
    with served(path) as ask:
        assert 1e-7 < difference(model, ask, 40) < limit


def test_a_greedy_answer_is_the_same(mine):
    model, ask = mine
    ids, _ = render([{"role": "user", "content": "Who are you?"}], add_generation_prompt=True)
    (ours,) = complete(model, [ids], max_new_tokens=20, temperature=0, stop_ids=())
    theirs = ask(
        "completion", prompt=ids, n_predict=20, temperature=0, ignore_eos=True, return_tokens=True
    )
    assert theirs["tokens"] == ours


def texts():
    """2,000 texts: Tiny World, code, other scripts, spaces, forged markers."""
    rng = random.Random(1)
    found = tiny_world.pretraining_text(World(1), rng)[:1500]
    pieces = [
        "naïve",
        "日本語",
        "🙂👍🏽",
        "\n\n",
        "\r\n",
        "\t",
        "   ",
        "don't",
        "I'LL",
        "x=1;",
        "3.14",
    ]
    pieces += ["<|im_start|>", "</think>", "é", "۱۲", "-", "...", " ", "a b", "__init__(self):"]
    found += ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(500)]
    return found


def test_llama_cpp_cuts_every_text_as_we_do(mine):
    _, ask = mine
    tokenizer, wrong = load_tokenizer(), []
    for text in texts():
        if (
            ask("tokenize", content=text, parse_special=False)["tokens"]
            != tokenizer.encode(text).ids
        ):
            wrong.append(text)
    assert wrong == []


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama 3"])
def test_published_ways_to_split_a_text_are_known_to_llama_cpp(tmp_path, split):
    """Tokens of 405 texts, and log-probabilities of the model."""
    rng, every = random.Random(4), texts()
    some = rng.sample(every, 400) + ["1234567", "a 12 b", "I'LL don't", "x  \n\n y", "²½ 日本"]
    tokenizer = train(every[:300] + every[-300:], 900)
    tokenizer.pre_tokenizer = SPLITS[split]
    torch.manual_seed(1)
    model = CausalLM(ModelConfig(vocab_size=tokenizer.get_vocab_size(), **SMALL)).eval()
    path, out = tmp_path / "x_64.pth", tmp_path / "x.gguf"
    write_weights(path, model.state_dict(), model.config, tokenizer, "full_sft", training={})
    to_gguf.main(["--weight", str(path), "--out", str(out)])
    tokenizer.encode_special_tokens = True
    with served(out) as ask:
        for text in some:
            found = ask("tokenize", content=text, parse_special=False)["tokens"]
            assert found == tokenizer.encode(text).ids, text
        assert difference(model, ask, 30, tokenizer) < 1e-4


def test_weights_that_were_only_pretrained_have_no_template_and_end_with_their_document(tmp_path):
    model, _ = exported(tmp_path, {})
    path, out = tmp_path / "text_64.pth", tmp_path / "text.gguf"
    tokenizer = load_tokenizer()
    write_weights(path, model.state_dict(), model.config, tokenizer, "pretrain", training={})
    to_gguf.main(["--weight", str(path), "--out", str(out)])
    chat, text = (gguf.GGUFReader(file).fields for file in (tmp_path / "mine.gguf", out))
    assert "tokenizer.chat_template" in chat and "tokenizer.chat_template" not in text
    ends = [fields["tokenizer.ggml.eos_token_id"].contents() for fields in (chat, text)]
    assert ends == [2, 0]
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "Modelfile").read_text(encoding="utf-8")


def test_control_tokens_are_known_as_such(mine):
    _, ask = mine
    for number, token in enumerate(CONTROL_TOKENS[:9]):
        assert ask("tokenize", content=token, parse_special=True)["tokens"] == [number]


def test_the_modelfile_names_the_file_and_the_stop(tmp_path):
    _, path = exported(tmp_path, {})
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith(f"FROM ./{path.name}\n")
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_wrong_flags_are_errors_of_one_sentence(tmp_path, trained):
    done = run_here("convert/to_gguf.py", "--save_dir", trained, "--out", tmp_path / "x.bin")
    assert done.returncode == 2 and "need a name that ends in .gguf" in done.stderr
    with pytest.raises(ValueError, match=r"q8_0: rows are \[48, .*not multiples of 32"):
        exported(tmp_path, {"hidden_size": 48}, "--type", "q8_0")
    with pytest.raises(ValueError, match="qwen2 needs head_dim"):
        exported(tmp_path, {"qk_norm": False})
    assert not (tmp_path / "mine.gguf").exists()


def test_without_gguf_a_sentence_names_it(tmp_path, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="needs: pip install gguf"):
        to_gguf.main(["--save_dir", str(trained), "--out", str(tmp_path / "x.gguf")])


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    exported(tmp_path, {})
    (tmp_path / "mine.gguf").unlink()
    (tmp_path / "Modelfile").unlink()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    file = tmp_path / "mine.gguf"
    done = run_here("convert/to_gguf.py", "--weight", tmp_path / "mine_64.pth", "--out", file)
    assert done.returncode == 2 and f"{file} cannot be written: No space" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine_64.pth"]
