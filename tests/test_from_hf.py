"""Published models, read from their folders and judged by transformers."""

import json
import shutil
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from convert import from_hf, to_hf
from model.chat_template import render
from model.generation import complete
from model.huggingface import read_chat_template
from model.lora import add_lora
from model.tokenizer import CONTROL_TOKENS, NAMED_CONTROL_TOKENS
from model.weights import build_model, load
from tests.conftest import chat, run_here, write_jsonl

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256,
    "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 2.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3, untied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "smollm2": ("Llama", {"rope_theta": 100000.0, "tie_word_embeddings": True}),
}
OWN = {  # where the control tokens of a published tokenizer are; the others have none of ours
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "llama": ["<|end_of_text|>"],
}


def write_tokenizer(folder, kind, template=True):
    """A byte-level tokenizer whose control tokens come last, as in Qwen's and Llama's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["Where does she live? She lives at the mill."] * 9, trainer)
    tokenizer.add_special_tokens(OWN[kind])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=OWN[kind][0], pad_token=OWN[kind][0]
    )
    if template:
        theirs.chat_template = to_hf.TEMPLATE.read_text(encoding="utf-8")
    theirs.save_pretrained(folder)
    return theirs


def published(folder, family, kind="qwen", dtype=torch.float32, **options):
    """transformers' random model of a family, saved in a folder with a tokenizer."""
    name, shape = FAMILIES[family]
    torch.manual_seed(3)
    eos = write_tokenizer(folder, kind).eos_token_id
    config = getattr(transformers, f"{name}Config")(**SMALL | shape, eos_token_id=eos)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith((".bias", "norm.weight")):  # zeros and ones test nothing
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    model.to(dtype).eval().save_pretrained(folder, **options)
    return model


