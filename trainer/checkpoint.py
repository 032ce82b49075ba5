"""The files of a run: its checkpoints, and those of an earlier run with the same name.

out/checkpoints/NAME_resume.pth      the latest checkpoint: a weights file with "optimizer",
                                     "scaler", "run" and "arguments" instead of "training"; with
                                     LoRA, without the base weights
out/checkpoints/NAME_step000500.pth  an earlier checkpoint
out/checkpoints/NAME_best.pth        the weights with the best validation score
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
    extra_entries,
    find_weights,
    load,
    matching,
    save_tensors,
    write_weights,
)
from trainer.flags import RENAMED
from trainer.optimizer import full_state
from trainer.runtime import is_rank_zero

EARLIER_OR_LATEST = r"_(?:resume|step\d+)"


def checkpoint_step(path):
    """Return the step in a checkpoint's name; infinity for the latest."""
    match = re.search(r"_step(\d+)$", path.stem)
    return int(match[1]) if match else math.inf


def load_latest(args):
    """Load a run's latest intact checkpoint; returns its content with its "path". Prints a line and
    returns None without a checkpoint. Raises UserError if all are damaged.
    """
    folder, name = args.save_dir / "checkpoints", args.save_weight

    def run_checkpoints(run_name):
        return matching(folder, run_name, args.hidden_size, args.use_moe, EARLIER_OR_LATEST)

    paths = run_checkpoints(name)
    if not paths and not name.startswith("lora_"):
        paths = run_checkpoints(f"lora_{name}")
    if not paths:
        latest = folder / f"{name}_{args.hidden_size or '*'}_resume.pth"
        plain_name = name.removeprefix("lora_")
        for other in (f"{name}_previous", f"lora_{plain_name}_previous", plain_name):
            if run_checkpoints(other):
                raise UserError(
                    f"there is no {latest}, but a checkpoint of the run {other}; to resume that, "
                    f"give --save_weight {other}; to start again, omit --from_resume"
                )
        print(f"there is no {latest} yet: starting from the beginning")
        return None
    # If several sizes have this name, use the newest; try its checkpoints from the latest
    # backwards.
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    newest_run = newest.name.rpartition("_")[0]
    run_paths = [path for path in paths if path.name.rpartition("_")[0] == newest_run]
    first_error = None
    for path in sorted(run_paths, key=checkpoint_step, reverse=True):
        try:
            content = load(path)
            require_checkpoint(content, path)
        except UserError as error:
            first_error = first_error or error
            continue
        if first_error:
            print(f"warning: {first_error}. Falling back to {path}")
        flags = content["arguments"]
        content["arguments"] = {RENAMED.get(name, name): value for name, value in flags.items()}
        return content | {"path": path}
    raise first_error


