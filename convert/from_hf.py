"""Convert a published model to a weights file: Qwen3, Qwen3-MoE, Qwen2, Llama, or MiniMind.

python convert/from_hf.py FOLDER --save_weight qwen
python convert/from_hf.py out/full_sft_768.pth --tokenizer_path model --save_weight minimind

The other scripts read such a folder directly, with `--weight FOLDER` and `--from_weight FOLDER`. A
.pth of MiniMind has no tokenizer, so give its folder too. Needs the package safetensors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
from cli import Parser
from common import ROOT
from model.huggingface import build_content, invalid_values_reported, read_folder
from model.weights import build_model, file_name, load_tensors, write_weights


def minimind_config(weights, path):
    """Return a config.json for MiniMind's weights, from their shapes and MiniMind's constants.
    Raises UserError for other weights.
    """
    try:
        layers = 1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name)
        first = "model.layers.0."
        q, k = (weights[f"{first}self_attn.{name}_proj.weight"].shape[0] for name in "qk")
        qk_norm = weights.get(f"{first}self_attn.q_norm.weight")
        head_dim = q // 8 if qk_norm is None else qk_norm.shape[0]
        experts = sum(name.startswith(f"{first}mlp.experts.") for name in weights) // 3
        up = f"{first}mlp.{'experts.0.' if experts else ''}up_proj.weight"
        config = {
            "model_type": "qwen3_moe" if experts else "llama" if qk_norm is None else "qwen3",
            "hidden_size": weights["model.embed_tokens.weight"].shape[1],
            "num_hidden_layers": layers,
            "num_attention_heads": q // head_dim,
            "num_key_value_heads": k // head_dim,
            "intermediate_size": weights[up].shape[0],
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5 if qk_norm is None else 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        }
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no MiniMind weights: {error!r}") from None
    if experts:
        config |= {"num_experts": experts, "num_experts_per_tok": 1, "norm_topk_prob": True}
        config |= {"moe_intermediate_size": config["intermediate_size"]}
    return config


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, help="folder of a published model, or a .pth of MiniMind")
    add("--tokenizer_path", type=Path, metavar="FOLDER", help="for a .pth: has tokenizer.json")
    add("--save_weight", required=True, metavar="NAME", help="writes NAME_512.pth")
    add("--save_dir", type=Path, default=ROOT / "out", help="folder of weights")
    args = parser.parse_args(argv)
    if args.source.suffix == ".pth" and args.tokenizer_path is None:
        raise UserError(f"{args.source} has no tokenizer; give --tokenizer_path FOLDER")
    return args


def main(argv=None):
    args = parse(argv)
    if args.source.suffix == ".pth":
        weights = load_tensors(args.source, hint="download it again")
        config = minimind_config(weights, args.source)
        with invalid_values_reported(args.tokenizer_path):
            content = build_content(config, weights, args.tokenizer_path)
    else:
        content = read_folder(args.source)
    model, tokenizer = build_model(content, args.source)
    target = args.save_dir / f"{file_name(args.save_weight, model.config)}.pth"
    if target.exists():
        raise UserError(f"{target} exists; give another --save_weight")
    weights, stage = model.state_dict(), content["stage"]
    write_weights(target, weights, model.config, tokenizer, stage, training={})
    print(f"written: {target}, {stage}")


if __name__ == "__main__":
    with report_user_errors():
        main()