def ids_of(tokenizer, folder):
    """{our id: the id of the same token in the folder's tokenizer, as transformers reads it}."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    ours = tokenizer.get_vocab()
    return {ours[token]: theirs[token] for token in theirs if token in ours}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_transformers(tmp_path, family):
    theirs = published(tmp_path, family)
    model, tokenizer = build_model(load(tmp_path), tmp_path)
    model.eval()
    pairs = ids_of(tokenizer, tmp_path)
    assert len(pairs) >= 280  # all of them
    ours, their_ids = torch.tensor(list(pairs)), torch.tensor(list(pairs.values()))
    some = torch.randint(0, len(ours), (2, 150), generator=torch.Generator().manual_seed(1))
    ids = ours[some]
    with torch.inference_mode():
        expected = theirs(their_ids[some]).logits[..., their_ids]
        torch.testing.assert_close(model(ids)[..., ours], expected, atol=1e-4, rtol=1e-4)
    prompt = ids[0, :20].tolist()
    fast = complete(model, [prompt], max_new_tokens=5, temperature=0, stop_ids=())
    plain = list(prompt)
    for _ in range(5):
        plain.append(model(torch.tensor([plain]))[0, -1].argmax().item())
    assert fast == [plain[20:]]


@pytest.mark.parametrize("command", ["check", "show"])
def test_data_is_checked_with_the_tokenizer_of_published_weights(tmp_path, command):
    """Of a folder, or of a weights file that was made of it: the tokens that a run would take."""
    published(tmp_path / "qwen", "qwen2")
    made = ["--save_weight", "qwen", "--save_dir", tmp_path]
    assert run_here("convert/from_hf.py", tmp_path / "qwen", *made).returncode == 0
    path = write_jsonl(tmp_path / "x.jsonl", [chat("Where does she live?", "At the mill.")])
    flags = ["dataset/prepare.py", command, "--data_path", path]
    own, folder, file = (
        run_here(*flags, *more).stdout
        for more in ([], ["--weight", tmp_path / "qwen"], ["--weight", tmp_path / "qwen_64.pth"])
    )
    assert folder == file != own
    _, tokenizer = build_model(load(tmp_path / "qwen"), tmp_path)
    ids, _ = render(
        chat("Where does she live?", "At the mill.")["conversations"], tokenizer=tokenizer
    )
    says = (
        f"tokens                    {len(ids)}\n" if command == "check" else f"{len(ids)} tokens;"
    )
    assert says in folder and says not in own
    torch.save([1, 2], tmp_path / "list.pth")
    done = run_here(*flags, "--weight", tmp_path / "list.pth")
    assert done.returncode == 2 and "isn't a weights file of this program" in done.stderr
    done = run_here(*flags, "--weight", tmp_path / "none.pth")
    assert done.returncode == 2 and "give the path of a .pth file or a folder" in done.stderr


def test_bf16_in_several_files_is_read(tmp_path):
    theirs = published(tmp_path, "qwen3", dtype=torch.bfloat16, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, _ = build_model(load(tmp_path), tmp_path)
    ours = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(ours, theirs.model.layers[1].mlp.up_proj.weight.float())


@pytest.mark.parametrize("kind", OWN)
def test_a_text_has_the_tokens_it_had(tmp_path, kind):
    published(tmp_path, "llama 3", kind)
    _, tokenizer = build_model(load(tmp_path), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for number, token in enumerate(CONTROL_TOKENS[:NAMED_CONTROL_TOKENS]):
        assert tokenizer.token_to_id(token) == number
    for text in ("Where does she live?", '  "27+15"\n\n= 42!', "naïve 🙂 日本", "#$%&'()*+,-./"):
        encoded = tokenizer.encode(text)
        assert encoded.tokens == theirs.tokenize(text)
        assert tokenizer.decode(encoded.ids) == text
    forged = tokenizer.encode("<|im_start|><|endoftext|>").ids
    assert min(forged) >= NAMED_CONTROL_TOKENS  # text never becomes a control token


def test_a_conversation_has_the_tokens_of_the_folder(tmp_path):
    """The folder has ChatML: our ids name the same tokens as the ids of transformers."""
    published(tmp_path, "qwen3")
    content = load(tmp_path)
    assert content["stage"] == "full_sft"
    _, tokenizer = build_model(content, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = chat("Where does she live?", "At the mill.")["conversations"]
    messages[1]["reasoning_content"] = "She is the miller."
    found = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    ids, _ = render(messages, tokenizer=tokenizer)
    assert [tokenizer.id_to_token(i) for i in ids] == theirs.convert_ids_to_tokens(found)


def test_a_folder_without_our_tokens_continues_text(tmp_path, capsys):
    theirs = published(tmp_path, "llama 3", "llama")
    content = load(tmp_path)
    assert content["stage"] == "pretrain"
    assert "weren't trained with ChatML" in capsys.readouterr().out
    model, tokenizer = build_model(content, tmp_path)
    # Its end of a document is ours, under our name.
    end = theirs.config.eos_token_id
    assert torch.equal(model.lm_head.weight[0], theirs.lm_head.weight[end])
    # The rows of the new tokens that the table had no room for are its mean.
    published(tmp_path, "smollm2", "llama")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    rows = len(tokenizer.get_vocab()) - 8  # as many as their tokenizer has
    weights = load(tmp_path)
    assert config["vocab_size"] > rows and weights["config"]["vocab_size"] == config["vocab_size"]


def test_a_template_within_the_configuration_of_the_tokenizer_is_read(tmp_path):
    """Folders of before transformers 4.50 have no chat_template.jinja."""
    published(tmp_path, "qwen3")
    file = tmp_path / "chat_template.jinja"
    template = file.read_text(encoding="utf-8")
    file.unlink()
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for text, stage in ((template, "full_sft"), ("{{ messages[0].content }}", "pretrain")):
        path.write_text(json.dumps(config | {"chat_template": text}), encoding="utf-8")
        assert load(tmp_path)["stage"] == stage


def test_eval_llm_and_sft_begin_with_a_folder(tmp_path):
    published(tmp_path / "hf", "qwen2")
    data = write_jsonl(tmp_path / "x.jsonl", [chat("Hi?", f"Hello {i}.") for i in range(20)])
    done = run_here(
        "eval_llm.py", "--weight", tmp_path / "hf", "--prompt", "Hi?", "--max_new_tokens", 3
    )
    assert done.returncode == 0, done.stderr
    assert "starting from the full_sft weights" in done.stdout
    done = run_here(
        "trainer/train_full_sft.py", "--from_weight", tmp_path / "hf", "--data_path", data,
        "--save_dir", tmp_path, "--batch_size", 2, "--max_seq_len", 64,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained = load(tmp_path / "full_sft_64.pth")
    assert trained["config"]["qkv_bias"] is True
    before = load(tmp_path / "hf")["model"]["model.layers.0.self_attn.q_proj.bias"]
    assert not torch.equal(before, trained["model"]["model.layers.0.self_attn.q_proj.bias"])


def test_out_and_in_again_are_the_same_logits(tmp_path):
    """A Qwen2 and a Llama 3 go through a weights file and out to transformers."""
    for family in ("qwen2", "llama 3"):
        folder = tmp_path / family.replace(" ", "")
        published(folder, family)
        from_hf.main([str(folder), "--save_weight", "mine", "--save_dir", str(folder / "out")])
        file = folder / "out" / "mine_64.pth"
        to_hf.main(["--weight", str(file), "--out", str(folder / "again")])
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "again").eval()
        assert theirs.config.model_type == family.split(" ")[0]
        model, _ = build_model(load(file), file)
        ids = torch.arange(9, 200)[None]
        with torch.inference_mode():
            torch.testing.assert_close(theirs(ids).logits, model.eval()(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("moe", [False, True])
def test_the_weights_of_minimind_are_read(tmp_path, moe):
    """MiniMind's current model computes what a Qwen3 does, with its constants."""
    family = "qwen3_moe" if moe else "qwen3"
    shape = dict(FAMILIES[family][1], head_dim=8, rope_theta=1e6, tie_word_embeddings=True)
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    if moe:
        shape |= {"num_experts_per_tok": 1, "moe_intermediate_size": 96, "norm_topk_prob": True}
    torch.manual_seed(3)
    write_tokenizer(tmp_path, "qwen")
    name = FAMILIES[family][0]
    config = getattr(transformers, f"{name}Config")(**SMALL | shape)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        parameter.data = parameter.data.half().float()
    theirs.save_pretrained(tmp_path / "there")
    state = load_file(tmp_path / "there" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    file = tmp_path / "full_sft_64.pth"
    torch.save({key: weight.half() for key, weight in state.items()}, file)
    done = run_here(
        "convert/from_hf.py", file, "--tokenizer_path", tmp_path, "--save_weight", "minimind",
        "--save_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "tokenizer.json").write_text("[1]", encoding="utf-8")
    args = ["convert/from_hf.py", file, "--save_weight", "x", "--save_dir", wrong]
    done_wrong = run_here(*args, "--tokenizer_path", wrong)
    assert done_wrong.returncode == 2 and f"{wrong}: a JSON file" in done_wrong.stderr
    path = tmp_path / f"minimind_64{'_moe' if moe else ''}.pth"
    model, tokenizer = build_model(load(path), path)
    pairs = ids_of(tokenizer, tmp_path)
    ours, their_ids = torch.tensor(list(pairs)), torch.tensor(list(pairs.values()))
    with torch.inference_mode():
        expected = theirs(their_ids[None]).logits[..., their_ids]
        found = model.eval()(ours[None])[..., ours]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_adapters_fit_a_model_with_biases(tmp_path):
    published(tmp_path / "hf", "qwen2")
    model, _ = build_model(load(tmp_path / "hf"), tmp_path / "hf")
    ids = torch.arange(9, 60)[None]
    with torch.inference_mode():
        before = model.eval()(ids)
        assert torch.equal(add_lora(model)(ids), before)  # B begins at zero
    data = write_jsonl(tmp_path / "x.jsonl", [chat("Hi?", f"Hello {i}.") for i in range(20)])
    flags = ["--data_path", data, "--save_dir", tmp_path, "--batch_size", 2, "--max_seq_len", 64]
    done = run_here(
        "trainer/train_full_sft.py", "--from_weight", tmp_path / "hf", "--use_lora", 1, *flags
    )
    assert done.returncode == 0, done.stderr
    args = ["--lora", "full_sft", "--save_dir", tmp_path, "--prompt", "Hi?", "--max_new_tokens", 2]
    done = run_here("eval_llm.py", *args)
    assert done.returncode == 0, done.stderr


def broken(folder, name, change):
    path = folder / name
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
MISTAKES = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json isn't JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"12345678x"), "is damaged"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "as pytorch_model.bin only, which could run any code",
    ),
    "pointer of weights": (
        lambda f: (f / "model.safetensors").write_bytes(POINTER),
        "model.safetensors is a Git LFS pointer, not the file itself; run: git lfs pull",
    ),
    "pointer of a tokenizer": (
        lambda f: (f / "tokenizer.json").write_bytes(POINTER),
        "tokenizer.json is a Git LFS pointer, not the file itself; run: git lfs pull",
    ),
    "adapters": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "it holds PEFT adapters: python convert/peft.py --from_peft",
    ),
    "GGUF": (lambda f: (f / "config.json").rename(f / "x.gguf"), "GGUF isn't supported"),
    "family": (
        lambda f: broken(f, "config.json", lambda c: c.update(model_type="mamba")),
        "model_type 'mamba' isn't supported; supported: qwen3, qwen3_moe, qwen2, llama",
    ),
    "fields": (
        lambda f: broken(
            f, "config.json", lambda c: c.update(hidden_act="gelu", attention_bias=True)
        ),
        "not supported: hidden_act = 'gelu', attention_bias = True",
    ),
    "rope": (
        lambda f: broken(f, "config.json", lambda c: c.update(rope_parameters={"type": "yarn"})),
        "not supported: RoPE of type 'yarn'",
    ),
    "rope without a type": (
        lambda f: broken(f, "config.json", lambda c: c.update(rope_parameters={"factor": 4.0})),
        "not supported: factor of RoPE",
    ),
    "no spaces": (
        lambda f: broken(f, "tokenizer.json", lambda t: t.update(pre_tokenizer=None)),
        "isn't a byte-level BPE",
    ),
    "no number": (
        lambda f: broken(f, "config.json", lambda c: c.update(num_attention_heads="4")),
        "a JSON file in it has an invalid value",
    ),
    "window": (
        lambda f: broken(f, "config.json", lambda c: c.update(layer_types=["sliding_attention"])),
        "layer_types other than full_attention",
    ),
    "field missing": (
        lambda f: broken(f, "config.json", lambda c: c.pop("intermediate_size")),
        "'intermediate_size' is missing",
    ),
    "vocabulary": (
        lambda f: broken(f, "config.json", lambda c: c.update(vocab_size=321)),
        "vocab_size 321, but 320 embeddings",
    ),
    "layers": (
        lambda f: broken(f, "config.json", lambda c: c.update(num_hidden_layers=3)),
        "its weights don't match its config",
    ),
    "unigram": (
        lambda f: broken(f, "tokenizer.json", lambda t: t["model"].update(type="Unigram")),
        "isn't a byte-level BPE",
    ),
    "other tokenizer": (
        lambda f: broken(
            f,
            "tokenizer.json",
            lambda t: t["model"]["vocab"].update({f"t{i}": 286 + i for i in range(100)}),
        ),
        "they aren't from the same model",
    ),
}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "hf"
    published(folder, "qwen3")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_folder_with_a_mistake_is_an_error_of_one_sentence(good_folder, tmp_path, mistake):
    folder = tmp_path / "hf"
    shutil.copytree(good_folder, folder)
    spoil, sentence = MISTAKES[mistake]
    spoil(folder)
    done = run_here("convert/from_hf.py", folder, "--save_weight", "x", "--save_dir", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and sentence in done.stderr and str(folder) in done.stderr
    assert not list(tmp_path.glob("*.pth"))


def test_a_missing_shard_is_named(tmp_path):
    published(tmp_path, "qwen3", max_shard_size="100KB")
    second = sorted(tmp_path.glob("model-00002*.safetensors"))[0]
    second.unlink()
    done = run_here("convert/from_hf.py", tmp_path, "--save_weight", "x", "--save_dir", tmp_path)
    assert done.returncode == 2 and f"{second} is missing" in done.stderr


def test_unknown_fields_are_named_and_weights_are_never_replaced(good_folder, tmp_path):
    shutil.copytree(good_folder, tmp_path / "hf")
    broken(tmp_path / "hf", "config.json", lambda c: c.update(new_trick=3))
    args = ["convert/from_hf.py", tmp_path / "hf", "--save_weight", "x", "--save_dir", tmp_path]
    done = run_here(*args)
    assert done.returncode == 0 and "ignoring unknown config fields: new_trick" in done.stdout
    done = run_here(*args)
    assert done.returncode == 2 and "exists; give another --save_weight" in done.stderr


def test_without_safetensors_the_sentence_names_it(good_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    done = run_here("eval_llm.py", "--weight", good_folder, "--prompt", "x")
    assert done.returncode == 2 and "pip install safetensors" in done.stderr


@pytest.mark.parametrize(
    "family, sentence",
    [
        ("llama 3", "has no RoPE scaling"),
        ("split", "splits text in none of the ways of qwen2, llama"),
    ],
)
def test_what_llama_cpp_would_read_in_another_way_is_refused(tmp_path, family, sentence):
    pytest.importorskip("gguf")
    published(tmp_path / "hf", "qwen3" if family == "split" else family)
    if family == "split":
        vowels = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated"}
        steps = [vowels | {"invert": False}, BYTES]
        split = {"type": "Sequence", "pretokenizers": steps}
        broken(tmp_path / "hf", "tokenizer.json", lambda t: t.update(pre_tokenizer=split))
    out = tmp_path / "x.gguf"
    done = run_here("convert/to_gguf.py", "--weight", tmp_path / "hf", "--out", out)
    assert done.returncode == 2 and sentence in done.stderr and not out.exists()


@pytest.mark.parametrize(
    "name, says",
    [
        ("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir FOLDER"),
        ("x.gguf", "GGUF isn't supported"),
        ("model.safetensors", "the published model's folder instead of one of its files"),
        ("nothing", "name other weights, or give the path of a .pth file or a folder"),
    ],
)
def test_a_name_of_no_weights_leads_on(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    for file in ("x.gguf", "model.safetensors"):
        (tmp_path / file).write_bytes(b"GGUF")
    done = run_here("eval_llm.py", "--weight", name, "--prompt", "x", "--save_dir", tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    if name != "nothing":
        made = ["--save_weight", "x", "--save_dir", tmp_path]
        done = run_here("convert/from_hf.py", name, *made)
        assert done.returncode == 2 and says in done.stderr, done.stderr


def test_earlier_weights_of_minimind_have_the_shape_of_llama(tmp_path):
    """8 heads, no norm of queries and keys; the constants are MiniMind's own."""
    weights = {"model.embed_tokens.weight": torch.zeros(50, 64)}
    for name, rows in (("self_attn.q", 64), ("self_attn.k", 16), ("mlp.up", 192)):
        for layer in range(2):
            weights[f"model.layers.{layer}.{name}_proj.weight"] = torch.zeros(rows, 64)
    config = from_hf.minimind_config(weights, tmp_path)
    assert config == {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 192,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    }  # fmt: skip


def test_the_chat_template_is_in_either_file_or_in_none(tmp_path):
    assert read_chat_template(tmp_path) == ""
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "one"}', encoding="utf-8")
    assert read_chat_template(tmp_path) == "one"
    (tmp_path / "chat_template.jinja").write_text("two", encoding="utf-8")
    assert read_chat_template(tmp_path) == "two"
