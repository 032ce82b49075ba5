"""Weights and checkpoints on disk: a dict of plain values and tensors, nothing that runs code.

weights   {"format", "stage", "config", "tokenizer", "model", "training"}
resume    the same, with "optimizer", "scaler", "step", "tokens", "arguments", "world_size"
"""

import dataclasses
import pickle
import re
from pathlib import Path

import torch

from dataset.errors import UserError
from dataset.files import replacing
from dataset.tokenizer import load_tokenizer
from model.causal_lm import CausalLM, ModelConfig

FORMAT = 1
MAKE = {
    "pretrain": "make it with: python trainer/train_pretrain.py",
    "full_sft": "make it with: python trainer/train_full_sft.py",
}


def file_name(name, config):
    """pretrain_256, or full_sft_512_moe: what weights, checkpoint and log of a run are called."""
    return f"{name}_{config.hidden_size}{'_moe' if config.use_moe else ''}"


def save(path, model, tokenizer, stage, **more):
    """Writes a weights or resume file; model is the plain one, not its compiled or DDP wrapper."""
    content = {
        "format": FORMAT,
        "stage": stage,
        "config": dataclasses.asdict(model.config),
        "tokenizer": tokenizer.to_str(),
        "model": model.state_dict(),
        **more,
    }
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise UserError(f"{path} cannot be written: {error}. Make room and go on") from None


def load(path):
    """The dict of a weights or resume file, on the CPU; no code in it is run.

    Raises UserError if it is missing, damaged, of another program, or would run code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than plain values and tensors, or is damaged; it is not opened, "
            "because it could run any code. Train anew, or get the file again"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); train anew, or get it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a weights file of this program; it needs format {FORMAT}")
    return content


def find(folder, name, hidden_size=None, use_moe=None, ending=""):
    """The file {name}_{hidden_size}[_moe]{ending}.pth; the newest where that leaves a choice.

    A name that is a path to a file is taken as it is. Raises UserError if there is none.
    """
    if Path(name).suffix == ".pth":
        return Path(name)
    pattern = re.compile(rf"{re.escape(name)}_(\d+)(_moe)?{ending}\.pth")
    found = []
    for path in sorted(Path(folder).glob("*.pth")):
        match = pattern.fullmatch(path.name)
        sized = match and hidden_size in (None, int(match[1]))
        if sized and use_moe in (None, match[2] is not None):
            found.append(path)
    if not found:
        size = hidden_size or "*"
        remedy = MAKE.get(name, "name other weights, or give the path of a .pth file")
        remedy = "start the run without --from_resume 1" if ending else remedy
        raise UserError(f"there is no {Path(folder) / f'{name}_{size}{ending}.pth'}; {remedy}")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        print(f"{len(found)} files match {name}; taking the newest, {newest}")
    return newest


def build(content, path, dropout=0.0):
    """(model, tokenizer) of a loaded file; every weight must be there and fit.

    Raises UserError with the missing and unexpected names and the shapes that differ.
    """
    try:
        config = ModelConfig(**content["config"])
        tokenizer = load_tokenizer(json_text=content["tokenizer"])
        weights = content["model"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say what model it holds: {error}") from None
    config.dropout = dropout
    model = CausalLM(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]} and not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        rest = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path} does not fit its own config: {', '.join(problems[:5])}{rest}")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {tokenizer.get_vocab_size()} tokens, but its model only "
            f"{config.vocab_size}; it was put together from two runs"
        )
    model.load_state_dict(weights)
    return model, tokenizer


def save_run(args, model, tokenizer, stage, optimizer, scaler, run):
    """Writes the weights so far, and beside them all that it takes to go on; run is a dict of
    plain values, where the run is: step, tokens, rows.
    """
    name = file_name(args.save_weight, model.config)
    flags = {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(args).items()}
    save(args.save_dir / f"{name}.pth", model, tokenizer, stage, training=run | flags)
    save(
        args.save_dir / "checkpoints" / f"{name}_resume.pth",
        model,
        tokenizer,
        stage,
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        arguments=flags,
        **run,
    )


# A run whose data or steps are cut differently is another run: its place in the data means nothing.
SAME_RUN = ("batch_size", "accumulation_steps", "max_seq_len", "eval_split", "seed", "data_path")
SAME_RUN += ("packing",)


def require_same_run(resume, args, rows, world_size):
    """Raises UserError with every flag that makes the resumed run another one."""
    now = {**{name: getattr(args, name) for name in SAME_RUN}, "rows of data": rows}
    before = {**resume["arguments"], "rows of data": resume["rows"]}
    differ = [
        f"{name} is {value} and was {before[name]}"
        for name, value in now.items()
        if str(value) != str(before[name])
    ]
    if world_size != resume["world_size"]:
        differ.append(f"processes are {world_size} and were {resume['world_size']}")
    if differ:
        raise UserError(f"--from_resume 1 goes on with the same run, but {'; '.join(differ)}")
