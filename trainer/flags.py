"""The flags of the train scripts, in groups, the check of all of them before any work, and the
command lines that a run prints.

Defaults < the flags of the run that is resumed < the TOML file of --config < the command line.
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

# Earlier names of flags, which are still read in checkpoints.
RENAMED = {"eval_split": "val_split", "eval_data_path": "val_data_path"}
RENAMED |= {"eval_interval": "val_interval", "student": "from_weight"}
# What a resumed run does not take over from the one before.
OF_THE_COMMAND = "from_resume force_resume config save_dir save_weight".split()
# Flags that need a validation, with the value that needs none.
VALIDATED = {"early_stop_patience": 0, "save_best_at_end": False, "best_metric": "val_loss"}


def source(text):
    """An argparse type: a file with its share, as `Source.read` takes it."""
    try:
        return Source.read(text)
    except ValueError as error:
        return Problem(str(error))


def training_parser(doc, **defaults):
    """The parser of a train script; defaults are those that differ from stage to stage."""
    parser = Parser(doc, usage="%(prog)s [--FLAG VALUE ...]")
    count, positive, share = number(int, 0), number(int, 1), number(float, 0, 1)
    add = parser.group("the flags that most people need")
    files = "files to train on, each with its share as in FILE:0.7; default: Tiny World"
    add("data_path", None, files, source, nargs="+", metavar="FILE")
    add("from_weight", None, "weights to begin with: a name in --save_dir, a path, or none")
    add("from_resume", 0, "1: continue the last run from its latest checkpoint", switch)
    add("save_weight", None, "name of the weights file")
    add("epochs", None, "passes over the data", positive)
    add("batch_size", None, "rows per forward pass and process", positive)
    add("max_seq_len", None, "maximum length of a row, in tokens", number(int, 2))
    above = number(float, 0, above=True)
    add("learning_rate", None, "maximum learning rate of the schedule", above)
    add("hidden_size", None, "width of the model; default: 256, or that of the weights", positive)
    add("num_hidden_layers", None, "layers; default: 3, or those of the weights", positive)

    add = parser.group("start and stop")
    add("config", None, "flags from a TOML file; the command line wins", Path, metavar="FILE")
    add("save_dir", ROOT / "out", "folder of weights, checkpoints, logs and cache", Path)
    add("force_resume", 0, "1: resume even if flags or data differ", switch)
    add("seed", 1, "of new weights, the order of samples, and dropout", count)
    patience = "stop after this number of validations without a better one; 0: never"
    add("early_stop_patience", 0, patience, count)
    bad = "stop after this number of consecutive steps without a finite gradient"
    add("max_bad_steps", 10, bad, positive)

    add = parser.group("data")
    add("val_data_path", None, "validation file; default: a part of the data", Path)
    add("val_split", 0.01, "share of the data held out for validation", number(float, 0, 0.5))
    add("tokenizer_path", None, "default: that of the weights, or model/tokenizer.json", Path)
    add("packing", 1, "1: rows of several samples; 0: one padded sample per row", switch)
    add("strict_data", 0, "1: stop at the first bad record", switch)
    add("cache_dir", None, "folder of the tokenised data; default: cache/ in --save_dir", Path)
    add("num_workers", None, "processes that prepare batches; default 0, NVIDIA on Linux: 2", count)

    add = parser.group("model")
    for name in SHAPE[2:]:
        kind = switch if name == "use_moe" else positive
        add(name, None, "default: ModelConfig's, or that of the weights", kind)
    add("dropout", 0.0, "dropout probability", number(float, 0, 0.9))

    add = parser.group("optimisation")
    add("accumulation_steps", 1, "forward passes per optimizer step", positive)
    optimizer = "muon (matrices of the layers; AdamW for the rest), or adamw for all, which needs "
    optimizer += "about a quarter of --learning_rate: give that too"
    add("optimizer", "muon", optimizer, choose_from("muon", "adamw"))
    add("warmup_steps", 50, "steps of linear warm-up", count)
    add("min_lr_ratio", 0.1, "final learning rate, as a fraction of the maximum", share)
    add("weight_decay", 0.1, "weight decay of the matrices", number(float, 0))
    add("grad_clip", 1.0, "maximum gradient norm; 0 disables clipping", number(float, 0))

    add = parser.group("precision and speed")
    add("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("dtype", "auto", "auto, fp32, bf16 or fp16", choose_from("auto", "fp32", "bf16", "fp16"))
    add("use_compile", 0, "1: torch.compile the layers; needs a compiler", switch)
    add("grad_checkpoint", 0, "1: less memory: recompute each layer in the backward pass", switch)
    add("parallel", "ddp", "ddp, or fsdp, which shards the model", choose_from("ddp", "fsdp"))
    add("deterministic", 0, "1: bit-identical runs on a GPU too, slower", switch)

    add = parser.group("logging and checkpoints")
    add("log_interval", 10, "steps between lines of the log", positive)
    add("val_interval", 100, "steps between validations", positive)
    add("save_interval", 500, "steps between checkpoints", positive)
    add("keep_checkpoints", 1, "number of earlier checkpoints to keep", count)
    add("save_best_at_end", 0, "1: the run's weights are the best in validation", switch)
    add("sample_interval", 0, "steps between samples of the model's text; 0: none", count)
    add("sample_prompt", None, "prompt of these samples")

    add = parser.group("fine-tuning")
    add("use_lora", 0, "1: train LoRA adapters; the weights stay as they are", switch)
    add("lora_rank", 16, "rank of the adapters", positive)
    add("lora_alpha", 32.0, "scale of the adapters, times the rank", above)
    add("lora_dropout", 0.0, "dropout of their input", number(float, 0, 0.9))
    targets = "matrices with an adapter, as q_proj,v_proj; all-linear: all of the layers'"
    add("lora_target", "all-linear", targets)
    new = "new tokens: JSON of item to tokens or of token to description, or a token a line"
    add("extend_tokens", None, new, Path, metavar="FILE")
    add("freeze_base", 0, "1: train only the rows of new tokens", switch)
    parser.set_defaults(**defaults)
    return parser


def conversation_flags(parser, training=True):
    """Adds the flags of conversations: of SFT, and, not training, of what records a teacher."""
    add = parser.group("conversations")
    replay = "pretraining text mixed in against forgetting; default: Tiny World's with its data"
    add("replay_path", None, replay, Path, metavar="FILE")
    add("replay_share", 0.4, "its tokens, per token of the conversations", number(float, 0))
    add("data_format", None, "default: that of a file's first record", choose_from(*KEYS))
    overlong = "what happens to a conversation longer than --max_seq_len: truncate|drop|split"
    add("overlong", "truncate", overlong, choose_from("truncate", "drop", "split"))
    think = "whose reasoning is kept: that of all answers, the last, or none"
    add("keep_think", "all", think, choose_from("all", "last", "none"))
    if training:
        from evaluation.tasks import TASKS  # here: pretraining loads no graders

        best = f"what makes weights the best: val_loss, or a score: {'|'.join(TASKS)}"
        add("best_metric", "val_loss", best, choose_from("val_loss", *TASKS))


def parse_args(parser, argv=None, saved=None, check=None):
    """Return the flags as a namespace. saved: the flags of the run that is resumed. check(args,
    parser) returns the problems of the flags that only one script has.

    Exits with code 2 and every problem, one a line, if there are any.
    """
    argv = sys.argv[1:] if argv is None else argv
    if saved:
        parser.set_defaults(**taken_over(saved, parser))
    config = parser.parse_known_args(argv)[0].config
    from_file, problems = read_config(config, parser) if config else ([], [])
    args = parser.parse_unchecked([*from_file, *argv])
    problems += wrong_values(args)
    problems += check(args, parser) if check else []
    problems += contradictions(args)
    stop_at(problems)
    return args


def taken_over(saved, parser):
    """The flags that a resumed run takes over from the one before."""
    known = {action.dest for action in parser._actions} - set(OF_THE_COMMAND)
    flags = {name: value for name, value in saved.items() if name in known}
    for name in ("data_path", "val_data_path", "replay_path"):
        if isinstance(flags.get(name), list):
            flags[name] = [Source(Path(path), weight) for path, weight, *_ in flags[name]]
    return flags


def read_config(path, parser):
    """(a TOML file as a command line, its problems). Its tables are only headings; its paths are
    relative to the repository, or to the file's folder if it lies elsewhere.
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
            problems.append(f"{path}: {name} is not a flag (--help lists them)")
            continue
        given = value if isinstance(value, list) else [value]
        given = [str(int(v)) if isinstance(v, bool) else str(v) for v in given]
        if action.type in (Path, source):
            given = [str(folder / text) for text in given]
        words += [f"--{name}", *given] if action.nargs else [f"--{name}={text}" for text in given]
    return words, problems


