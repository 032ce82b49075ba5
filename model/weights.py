"""Weights on disk and their adapters: found by name, loaded, saved, and opened as a model.

out/NAME_256.pth       {"format", "stage", "config", "tokenizer", "model", "training"}
out/lora_NAME_256.pth  only adapters in "model", and their description in "lora"

Both are dicts of plain values and tensors, which torch.load opens without running code.
"""

import dataclasses
import math
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from common import UserError, is_folder, replacing
from model.causal_lm import CausalLM, ModelConfig
from model.device import pick_device, pick_dtype, require_compiler
from model.lora import adapter_state, add_lora, hash_of, merge
from model.tokenizer import load_tokenizer

FORMAT = 1
# What values of a wrong kind or size raise where a model is built.
DAMAGED = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)
MAKE = {
    "pretrain": "make it with: python trainer/train_pretrain.py",
    "full_sft": "make it with: python trainer/train_full_sft.py",
}
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPE += ("intermediate_size", "use_moe", "num_experts", "num_experts_per_tok")


@dataclass
class OpenModel:
    """A trained model that is ready to run."""

    name: str  # of its weights, as it was given
    model: CausalLM
    tokenizer: object
    stage: str  # of training: pretrain, full_sft, dpo, ...
    training: dict  # the flags and the progress of the run that wrote the weights
    paths: list  # of the weights, and of the adapters that are merged into them

    @property
    def chats(self):
        """Whether it answers; a model that was only pretrained continues a text."""
        return self.stage != "pretrain"

    @property
    def trained_length(self):
        """The longest sample in training, in tokens."""
        return self.training.get("max_seq_len", 10**9)


def open_model(args, name=None):
    """Return the OpenModel of the weights `name` (None: see `weights_to_start_from`), with the
    adapters of --lora merged, on --device and in --dtype. Raises UserError if they are missing.
    """
    device = pick_device(args.device)
    if args.use_compile:
        require_compiler(device)
    name = name or weights_to_start_from(args)
    if name == "none":
        raise UserError("--weight none: only trained weights can answer; give a name or a path")
    path = find(args.save_dir, name, args.hidden_size)
    content = load(path)
    model, tokenizer = build_model(content, path)
    require_same_shape(args, model.config, path)
    print_summary(f"starting from the {content['stage']} weights {path}", model)
    model, paths, stage = model.to(device), [path], content["stage"]
    if args.lora:
        adapters, stage = merge_adapters(model, args)
        paths.append(adapters)
    model = model.to(pick_dtype(args.dtype, device))
    return OpenModel(name, model, tokenizer, stage, content["training"], paths)


def print_summary(origin, model):
    """Print where a model's weights come from, and its size."""
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{origin}: {parameters / 1e6:.2f} M parameters, vocabulary {model.config.vocab_size}")


def require_same_shape(args, config, path):
    """Raise UserError where flags of the model's shape differ from the weights of a file."""
    differ = []
    for name in SHAPE:
        value = getattr(args, name, None)
        if value not in (None, getattr(config, name)):
            differ.append(f"--{name} {value}, but {path} has {getattr(config, name)}")
    longest, limit = getattr(args, "max_seq_len", 0), config.max_position_embeddings
    if longest > limit:
        differ.append(f"--max_seq_len {longest}, but {path} has a context of {limit}")
    if differ:
        raise UserError(f"{'; '.join(differ)}. Leave the flag out, or train such weights first")


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


def save_tensors(path, content):
    """Writes plain values and tensors with torch.save. Raises UserError as `replacing` does."""
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's error on a full disk
            raise OSError(0, getattr(error.__context__, "strerror", None) or str(error)) from None


def load_tensors(path, remedy="train anew, or get it again", verify=True, **options):
    """What `save_tensors` wrote, by torch.load; no code in the file is run. verify compares the
    checksum of every part, which reads all of it.

    Raises UserError if it is missing, damaged, or holds more than plain values and tensors.
    """
    try:
        if verify and zipfile.is_zipfile(path):  # as torch.save writes it
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {remedy}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than plain values and tensors, or is damaged; it is not opened, "
            f"because it could run any code; {remedy}"
        ) from None
    except Exception as error:  # the readers of zip and pickle raise nearly anything on any bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); {remedy}") from None


def load(path):
    """The dict of a weights or resume file, on the CPU, or of the folder of a published model.
    Raises UserError as `load_tensors` does, and if it is that of another program.
    """
    if Path(path).suffix != ".pth" and is_folder(path):
        from model.huggingface import read_folder  # here: most models are our own

        return read_folder(Path(path))
    content = load_tensors(path)
    is_ours = isinstance(content, dict) and content.get("format") == FORMAT
    if not is_ours or not isinstance(content.get("stage"), str):
        raise UserError(f"{path} is not a weights file of this program; it needs format {FORMAT}")
    return content


def find(folder, name, hidden_size=None, use_moe=None):
    """The weights file {name}_{hidden_size}[_moe].pth; the newest where that leaves a choice.

    A name that is a path to a .pth file is taken as it is; where no file has the name, so is one
    that is a path to a folder. Raises UserError if no file has the name.
    """
    if Path(name).suffix == ".pth":
        return Path(name)
    paths = matching(folder, name, hidden_size, use_moe)
    if not paths and is_folder(name):
        return Path(name)
    if not paths:
        wanted = Path(folder) / f"{name}_{hidden_size or '*'}.pth"
        from model.huggingface import remedy_for

        remedy = MAKE.get(name) or remedy_for(name)
        remedy = remedy or "name other weights, or give the path of a .pth file or a folder"
        if matching(folder, f"{name}_previous", hidden_size, use_moe):
            remedy = f"those of an earlier run are {name}_previous"
        raise UserError(f"there is no {wanted}; {remedy}")
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    if len(paths) > 1:
        print(f"{len(paths)} files match {name}; taking the newest, {newest}")
    return newest


def matching(folder, name, hidden_size=None, use_moe=None, ending=""):
    """Files {name}_{hidden_size}[_moe]{ending}.pth of a folder; ending is a pattern."""
    pattern, paths = re.compile(rf"{re.escape(name)}_(\d+)(_moe)?{ending}\.pth"), []
    for path in sorted(Path(folder).glob("*.pth")):
        match = pattern.fullmatch(path.name)
        sized = match and hidden_size in (None, int(match[1]))
        if sized and use_moe in (None, match[2] is not None):
            paths.append(path)
    return paths


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
            model = CausalLM(config)
            if "lora" in content:
                add_lora(model, **content["lora"])
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


def description(model):
    """Return the parts of a file beyond the config: its adapters and its first new token."""
    parts = {}
    if getattr(model, "first_new_token", None) is not None:
        parts["first_new_token"] = model.first_new_token
    if getattr(model, "lora", None):
        parts["lora"] = dataclasses.asdict(model.lora)
    return parts


def weights_to_start_from(args):
    """--weight; without it what the adapters of --lora were trained on, or full_sft."""
    if args.from_weight or not args.lora:
        return args.from_weight or "full_sft"
    path = find(args.save_dir, adapters_name(args.lora))
    content = load(path)
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


def load_adapters(model, path):
    """Adds the adapters of a file to the weights that they were trained on; returns its content.

    Raises UserError if these are other weights, or if the adapters do not fit.
    """
    content = load(path)
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
    path = find(args.save_dir, adapters_name(args.lora), config.hidden_size, config.use_moe)
    content = load_adapters(model, path)
    merge(model)
    print(f"with the adapters {path}")
    return path, content["stage"]
