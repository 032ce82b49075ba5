"""Weights and checkpoints on disk: a dict of plain values and tensors, nothing that runs code.

out/NAME.pth                         weights {"format", "stage", "config", "tokenizer", "model",
                                     "training"}
out/lora_NAME.pth                    adapters alone in "model", and their description in "lora"
out/checkpoints/NAME_resume.pth      the latest checkpoint: "optimizer", "scaler", "run" and
                                     "arguments" instead of "training"; of LoRA without the weights
out/checkpoints/NAME_step000500.pth  an earlier one
out/checkpoints/NAME_best.pth        the weights that did best in validation
"""

import dataclasses
import math
import re
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from common import UserError, load_tensors, patiently, save_tensors
from dataset.jsonl import is_folder
from dataset.tokenizer import load_tokenizer
from model.causal_lm import CausalLM, ModelConfig
from model.distillation import add_projections
from model.lora import adapter_state, add_lora
from trainer.arguments import RENAMED
from trainer.hf_folder import read_folder, remedy_for
from trainer.optimizer import full_state
from trainer.runtime import is_first

FORMAT = 1
# What values of a wrong kind or size raise where a model is built.
DAMAGED = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)
EARLIER_OR_LATEST = r"_(?:resume|step\d+)"
MAKE = {
    "pretrain": "make it with: python trainer/train_pretrain.py",
    "full_sft": "make it with: python trainer/train_full_sft.py",
}


def file_name(name, config):
    """pretrain_256, or full_sft_512_moe: what weights, checkpoint and log of a run are called."""
    return f"{name}_{config.hidden_size}{'_moe' if config.use_moe else ''}"


def save(path, model_state, config, tokenizer, stage, **more):
    """Writes a weights or resume file."""
    content = {
        "format": FORMAT,
        "stage": stage,
        "config": dataclasses.asdict(config),
        "tokenizer": tokenizer.to_str(),
        "model": model_state,
        **more,
    }
    save_tensors(path, content)


def load(path):
    """The dict of a weights or resume file, on the CPU, or of the folder of a published model.
    Raises UserError as `load_tensors` does, and if it is that of another program.
    """
    if Path(path).suffix != ".pth" and is_folder(path):
        return read_folder(Path(path))
    content = load_tensors(path)
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    if not ours or not isinstance(content.get("stage"), str):
        raise UserError(f"{path} is not a weights file of this program; it needs format {FORMAT}")
    return content


def find(folder, name, hidden_size=None, use_moe=None):
    """The weights file {name}_{hidden_size}[_moe].pth; the newest where that leaves a choice.

    A name that is a path to a .pth file is taken as it is; where no file has the name, so is one
    that is a path to a folder. Raises UserError if there is none.
    """
    if Path(name).suffix == ".pth":
        return Path(name)
    found = matching(folder, name, hidden_size, use_moe)
    if not found and is_folder(name):
        return Path(name)
    if not found:
        wanted = Path(folder) / f"{name}_{hidden_size or '*'}.pth"
        remedy = MAKE.get(name) or remedy_for(name)
        remedy = remedy or "name other weights, or give the path of a .pth file or a folder"
        if matching(folder, f"{name}_previous", hidden_size, use_moe):
            remedy = f"those of an earlier run are {name}_previous"
        raise UserError(f"there is no {wanted}; {remedy}")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        print(f"{len(found)} files match {name}; taking the newest, {newest}")
    return newest


def matching(folder, name, hidden_size=None, use_moe=None, ending=""):
    """Files {name}_{hidden_size}[_moe]{ending}.pth of a folder; ending is a pattern."""
    pattern, found = re.compile(rf"{re.escape(name)}_(\d+)(_moe)?{ending}\.pth"), []
    for path in sorted(Path(folder).glob("*.pth")):
        match = pattern.fullmatch(path.name)
        sized = match and hidden_size in (None, int(match[1]))
        if sized and use_moe in (None, match[2] is not None):
            found.append(path)
    return found


def step_of(path):
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
    for path in sorted(ours, key=step_of, reverse=True):
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


def require_checkpoint(content, path):
    """Raises UserError unless a loaded file is one that `save_run` wrote."""
    parts = [content.get(part) for part in ("run", "arguments", "optimizer", "scaler")]
    ours = all(isinstance(part, dict) for part in parts)
    if not ours or not isinstance(content["run"].get("step"), int):
        raise UserError(f"{path} is no checkpoint of this version; start the run anew")