def contradictions(args):
    """A sentence for each flag that does not fit the others or the disk. Resolves the paths of
    data, and fills in what follows from other flags.
    """
    problems = []
    sources = args.data_path or []
    if len({isinstance(s, Source) and s.weight is None for s in sources}) > 1:
        problems.append("--data_path: give every file a share, or none")
    for name in ("val_data_path", "tokenizer_path", "replay_path", "extend_tokens"):
        path = getattr(args, name, None)
        if path is None or (name == "extend_tokens" and args.from_resume):
            continue  # the checkpoint of a resumed run has its tokens
        if os.path.isfile(path):  # noqa: PTH113
            setattr(args, name, path.resolve())  # the same file, wherever the run is resumed from
        else:
            problems.append(f"--{name} {path}: there is no such file; give a path from here")
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
    plain = re.fullmatch(r"\w[\w .+=-]*", name) and not name.endswith(".pth")
    earlier = args.from_resume and Path(name).name == name  # earlier versions took any name
    if not (plain or earlier) or len(name.encode()) > 100:
        problems.append(
            f"--save_weight {name:.110}: give a name of at most 100 bytes, of letters, digits and "
            "_-+=. without folders and without .pth"
        )
    if args.sample_prompt is not None and not 0 < len(args.sample_prompt) <= 500:
        problems.append("--sample_prompt: give from 1 to 500 characters")
    if not (args.val_split or args.val_data_path):
        for name, without in VALIDATED.items():
            if getattr(args, name, without) != without:
                problems.append(f"--{name} needs --val_split above 0, or --val_data_path")
    return problems


