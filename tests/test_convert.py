"""Folders for Hugging Face, judged by transformers."""

import json
import os
import shutil
import sys

import pytest
import torch

from common import UserError
from convert import to_hf
from model.causal_lm import CausalLM, ModelConfig
from model.chat_template import render
from model.generation import complete
from model.tokenizer import load_tokenizer
from model.weights import write_weights
from tests.conftest import chat, run_here

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 32}
FAMILIES = {
    "qwen3": {},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
    "qwen3_moe": {"use_moe": True, "num_experts": 4},
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"größe": 1}}}
CALLS = [{"function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}}]
GOLDEN = [
    chat("Hi", "Hello!")["conversations"],
    chat("Hi", "Hello!", "Where is 12 Main St?", "Here,  of course.\nYes. 🙂")["conversations"],
    [{"role": "system", "content": "Be brief."}, *chat("你好", "naïve")["conversations"]],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", "reasoning_content": "I ask.", "tool_calls": CALLS},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "Cold."},
    ],
]


def exported(folder, shape, *flags):
    """(our model, the folder that to_hf.py wrote of it)."""
    torch.manual_seed(1)
    tokenizer = load_tokenizer()
    config = ModelConfig(vocab_size=tokenizer.get_vocab_size(), **SMALL, **shape)
    model = CausalLM(config).eval()
    path, out = folder / "mine_48.pth", folder / "hf"
    training = {"tokens": 10, "seed": 1}
    write_weights(path, model.state_dict(), config, tokenizer, "full_sft", training=training)
    to_hf.main(["--weight", str(path), "--out", str(out), *flags])
    return model, out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("hf"), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(tmp_path, family):
    model, out = exported(tmp_path, FAMILIES[family])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert theirs.config.model_type == family and theirs.dtype == torch.float32
    ids = torch.randint(16, 2048, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=1e-4)


def test_half_precision_is_written_and_read(tmp_path):
    model, out = exported(tmp_path, {}, "--dtype", "bf16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16
    ours = model.model.layers[0].mlp.up_proj.weight.bfloat16()
    assert torch.equal(theirs.model.layers[0].mlp.up_proj.weight, ours)


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_the_template_gives_our_ids_and_our_mask(folder, number):
    messages, tools = GOLDEN[number], [WEATHER] if number > 1 else None
    theirs = transformers.AutoTokenizer.from_pretrained(folder[1])
    found = theirs.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = render(messages, tools=tools)
    assert found["input_ids"] == ids
    assert found["assistant_masks"] == mask
    asked = messages[:-1]
    found = theirs.apply_chat_template(
        asked, tools=tools, add_generation_prompt=True, return_dict=True
    )
    assert found["input_ids"] == render(asked, tools=tools, add_generation_prompt=True)[0]


def test_texts_are_cut_as_here(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder[1])
    for text in ("Nelina lives at the mill.", "  27+15\n\n= 42", "naïve 🙂 日本", "x\r\n\ty  z"):
        ids = load_tokenizer().encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_a_pipeline_answers_as_we_do(folder):
    model, out = folder
    pipeline = transformers.pipeline("text-generation", model=str(out))
    messages = GOLDEN[0][:1]
    said = pipeline(messages, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]
    prompt, _ = render(messages, add_generation_prompt=True)
    (ours,) = complete(model, [prompt], max_new_tokens=12, temperature=0)
    assert said["content"] == load_tokenizer().decode(ours)


def test_trl_trains_the_folder(folder, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"messages": GOLDEN[0]}] * 2)
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none",
        assistant_only_loss=True, use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(str(folder[1]), args=args, train_dataset=data)
    assert trainer.train().training_loss > 0


def test_wrong_flags_are_errors_of_one_sentence(tmp_path, trained):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    done = run_here("convert/to_hf.py", "--save_dir", trained, "--out", full)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --out {full} is not empty; give another folder\n",
    )
    done = run_here("convert/to_hf.py", "--save_dir", trained, "--out", full / "mine.txt")
    assert done.returncode == 2 and "mine.txt is a file; give a folder" in done.stderr
    for flags in (["--lora", "x", "--save_weight", "y"], ["--from_peft", full]):
        done = run_here("convert/peft.py", *flags, "--to_peft", tmp_path / "x")
        assert done.returncode == 2 and "omit --from_peft and --save_weight" in done.stderr
    done = run_here("convert/to_hf.py", "--save_dir", tmp_path, "--out", tmp_path / "x")
    assert done.returncode == 2 and "make it with" in done.stderr
    assert not (tmp_path / "x").exists()


def test_without_safetensors_a_sentence_names_it(tmp_path, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="needs: pip install safetensors"):
        to_hf.main(["--save_dir", str(trained), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_experts_without_qk_norm_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no transformers architecture matches"):
        exported(tmp_path, {"use_moe": True, "qk_norm": False})
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("file", [2, 5])
def test_a_disk_that_is_full_half_way_leaves_nothing(tmp_path, monkeypatch, file):
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == file:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    exported(tmp_path, {})
    monkeypatch.setattr(os, "fsync", full)
    weights, out = tmp_path / "mine_48.pth", tmp_path / "new"
    done = run_here("convert/to_hf.py", "--weight", weights, "--out", out)
    assert done.returncode == 2 and "cannot be written: No space" in done.stderr
    assert not (tmp_path / "new").exists()


def test_weights_that_were_only_pretrained_are_exported_to_continue_text(tmp_path):
    model, folder = exported(tmp_path, {})
    path, out = tmp_path / "text_48.pth", tmp_path / "text"
    tokenizer = load_tokenizer()
    write_weights(path, model.state_dict(), model.config, tokenizer, "pretrain", training={})
    to_hf.main(["--weight", str(path), "--out", str(out)])
    chat, text = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, out))
    assert chat.chat_template and not text.chat_template
    assert (chat.eos_token, text.eos_token) == ("<|im_end|>", "<|endoftext|>")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config.eos_token_id == 0 and theirs.generation_config.eos_token_id == [0]


def test_adapters_of_pretraining_are_exported_to_continue_text(trained, data, tmp_path):
    shutil.copy(trained / "pretrain_32.pth", tmp_path / "pretrain_32.pth")
    flags = [
        "--from_weight",
        "pretrain",
        "--use_lora",
        1,
        "--save_weight",
        "more",
        "--device",
        "cpu",
    ]
    flags += ["--data_path", data / "pretrain.jsonl", "--save_dir", tmp_path, "--max_seq_len", 96]
    assert run_here("trainer/train_pretrain.py", *flags).returncode == 0
    export = ["--lora", "more", "--save_dir", tmp_path, "--out", tmp_path / "hf"]
    assert run_here("convert/to_hf.py", *export).returncode == 0
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()


def test_generation_ends_at_both_tokens_that_end_an_answer(folder):
    written = json.loads((folder[1] / "generation_config.json").read_text(encoding="utf-8"))
    assert written["eos_token_id"] == [2, 0] and written["pad_token_id"] == 0
    theirs = transformers.GenerationConfig.from_pretrained(folder[1])
    assert theirs.eos_token_id == [2, 0]


@pytest.mark.parametrize("shape", [{"qk_norm": True}, {"use_moe": True, "qk_norm": True}])
def test_biases_with_qk_norm_or_experts_are_refused(shape):
    config = ModelConfig(hidden_size=32, qkv_bias=True, **shape)
    with pytest.raises(UserError, match="no transformers architecture matches .* with biases"):
        to_hf.hf_config(config, "fp32", 2)