def require_plain(config, content):
    """Raises ValueError unless the values in a file are of the kind that a model takes."""
    weights, first = content["model"], content.get("first_new_token", 1)
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), type(getattr(ModelConfig(), field.name))
        fits = type(value) in (int, float) if kind is float else type(value) is kind
        if not fits or not 0 <= value < math.inf or (kind is int and value == 0):
            raise ValueError(f"{field.name} is {value!r}")
    if max(config.num_hidden_layers, config.use_moe * config.num_experts) > len(weights):
        raise ValueError("it has fewer weights than layers or experts")
    if type(first) is not int or not 0 < first <= config.vocab_size:
        raise ValueError(f"first_new_token is {first!r}")
    for name, weight in weights.items():
        if not weight.is_floating_point() or weight.layout != torch.strided:
            raise ValueError(f"{name} does not hold floating point numbers")


class NoValues(TorchFunctionMode):
    """Inside, new modules draw no values for their weights. On "meta" there would be none, but
    torch 2.13 loads its compiler for that, which takes longer than a short answer.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_model(config, content):
    """A model of the shape that a file names, with its adapters and projections."""
    model = CausalLM(config)
    if "lora" in content:
        add_lora(model, **content["lora"])
    if "projections" in content:
        add_projections(model, *content["projections"])
    return model


def build_model(content, path, dropout=0.0):
    """The (model, tokenizer) of a loaded file; the model shares its fp32 tensors.

    Raises UserError if a weight is missing or of another shape, or if the file does not say what
    it holds.
    """
    if "under" in content:
        raise UserError(f"{path} holds adapters, not weights; name it with --lora instead")
    try:
        tokenizer = load_tokenizer(json_text=str(content["tokenizer"]))
        config = ModelConfig(**content["config"])
        config.dropout = dropout
        require_plain(config, content)
        # On "meta" it takes no memory, whatever sizes a damaged file names.
        with torch.device("meta"), NoValues():
            model = empty_model(config, content)
    except DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} does not say what model it holds: {reason}") from None
    weights = {name: weight.float() for name, weight in content["model"].items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # torch's, a line for each weight that does not fit
        problems = " ".join(str(error).partition(":")[2].split())
        raise UserError(f"{path} does not fit its own config: {problems:.600}") from None
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        both = f"its tokenizer has {size} tokens, but its model only {config.vocab_size}"
        raise UserError(f"{path}: {both}; it was put together from two runs")
    model.first_new_token = content.get("first_new_token")
    return model, tokenizer


def description(model):
    """The parts of a file beyond the config: adapters, first new token, projections."""
    found = {}
    if getattr(model, "first_new_token", None) is not None:
        found["first_new_token"] = model.first_new_token
    if getattr(model, "lora", None):
        found["lora"] = dataclasses.asdict(model.lora)
    if hasattr(model, "projections"):
        found["projections"] = [model.projections[0].out_features, len(model.projections)]
    return found


def flags_of(args):
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
    training = dataclasses.asdict(run.progress) | flags_of(run.args)
    training.pop("reference")  # only a resumed run needs it
    content = {"training": training, **description(run.model)}
    if content.pop("projections", None):
        state = {name: state[name] for name in state if not name.startswith("projections.")}
    if "lora" in content:
        state, content["under"] = adapter_state(state), str(run.args.from_weight)
    save(path, state, run.model.config, run.tokenizer, run.stage, **content)


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
    content |= {"run": dataclasses.asdict(run.progress), "arguments": flags_of(args)}
    content |= description(run.model)
    if "lora" in content:  # the weights under the adapters have not changed
        state, content["under"] = adapter_state(state), str(args.from_weight)
    new, latest = run.checkpoint_path("_new.pth"), run.checkpoint_path("_resume.pth")
    save(new, state, config, run.tokenizer, run.stage, **content)
    place = run.checkpoint_path(f"_step{before or 0:06d}.pth")
    if latest.exists() and not place.exists():  # there already: the latest was damaged
        patiently(latest.replace, place)
    patiently(new.replace, latest)
    which = args.save_weight, config.hidden_size, config.use_moe
    earlier = sorted(matching(new.parent, *which, r"_step\d+"), key=step_of)
    for path in earlier[: max(0, len(earlier) - args.keep_checkpoints)]:
        patiently(path.unlink)
    save_weights(run, run.weights_path, state)


def put_best_in_place(run):
    """Make the weights that did best in validation those of a TrainingRun."""
    best = load(run.checkpoint_path("_best.pth"))  # an error names this file
    save_tensors(run.weights_path, best)
