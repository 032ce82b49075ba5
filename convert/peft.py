"""Merge LoRA adapters into their base weights, or convert them to and from PEFT's format.

python convert/peft.py --lora full_sft                      # out/full_sft_merged_256.pth
python convert/peft.py --lora full_sft --to_peft FOLDER     # adapter_config.json and
                                                            # adapter_model.safetensors
python convert/peft.py --from_peft FOLDER --weight pretrain --save_weight mine
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
from cli import Parser
from common import ROOT, atomic_write, read_json
from model.lora import adapter_state, add_lora, merge
from model.weights import (
    adapters_name,
    build_model,
    extra_entries,
    file_name,
    find_weights,
    load,
    load_adapters,
    weights_to_start_from,
    write_weights,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, SUFFIX = "base_model.model.", ".weight"  # around the names in PEFT's files
DISABLED = {  # PEFT options that must be off, and are written as off
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}


def main(argv=None):
    args = parse(argv)
    base = weights_to_start_from(args)
    path = find_weights(args.save_dir, base)
    content = load(path)
    model, tokenizer = build_model(content, path)
    if args.from_peft:
        read_peft(args.from_peft, model)
        name, stage = f"lora_{args.save_weight}", "full_sft"  # an assumption
        state = adapter_state(model.state_dict())
        fields = {"under": base, "training": {}}
    else:
        lora = adapters_name(args.lora)
        adapters_path = find_weights(args.save_dir, lora, model.config.hidden_size)
        content = load_adapters(model, adapters_path)
        if args.to_peft:
            write_peft(args.to_peft, model, base)
            return
        merged = f"{Path(lora).stem.removeprefix('lora_')}_merged"
        name, stage = args.save_weight or merged, content["stage"]
        state = merge(model).state_dict()
        fields = {"training": content["training"]}
    fields |= extra_entries(model)
    target = args.save_dir / f"{file_name(name, model.config)}.pth"
    write_weights(target, state, model.config, tokenizer, stage, **fields)
    print(f"written: {target}")


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--lora", metavar="NAME", help="adapters: lora_NAME_512.pth in --save_dir")
    add("--weight", dest="from_weight", help="base weights; default: those they were trained on")
    add("--save_dir", type=Path, default=ROOT / "out", help="folder of weights")
    add("--save_weight", help="name of the result; default: the adapters' name and _merged")
    add("--to_peft", type=Path, metavar="FOLDER", help="write PEFT's files instead")
    add("--from_peft", type=Path, metavar="FOLDER", help="read PEFT's files; writes lora_NAME")
    args = parser.parse_args(argv)
    if (args.lora is None) == (args.from_peft is None):
        raise UserError("give --lora NAME, or --from_peft FOLDER")
    if args.to_peft and (args.from_peft or args.save_weight):
        raise UserError("--to_peft writes a folder: omit --from_peft and --save_weight")
    if args.from_peft and not (args.from_weight and args.save_weight):
        raise UserError("--from_peft needs --weight (the base weights) and --save_weight (a name)")
    return args


def import_safetensors():
    """Import safetensors. Raises UserError if it isn't installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("PEFT's files need a package: pip install safetensors") from None
    return safetensors


def write_peft(folder, model, base):
    """Write the adapters of a model in PEFT's format."""
    safetensors, state = import_safetensors(), adapter_state(model.state_dict())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": model.lora.dropout,
        "target_modules": sorted({name.split(".")[-2] for name in state}),
        "fan_in_fan_out": False,
    }
    tensors = {f"{PREFIX}{name}{SUFFIX}": weight.float() for name, weight in state.items()}
    with atomic_write(folder / CONFIG) as file:
        file.write(json.dumps(config | DISABLED, indent=1).encode())
    with atomic_write(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors))
    print(f"written: {folder / CONFIG}, {folder / WEIGHTS}")


def read_peft(folder, model):
    """Add the adapters in PEFT's files to a model. Raises UserError if they aren't plain LoRA or
    don't match the model.
    """
    safetensors = import_safetensors()
    damaged = (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError)
    try:
        config = read_json(folder / CONFIG)
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        target = config["target_modules"]
        target = target if isinstance(target, str) else ",".join(sorted(target))
    except damaged as error:
        raise UserError(f"--from_peft {folder} has no PEFT adapters: {error}") from None
    for option, off in DISABLED.items():
        if config.get(option) not in (off, None):
            raise UserError(f"{folder / CONFIG}: {option} = {config[option]} is not supported")
    try:
        add_lora(model, rank, alpha, config.get("lora_dropout", 0.0), target)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: target_modules {error}") from None
    state = {
        name.removeprefix(PREFIX).removesuffix(SUFFIX): weight for name, weight in tensors.items()
    }
    shapes = {name: weight.shape for name, weight in state.items()}
    expected = {name: w.shape for name, w in adapter_state(model.state_dict()).items()}
    if shapes != expected:
        wrong = sorted({name for name, _ in shapes.items() ^ expected.items()})
        raise UserError(f"{folder / WEIGHTS} doesn't match these weights: {', '.join(wrong[:5])}")
    model.load_state_dict(state, strict=False)


if __name__ == "__main__":
    with report_user_errors():
        main()
