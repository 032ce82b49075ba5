"""A published model, a folder with config.json, *.safetensors and tokenizer.json, read as if it
were a weights file: Qwen3, Qwen3-MoE, Qwen2 (with Qwen2.5) and Llama (with Llama 3 and SmolLM2).

The names of the weights are ours already. The control tokens get our ids, 0 to 8: each exchanges
its number, and its rows of the weights, with the token that has this number. So `render` and all
that follows works as with weights that were trained here, and a text has the same tokens as before.
"""

import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common import UserError, open_file, read_json
from model.causal_lm import ModelConfig
from model.tokenizer import with_our_ids

FAMILIES = {  # model_type: fields of ModelConfig
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True, "use_moe": True},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "llama": {"qk_norm": False},
}
# Fields of ModelConfig that have the same name in config.json.
NEEDED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "rms_norm_eps"),
)
SAME = (*NEEDED, "vocab_size", "num_key_value_heads", "head_dim", "tie_word_embeddings")
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
SCALING = {  # fields of ModelConfig: those of Llama 3's RoPE scaling in config.json
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}
ONLY = {  # fields that change what a model computes, and the one value that is supported
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "quantization_config": None,
}
NO_EFFECT = set(  # fields that change nothing in what we compute, or are checked by themselves
    """architectures model_type torch_dtype dtype transformers_version _name_or_path use_cache
    initializer_range bos_token_id eos_token_id pad_token_id attention_dropout sliding_window
    max_window_layers layer_types pretraining_tp rope_theta rope_scaling rope_parameters
    rope_interleaved is_llama_config output_router_logits router_aux_loss_coef
    transformers.js_config num_local_experts""".split()
)


def read_folder(folder):
    """Return the content of a weights file, as `load` of model/weights.py does. Raises UserError,
    which names the file, for what is missing, damaged or not supported.
    """
    if not (folder / "config.json").is_file():
        remedy = remedy_for(folder) or "it is not the folder of a published model"
        raise UserError(f"{folder} has no config.json; {remedy}")
    with wrong_values(folder):
        return content_of(read_json(folder / "config.json"), read_weights(folder), folder)


def remedy_for(name):
    """Return what to do about a name or path that leads to nothing that can be read, or None."""
    path = Path(name)
    with suppress(OSError):  # of a name that is too long for a path
        if (path / "adapter_config.json").is_file():
            return (
                "it holds adapters of PEFT: python convert/peft.py --from_peft FOLDER "
                "--weight BASE --save_weight NAME, then --lora NAME"
            )
        if path.suffix == ".gguf" or any(path.glob("*.gguf")):
            return "GGUF isn't read; give the folder with *.safetensors that the file was made of"
        if path.is_file():
            return "give a .pth file, or the folder of a published model that the file is in"
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) and not path.is_dir():
            return f"for a model of the hub: hf download {name} --local-dir FOLDER, and give FOLDER"
    return None


@contextmanager
def wrong_values(folder):
    """Turns what a wrong value in a JSON file of the folder raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{folder}: a JSON file in it has a wrong value: {error!r}") from None


def content_of(config, weights, folder):
    """The content of a weights file, of the fields of a config.json and weights that
    transformers names; folder has their tokenizer.
    """
    shape = shape_of(config, weights, folder / "config.json")
    written, order, new = with_our_ids(folder, config.get("eos_token_id"))
    rows = shape["vocab_size"]
    if len(order) - len(new) > rows:
        raise UserError(
            f"{folder}: the tokenizer has {len(order) - len(new)} tokens, the weights only {rows} "
            "rows; they are not of the same model"
        )
    order += range(len(order), rows)  # rows that no token uses
    shape["vocab_size"] = len(order)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            table = weights[name]  # (V, D)
            mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
            weights[name] = torch.cat([table, mean.expand(len(order) - rows, -1)])[order]
    if shape["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    if new:
        print(f"new tokens, not trained yet: {' '.join(new)}")
    if "<|im_start|>" in new:
        print("these weights do not know ChatML: fine-tune them before a chat")
    chats = "<|im_start|>" not in new and "<|im_start|>" in template_of(folder)
    return {
        "stage": "full_sft" if chats else "pretrain",
        "config": shape,
        "tokenizer": written,
        "model": weights,
        "training": {},
    }


def shape_of(config, weights, path):
    """The fields of ModelConfig that a config.json says. Raises UserError, naming all fields that
    are not supported.
    """
    if "num_local_experts" in config:  # transformers 5 writes it so
        config = {**config, "num_experts": config["num_local_experts"]}
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{path}: model_type {family!r} is not supported; there is {', '.join(FAMILIES)}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = [
        f"{name} = {config[name]!r}"
        for name, supported in ONLY.items()
        if config.get(name, supported) not in (supported, None)
    ]
    wrong += [f"RoPE of type {kind!r}"] if kind not in ("default", "llama3") else []
    read = {"rope_type", "type", "rope_theta"} | set(SCALING.values() if kind == "llama3" else ())
    wrong += [f"{name} of RoPE" for name in rope if name not in read and rope[name] is not None]
    if set(config.get("layer_types") or []) - {"full_attention"}:
        wrong.append("layer_types other than full_attention")
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)}: not supported")
    known = {*SAME, *EXPERTS, *ONLY, *NO_EFFECT}
    unknown = sorted(name for name in config if name not in known)
    if unknown:
        print(f"{path}: not read, because unknown: {', '.join(unknown)}")
    try:
        found = {name: config[name] for name in NEEDED}
        found |= {name: config[name] for name in SAME if config.get(name) is not None}
        rows = weights["model.embed_tokens.weight"].shape[0]
        if found.setdefault("vocab_size", rows) != rows:
            raise UserError(f"{path}: vocab_size {found['vocab_size']}, but {rows} embeddings")
        found.setdefault("tie_word_embeddings", "lm_head.weight" not in weights)
        found.setdefault("num_key_value_heads", found["num_attention_heads"])
        rows = weights["model.layers.0.self_attn.q_proj.weight"].shape[0]
        found.setdefault("head_dim", rows // found["num_attention_heads"])
        found["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
        if kind == "llama3":
            found |= {ours: rope[theirs] for ours, theirs in SCALING.items()}
        if "use_moe" in FAMILIES[family]:
            found |= {name: config[name] for name in EXPERTS}
    except LookupError as error:
        raise UserError(f"{path} or its weights: {error} is missing") from None
    floats = ("rms_norm_eps", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor")
    found |= {name: float(found[name]) for name in floats if name in found}
    return vars(ModelConfig()) | found | FAMILIES[family]


def read_weights(folder):
    """{name: tensor} of the safetensors of a folder, mapped into memory."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"reading {folder} needs: pip install safetensors") from None
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted({Path(name).name for name in read_json(index)["weight_map"].values()})
    weights = {}
    for path in (folder / name for name in names):
        if not path.is_file() and any(folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{folder} has its weights as pytorch_model.bin only, which could run any code; "
                "write them again with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        if not path.is_file():
            raise UserError(f"{path} is missing; download the folder again")
        try:
            with safe_open(path, "pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            open_file(path).close()  # raises an error for a pointer of Git LFS
            raise UserError(f"{path} is damaged ({error}); download it again") from None
    return {name: weight for name, weight in weights.items() if not name.endswith("inv_freq")}


def template_of(folder):
    """The chat template of a folder, or ""."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8-sig")
    path = folder / "tokenizer_config.json"
    return str(read_json(path).get("chat_template", "")) if path.is_file() else ""
