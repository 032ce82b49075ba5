"""Weights files: find, load, save, and build models and adapters from them.

out/NAME_256.pth       {"format", "stage", "config", "tokenizer", "model", "training"}
out/lora_NAME_256.pth  only the adapters in "model"; their configuration in "lora", and the name of
                       their base weights in "under"

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

from common import UserError, atomic_write, is_folder
from model.causal_lm import CausalLM, ModelConfig
from model.device import pick_device, pick_dtype, require_compiler
from model.lora import adapter_state, add_lora, merge, weights_hash
from model.tokenizer import load_tokenizer

FORMAT = 1
# The exceptions that invalid values in a file cause when the model is built.
DAMAGED = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)
HINTS = {
    "pretrain": "make it with: python trainer/train_pretrain.py",
    "full_sft": "make it with: python trainer/train_full_sft.py",
}
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPE += ("intermediate_size", "use_moe", "num_experts", "num_experts_per_tok")


@dataclass
class OpenModel:
    """A trained model, ready to run."""

    name: str  # of the weights, as typed
    model: CausalLM
    tokenizer: object
    stage: str  # the training stage: pretrain, full_sft, dpo, ...
    training: dict  # the flags and progress of the training run
    paths: list  # of the weights, and of the merged adapters

    @property
    def chats(self):
        """Whether it answers chats; a pretrained model only continues text."""
        return self.stage != "pretrain"

    @property
    def trained_length(self):
        """The longest sample in training, in tokens."""
        return self.training.get("max_seq_len", 10**9)


def open_model(args, name=None):
    """Open the weights `name` (None: see `weights_to_start_from`), with the adapters of --lora
    merged, on --device and in --dtype. Returns an OpenModel. Raises UserError if they don't exist.
    """
    device = pick_device(args.device)
    if args.use_compile:
        require_compiler(device)
    name = name or weights_to_start_from(args)
    if name == "none":
        raise UserError("--weight none: an untrained model can't answer; give a name or a path")
    path = find_weights(args.save_dir, name, args.hidden_size)
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
    """Print where the weights come from, and the model's size."""
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{origin}: {parameters / 1e6:.2f} M parameters, vocabulary {model.config.vocab_size}")


def require_same_shape(args, config, path):
    """Raise UserError if flags for the model's shape or context do not fit its config."""
    differ = []
    for name in SHAPE:
        value = getattr(args, name, None)
        if value not in (None, getattr(config, name)):
            differ.append(f"--{name} {value}, but {path} has {getattr(config, name)}")
    longest, limit = getattr(args, "max_seq_len", 0), config.max_position_embeddings
    if longest > limit:
        differ.append(f"--max_seq_len {longest}, but {path} has a context of {limit}")
    if differ:
        raise UserError(f"{'; '.join(differ)}. Omit the flag, or train weights of this shape first")


def file_name(name, config):
    """Return the stem of a run's files, e.g. pretrain_256 or full_sft_512_moe."""
    return f"{name}_{config.hidden_size}{'_moe' if config.use_moe else ''}"


def write_weights(path, model_state, config, tokenizer, stage, **fields):
    """Write a weights or resume file; fields are additional entries."""
    content = {
        "format": FORMAT,
        "stage": stage,
        "config": dataclasses.asdict(config),
        "tokenizer": tokenizer.to_str(),
        "model": model_state,
        **fields,
    }
    save_tensors(path, content)


def save_tensors(path, content):
    """Write plain values and tensors with torch.save. Raises UserError like `atomic_write`."""
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's error on a full disk
            raise OSError(0, getattr(error.__context__, "strerror", None) or str(error)) from None


def load_tensors(path, hint="retrain it or download it again", verify=True, **options):
    """Load a file of `save_tensors` with torch.load, without running code in it. verify checks the
    checksums, which reads the whole file.

    Raises UserError if it is missing, damaged, or holds more than plain values and tensors.
    """
    try:
        if verify and zipfile.is_zipfile(path):  # the format of torch.save
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {hint}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than plain values and tensors, or is damaged. Loading it could run "
            f"any code, so it is rejected; {hint}"
        ) from None
    except Exception as error:  # corrupt files can raise almost any exception here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); {hint}") from None


def load(path):
    """Load a weights or resume file, or the folder of a published model, as a dict on the CPU.
    Raises UserError like `load_tensors`, and if another program wrote the file.
    """
    if Path(path).suffix != ".pth" and is_folder(path):
        from model.huggingface import read_folder  # imported late: rarely needed

        return read_folder(Path(path))
    content = load_tensors(path)
    is_ours = isinstance(content, dict) and content.get("format") == FORMAT
    if not is_ours or not isinstance(content.get("stage"), str):
        raise UserError(f"{path} isn't a weights file of this program (format {FORMAT})")
    return content


def find_weights(folder, name, hidden_size=None, use_moe=None):
    """Return the path of the weights {name}_{hidden_size}[_moe].pth; the newest, if several match.

    name may also be the path of a .pth file, or, if no file matches, of a folder. Raises UserError
    if nothing matches.
    """
    if Path(name).suffix == ".pth":
        return Path(name)
    paths = matching(folder, name, hidden_size, use_moe)
    if not paths and is_folder(name):
        return Path(name)
    if not paths:
        from model.huggingface import hint_for

        hint = HINTS.get(name) or hint_for(name)
        hint = hint or "name other weights, or give the path of a .pth file or a folder"
        if matching(folder, f"{name}_previous", hidden_size, use_moe):
            hint = f"an earlier run's weights are {name}_previous"
        expected = Path(folder) / f"{name}_{hidden_size or '*'}.pth"
        raise UserError(f"there is no {expected}; {hint}")
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    if len(paths) > 1:
        print(f"{len(paths)} files match {name}; using the newest, {newest}")
    return newest


