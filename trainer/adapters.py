"""LoRA adapters on disk: a file of their own, without the weights that they were trained on."""

from pathlib import Path

from common import UserError
from model.lora import adapter_state, add_lora, hash_of, merge
from trainer import checkpoint


def weights_to_start_from(args):
    """--weight; without it what the adapters of --lora were trained on, or full_sft."""
    if args.from_weight or not args.lora:
        return args.from_weight or "full_sft"
    path = checkpoint.find(args.save_dir, adapters_name(args.lora))
    content = checkpoint.load(path)
    require_adapters(content, path)
    return content["under"]


def adapters_name(name):
    """Return the name of a file of adapters, lora_x, or its path: x and lora_x are the same."""
    return name if Path(name).suffix == ".pth" else f"lora_{name.removeprefix('lora_')}"


def require_adapters(content, path):
    """Raise UserError unless a loaded file holds adapters without their weights."""
    if "lora" not in content or "under" not in content:
        stage = content["stage"]
        raise UserError(f"{path} holds no adapters, but {stage} weights; name it with --weight")


def build_resumed(content, path, dropout=0.0):
    """Return the (model, tokenizer) of a checkpoint. One of LoRA holds only the adapters: the
    weights under them come from their own file. Errors are those of `find` and `load_adapters`.
    """
    if "under" not in content:
        return checkpoint.build_model(content, path, dropout)
    config, name = content["config"], content["under"]
    base = checkpoint.find(path.parents[1], name, config["hidden_size"], config["use_moe"])
    model, tokenizer = checkpoint.build_model(checkpoint.load(base), base, dropout)
    attach_adapters(model, content, path)
    return model, tokenizer


def load_adapters(model, path):
    """Adds the adapters of a file to the weights that they were trained on; returns its content.

    Raises UserError if these are other weights, or if the adapters do not fit.
    """
    content = checkpoint.load(path)
    attach_adapters(model, content, path)
    return content


def attach_adapters(model, content, path):
    """Adds the adapters of a loaded file to a model; errors are those of `load_adapters`."""
    require_adapters(content, path)
    lora = content["lora"]
    if lora["base"] != hash_of(model):
        raise UserError(
            f"{path} was trained on other weights than these, and fits only those: "
            f"{content['under']} (--weight or --from_weight), as they were then"
        )
    add_lora(model, **lora)
    expected = {name: w.shape for name, w in adapter_state(model.state_dict()).items()}
    if expected != {name: weight.shape for name, weight in content["model"].items()}:
        raise UserError(f"{path} is damaged: its adapters do not fit their own description")
    model.load_state_dict(content["model"], strict=False)


def merge_adapters(model, args):
    """Merge the adapters that --lora names into the model's weights; return (their file's path,
    their stage).
    """
    config = model.config
    path = checkpoint.find(
        args.save_dir, adapters_name(args.lora), config.hidden_size, config.use_moe
    )
    content = load_adapters(model, path)
    merge(model)
    print(f"with the adapters {path}")
    return path, content["stage"]
