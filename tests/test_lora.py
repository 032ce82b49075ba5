"""LoRA: what it starts from, what it leaves alone, merging, files, and PEFT as the judge."""

import copy
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import eval_llm
from common import UserError
from convert import peft as merge_lora
from model.causal_lm import CausalLM, ModelConfig
from model.generation import complete
from model.lora import LoRALinear, add_lora, merge, weights_hash
from model.weights import build_model, load, open_model, require_adapters, save_tensors
from tests.conftest import LORA, ROOT, run_here, sft, torchrun
from trainer import train_full_sft
from trainer.checkpoint import build_resumed
from trainer.parameters import choose_trainable

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


def small(**more):
    torch.manual_seed(0)
    return CausalLM(ModelConfig(**SMALL, **more))


def adapters(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def with_adapters(model, **more):
    """Adapters as they are after some training: B is no longer zero."""
    add_lora(model, rank=4, alpha=8, **more)
    for linear in adapters(model):
        torch.nn.init.normal_(linear.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("more", [{}, {"use_moe": True}, {"qk_norm": False}])
def test_at_first_the_model_is_what_it_was_to_the_bit(more):
    model = small(**more)
    before = model(IDS)
    add_lora(model, dropout=0.5)
    assert torch.equal(model.eval()(IDS), before)
    assert torch.equal(model.train()(IDS), before)  # B is zero, whatever dropout takes of x


@pytest.mark.parametrize("more", [{}, {"use_moe": True}])
def test_merged_computes_what_the_adapters_did(more):
    model = with_adapters(small(**more))
    adapted = model(IDS)
    assert (adapted - small(**more)(IDS)).abs().max() > 0.01
    merge(model)
    assert torch.allclose(model(IDS), adapted, atol=1e-5)
    assert {*model.state_dict()} == {*small(**more).state_dict()}
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_an_adapter_computes_the_formula():
    model = with_adapters(small(), target="q_proj")
    linear = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    expected = x @ linear.weight.T + 8 / 4 * (x @ linear.lora_A.T @ linear.lora_B.T)
    assert torch.allclose(linear(x), expected, atol=1e-6)
    assert len(adapters(model)) == 2  # a layer each


def test_dropout_is_on_what_adapters_read_and_only_in_training():
    model = with_adapters(small(), dropout=1.0)
    assert torch.equal(model.train()(IDS), small()(IDS))  # nothing reaches the adapters
    assert torch.equal(model.eval()(IDS), with_adapters(small())(IDS))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_adapters_of_a_run_begin_as_its_seed_says(dropout):
    def begin(seed):
        torch.randn(3)  # whatever was drawn before
        flags = {"seed": seed, "use_lora": True, "lora_rank": 2, "lora_alpha": 4.0}
        flags |= {"lora_dropout": dropout, "lora_target": "q_proj,down_proj"}
        others = dict.fromkeys(("freeze_base", "extend_tokens"))
        model = CausalLM(ModelConfig(**SMALL))
        choose_trainable(model, None, SimpleNamespace(**flags, **others))
        assert model.lora.dropout == dropout and model.lora.alpha == 4.0
        return torch.stack([module.lora_A.norm() for module in adapters(model)])

    assert torch.equal(begin(1), begin(1)) and len(begin(1)) == 4
    assert not torch.equal(begin(1), begin(2))


def test_generation_uses_the_adapters():
    """Also where it lays matrices out anew."""
    model, prompts = with_adapters(small()), [[5, 6, 7], [8]]
    merged = merge(copy.deepcopy(model))
    options = {"max_new_tokens": 8, "temperature": 0, "stop_ids": ()}
    assert complete(model, prompts, **options) == complete(merged, prompts, **options)
    assert complete(model, prompts, **options) != complete(small(), prompts, **options)


def test_nothing_is_dropped_while_a_model_in_training_writes():
    """Neither of the adapters' input nor of the layers'."""
    options = {"max_new_tokens": 8, "temperature": 0, "stop_ids": ()}
    for more in ({}, {"use_moe": True}):
        model = with_adapters(small(dropout=0.6, **more), dropout=0.6).train()
        drawn = [complete(model, [[5, 6, 7], [8]], **options) for _ in range(3)]
        assert all(module.training for module in model.modules())
        assert drawn == [complete(model.eval(), [[5, 6, 7], [8]], **options)] * 3


def test_the_hash_is_of_the_weights_beneath():
    model = small()
    before = weights_hash(model)
    assert weights_hash(with_adapters(model)) == before
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert weights_hash(model) != before


def test_a_name_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match="k_prj"):
        add_lora(small(), target="q_proj,k_prj")


# ------------------------------------------------------------------------------------------- runs


def test_only_the_adapters_move_and_only_they_are_saved(lora_run):
    saved = load(lora_run / "lora_full_sft_32.pth")
    assert all(name.endswith(("lora_A", "lora_B")) for name in saved["model"])
    assert any(weight.abs().max() > 0 for n, weight in saved["model"].items() if "lora_B" in n)
    attention, mlp = 2 * (32 + 32) + 2 * (32 + 16), 3 * (32 + 96)  # of rank 1, in a layer
    assert sum(weight.numel() for weight in saved["model"].values()) == 2 * 4 * (attention + mlp)
    # The checkpoint has the adapters twice more, as AdamW's moments, and no other weights.
    resume = load(lora_run / "checkpoints" / "lora_full_sft_32_resume.pth")
    assert resume["model"].keys() == saved["model"].keys() == resume["optimizer"]["state"].keys()
    # What is trained on fits the weights as they were before: `attach_adapters` compares them.
    model, _ = build_resumed(resume, lora_run / "checkpoints" / "x")
    assert len(adapters(model)) == 2 * 7


def test_a_checkpoint_of_lora_whose_weights_have_changed_or_gone_is_refused(
    lora_run, data, tmp_path
):
    shutil.copytree(lora_run, tmp_path / "out")
    base = tmp_path / "out" / "pretrain_32.pth"
    go_on = ["--from_resume", 1, "--save_dir", tmp_path / "out", "--use_lora", 1, "--epochs", 9]
    content = load(base)
    content["model"]["model.norm.weight"][0] += 1
    save_tensors(base, content)
    done = run_here("trainer/train_full_sft.py", *go_on)
    assert (
        done.returncode == 2 and "was trained on other weights and fits only these" in done.stderr
    )
    base.unlink()
    done = run_here("trainer/train_full_sft.py", *go_on)
    assert done.returncode == 2 and "there is no" in done.stderr and "pretrain_32" in done.stderr


def test_a_checkpoint_of_lora_with_all_weights_is_resumed(lora_run, tmp_path):
    """As versions before wrote them."""
    shutil.copytree(lora_run, tmp_path / "out")
    path = tmp_path / "out" / "checkpoints" / "lora_full_sft_32_resume.pth"
    content, base = load(path), load(tmp_path / "out" / "pretrain_32.pth")
    content["model"] |= base["model"]
    del content["under"], content["run"]["row_length"]
    save_tensors(path, content)
    (tmp_path / "out" / "pretrain_32.pth").unlink()
    flags = ["--from_resume", 1, "--save_dir", tmp_path / "out", "--use_lora", 1]
    done = run_here("trainer/train_full_sft.py", *flags)
    assert done.returncode == 0 and "This run is already finished" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["full_sft", "lora_full_sft", "PATH"])