def matching(folder, name, hidden_size=None, use_moe=None, ending=""):
    """Return the files {name}_{hidden_size}[_moe]{ending}.pth of a folder; ending is a regex."""
    pattern = re.compile(rf"{re.escape(name)}_(\d+)(_moe)?{ending}\.pth")
    paths = []
    for path in sorted(Path(folder).glob("*.pth")):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        is_size = hidden_size in (None, int(match[1]))
        is_kind = use_moe in (None, match[2] is not None)
        if is_size and is_kind:
            paths.append(path)
    return paths


def build_model(content, path, dropout=0.0):
    """Build (model, tokenizer) from a loaded file; the model shares its fp32 tensors.

    Raises UserError if weights are missing or have another shape, or if the config is invalid.
    """
    if "under" in content:
        raise UserError(f"{path} holds adapters, not weights; pass it as --lora")
    try:
        tokenizer = load_tokenizer(json_text=str(content["tokenizer"]))
        config = ModelConfig(**content["config"])
        config.dropout = dropout
        require_plain(config, content)
        # On "meta" it uses no memory, whatever sizes a damaged file has.
        with torch.device("meta"), SkipInit():
            model = CausalLM(config)
            if "lora" in content:
                add_lora(model, **content["lora"])
    except DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} has an invalid model config: {reason}") from None
    weights = {name: weight.float() for name, weight in content["model"].items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # one line per weight that doesn't fit
        problems = " ".join(str(error).partition(":")[2].split())
        raise UserError(f"{path}: its weights don't match its config: {problems:.600}") from None
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        raise UserError(
            f"{path}: model and tokenizer don't match: the tokenizer has {size} tokens, the model "
            f"only {config.vocab_size}"
        )
    model.first_new_token = content.get("first_new_token")
    return model, tokenizer


def require_plain(config, content):
    """Raise ValueError if values in a loaded file have a wrong type or size."""
    weights, first_new_token = content["model"], content.get("first_new_token", 1)
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), type(getattr(ModelConfig(), field.name))
        fits = type(value) in (int, float) if kind is float else type(value) is kind
        if not fits or not 0 <= value < math.inf or (kind is int and value == 0):
            raise ValueError(f"{field.name} is {value!r}")
    num_experts = config.num_experts if config.use_moe else 0
    if max(config.num_hidden_layers, num_experts) > len(weights):
        raise ValueError("it has fewer weights than layers or experts")
    if type(first_new_token) is not int or not 0 < first_new_token <= config.vocab_size:
        raise ValueError(f"first_new_token is {first_new_token!r}")
    for name, weight in weights.items():
        if not weight.is_floating_point() or weight.layout != torch.strided:
            raise ValueError(f"{name} isn't a floating-point tensor")


class SkipInit(TorchFunctionMode):
    """Context manager: skip weight initialization. On "meta" it has no effect anyway, but torch
    2.13 imports its compiler for it, which takes longer than a short answer.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def extra_entries(model):
    """Return the entries of a weights file for adapters and new tokens, if the model has any."""
    parts = {}
    if getattr(model, "first_new_token", None) is not None:
        parts["first_new_token"] = model.first_new_token
    if getattr(model, "lora", None):
        parts["lora"] = dataclasses.asdict(model.lora)
    return parts


def weights_to_start_from(args):
    """Return --weight; its default is the base weights of --lora, or full_sft."""
    if args.from_weight or not args.lora:
        return args.from_weight or "full_sft"
    path = find_weights(args.save_dir, adapters_name(args.lora))
    content = load(path)
    require_adapters(content, path)
    return content["under"]


def adapters_name(name):
    """Return the name lora_x for an adapter file x or lora_x; a path is unchanged."""
    return name if Path(name).suffix == ".pth" else f"lora_{name.removeprefix('lora_')}"


def require_adapters(content, path):
    """Raise UserError unless a loaded file holds adapters without their base weights."""
    if "lora" not in content or "under" not in content:
        stage = content["stage"]
        raise UserError(f"{path} holds {stage} weights, not adapters; pass it as --weight")


def load_adapters(model, path):
    """Add the adapters of a file to their base weights. Returns the file's content.

    Raises UserError if the model has other weights, or if the adapters don't fit.
    """
    content = load(path)
    attach_adapters(model, content, path)
    return content


def attach_adapters(model, content, path):
    """Add the adapters of a loaded file to a model. Errors as in `load_adapters`."""
    require_adapters(content, path)
    lora = content["lora"]
    if lora["base"] != weights_hash(model):
        raise UserError(
            f"{path} was trained on other weights and fits only these: "
            f"{content['under']} (--weight or --from_weight), unchanged since then"
        )
    add_lora(model, **lora)
    expected = {name: w.shape for name, w in adapter_state(model.state_dict()).items()}
    if expected != {name: weight.shape for name, weight in content["model"].items()}:
        raise UserError(f"{path} is damaged: its adapters don't match their configuration")
    model.load_state_dict(content["model"], strict=False)


def merge_adapters(model, args):
    """Merge the adapters of --lora into the model. Returns (path of their file, their stage)."""
    config = model.config
    path = find_weights(args.save_dir, adapters_name(args.lora), config.hidden_size, config.use_moe)
    content = load_adapters(model, path)
    merge(model)
    print(f"with the adapters {path}")
    return path, content["stage"]