def build_resumed(content, path, dropout=0.0):
    """Build (model, tokenizer) from a checkpoint. A LoRA checkpoint holds only the adapters, so the
    base weights are loaded from their own file. Errors as in `find_weights` and `load_adapters`.
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
    """Raise UserError unless a loaded file was written by `save_run`."""
    parts = [content.get(part) for part in ("run", "arguments", "optimizer", "scaler")]
    is_complete = all(isinstance(part, dict) for part in parts)
    if not is_complete or not isinstance(content["run"].get("step"), int):
        raise UserError(f"{path} is not a checkpoint of this version; start a new run")


def plain_flags(args):
    """Return the flags as plain values, which torch.load(weights_only=True) accepts."""

    def plain(value):
        if isinstance(value, list):
            return [tuple(map(plain, source)) for source in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(args).items()}


def save_weights(run, path, state=None):
    """Save the weights of a TrainingRun; with LoRA, only the adapters. state: from `full_state`, if
    it is gathered already; without it, this must be called on all ranks. Rank 0 writes.
    """
    if state is None:
        state = full_state(run.model)
    if not is_rank_zero():
        return
    training = dataclasses.asdict(run.spec) | dataclasses.asdict(run.progress)
    training |= plain_flags(run.args)
    training.pop("reference")  # only needed to resume
    content = {"training": training, **extra_entries(run.model)}
    state = {name: state[name] for name in state if not name.startswith("projections.")}
    if "lora" in content:
        state, content["under"] = adapter_state(state), str(run.args.from_weight)
    write_weights(path, state, run.model.config, run.tokenizer, run.stage, **content)


def save_run(run):
    """Save a checkpoint of a TrainingRun, and its weights. Must be called on all ranks.

    Once it is complete, the previous checkpoint is renamed to NAME_step*.pth; --keep_checkpoints of
    these are kept.
    """
    args, config = run.args, run.model.config
    state, optimizer_state = full_state(run.model, run.optimizer)
    previous_step = run.progress.saved_step
    run.progress.saved_step = run.progress.step
    if not is_rank_zero():
        return
    content = {"optimizer": optimizer_state, "scaler": run.runtime.scaler.state_dict()}
    content["run"] = dataclasses.asdict(run.spec) | dataclasses.asdict(run.progress)
    content["arguments"] = plain_flags(args)
    content |= extra_entries(run.model)
    if hasattr(run.model, "projections"):
        layers = run.model.projections
        content["projections"] = [layers[0].out_features, len(layers)]
    if "lora" in content:  # the base weights haven't changed
        state, content["under"] = adapter_state(state), str(args.from_weight)
    new, latest = run.checkpoint_path("_new.pth"), run.checkpoint_path("_resume.pth")
    write_weights(new, state, config, run.tokenizer, run.stage, **content)
    earlier_path = run.checkpoint_path(f"_step{previous_step or 0:06d}.pth")
    if latest.exists() and not earlier_path.exists():  # exists if the latest was damaged
        retry_on_windows(latest.replace, earlier_path)
    retry_on_windows(new.replace, latest)
    run_id = args.save_weight, config.hidden_size, config.use_moe
    earlier_paths = sorted(matching(new.parent, *run_id, r"_step\d+"), key=checkpoint_step)
    for path in earlier_paths[: max(0, len(earlier_paths) - args.keep_checkpoints)]:
        retry_on_windows(path.unlink)
    save_weights(run, run.weights_path, state)


def put_best_in_place(run):
    """Replace the weights of a TrainingRun with the best in validation."""
    best = load(run.checkpoint_path("_best.pth"))  # errors name this file
    save_tensors(run.weights_path, best)


def keep_previous(args, name):
    """Rename the files of an earlier run, e.g. full_sft_256 to full_sft_previous_256."""
    files = run_files(args.save_dir, re.escape(name))
    if not any(path.suffix == ".pth" for path in files):
        return
    size = name.removeprefix(args.save_weight)
    new_name, number = f"{args.save_weight}_previous", 1
    while run_files(args.save_dir, re.escape(new_name + size)):
        number += 1
        new_name = f"{args.save_weight}_previous{number}"
    for path in reversed(files):  # the log first: if that fails, nothing has changed
        try:
            path.rename(path.with_name(new_name + size + path.name.removeprefix(name)))
        except OSError as error:
            raise UserError(
                f"{path} cannot be renamed: {error.strerror}; close the program using it, or "
                "choose another --save_weight"
            ) from None
    print(f"the earlier run {name} is kept as {new_name + size} until this one is complete")
    print(f"to resume it instead: --from_resume 1 --save_weight {new_name}")


def run_files(save_dir, name, suffix=""):
    """Return the files of a run. name is a regex, suffix a regex that follows the ending."""
    endings = {
        ".": r"\.pth",
        "checkpoints": r"_(resume|best|new|step\d+)\.pth",
        "logs": r"(\.jsonl|_loss\.(png|svg))",
    }
    return [
        path
        for folder, ending in endings.items()
        for path in sorted((save_dir / folder).glob("*"))
        if re.fullmatch(name + ending + suffix, path.name)
    ]


def delete_partial_files(save_dir, name):
    """Delete the files that a killed process of this run was writing."""
    for path in run_files(save_dir, rf"\.{re.escape(name)}", r"\.\d+\.part"):
        path.unlink()


def delete_previous(args, name):
    """Delete the files that `keep_previous` renamed, when this run is complete."""
    size = name.removeprefix(args.save_weight)
    for path in run_files(args.save_dir, rf"{re.escape(args.save_weight)}_previous\d*{size}"):
        try:
            path.unlink()
        except OSError as error:
            print(f"warning: {path} cannot be removed: {error.strerror}")
