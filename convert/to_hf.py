"""Export weights as a folder for transformers, vLLM and the Hugging Face Hub.

python convert/to_hf.py --weight full_sft --out FOLDER
python convert/to_hf.py --lora full_sft --out FOLDER --dtype bf16     # adapters are merged

A model with QK norm becomes a Qwen3, without it a Llama, with biases a Qwen2, with experts a
Qwen3-MoE; parameter names already match. Needs the package safetensors.
"""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
from cli import Parser
from common import END_OF_TEXT, IM_END, ROOT, atomic_write
from model.huggingface import EXPERTS, SAME, SCALING
from model.weights import open_model

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def hf_config(config, dtype, eos):
    """Return the content of config.json; eos is the id that ends an answer. Raises UserError if no
    transformers architecture matches.
    """
    if config.use_moe and not config.qk_norm:
        raise UserError("no transformers architecture matches experts without QK norm")
    if config.qkv_bias and (config.qk_norm or config.use_moe):
        raise UserError("no transformers architecture matches QK norm or experts with biases")
    if config.use_moe:
        family, name = "qwen3_moe", "Qwen3Moe"
    elif config.qkv_bias:
        family, name = "qwen2", "Qwen2"
    elif config.qk_norm:
        family, name = "qwen3", "Qwen3"
    else:
        family, name = "llama", "Llama"
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        rope |= {their_name: getattr(config, our_name) for our_name, their_name in SCALING.items()}
        rope["rope_type"] = "llama3"
    fields = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": END_OF_TEXT,
        "dtype": DTYPES[dtype],
    }
    fields |= {name: getattr(config, name) for name in SAME}
    if config.use_moe:
        fields |= {name: getattr(config, name) for name in (*EXPERTS, "router_aux_loss_coef")}
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return fields


def export_parser(doc, out):
    """Return the parser of an export script; out: the help of --out. It has the flags and defaults
    for `open_model`.
    """
    parser = Parser(doc)
    add = parser.add_argument
    add("--weight", dest="from_weight", help="a name in --save_dir, or a path; default: full_sft")
    add("--lora", metavar="NAME", help="adapters to merge into the weights")
    add("--out", type=Path, required=True, help=out)
    add("--save_dir", type=Path, default=ROOT / "out", help="folder of weights")
    parser.set_defaults(hidden_size=None, device="cpu", dtype="fp32", use_compile=False)
    return parser


@contextmanager
def removed_on_error(folder):
    """Context manager: delete a folder, empty before, if the block raises."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def parse(argv):
    parser = export_parser(__doc__, "folder to write")
    add = parser.add_argument
    add("--dtype", choices=list(DTYPES), default="fp32", help="dtype of the weights (%(default)s)")
    args = parser.parse_args(argv)
    if args.out.is_file():
        raise UserError(f"--out {args.out} is a file; give a folder")
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"--out {args.out} is not empty; give another folder")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("writing this folder needs: pip install safetensors") from None
    trained = open_model(args)
    model, tokenizer = trained.model, trained.tokenizer
    stop = [IM_END, END_OF_TEXT] if trained.chats else [END_OF_TEXT]
    config, tensors = hf_config(model.config, args.dtype, stop[0]), model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]

    def write(name, value):
        text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
        with atomic_write(args.out / name) as file:
            file.write(text.encode("utf-8"))

    with removed_on_error(args.out):
        with atomic_write(args.out / "model.safetensors") as file:
            file.write(save(tensors, {"format": "pt"}))
        write("tokenizer.json", tokenizer.to_str(pretty=True))
        if trained.chats:
            write("chat_template.jinja", TEMPLATE.read_text(encoding="utf-8"))
        write(
            "tokenizer_config.json",
            {
                # Without it, transformers 5 builds the tokenizer of the model's family instead.
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": None,
                "eos_token": tokenizer.id_to_token(stop[0]),
                "pad_token": tokenizer.id_to_token(END_OF_TEXT),
                "model_max_length": model.config.max_position_embeddings,
                "clean_up_tokenization_spaces": False,
            },
        )
        write("generation_config.json", {"eos_token_id": stop, "pad_token_id": END_OF_TEXT})
        write("config.json", config)  # last: a folder without it is incomplete
    print(f"written: {args.out}, {config['architectures'][0]}")


if __name__ == "__main__":
    with report_user_errors():
        main()
