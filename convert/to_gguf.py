"""Convert weights to a GGUF file for llama.cpp and Ollama, with a Modelfile for Ollama.

python convert/to_gguf.py --weight full_sft --out seedling.gguf
python convert/to_gguf.py --weight full_sft --out seedling.gguf --type q8_0

A model with QK norm becomes a qwen3, one without a qwen2 (llama.cpp's llama expects the rows of
queries and keys in another order), one with experts a qwen3moe. Needs the package gguf.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
import json

import torch

from common import END_OF_TEXT, IM_END, atomic_write
from convert.to_hf import TEMPLATE, export_parser
from model.tokenizer import CONTROL_TOKENS, NAMED_CONTROL_TOKENS
from model.weights import open_model
from trainer.train_tokenizer import QWEN2

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
OUTSIDE = {  # our names: GGUF names, outside the layers and in a layer
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Pre-tokenizers by the steps of their split: llama.cpp's name. ByteLevel splits like GPT-2.
SPLITS = {
    (QWEN2, "bytes"): "qwen2",
    (QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), "bytes"): "llama-bpe",
    ("gpt-2",): "gpt-2",
    ("digits", "gpt-2"): "smollm",
}
# Ollama doesn't run Jinja: this is the template without tools, in Go's syntax.
CHAT = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
MODELFILE = '''FROM ./{name}
TEMPLATE """{template}"""
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
PARAMETER temperature 0
PARAMETER num_ctx {context}
'''


def gguf_tensors(model):
    """Return {GGUF name: tensor} of a model. A layer's experts become one tensor (E, out, in)."""
    tensors, experts = {}, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name in OUTSIDE:
            tensors[OUTSIDE[name]] = tensor
            continue
        path, _, kind = name.rpartition(".")  # kind: weight or bias
        _, _, layer, inner = path.split(".", 3)
        if inner.startswith("mlp.experts."):
            part = inner.rsplit(".", 1)[1].removesuffix("_proj")
            experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", []).append(tensor)
        else:
            tensors[f"blk.{layer}.{INSIDE[inner]}.{kind}"] = tensor
    return tensors | {name: torch.stack(parts) for name, parts in experts.items()}


def describe(writer, config, name):
    """Write the fields for the model's shape."""
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if config.use_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def pre_tokenizer_name(tokenizer_json):
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises UserError if it has
    none.
    """
    first = tokenizer_json["pre_tokenizer"] or {}
    steps = []
    for part in first.get("pretokenizers", [first]):
        steps.append(part.get("pattern", {}).get("Regex"))
        if part.get("individual_digits"):
            steps[-1] = "digits"
        if part.get("type") == "ByteLevel" and not part["add_prefix_space"]:
            steps[-1] = "gpt-2" if part.get("use_regex", True) else "bytes"
    if tuple(steps) not in SPLITS:
        raise UserError(
            "the tokenizer of these weights splits text in none of the ways of "
            f"{', '.join(SPLITS.values())}; convert the folder that they come from with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    return SPLITS[tuple(steps)]


def add_tokenizer(writer, tokenizer, rows, kinds, chats):
    """Writes the tokenizer, with the chat template if the model chats. Raises UserError as
    `pre_tokenizer_name` does. rows: of the embeddings.
    """
    tokenizer_json = json.loads(tokenizer.to_str())
    tokens = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    control = {token["id"]: token["special"] for token in tokenizer_json["added_tokens"]}
    types = [kinds.CONTROL if control.get(i) else kinds.NORMAL for i in range(len(tokens))]
    for spare in CONTROL_TOKENS[NAMED_CONTROL_TOKENS:]:
        if tokenizer.token_to_id(spare) is not None:
            types[tokenizer.token_to_id(spare)] = kinds.UNUSED
    for token, special in control.items():
        if not special:
            types[token] = kinds.USER_DEFINED
    tokens += [f"[unused {row}]" for row in range(len(tokens), rows)]
    types += [kinds.UNUSED] * (rows - len(types))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer_json))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer_json["model"]["merges"]])
    writer.add_eos_token_id(IM_END if chats else END_OF_TEXT)
    writer.add_pad_token_id(END_OF_TEXT)
    writer.add_add_bos_token(False)  # the default would add token 11
    if chats:
        writer.add_chat_template(TEMPLATE.read_text(encoding="utf-8"))


def parse(argv):
    parser = export_parser(__doc__, "file to write; the Modelfile is written next to it")
    matrices = "data type of matrices (%(default)s)"
    parser.add_argument("--type", choices=list(TYPES), default="f32", help=matrices)
    args = parser.parse_args(argv)
    if args.out.suffix != ".gguf":
        raise UserError(f"--out {args.out}: llama.cpp and Ollama need a name that ends in .gguf")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs: pip install gguf") from None
    trained = open_model(args)
    model, tokenizer, config = trained.model, trained.tokenizer, trained.model.config
    if config.use_moe and not (config.qk_norm and config.norm_topk_prob):
        raise UserError("llama.cpp has no mixture of experts without QK norm or norm_topk_prob")
    if config.qkv_bias and (config.qk_norm or config.use_moe):
        raise UserError("llama.cpp has no model with biases and QK norm or experts")
    arch = "qwen3moe" if config.use_moe else "qwen3" if config.qk_norm else "qwen2"
    if config.rope_factor != 1:
        raise UserError(f"llama.cpp's {arch} has no RoPE scaling, which these weights need")
    if not config.qk_norm and config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError("llama.cpp's qwen2 needs head_dim * num_attention_heads = hidden_size")
    tensors, kind = gguf_tensors(model), getattr(gguf.GGMLQuantizationType, TYPES[args.type])
    widths = {tensor.shape[-1] for tensor in tensors.values() if tensor.dim() > 1}
    if args.type == "q8_0" and any(width % 32 for width in widths):
        raise UserError(f"--type q8_0: rows are {sorted(widths)}, not multiples of 32; use f16")
    with atomic_write(args.out) as file:
        writer = gguf.GGUFWriter(file.name, arch)
        describe(writer, config, trained.paths[-1].stem)
        add_tokenizer(writer, tokenizer, config.vocab_size, gguf.TokenType, trained.chats)
        prefix = "ALL" if args.type == "f32" else "MOSTLY"
        file_type = f"{prefix}_{TYPES[args.type]}"
        writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
        for name, tensor in tensors.items():
            plain = tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight")  # norms, the router
            tensor_type = gguf.GGMLQuantizationType.F32 if plain else kind
            data = gguf.quants.quantize(tensor.float().contiguous().numpy(), tensor_type)
            writer.add_tensor(name, data, raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with atomic_write(args.out.with_name("Modelfile")) as file:
        template = CHAT if trained.chats else "{{ .Prompt }}"
        context = config.max_position_embeddings
        text = MODELFILE.format(name=args.out.name, context=context, template=template)
        file.write(text.encode("utf-8"))
    print(f"written: {args.out} ({arch}), and Modelfile: ollama create NAME -f Modelfile")


if __name__ == "__main__":
    with report_user_errors():
        main()
