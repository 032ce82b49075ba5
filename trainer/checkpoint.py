"""Checkpoints on disk, beside the weights of model/weights.py:

out/checkpoints/NAME_resume.pth      the latest checkpoint: "optimizer", "scaler", "run" and
                                     "arguments" instead of "training"; of LoRA without the weights
out/checkpoints/NAME_step000500.pth  an earlier one
out/checkpoints/NAME_best.pth        the weights that did best in validation
"""

import dataclasses
import math
import re
from pathlib import Path

from common import UserError, retry_on_windows
from model.lora import adapter_state
from model.weights import (
    attach_adapters,
    build_model,
    description,
    find_weights,
    load,
    matching,
    save_tensors,
    write_weights,
)
from trainer.flags import RENAMED
from trainer.optimizer import full_state
from trainer.runtime import is_first

EARLIER_OR_LATEST = r"_(?:resume|step\d+)"


def checkpoint_step(path):
    """The step in a checkpoint's name; that of the latest is above all."""
    match = re.search(r"_step(\d+)$", path.stem)
    return int(match[1]) if match else math.inf


def load_latest(args):
    """The content of a run's latest checkpoint that is not damaged, with its "path". None, with a
    line that says so, if there is no checkpoint. Raises UserError if all are damaged.
    """
    folder, name = args.save_dir / "checkpoints", args.save_weight

    def checkpoints(name):
        return matching(folder, name, args.hidden_size, args.use_moe, EARLIER_OR_LATEST)

    plain = name.removeprefix("lora_")
    found = checkpoints(name) or (checkpoints(f"lora_{name}") if name == plain else [])
    if not found:
        latest = folder / f"{name}_{args.hidden_size or '*'}_resume.pth"
        names = [f"{name}_previous", f"lora_{plain}_previous", *([plain] if name != plain else [])]
        if others := [earlier for earlier in names if checkpoints(earlier)]:
            raise UserError(
                f"there is no {latest}, but a checkpoint of the run {others[0]}; to resume that, "
                f"give --save_weight {others[0]}; to start again, leave --from_resume out"
            )
        print(f"there is no {latest} yet: the run starts from its beginning")
        return None
    # Of several models under one name the newest; of its checkpoints the latest, then backwards.
    newest = max(found, key=lambda path: path.stat().st_mtime)
    run_name, failed = newest.name.rpartition("_")[0], None
    ours = [path for path in found if path.name.rpartition("_")[0] == run_name]
    for path in sorted(ours, key=checkpoint_step, reverse=True):
        try:
            content = load(path)
            require_checkpoint(content, path)
        except UserError as error:
            failed = failed or error
            continue
        if failed:
            print(f"warning: {failed}. Going on from the one before, {path}")
        flags = content["arguments"]
        content["arguments"] = {RENAMED.get(name, name): value for name, value in flags.items()}
        return content | {"path": path}
    raise failed


def build_resumed(content, path, dropout=0.0):
    """Return the (model, tokenizer) of a checkpoint. One of LoRA holds only the adapters: the
    weights under them come from their own file. Errors are those of `find` and `load_adapters`.
    """
    weights = content["model"]
    names = [name for name in weights if name.startswith("projections.")]
    projections = {name: weights.pop(name) for name in names}
    if "under" not in content:
        model, tokenizer = build_model(content, path, dropout)
    else:
        config, name = content["config"], content["under"]
        base = find_weights(path.parents[1], name, config["hidden_size"], config["use_moe"])
        model, tokenizer = build_model(load(base), base, dropout)
        attach_adapters(model, content, path)
    if "projections" in content:  # of distillation
        from trainer.distillation import load_projections

        load_projections(model, content["projections"], projections, path)
    return model, tokenizer


def require_checkpoint(content, path):
    """Raises UserError unless a loaded file is one that `save_run` wrote."""
    parts = [content.get(part) for part in ("run", "arguments", "optimizer", "scaler")]
    ours = all(isinstance(part, dict) for part in parts)
    if not ours or not isinstance(content["run"].get("step"), int):
        raise UserError(f"{path} is no checkpoint of this version; start the run anew")


def plain_flags(args):
    """The flags as torch.load(weights_only=True) may load them."""

    def plain(value):
        if isinstance(value, list):
            return [tuple(map(plain, source)) for source in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(args).items()}


def save_weights(run, path, state=None):
    """Write the weights of a TrainingRun; only its adapters, where only these are trained. state:
    the full state dict. Every process must call this; the first one writes.
    """
    state = state or full_state(run.model)
    if not is_first():
        return
    training = dataclasses.asdict(run.progress) | plain_flags(run.args)
    training.pop("reference")  # only a resumed run needs it
    content = {"training": training, **description(run.model)}
    state = {name: state[name] for name in state if not name.startswith("projections.")}
    if "lora" in content:
        state, content["under"] = adapter_state(state), str(run.args.from_weight)
    write_weights(path, state, run.model.config, run.tokenizer, run.stage, **content)


def save_run(run):
    """Write all that resuming a TrainingRun needs, and its weights. Every process must call this.

    The latest checkpoint becomes an earlier one when the new one is complete; --keep_checkpoints
    of those stay.
    """
    args, config = run.args, run.model.config
    state, optimizer_state = full_state(run.model, run.optimizer)
    before, run.progress.saved_step = run.progress.saved_step, run.progress.step
    if not is_first():
        return
    content = {"optimizer": optimizer_state, "scaler": run.runtime.scaler.state_dict()}
    content |= {"run": dataclasses.asdict(run.progress), "arguments": plain_flags(args)}
    content |= description(run.model)
    if hasattr(run.model, "projections"):
        layers = run.model.projections
        content["projections"] = [layers[0].out_features, len(layers)]
    if "lora" in content:  # the weights under the adapters have not changed
        state, content["under"] = adapter_state(state), str(args.from_weight)
    new, latest = run.checkpoint_path("_new.pth"), run.checkpoint_path("_resume.pth")
    write_weights(new, state, config, run.tokenizer, run.stage, **content)
    place = run.checkpoint_path(f"_step{before or 0:06d}.pth")
    if latest.exists() and not place.exists():  # there already: the latest was damaged
        retry_on_windows(latest.replace, place)
    retry_on_windows(new.replace, latest)
    which = args.save_weight, config.hidden_size, config.use_moe
    earlier = sorted(matching(new.parent, *which, r"_step\d+"), key=checkpoint_step)
    for path in earlier[: max(0, len(earlier) - args.keep_checkpoints)]:
        retry_on_windows(path.unlink)
    save_weights(run, run.weights_path, state)


def put_best_in_place(run):
    """Make the weights that did best in validation those of a TrainingRun."""
    best = load(run.checkpoint_path("_best.pth"))  # an error names this file
    save_tensors(run.weights_path, best)
