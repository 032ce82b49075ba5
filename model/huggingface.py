"""Loading published models (a folder with config.json, *.safetensors and tokenizer.json): Qwen3,
Qwen3-MoE, Qwen2 (and Qwen2.5) and Llama (and Llama 3, SmolLM2).

Parameter names already match. Control tokens get our ids, 0 to 8: each special token swaps ids, and
rows of the embeddings, with the token currently at that id. Text is still encoded to the same
tokens.
"""

import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common import UserError, open_file, read_json
from model.causal_lm import ModelConfig
from model.tokenizer import renumber_control_tokens

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
SCALING = {  # field of ModelConfig: its name in config.json, for Llama 3's RoPE scaling
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}
ONLY = {  # fields that change the computation, and the only supported value
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "quantization_config": None,
}
NO_EFFECT = set(  # fields that don't change the computation, or are checked separately
    """architectures model_type torch_dtype dtype transformers_version _name_or_path use_cache
    initializer_range bos_token_id eos_token_id pad_token_id attention_dropout sliding_window
    max_window_layers layer_types pretraining_tp rope_theta rope_scaling rope_parameters
    rope_interleaved is_llama_config output_router_logits router_aux_loss_coef
    transformers.js_config num_local_experts""".split()
)


def read_folder(folder):
    """Load a published model; returns the same dict as `model.weights.load`. Raises UserError,
    naming the file, for what is missing, damaged or not supported.
    """
    if not (folder / "config.json").is_file():
        hint = hint_for(folder) or "it is not the folder of a published model"
        raise UserError(f"{folder} has no config.json; {hint}")
    with invalid_values_reported(folder):
        return build_content(read_json(folder / "config.json"), read_weights(folder), folder)


def hint_for(name):
    """Return what to do about a name or path that can't be read, or None."""
    path = Path(name)
    with suppress(OSError):  # the name is too long for a path
        if (path / "adapter_config.json").is_file():
            return (
                "it holds PEFT adapters: python convert/peft.py --from_peft FOLDER "
                "--weight BASE --save_weight NAME, then --lora NAME"
            )
        if path.suffix == ".gguf" or any(path.glob("*.gguf")):
            return "GGUF isn't supported; give the folder with *.safetensors it was made from"
        if path.is_file():
            return "give a .pth file, or the published model's folder instead of one of its files"
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) and not path.is_dir():
            return f"for a model on the Hub: hf download {name} --local-dir FOLDER, and give FOLDER"
    return None


@contextmanager
def invalid_values_reported(folder):
    """Context manager: turn the exceptions caused by invalid JSON values into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{folder}: a JSON file in it has an invalid value: {error!r}") from None


def build_content(config, weights, folder):
    """Build the content of a weights file from a config.json and weights with transformers' names;
    folder has the tokenizer.
    """
    fields = model_config_fields(config, weights, folder / "config.json")
    tokenizer_json, order, new_tokens = renumber_control_tokens(folder, config.get("eos_token_id"))
    num_rows = fields["vocab_size"]
    if len(order) - len(new_tokens) > num_rows:
        raise UserError(
            f"{folder}: the tokenizer has {len(order) - len(new_tokens)} tokens, the weights only "
            f"{num_rows} rows; they aren't from the same model"
        )
    order += range(len(order), num_rows)  # rows without a token
    fields["vocab_size"] = len(order)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            table = weights[name]  # (V, D)
            mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
            weights[name] = torch.cat([table, mean.expand(len(order) - num_rows, -1)])[order]
    if fields["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    if new_tokens:
        print(f"added tokens, not trained yet: {' '.join(new_tokens)}")
    if "<|im_start|>" in new_tokens:
        print("these weights weren't trained with ChatML: fine-tune them before chatting")
    knows_chatml = "<|im_start|>" not in new_tokens
    chats = knows_chatml and "<|im_start|>" in read_chat_template(folder)
    return {
        "stage": "full_sft" if chats else "pretrain",
        "config": fields,
        "tokenizer": tokenizer_json,
        "model": weights,
        "training": {},
    }


def model_config_fields(config, weights, path):
    """Return the fields of ModelConfig for a config.json. Raises UserError, naming all fields that
    aren't supported.
    """
    if "num_local_experts" in config:  # the name in transformers 5
        config = {**config, "num_experts": config["num_local_experts"]}
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{path}: model_type {family!r} isn't supported; supported: {', '.join(FAMILIES)}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = [
        f"{name} = {config[name]!r}"
        for name, supported in ONLY.items()
        if config.get(name, supported) not in (supported, None)
    ]
    wrong += [f"RoPE of type {kind!r}"] if kind not in ("default", "llama3") else []
    known_rope = ["rope_type", "type", "rope_theta"]
    known_rope += SCALING.values() if kind == "llama3" else []
    settings = [name for name, value in rope.items() if value is not None]
    wrong += [f"{name} of RoPE" for name in settings if name not in known_rope]
    if set(config.get("layer_types") or []) - {"full_attention"}:
        wrong.append("layer_types other than full_attention")
    if wrong:
        raise UserError(f"{path}: not supported: {', '.join(wrong)}")
    known = {*SAME, *EXPERTS, *ONLY, *NO_EFFECT}
    unknown = sorted(name for name in config if name not in known)
    if unknown:
        print(f"{path}: ignoring unknown config fields: {', '.join(unknown)}")
    try:
        fields = {name: config[name] for name in NEEDED}
        fields |= {name: config[name] for name in SAME if config.get(name) is not None}
        rows = weights["model.embed_tokens.weight"].shape[0]
        if fields.setdefault("vocab_size", rows) != rows:
            raise UserError(f"{path}: vocab_size {fields['vocab_size']}, but {rows} embeddings")
        fields.setdefault("tie_word_embeddings", "lm_head.weight" not in weights)
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        rows = weights["model.layers.0.self_attn.q_proj.weight"].shape[0]
        fields.setdefault("head_dim", rows // fields["num_attention_heads"])
        fields["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
        if kind == "llama3":
            fields |= {our_name: rope[their_name] for our_name, their_name in SCALING.items()}
        if "use_moe" in FAMILIES[family]:
            fields |= {name: config[name] for name in EXPERTS}
    except LookupError as error:
        raise UserError(f"{path} or its weights: {error} is missing") from None
    floats = ("rms_norm_eps", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor")
    fields |= {name: float(fields[name]) for name in floats if name in fields}
    return vars(ModelConfig()) | fields | FAMILIES[family]


def read_weights(folder):
    """Load the safetensors of a folder as {name: tensor}, memory-mapped."""
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
                "convert them with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        if not path.is_file():
            raise UserError(f"{path} is missing; download the folder again")
        try:
            with safe_open(path, "pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            open_file(path).close()  # raises UserError for a Git LFS pointer
            raise UserError(f"{path} is damaged ({error}); download it again") from None
    return {name: weight for name, weight in weights.items() if not name.endswith("inv_freq")}


def read_chat_template(folder):
    """Return the chat template of a folder, or ""."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8-sig")
    path = folder / "tokenizer_config.json"
    return str(read_json(path).get("chat_template", "")) if path.is_file() else ""