def next_command(args, script="eval_llm.py"):
    """Return the command that opens what a run has written: a chat, or the script of a stage."""
    flags, name = [], args.save_weight
    if args.use_lora:  # adapters are merged before another stage
        script, flags = "eval_llm.py", ["--lora", name.removeprefix("lora_")]
    elif script != "eval_llm.py":
        flags = ["--from_weight", name]
    elif name != "full_sft":  # the default
        flags = ["--weight", name]
    return command("python", script, args, *flags)


def resume_command(args, stage, processes):
    """Return the command that resumes a run; its other flags are in the checkpoint."""
    is_ours = Path(sys.argv[0]).resolve().parent == ROOT / "trainer"  # else called from other code
    name = Path(sys.argv[0]).name if is_ours else f"train_{stage}.py"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # processes on this machine
    nodes = f"--nnodes {processes // here} " if here < processes else ""
    launcher = "python" if processes == 1 else f"torchrun {nodes}--nproc_per_node {here}"
    flags = ["--from_resume", "1", "--save_weight", args.save_weight]
    return command(launcher, f"trainer/{name}", args, *flags)


def command(launcher, script, args, *flags):
    """Return a command line that works from where the user is."""
    folder = [] if args.save_dir == ROOT / "out" else ["--save_dir", str(args.save_dir)]
    path = ROOT / script
    if Path.cwd().is_relative_to(ROOT):
        path = Path(os.path.relpath(path))
    return f"{launcher} {shlex.join([str(path), *flags, *folder])}"
