"""The flags of the train scripts: definition, validation, and the commands that a run prints.

Precedence, lowest first: defaults, flags of the resumed run, TOML file of --config, command line.
"""

import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

from cli import Parser, Problem, choose_from, number, stop_at, switch, wrong_values
from common import ROOT, UserError
from dataset.formats import KEYS
from dataset.step_plan import Source
from model.weights import SHAPE

# Old names of flags in checkpoints.
RENAMED = {"eval_split": "val_split", "eval_data_path": "val_data_path"}
RENAMED |= {"eval_interval": "val_interval", "student": "from_weight"}
# Flags that a resumed run doesn't restore.
NOT_RESTORED = "from_resume force_resume config save_dir save_weight".split()
# Flags that require validation data, and the value that doesn't.
VALIDATED = {"early_stop_patience": 0, "save_best_at_end": False, "best_metric": "val_loss"}


def parse_source(text):
    """Parse FILE or FILE:WEIGHT; an argparse type."""
    try:
        return Source.read(text)
    except ValueError as error:
        return Problem(str(error))


def training_parser(doc, **defaults):
    """Return the parser of a train script. defaults: values that depend on the stage."""
    parser = Parser(doc, usage="%(prog)s [--FLAG VALUE ...]")
    count, positive, share = number(int, 0), number(int, 1), number(float, 0, 1)
    add = parser.group("common options")
    files = "training files, with an optional weight: FILE:0.7; default: Tiny World"
    add("data_path", None, files, parse_source, nargs="+", metavar="FILE")
    add("from_weight", None, "weights to start from: a name in --save_dir, a path, or none")
    add("from_resume", 0, "1: resume the run --save_weight from its latest checkpoint", switch)
    add("save_weight", None, "name of the weights file")
    add("epochs", None, "passes over the data", positive)
    add("batch_size", None, "rows per forward pass and process", positive)
    add("max_seq_len", None, "maximum length of a row, in tokens", number(int, 2))
    positive_float = number(float, 0, above=True)
    add("learning_rate", None, "maximum learning rate of the schedule", positive_float)
    add("hidden_size", None, "model width; default: 256, or from the weights", positive)
    add("num_hidden_layers", None, "number of layers; default: 3, or from the weights", positive)

    add = parser.group("starting and stopping")
    add("config", None, "flags from a TOML file; the command line wins", Path, metavar="FILE")
    add("save_dir", ROOT / "out", "folder for weights, checkpoints, logs and cache", Path)
    add("force_resume", 0, "1: resume even if flags or data differ", switch)
    add("seed", 1, "seed for new weights, sample order and dropout", count)
    patience = "stop after this many validations without improvement; 0: never"
    add("early_stop_patience", 0, patience, count)
    bad = "stop after this many consecutive steps without a finite gradient"
    add("max_bad_steps", 10, bad, positive)

    add = parser.group("data")
    add("val_data_path", None, "validation file; default: part of the data", Path)
    add("val_split", 0.01, "fraction of the data held out for validation", number(float, 0, 0.5))
    add("tokenizer_path", None, "default: from the weights, or model/tokenizer.json", Path)
    add("packing", 1, "1: pack several samples per row; 0: one padded sample per row", switch)
    add("strict_data", 0, "1: stop at the first bad record", switch)
    add("cache_dir", None, "folder for tokenized data; default: cache/ in --save_dir", Path)
    add("num_workers", None, "DataLoader workers; default: 0, with an NVIDIA GPU 2", count)

    add = parser.group("model")
    for name in SHAPE[2:]:  # the first two are common options
        kind = switch if name == "use_moe" else positive
        add(name, None, "default: see ModelConfig, or from the weights", kind)
    add("dropout", 0.0, "dropout probability", number(float, 0, 0.9))

    add = parser.group("optimization")
    add("accumulation_steps", 1, "forward passes per optimizer step", positive)
    optimizer = "muon (layer matrices; AdamW for the rest), or adamw: with it, use about 1/4 of "
    optimizer += "the Muon learning rate"
    add("optimizer", "muon", optimizer, choose_from("muon", "adamw"))
    add("warmup_steps", 50, "linear warm-up steps", count)
    add("min_lr_ratio", 0.1, "final learning rate, as a fraction of the maximum", share)
    add("weight_decay", 0.1, "weight decay of matrices", number(float, 0))
    add("grad_clip", 1.0, "maximum gradient norm; 0 disables clipping", number(float, 0))

    add = parser.group("precision and speed")
    add("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("dtype", "auto", "auto, fp32, bf16 or fp16", choose_from("auto", "fp32", "bf16", "fp16"))
    add("use_compile", 0, "1: use torch.compile; needs a compiler", switch)
    add("grad_checkpoint", 0, "1: recompute layers in the backward pass to save memory", switch)
    add("parallel", "ddp", "ddp, or fsdp, which shards the model", choose_from("ddp", "fsdp"))
    add("deterministic", 0, "1: bit-identical results on a GPU, slower", switch)

    add = parser.group("logging and checkpoints")
    add("log_interval", 10, "steps between log lines", positive)
    add("val_interval", 100, "steps between validations", positive)
    add("save_interval", 500, "steps between checkpoints", positive)
    add("keep_checkpoints", 1, "number of earlier checkpoints to keep", count)
    add("save_best_at_end", 0, "1: at the end, use the weights with the best validation", switch)
    add("sample_interval", 0, "steps between generated samples; 0: none", count)
    add("sample_prompt", None, "prompt of these samples")

    add = parser.group("fine-tuning")
    add("use_lora", 0, "1: train LoRA adapters and freeze the weights", switch)
    add("lora_rank", 16, "rank of the adapters", positive)
    add("lora_alpha", 32.0, "scale of the adapters is lora_alpha / lora_rank", positive_float)
    add("lora_dropout", 0.0, "dropout on the adapters' input", number(float, 0, 0.9))
    targets = "layers with an adapter, e.g. q_proj,v_proj, or all-linear"
    add("lora_target", "all-linear", targets)
    new = "new tokens: JSON {item: tokens} or {token: description}, or one token per line"
    add("extend_tokens", None, new, Path, metavar="FILE")
    add("freeze_base", 0, "1: train only the embeddings of new tokens", switch)
    parser.set_defaults(**defaults)
    return parser


def conversation_flags(parser, training=True):
    """Add the flags for conversations; training: also those that only SFT needs."""
    add = parser.group("conversations")
    replay = "pretraining text to mix in against forgetting; default: Tiny World's, with its data"
    add("replay_path", None, replay, Path, metavar="FILE")
    add("replay_share", 0.4, "replayed pretraining tokens per SFT token", number(float, 0))
    add("data_format", None, "default: detected from a file's first record", choose_from(*KEYS))
    overlong = "conversations longer than --max_seq_len: truncate, drop or split"
    add("overlong", "truncate", overlong, choose_from("truncate", "drop", "split"))
    think = "keep the reasoning of all answers, the last one, or none"
    add("keep_think", "all", think, choose_from("all", "last", "none"))
    if training:
        from evaluation.tasks import TASKS  # here: pretraining loads no graders

        best = f"score that selects the best weights: val_loss, {', '.join(TASKS)}"
        add("best_metric", "val_loss", best, choose_from("val_loss", *TASKS))


def parse_args(parser, argv=None, saved=None, check=None):
    """Parse the flags into a namespace. saved: the flags of the run to resume. check(args, parser)
    returns error messages for the flags of a single script.

    Exits with code 2 after printing all errors, one per line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if saved:
        parser.set_defaults(**restored_flags(saved, parser))
    config = parser.parse_known_args(argv)[0].config
    from_file, problems = read_config(config, parser) if config else ([], [])
    args = parser.parse_unchecked([*from_file, *argv])
    problems += wrong_values(args)
    problems += check(args, parser) if check else []
    problems += validate_flags(args)
    stop_at(problems)
    return args


def restored_flags(saved, parser):
    """Return the flags that a resumed run restores."""
    known = {action.dest for action in parser._actions} - set(NOT_RESTORED)
    flags = {name: value for name, value in saved.items() if name in known}
    for name in ("data_path", "val_data_path", "replay_path"):
        if isinstance(flags.get(name), list):
            flags[name] = [Source(Path(path), weight) for path, weight, *_ in flags[name]]
    return flags


def read_config(path, parser):
    """Convert a TOML file to command-line words. Returns (words, error messages). Its tables only
    group the flags; paths are relative to the repository, or to the file if it is elsewhere.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from None
    flat = {}
    for key, value in values.items():
        flat |= value if isinstance(value, dict) else {key: value}
    folder = ROOT if path.resolve().is_relative_to(ROOT) else path.resolve().parent
    words, problems = [], []
    for name, value in flat.items():
        action = parser._option_string_actions.get(f"--{name}")
        if action is None or name == "config":
            problems.append(f"{path}: {name} isn't a flag (--help lists them)")
            continue
        texts = value if isinstance(value, list) else [value]
        texts = [str(int(v)) if isinstance(v, bool) else str(v) for v in texts]
        if action.type in (Path, parse_source):
            texts = [str(folder / text) for text in texts]
        words += [f"--{name}", *texts] if action.nargs else [f"--{name}={text}" for text in texts]
    return words, problems


def validate_flags(args):
    """Return an error message for each flag that conflicts with other flags or with the disk.
    Resolves the paths of data files, and sets flags that follow from others. Invalid values are
    still Problems here.
    """
    problems = []
    sources = args.data_path or []
    if len({isinstance(s, Source) and s.weight is None for s in sources}) > 1:
        problems.append("--data_path: give every file a weight, or none")
    for name in ("val_data_path", "tokenizer_path", "replay_path", "extend_tokens"):
        path = getattr(args, name, None)
        if path is None or (name == "extend_tokens" and args.from_resume):
            continue  # a resumed run's checkpoint contains the tokens
        if os.path.isfile(path):  # noqa: PTH113
            setattr(args, name, path.resolve())  # the run may be resumed from another folder
        else:
            problems.append(f"--{name} {path}: no such file; give a path from here")
    if args.from_weight in (None, "none") and not args.from_resume:
        for name in ("use_lora", "extend_tokens", "freeze_base"):
            if getattr(args, name):
                problems.append(f"--{name}: needs trained weights; give --from_weight")
    if args.use_lora == 1 and not str(args.save_weight).startswith("lora_"):
        args.save_weight = f"lora_{args.save_weight}"
    try:
        args.save_dir.exists()
    except OSError as error:
        problems.append(f"--save_dir {str(args.save_dir):.60}: {error.strerror}")
    name = str(args.save_weight)
    is_plain = re.fullmatch(r"\w[\w .+=-]*", name) and not name.endswith(".pth")
    if not is_plain or len(name.encode()) > 100:
        problems.append(
            f"--save_weight {name:.110}: give a name of at most 100 bytes, of letters, digits and "
            "_-+=. (no folder, no .pth)"
        )
    if args.sample_prompt is not None and not 0 < len(args.sample_prompt) <= 500:
        problems.append("--sample_prompt: give from 1 to 500 characters")
    if not (args.val_split or args.val_data_path):
        for name, without in VALIDATED.items():
            if getattr(args, name, without) != without:
                problems.append(f"--{name} needs --val_split above 0, or --val_data_path")
    return problems


def next_command(args, stage):
    """Return the command for the next step: a chat, or, after pretraining, SFT."""
    name = args.save_weight
    if args.use_lora:
        return command("python", "eval_llm.py", args, "--lora", name.removeprefix("lora_"))
    if stage == "pretrain":
        return command("python", "trainer/train_full_sft.py", args, "--from_weight", name)
    flags = [] if name == "full_sft" else ["--weight", name]
    return command("python", "eval_llm.py", args, *flags)


def resume_command(args, stage, processes):
    """Return the command that resumes a run; the checkpoint has the other flags."""
    is_ours = Path(sys.argv[0]).resolve().parent == ROOT / "trainer"  # else: called from other code
    name = Path(sys.argv[0]).name if is_ours else f"train_{stage}.py"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # processes on this machine
    nodes = f"--nnodes {processes // here} " if here < processes else ""
    launcher = "python" if processes == 1 else f"torchrun {nodes}--nproc_per_node {here}"
    flags = ["--from_resume", "1", "--save_weight", args.save_weight]
    return command(launcher, f"trainer/{name}", args, *flags)


def command(launcher, script, args, *flags):
    """Return a command line that works from the current folder."""
    folder = [] if args.save_dir == ROOT / "out" else ["--save_dir", str(args.save_dir)]
    path = ROOT / script
    if Path.cwd().is_relative_to(ROOT):
        path = Path(os.path.relpath(path))
    return f"{launcher} {shlex.join([str(path), *flags, *folder])}"
