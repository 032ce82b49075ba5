"""Weights and checkpoints on disk: a dict of plain values and tensors, nothing that runs code.

out/NAME.pth                         weights {"format", "stage", "config", "tokenizer", "model",
                                     "training"}
out/lora_NAME.pth                    adapters alone in "model", and what they are like in "lora"
out/checkpoints/NAME_resume.pth      the latest checkpoint: "optimizer", "scaler", "run" and
                                     "arguments" instead of "training"
out/checkpoints/NAME_step000500.pth  an earlier one
out/checkpoints/NAME_best.pth        the weights that did best in validation
"""

import dataclasses
import math
import pickle
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.errors import UserError
from dataset.files import replacing, save_tensors
from dataset.tokenizer import load_tokenizer
from model.causal_lm import CausalLM, ModelConfig
from model.distillation import add_projections
from model.lora import adapter_state, add_lora, load_adapters, merge_for_good
from trainer.adapting import choose_what_learns, description
from trainer.distributed import is_first, load_optimizer, whole

FORMAT = 1
EARLIER_OR_LATEST = r"_(?:resume|step\d+)"
# Flags that a resumed run may change: the weights come out the same, or, with another device,
# nearly the same.
FREE = """from_resume force_resume from_weight save_dir save_weight config cache_dir rebuild_cache
    device num_workers use_compile grad_checkpoint profile parallel deterministic log_interval
    save_interval eval_interval sample_interval sample_prompt strict_data keep_checkpoints
    best_metric early_stop_patience save_best_at_end max_bad_steps loss_curve offline_dir""".split()
FREE += ["batch_size", "accumulation_steps"]  # their product with the processes is compared
FREE += ["data_path", "eval_data_path", "replay_path"]  # the content of the files is compared
QUIET = ("from_resume", "force_resume")  # are not worth a line when they differ
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
    """The dict of a weights or resume file, on the CPU; no code in it is run.

    Raises UserError if it is missing, damaged, of another program, or would run code.
    """
    try:
        if zipfile.is_zipfile(path):  # as torch.save writes it, with a checksum of every part
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than plain values and tensors, or is damaged; it is not opened, "
            "because it could run any code. Train anew, or get the file again"
        ) from None
    except Exception as error:  # the readers of zip and pickle raise nearly anything on any bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); train anew, or get it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a weights file of this program; it needs format {FORMAT}")
    return content


def find(folder, name, hidden_size=None, use_moe=None):
    """The weights file {name}_{hidden_size}[_moe].pth; the newest where that leaves a choice.

    A name that is a path to a file is taken as it is. Raises UserError if there is none.
    """
    if Path(name).suffix == ".pth":
        return Path(name)
    found = matching(folder, name, hidden_size, use_moe)
    if not found:
        wanted = Path(folder) / f"{name}_{hidden_size or '*'}.pth"
        remedy = MAKE.get(name, "name other weights, or give the path of a .pth file")
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
    """(path, content) of the latest checkpoint of a run that is not damaged.

    Raises UserError if there is none.
    """
    folder, name = args.save_dir / "checkpoints", args.save_weight
    found = matching(folder, name, args.hidden_size, args.use_moe, EARLIER_OR_LATEST)
    if not found:
        size = args.hidden_size or "*"
        raise UserError(
            f"there is no {folder / f'{name}_{size}_resume.pth'}; start the run without "
            "--from_resume 1"
        )
    # Of several models under one name the newest; of its checkpoints the latest, then backwards.
    newest = max(found, key=lambda path: path.stat().st_mtime)
    run_name, failed = newest.name.rpartition("_")[0], None
    ours = [path for path in found if path.name.rpartition("_")[0] == run_name]
    for path in sorted(ours, key=step_of, reverse=True):
        try:
            content = load(path)
            if "run" not in content:
                raise UserError(f"{path} is no checkpoint of this version; start the run anew")
        except UserError as error:
            failed = failed or error
            continue
        if failed:
            print(f"warning: {failed}. Going on from the one before, {path}")
        return path, content
    raise failed


def weights_to_start_from(args):
    """--from_weight; where --lora is given without it, what the adapters were trained on."""
    if args.from_weight or not hasattr(args, "lora"):
        return args.from_weight
    return load(find(args.save_dir, f"lora_{args.lora}"))["under"] if args.lora else "full_sft"


