"""Merges adapters into their weights, or converts them to and from PEFT's files.

python recipes/peft.py --lora full_sft                      # out/full_sft_merged_384.pth
python recipes/peft.py --lora full_sft --to_peft FOLDER     # adapter_config.json and
                                                                  # adapter_model.safetensors
python recipes/peft.py --from_peft FOLDER --weight pretrain --save_weight mine
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split

from common import ROOT, replacing
from model.lora import adapter_state, add_lora, merge_for_good
from trainer import checkpoint
from trainer.arguments import Parser

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names, which end with .weight
UNKNOWN = {  # what PEFT can do and these adapters cannot, with the value that switches it off
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.group("adapters and weights")
    add("lora", None, "adapters: lora_NAME_512.pth in --save_dir", metavar="NAME")
    weights = "the weights beneath; default: those that the adapters were trained on"
    add("weight", None, weights, dest="from_weight")
    add("save_dir", ROOT / "out", "folder of weights", Path)
    add("save_weight", None, "name of the result; default: that of the adapters, and _merged")
    add("to_peft", None, "write PEFT's files instead", Path, metavar="FOLDER")
    add("from_peft", None, "read PEFT's files; writes lora_NAME", Path, metavar="FOLDER")
    args = parser.parse_args(argv)
    if (args.lora is None) == (args.from_peft is None):
        raise UserError("give --lora NAME, or --from_peft FOLDER")
    if args.from_peft and not (args.from_weight and args.save_weight):
        raise UserError("--from_peft needs --weight, what is beneath, and --save_weight, a name")

    name = checkpoint.weights_to_start_from(args)
    path = checkpoint.find(args.save_dir, name)
    content = checkpoint.load(path)
    model, tokenizer = checkpoint.build_model(content, path)
    if args.from_peft:
        read_peft(args.from_peft, model)
        file = checkpoint.file_name(f"lora_{args.save_weight}", model.config)
        more = {**checkpoint.description(model), "under": name, "training": {}}
        state = adapter_state(model.state_dict())
    else:
        place = checkpoint.find(args.save_dir, f"lora_{args.lora}", model.config.hidden_size)
        adapters = checkpoint.load_adapters(model, place)
        if args.to_peft:
            write_peft(args.to_peft, model, name)
            return
        content |= {"stage": adapters["stage"], "training": adapters["training"]}
        file = checkpoint.file_name(args.save_weight or f"{args.lora}_merged", model.config)
        state = merge_for_good(model).state_dict()
        more = {**checkpoint.description(model), "training": content["training"]}
    target = args.save_dir / f"{file}.pth"
    checkpoint.save(target, state, model.config, tokenizer, content["stage"], **more)
    print(f"written: {target}")


def require_safetensors():
    """The package safetensors. Raises UserError where it is missing."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "PEFT's files need the package safetensors: pip install safetensors"
        ) from None
    return safetensors


def write_peft(folder, model, base):
    """Writes a model's adapters as PEFT reads them."""
    state = adapter_state(model.state_dict())
    names = sorted({name.split(".")[-2] for name in state})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    config |= {"r": model.lora.rank, "lora_alpha": model.lora.alpha, "target_modules": names}
    config |= {"lora_dropout": model.lora.dropout, "fan_in_fan_out": False, **UNKNOWN}
    with replacing(folder / CONFIG) as file:
        file.write(json.dumps(config, indent=1).encode())
    tensors = {f"{PREFIX}{name}.weight": w.contiguous() for name, w in state.items()}
    with replacing(folder / WEIGHTS) as file:
        file.write(require_safetensors().torch.save(tensors))
    print(f"written: {folder / CONFIG}, {folder / WEIGHTS}")


def read_peft(folder, model):
    """Adds the adapters of PEFT's files to a model. Raises UserError for what they cannot be."""
    safetensors = require_safetensors()
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        targets = config["target_modules"]
    except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"--from_peft {folder} holds no adapters of PEFT: {error}") from None
    other = [
        f"{k} = {config[k]}" for k, off in UNKNOWN.items() if config.get(k, off) not in (off, None)
    ]
    if other:
        raise UserError(f"{folder / CONFIG}: {', '.join(other)} is more than LoRA; it is not read")
    target = targets if isinstance(targets, str) else ",".join(sorted(targets))
    try:
        add_lora(model, rank, alpha, config.get("lora_dropout", 0.0), target)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: target_modules {error}") from None
    state = {n.removeprefix(PREFIX).removesuffix(".weight"): w for n, w in tensors.items()}
    expected = adapter_state(model.state_dict())
    wrong = sorted(set(state) ^ set(expected))
    wrong += [
        name for name in set(state) & set(expected) if state[name].shape != expected[name].shape
    ]
    if wrong:
        raise UserError(f"{folder / WEIGHTS} does not fit these weights: {', '.join(wrong[:5])}")
    model.load_state_dict(state, strict=False)


if __name__ == "__main__":
    with report_user_errors():
        main()