def test_adapters_are_found_by_each_of_their_names(lora_run, name):
    name = lora_run / "lora_full_sft_32.pth" if name == "PATH" else name
    flags = ["--save_dir", lora_run, "--lora", name, "--prompt", "Hi", "--max_new_tokens", 1]
    done = run_here("eval_llm.py", *flags)
    assert done.returncode == 0 and "lora_full_sft_32.pth" in done.stdout, done.stderr


def test_full_weights_with_a_name_of_adapters_are_told(trained, tmp_path):
    shutil.copy(trained / "full_sft_32.pth", tmp_path / "lora_x_32.pth")
    done = run_here("eval_llm.py", "--save_dir", tmp_path, "--lora", "x", "--prompt", "Hi")
    says = "holds full_sft weights, not adapters; pass it as --weight"
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_resumed_is_uninterrupted(lora_run, data, tmp_path, capsys):
    (tmp_path / "pretrain_32.pth").write_bytes((lora_run / "pretrain_32.pth").read_bytes())
    rows = (lora_run / "logs" / "lora_full_sft_32.jsonl").read_text(encoding="utf-8").splitlines()
    steps = json.loads(rows[-1])["step"]
    middle = steps // 2
    more = ["--save_interval", middle, "--keep_checkpoints", 9]
    sft(tmp_path, "--data_path", data / "sft.jsonl", *LORA, *more)
    folder = tmp_path / "checkpoints"
    (folder / f"lora_full_sft_32_step{middle:06d}.pth").replace(
        folder / "lora_full_sft_32_resume.pth"
    )
    for path in folder.glob("*_step*.pth"):
        path.unlink()
    (tmp_path / "lora_full_sft_32.pth").unlink()
    go_on = ["--use_lora", "1", "--from_resume", "1", "--save_dir", str(tmp_path)]
    train_full_sft.main(go_on)
    assert f"at step {middle}" in capsys.readouterr().out
    one, other = (load(out / "lora_full_sft_32.pth")["model"] for out in (lora_run, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_several_processes_and_compiled_layers_give_the_same_adapters(
    trained, data, tmp_path, compiled
):
    how = ["--data_path", data / "sft.jsonl", "--from_weight", trained / "pretrain_32.pth"]
    how += ["--use_lora", 1, "--max_seq_len", 96, "--learning_rate", 1e-2, "--dtype", "fp32"]
    how += ["--device", "cpu", "--save_dir"]
    train_full_sft.main(list(map(str, [*how, tmp_path / "one", "--batch_size", 2])))
    script = ROOT / "trainer" / "train_full_sft.py"
    done = torchrun(2, script, *how, tmp_path / "two", "--batch_size", 1)
    assert done.returncode == 0, done.stderr

    out = [tmp_path / "compiled", "--batch_size", 2, "--use_compile", 1]
    train_full_sft.main(list(map(str, [*how, *out])))
    assert len(compiled) == 2
    one, *others = (
        load(tmp_path / name / "lora_full_sft_32.pth")["model"]
        for name in ("one", "two", "compiled")
    )
    assert any(weight.abs().max() > 1e-3 for n, weight in one.items() if "lora_B" in n)
    for other in others:
        assert one.keys() == other.keys()
        for name, weight in one.items():
            torch.testing.assert_close(weight, other[name], atol=2e-5, rtol=1e-4)


def test_chat_with_adapters_and_with_them_merged(lora_run):
    ask = ["--prompt", "What is 3?", "--temperature", 0, "--save_dir", lora_run, "--dtype", "fp32"]
    ask += ["--max_new_tokens", 12]
    apart = run_here("eval_llm.py", "--lora", "full_sft", *ask)
    assert apart.returncode == 0, apart.stderr
    merge_lora.main(["--lora", "full_sft", "--save_dir", str(lora_run)])
    merged = run_here("eval_llm.py", "--weight", "full_sft_merged", *ask)
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.splitlines()[-1] == apart.stdout.splitlines()[-1]


def test_merged_weights_still_know_which_tokens_are_new(extended, shop_data, tmp_path):
    under = extended / "full_sft_32.pth"
    mark = load(under)["first_new_token"]
    flags = ["--data_path", shop_data / "train.jsonl", "--from_weight", under, "--epochs", 1]
    sft(tmp_path, *flags, *LORA)
    merge_lora.main(["--lora", "full_sft", "--save_dir", str(tmp_path)])
    merged = load(tmp_path / "full_sft_merged_32.pth")
    assert merged.get("first_new_token") == mark and mark is not None
    assert "lora" not in merged


def test_an_evaluation_is_of_weights_and_adapters_together(lora_run, gsm8k, tmp_path):
    """Other adapters on the same weights are another run."""
    for name in ("pretrain_32.pth", "lora_full_sft_32.pth"):
        (tmp_path / name).write_bytes((lora_run / name).read_bytes())
    flags = ["--task", "gsm8k", "--data_path", gsm8k / "test.jsonl", "--limit", 1]
    flags += ["--max_new_tokens", 2, "--save_dir", tmp_path]
    done = run_here("evaluation/run_eval.py", *flags, "--lora", "full_sft")
    assert done.returncode == 0, done.stderr
    assert run_here("evaluation/run_eval.py", *flags, "--lora", "full_sft").returncode == 0
    saved = load(tmp_path / "lora_full_sft_32.pth")
    for weight in saved["model"].values():
        weight += 1
    torch.save(saved, tmp_path / "lora_full_sft_32.pth")
    (result,) = (tmp_path / "eval" / "gsm8k").glob("*.json")
    before = result.read_bytes()
    done = run_here("evaluation/run_eval.py", *flags, "--lora", "full_sft")
    assert done.returncode == 2 and "is from another run: weights_sha256 was" in done.stderr
    assert result.read_bytes() == before


def test_other_weights_beneath_are_refused(lora_run, trained):
    flags = ["--prompt", "x", "--save_dir", lora_run, "--lora", "full_sft"]
    done = run_here("eval_llm.py", *flags, "--weight", trained / "full_sft_32.pth")
    assert done.returncode == 2 and "trained on other weights" in done.stderr
    path = lora_run / "lora_full_sft_32.pth"
    with pytest.raises(UserError, match="--lora"):
        build_model(load(path), path)


def test_adapters_from_scratch_are_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        sft(tmp_path, "--data_path", data / "sft.jsonl", *LORA, "--from_weight", "none")
    assert "--from_weight" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("target", ["all-linear", "q_proj,v_proj"])
def test_to_peft_and_back(target, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = with_adapters(small(tie_word_embeddings=False), target=target).eval()
    merge_lora.write_peft(tmp_path, model, "base")
    config = transformers.Qwen3Config(
        **{name: getattr(model.config, name) for name in merge_lora_names()},
        attention_bias=False,
        use_sliding_window=False,
    )
    theirs = transformers.Qwen3ForCausalLM(config)
    theirs.load_state_dict(small(tie_word_embeddings=False).state_dict())
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, model(IDS), atol=1e-5)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    again = small(tie_word_embeddings=False)
    merge_lora.read_peft(tmp_path / "theirs", again)
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, again.eval()(IDS), atol=1e-5)


@pytest.mark.parametrize("flags", [["--to_peft"], ["--save_weight", "x", "--from_peft"]])
def test_peft_files_without_safetensors_are_a_sentence(lora_run, tmp_path, monkeypatch, flags):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as where it is not installed
    weight = ["--weight", lora_run / "pretrain_32.pth", "--save_dir", lora_run]
    which = ["--lora", "full_sft"] if flags == ["--to_peft"] else []
    done = run_here("convert/peft.py", *weight, *which, *flags, tmp_path / "peft")
    assert done.returncode == 2 and "pip install safetensors" in done.stderr
    assert not (tmp_path / "peft").exists()


def merge_lora_names():
    return """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads
        head_dim intermediate_size rope_theta rms_norm_eps max_position_embeddings
        tie_word_embeddings""".split()


def test_files_of_peft_that_mean_more_are_refused(tmp_path):
    model = with_adapters(small())
    merge_lora.write_peft(tmp_path, model, "base")
    config = json.loads((tmp_path / merge_lora.CONFIG).read_text(encoding="utf-8"))
    (tmp_path / merge_lora.CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        merge_lora.read_peft(tmp_path, small())
    (tmp_path / merge_lora.CONFIG).write_text(json.dumps(config | {"r": "many"}))
    with pytest.raises(UserError, match="no PEFT adapters"):
        merge_lora.read_peft(tmp_path, small())
    (tmp_path / merge_lora.CONFIG).write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    with pytest.raises(UserError, match=r"target_modules .*c_attn"):
        merge_lora.read_peft(tmp_path, small())
    (tmp_path / merge_lora.CONFIG).write_text(json.dumps(config))
    (tmp_path / merge_lora.WEIGHTS).write_bytes(b"short")
    with pytest.raises(UserError, match="no PEFT adapters"):
        merge_lora.read_peft(tmp_path, small())


def test_weights_are_opened_with_their_adapters_merged(lora_run):
    flags = ["--save_dir", lora_run, "--weight", "pretrain", "--lora", "full_sft"]
    opened = open_model(eval_llm.parse(list(map(str, flags))))
    plain = load(lora_run / "pretrain_32.pth")["model"]
    assert opened.model.state_dict().keys() == plain.keys()
    assert not any("lora" in name for name in opened.model.state_dict())


def test_new_adapters_are_drawn_as_those_of_peft():
    """kaiming_uniform with a = sqrt(5): uniform between -1 and 1 over the root of the inputs."""
    for module in add_lora(small(), rank=64).modules():
        if isinstance(module, LoRALinear):
            bound = module.in_features**-0.5
            assert 0.97 * bound < module.lora_A.abs().max() <= bound
            assert torch.all(module.lora_B == 0)


@pytest.mark.parametrize("entry", ["lora", "under"])
def test_adapters_need_their_configuration_and_the_name_of_their_weights(entry, tmp_path):
    with pytest.raises(UserError, match="holds pretrain weights, not adapters"):
        require_adapters({"stage": "pretrain", entry: {}}, tmp_path / "x.pth")


def test_the_lm_head_has_no_adapter():
    """The loss reads its weight directly, so an adapter there would never be trained."""
    with pytest.raises(ValueError, match="lm_head: choose from q_proj"):
        add_lora(small(), target="q_proj,lm_head")
