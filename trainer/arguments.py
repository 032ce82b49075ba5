"""The flags that the train scripts share, and the check of all of them before any work."""

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path

from common import ROOT, UserError
from dataset.loader import Source
from trainer.checkpoint import load_latest

# Flags that decide the model's shape. Their default is None: those of ModelConfig for a new model,
# and of the file for weights that are loaded.
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPE += ("intermediate_size", "use_moe", "num_experts", "num_experts_per_tok")
# What a resumed run does not take over from the one before.
OF_THE_COMMAND = (
    "from_resume",
    "force_resume",
    "rebuild_cache",
    "config",
    "save_dir",
    "save_weight",
)


MOST = 2**53  # every number above is a mistake, and floats no longer hold all whole ones


class Problem(str):
    """What is wrong with a flag's value. Kept in its place, so that all can be said at once."""


def number(kind, low, high=None):
    """An argparse type: an int or float from low to high."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= (MOST if high is None else high):
            limits = f"from {low} to {high}"
            if high is None:
                limits = f"from {low} up" + (f", at most {MOST}" if value and value > MOST else "")
            whole = "a whole" if kind is int else "a"
            return Problem(f"{text:.40}: give {whole} number {limits}")
        return value

    return convert


def one_of(*choices):
    """An argparse type: one of some words."""
    return lambda text: text if text in choices else Problem(f"{text}: give {'|'.join(choices)}")


def switch(text):
    """An argparse type: 0 or 1."""
    return bool(int(text)) if text in ("0", "1") else Problem(f"{text}: give 0 or 1")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def training_parser(description, **defaults):
    """The parser of a train script; defaults are those that differ from stage to stage."""
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, positive = number(int, 0), number(int, 1)
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE.toml", help="flags from a file; the command line wins")
    files = "files to train on, each with :0.7 for its share or *3 for copies; default: Tiny World"
    add("--data_path", type=source, nargs="+", metavar="FILE", help=files)
    add("--eval_data_path", type=Path, help="a file to validate on; default: a part of the data")
    add("--eval_split", type=number(float, 0, 0.5), default=0.01, help="how large that part is")
    add("--tokenizer_path", type=Path, help="default: the weights' own, or model/tokenizer.json")
    add("--save_dir", type=Path, default=ROOT / "out", help="weights, checkpoints, logs")
    add("--save_weight", help="name of the weights file")
    add("--from_weight", help="weights to start from: a name, a path, or none")
    add("--from_resume", type=switch, default=False, help="1: go on where the last run stopped")
    add("--force_resume", type=switch, default=False, help="1: even if flags or data are others")
    add("--epochs", type=positive, help="times that the data is gone through")
    add("--batch_size", type=positive, help="rows of one forward pass, per process")
    add("--accumulation_steps", type=positive, default=1, help="forward passes per step")
    add("--learning_rate", type=number(float, 0), help="the highest of the schedule")
    add("--min_lr_ratio", type=number(float, 0, 1), default=0.1, help="its last, as a share")
    add("--warmup_steps", type=count, default=50, help="steps in which it rises")
    add("--weight_decay", type=number(float, 0), default=0.1, help="of the matrices")
    muon = "adamw, or muon for the matrices of the layers and adamw for the rest"
    add("--optimizer", type=one_of("adamw", "muon"), default="adamw", help=muon)
    add("--grad_clip", type=number(float, 0), default=1.0, help="longest gradient; 0: any")
    add("--max_seq_len", type=number(int, 2), help="tokens of a row at most")
    packed = "1: rows of several documents; 0: each has its own, padded to the longest"
    add("--packing", type=switch, default=True, help=packed)
    add("--cache_dir", type=Path, help="for the tokenised data; default: cache/ in --save_dir")
    add("--rebuild_cache", type=switch, default=False, help="1: tokenise anew")
    add("--dropout", type=number(float, 0, 0.9), default=0.0)
    for name in SHAPE:
        kind = switch if name == "use_moe" else positive
        add(f"--{name}", type=kind, help="default: ModelConfig's, or that of the weights")
    add("--dtype", type=one_of("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--num_workers", type=count, default=0, help="processes that prepare batches")
    add("--log_interval", type=positive, default=10, help="steps between lines of the log")
    add("--save_interval", type=positive, default=500, help="steps between checkpoints")
    add("--keep_checkpoints", type=count, default=1, help="earlier ones that stay")
    add("--eval_interval", type=positive, default=100, help="steps between validations")
    patience = "stop after this many validations without a better one; 0: never"
    add("--early_stop_patience", type=count, default=0, help=patience)
    add("--save_best_at_end", type=switch, default=False, help="1: the best weights, not the last")
    bad = "stop after so many steps in a row without a finite gradient"
    add("--max_bad_steps", type=positive, default=10, help=bad)
    add("--sample_interval", type=count, default=0, help="steps between sample answers; 0: none")
    add("--sample_prompt", help="what the samples answer or continue")
    several = "how several processes share the work: ddp, or fsdp, which shards the model"
    add("--parallel", type=one_of("ddp", "fsdp"), default="ddp", help=several)
    add("--deterministic", type=switch, default=False, help="1: to the bit on a GPU too, slower")
    add(
        "--use_compile",
        type=switch,
        default=False,
        help="1: fuse small operations; needs a C++ compiler",
    )
    lora = "1: train small adapters (LoRA) on top of --from_weight, which stays as it is"
    add("--use_lora", type=switch, default=False, help=lora)
    add("--lora_rank", type=positive, default=16, help="rows of an adapter's matrices")
    add("--lora_alpha", type=number(float, 0), default=32.0, help="its weight, times the rank")
    add("--lora_dropout", type=number(float, 0, 0.9), default=0.0, help="of what it reads")
    targets = "the matrices that get one, as q_proj,v_proj; all-linear: all of the layers'"
    add("--lora_target", default="all-linear", help=targets)
    taught = "weights of a teacher, whose probabilities the loss compares with (distillation)"
    add("--teacher_weight", metavar="NAME", help=taught)
    share = "how much of the loss is that of the data, not of the teacher"
    add("--distill_alpha", type=number(float, 0, 1), default=0.1, help=share)
    flat = "above 1 flattens both distributions before they are compared"
    add("--distill_temperature", type=number(float, 0.01), default=1.0, help=flat)
    recorded = "what a teacher said, from export_hidden_states.py: in the place of it and the data"
    add("--offline_dir", type=Path, metavar="DIR", help=recorded)
    error = "how much the squared error of hidden states, projected to the teacher's, adds"
    add("--hidden_weight", type=number(float, 0), default=0.0, help=error)
    deep = "layers of the teacher, as 1,2, whose hidden states count, too"
    add("--aux_layers", default="", metavar="LAYERS", help=deep)
    new = "new tokens: JSON of item to tokens or of token to description, or a token a line"
    add("--extend_tokens", type=Path, metavar="FILE", help=new)
    add("--freeze_base", type=switch, default=False, help="1: only the new tokens' rows learn")
    add("--freeze", metavar="REGEX", help="weights whose names match do not learn")
    less = "1: keep one tensor per layer for the backward pass and compute the rest again"
    add("--grad_checkpoint", type=switch, default=False, help=less)
    add("--loss_curve", type=Path, metavar="FILE", help="its picture; default: beside the log")
    add("--profile", type=switch, default=False, help="1: see where the time of a few steps goes")
    add("--strict_data", type=switch, default=False, help="1: stop at the first bad line")
    add("--seed", type=count, default=1)
    parser.set_defaults(**defaults)
    return parser


def source(text):
    """An argparse type: a file, or one with its share (a.jsonl:0.7) or its copies (a.jsonl*3)."""
    match = re.fullmatch(r"(.*?)(?::([0-9.]+)|\*([0-9]+))?", text, re.DOTALL)
    path, weight, copies = match.groups()
    try:
        if Path(text).is_file():
            path, weight, copies = text, None, None
        if not Path(path).exists():
            return Problem(f"{path}: there is no such file; give a path from here")
        if not Path(path).is_file():
            return Problem(
                f"{path or repr('')}: is no file, and data is read more than once; give a file"
            )
    except OSError as error:
        return Problem(f"{path}: {error.strerror}; give a path that can be read")
    weight = number(float, 1e-9)(weight) if weight else None
    copies = number(int, 1)(copies) if copies else 1
    problem = next((part for part in (weight, copies) if isinstance(part, Problem)), None)
    # The same file, wherever the run is resumed from.
    return problem or Source(Path(path).resolve(), weight, copies)


def is_file(path):
    """Whether there is such a file; False for a name that the system cannot have."""
    try:
        return path.is_file()
    except OSError:
        return False


def reading(args, rank):
    """The flags that say how a dataset reads its files, as its arguments; rank is the process."""
    return {
        "max_length": args.max_seq_len,
        "strict": args.strict_data,
        "cache_dir": args.cache_dir or args.save_dir / "cache",
        "rebuild": args.rebuild_cache and rank == 0,
    }


def parse_training_args(parser, argv=None):
    """(flags as a namespace, what `load_latest` returns or None).

    Defaults < the flags of the run that is resumed < --config < command line.
    Exits with code 2 and every problem, one a line, if there are any.
    """
    args = parse_once(parser, argv)
    if not args.from_resume:
        return args, None
    resume = load_latest(args)
    saved = {k: v for k, v in resume[1]["arguments"].items() if k not in OF_THE_COMMAND}
    for name in ("data_path", "eval_data_path", "replay_path"):
        if saved.get("offline_dir"):  # which says where the data is
            saved[name] = None
        elif isinstance(saved.get(name), list):
            saved[name] = [Source(Path(path), *how) for path, *how in saved[name]]
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{k: v for k, v in saved.items() if k in known})
    return parse_once(parser, argv), resume


def parse_once(parser, argv):
    config = parser.parse_known_args(argv)[0].config
    problems = []
    if config is not None:
        known = {action.dest for action in parser._actions} - {"help", "config"}
        values = read_toml(config)
        unknown = sorted(set(values) - known)
        problems += [f"{config}: {name} is not a flag (--help lists them)" for name in unknown]
        parser.set_defaults(**{k: v for k, v in values.items() if k in known})
    args = parser.parse_args(argv)
    problems += wrong_values(args)
    sources = args.data_path or []
    if len({isinstance(s, Source) and s.weight is None for s in sources}) > 1:
        problems.append("--data_path: give every file a share, or none")
    for name in ("eval_data_path", "tokenizer_path", "replay_path", "extend_tokens"):
        path = getattr(args, name, None)
        if name == "extend_tokens" and args.from_resume:
            continue  # the checkpoint has them
        if path is not None and not is_file(path):
            problems.append(f"--{name} {path}: there is no such file; give a path from here")
        elif path is not None:
            setattr(args, name, path.resolve())  # the same file, wherever the run is resumed from
    if args.offline_dir:
        folder = args.offline_dir = args.offline_dir.resolve()
        both = ("teacher_weight", "data_path", "eval_data_path", "replay_path")
        given = [f"--{name}" for name in both if getattr(args, name, None)]
        if given:
            problems.append(
                f"--offline_dir is teacher and data in one; leave out {', '.join(given)}"
            )
        if not (folder / "manifest.json").is_file():
            problems.append(
                f"--offline_dir {folder}: export_hidden_states.py has written none there"
            )
        args.data_path = [Source(folder / "train")]
        args.eval_data_path = folder / "valid" if (folder / "valid").is_dir() else None
    if args.hidden_weight and not (args.teacher_weight or args.offline_dir):
        problems.append("--hidden_weight: needs --teacher_weight or --offline_dir to compare with")
    if args.aux_layers and not args.hidden_weight:
        problems.append("--aux_layers: counts with --hidden_weight only; give one above 0")
    adapting = ("use_lora", "extend_tokens", "freeze_base", "freeze")
    if args.from_weight in (None, "none") and not args.from_resume:
        given = [name for name in adapting if getattr(args, name)]
        problems += [f"--{name}: needs trained weights; give --from_weight" for name in given]
    if args.use_lora is True and not str(args.save_weight).startswith("lora_"):
        args.save_weight = f"lora_{args.save_weight}"
    try:
        args.save_dir.exists()
    except OSError as error:
        problems.append(f"--save_dir {str(args.save_dir):.60}: {error.strerror}")
    name = str(args.save_weight)
    plain = re.fullmatch(r"\w[\w .+=-]*", name) and not name.endswith(".pth")
    earlier = args.from_resume and Path(name).name == name  # names were freer once
    if not (plain or earlier) or len(name.encode()) > 100:
        problems.append(
            f"--save_weight {name:.110}: give a name of at most 100 bytes, of letters, digits and "
            "_-+=. without folders and without .pth"
        )
    if args.sample_prompt is not None and not 0 < len(args.sample_prompt) <= 500:
        problems.append("--sample_prompt: give from 1 to 500 characters")
    if args.loss_curve and args.loss_curve.is_dir():
        problems.append(f"--loss_curve {args.loss_curve} is a folder; give a file in it")
    if not (args.eval_split or args.eval_data_path):
        given = [
            flag for flag in ("early_stop_patience", "save_best_at_end") if getattr(args, flag)
        ]
        given += ["best_metric"] if getattr(args, "best_metric", "val_loss") != "val_loss" else []
        problems += [f"--{flag} needs --eval_split above 0, or --eval_data_path" for flag in given]
    stop_at(problems)
    return args


def wrong_values(args):
    """A sentence for each value that `number` and its like could not read."""
    values = [
        (name, value)
        for name, given in vars(args).items()
        for value in (given if isinstance(given, list) else [given])
    ]
    return [f"--{name} {value}" for name, value in values if isinstance(value, Problem)]


def stop_at(problems):
    """Says them, one a line, and ends with code 2, if there are any."""
    if problems:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        sys.exit(2)


def read_toml(path):
    """A TOML file's values as flags write them; its tables are only headings."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from None
    flat = {}
    for key, value in values.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in flat.items()} | {
        k: str(int(v)) for k, v in flat.items() if isinstance(v, bool)
    }