def build(content, path, args=None):
    """(model, tokenizer) of a loaded file; every weight must be there and fit.

    args: the flags; lora names adapters to merge into the weights.
    Raises UserError with the missing and unexpected names and the shapes that differ.
    """
    try:
        config = ModelConfig(**content["config"])
        tokenizer = load_tokenizer(json_text=content["tokenizer"])
        weights = content["model"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say what model it holds: {error}") from None
    config.dropout = getattr(args, "dropout", 0.0)
    model = CausalLM(config)
    if "lora" in content:
        if "run" not in content:
            raise UserError(f"{path} holds adapters, not weights; name it with --lora instead")
        add_lora(model, **content["lora"])
    if "projections" in content:
        add_projections(model, *content["projections"])
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
        raise UserError(f"{path} does not fit its own config: {', '.join(problems[:5])} ...")
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        both = f"its tokenizer has {size} tokens, but its model only {config.vocab_size}"
        raise UserError(f"{path}: {both}; it was put together from two runs")
    model.load_state_dict(weights)
    model.first_new_token = content.get("first_new_token")
    if getattr(args, "lora", None):
        place = find(args.save_dir, f"lora_{args.lora}", config.hidden_size, config.use_moe)
        adapters = load(place)
        merge_for_good(load_adapters(model, adapters, place))
        content["stage"] = adapters["stage"]
        print(f"with the adapters {place}")
    elif hasattr(args, "use_lora"):
        choose_what_learns(model, tokenizer, args)
    return model, tokenizer


@dataclass
class Run:
    """Where a run is. Random numbers and the learning rate follow from the step and the flags."""

    data: list  # the hash of each file
    rows: int
    rows_per_step: int
    processes: int
    step: int = 0
    tokens: int = 0  # trained on
    bad_steps: int = 0  # the last ones, left out because their gradients were not finite
    log_bytes: int = 0  # of the metrics log
    saved_step: int | None = None  # that of the latest checkpoint
    best_score: float | None = None
    evaluations_since_best: int = 0

    def judge(self, score):
        """Takes note of a validation (higher is better); returns whether it is the best so far."""
        best = self.best_score is None or score > self.best_score
        best = best and not math.isnan(score)
        self.best_score = score if best else self.best_score
        self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
        return best

    def stalled(self, patience):
        """Whether the last `patience` validations found nothing better; with 0, never."""
        return 0 < patience <= self.evaluations_since_best


def flags_of(args):
    """The flags as weights_only=True may load them."""

    def plain(value):
        if isinstance(value, list):
            return [tuple(map(plain, source)) for source in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(args).items()}


def save_weights(path, args, model, tokenizer, stage, run, state=None):
    """Writes a weights file; of adapters alone, where only these learn. state: the gathered
    weights. Every process must call this; the first one writes.
    """
    state = state or whole(model.state_dict())
    if is_first():
        more = {"training": dataclasses.asdict(run) | flags_of(args), **description(model)}
        if more.pop("projections", None):
            state = {name: state[name] for name in state if not name.startswith("projections.")}
        if "lora" in more:
            state, more["under"] = adapter_state(state), str(args.from_weight)
        save(path, state, model.config, tokenizer, stage, **more)


def save_run(args, model, tokenizer, stage, optimizer, scaler, run):
    """Writes all that it takes to go on, and the weights so far. Every process must call this.

    What was the latest checkpoint becomes an earlier one when the new one is complete;
    args.keep_checkpoints of those stay.
    """
    name, folder = file_name(args.save_weight, model.config), args.save_dir / "checkpoints"
    more = {"optimizer": whole(optimizer.state_dict()), "scaler": scaler.state_dict()}
    state, before, run.saved_step = whole(model.state_dict()), run.saved_step, run.step
    if is_first():
        more["run"], more["arguments"] = dataclasses.asdict(run), flags_of(args)
        new, latest = folder / f"{name}_new.pth", folder / f"{name}_resume.pth"
        save(new, state, model.config, tokenizer, stage, **more, **description(model))
        earlier = sorted(folder.glob(f"{name}_step*.pth"), key=step_of)
        if before is None:  # this run did not begin with them: it replaces another one
            for path in earlier:
                path.unlink()
        else:
            place = folder / f"{name}_step{before:06d}.pth"
            if latest.exists() and place not in earlier:  # there: the latest was damaged
                latest.replace(place)
                earlier.append(place)
            for path in earlier[: max(0, len(earlier) - args.keep_checkpoints)]:
                path.unlink()
        new.replace(latest)
        save_weights(args.save_dir / f"{name}.pth", args, model, tokenizer, stage, run, state)


def put_best_in_place(args, name):
    """Makes the weights that did best in validation those of the run."""
    best = args.save_dir / "checkpoints" / f"{name}_best.pth"
    load(best)  # raises an error if it is damaged
    with best.open("rb") as source, replacing(args.save_dir / f"{name}.pth") as file:
        shutil.copyfileobj(source, file)


def go_on(run, resume, args, optimizer, scaler):
    """The Run of a checkpoint, and its state for optimizer and scaler; run holds what is known of
    this one before its first step.

    Prints which flags differ. Raises UserError with all that make it another run, unless
    args.force_resume.
    """
    path, content = resume
    before, saved = content["arguments"], Run(**content["run"])
    now = flags_of(args)
    differ = {
        name: f"{name} is {value} and was {before.get(name)}"
        for name, value in now.items()
        if value != before.get(name)
    }
    free = [name for name in FREE if name in differ]
    if "epochs" in differ and now["epochs"] > before["epochs"]:
        free.append("epochs")
    harm = [text for name, text in differ.items() if name not in free]
    if (run.data, run.rows) != (saved.data, saved.rows):
        harm.append("the data is not what it was when the run began")
    if run.rows_per_step != saved.rows_per_step:
        harm.append(
            f"a step takes {run.rows_per_step} rows (batch_size x accumulation_steps x processes) "
            f"and took {saved.rows_per_step}"
        )
    elif run.processes != saved.processes:
        print(
            f"{run.processes} processes go on where {saved.processes} stopped: a step takes "
            f"{run.rows_per_step} rows as before, so none is repeated or left out"
        )
    print("".join(f"{differ[name]}\n" for name in free if name not in QUIET), end="")
    if harm and not args.force_resume:
        raise UserError(
            f"--from_resume 1 goes on with the run of {path}, but {'; '.join(harm)}. "
            "Give what it was, or --force_resume 1"
        )
    for text in harm:
        print(f"warning: {text}")
    load_optimizer(optimizer, content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    now_known = ("data", "rows", "rows_per_step", "processes")
    return dataclasses.replace(saved, **{name: getattr(run, name) for name in now_known})
