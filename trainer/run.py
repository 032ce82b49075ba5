"""Where a run is, whether it may be resumed, why it ends, and what becomes of the one before."""

import dataclasses
import itertools
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, UserError
from trainer import checkpoint, distributed
from trainer.arguments import parse_args
from trainer.metrics import MetricsLog
from trainer.optimizer import learning_rate, load_full_state
from trainer.signals import RunLock

# Flags that a resumed run may change: the weights come out the same, or, with another device,
# nearly the same.
FREE = """from_resume force_resume from_weight save_dir save_weight config cache_dir
    device num_workers use_compile grad_checkpoint parallel deterministic log_interval
    save_interval val_interval sample_interval sample_prompt strict_data keep_checkpoints
    early_stop_patience save_best_at_end max_bad_steps loss_curve offline_dir""".split()
FREE += ["batch_size", "accumulation_steps"]  # their product with the processes is compared
FREE += ["data_path", "val_data_path", "replay_path"]  # content and shares are compared
QUIET = ("from_resume", "force_resume")  # are not worth a line when they differ


@dataclass
class Run:
    """Where a run is. Random numbers and the learning rate follow from the step and the flags."""

    data: list  # the hash of each file
    rows: int  # samples to train on
    rows_per_step: int
    processes: int = 1
    row_length: int | None = None  # of packed rows: see `loader.row_length`
    teacher: str | None = None  # the hash of its weights
    step: int = 0
    tokens: int = 0  # trained on
    bad_steps: int = 0  # the latest ones, skipped because their gradients were not finite
    log_bytes: int = 0  # of the metrics log
    saved_step: int | None = None  # that of the latest checkpoint
    best_score: float | None = None
    evaluations_since_best: int = 0
    reference: list | None = None  # DPO: of training and validation pairs, by the model before

    def advance(self, tokens, grad_norm):
        """Counts a step. One without a finite gradient was skipped."""
        self.step += 1
        self.tokens += int(tokens)
        self.bad_steps = 0 if math.isfinite(grad_norm) else self.bad_steps + 1

    def note_score(self, score):
        """Records a validation (higher is better); returns whether it is the best so far."""
        best = self.best_score is None or score > self.best_score
        if best and not math.isnan(score):
            self.best_score, self.evaluations_since_best = score, 0
            return True
        self.evaluations_since_best += 1
        return False

    def finished(self, total_steps, patience):
        """Whether all steps are done, or the last `patience` validations brought nothing better."""
        return self.step >= total_steps or 0 < patience <= self.evaluations_since_best


def parse_run(parser, argv):
    """(the flags, the checkpoint to resume or None). Flags left out stay as the run began."""
    args = parse_args(parser, argv)
    saved = checkpoint.load_latest(args) if args.from_resume else None
    return parse_args(parser, argv, saved["arguments"]) if saved else args, saved


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


def refuse(args, parser, names):
    """Raises UserError for flags that a train script makes no use of, unless they are left out."""
    given = [name for name in names.split() if getattr(args, name) != parser.get_default(name)]
    if given:
        raise UserError(f"{parser.prog} makes no use of --{', --'.join(given)}; leave that out")


def lock_run(args, config):
    """The RunLock of a run's name on the first process, None on others."""
    name = checkpoint.file_name(args.save_weight, config)
    first = distributed.is_first()
    return RunLock(args.save_dir / "checkpoints" / f"{name}.lock") if first else None


def begin_run(run, args, model, optimizer, compute, total_steps, saved):
    """(the Run to train from, its log); run is a new one, saved the checkpoint to resume or None.

    Renames the files of an earlier run under this name.
    """
    name = checkpoint.file_name(args.save_weight, model.config)
    if saved:
        run = resume(run, saved, args, model, optimizer, compute.scaler)
        earlier = saved["arguments"]["epochs"]
        if args.epochs > earlier:
            before = learning_rate(max(0, run.step - 1), total_steps * earlier // args.epochs, args)
            lr = learning_rate(run.step, total_steps, args)
            print(
                f"the schedule now ends after {args.epochs} epochs instead of {earlier}:", end=" "
            )
            print(f"the learning rate was {before:.3g} and continues from {lr:.3g}")
    if compute.rank == 0:
        keep_previous(args, name, saved)
    path = args.save_dir / "logs" / f"{name}.jsonl"
    return run, MetricsLog(path, run, total_steps, silent=compute.rank > 0)


def resume(run, saved, args, model, optimizer, scaler):
    """The Run of a checkpoint, whose state is loaded into optimizer and scaler; run holds what is
    known of this one before its first step.

    Prints which flags differ. Raises UserError with all that make it another run, unless
    args.force_resume, and if the state does not fit the optimizer.
    """
    try:
        before, then = saved["arguments"], Run(**saved["run"])
    except TypeError as error:
        path = saved["path"]
        raise UserError(f"{path} is no checkpoint of this version ({error}); start anew") from None
    now = checkpoint.flags_of(args)
    differ = {
        name: f"{name} is {value} and was {before.get(name)}"
        for name, value in now.items()
        if value != before.get(name)
    }
    free = [name for name in FREE if name in differ]
    if "epochs" in differ and now["epochs"] > before["epochs"]:
        free.append("epochs")
    harm = [text for name, text in differ.items() if name not in free]
    if (run.data, run.rows) != (then.data, then.rows):
        harm.append("the data is not what it was when the run began")
    if shares_of(now) != shares_of(before):
        harm.append("--data_path gives other shares or copies than when the run began")
    if run.row_length not in (None, then.row_length or args.max_seq_len):  # earlier: always that
        harm.append("samples are packed into other rows than by the version that began the run")
    if run.teacher != then.teacher and then.teacher:
        harm.append("the teacher has other weights than when the run began")
    if run.rows_per_step != then.rows_per_step:
        harm.append(
            f"a step takes {run.rows_per_step} rows (batch_size x accumulation_steps x processes) "
            f"and took {then.rows_per_step}"
        )
    elif run.processes != then.processes:
        print(
            f"{run.processes} processes resume a run of {then.processes}: a step takes "
            f"{run.rows_per_step} rows as before, so none is repeated or left out"
        )
    print("".join(f"{differ[name]}\n" for name in free if name not in QUIET), end="")
    if harm and not args.force_resume:
        raise UserError(
            f"--from_resume 1 resumes the run of {saved['path']}, but {'; '.join(harm)}. "
            "Give what it was, or --force_resume 1"
        )
    for text in harm:
        print(f"warning: {text}")
    try:
        load_full_state(model, optimizer, saved.pop("optimizer"))  # pop: it is not kept in memory
        scaler.load_state_dict(saved["scaler"])
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{saved['path']}: its optimizer state does not fit this run ({error}). --force_resume "
            f"1 cannot change what is trained or --optimizer, which was {before.get('optimizer')}; "
            f"start a new run from the weights: --from_weight {args.save_weight} --save_weight NAME"
        ) from None
    known = ("data", "rows", "rows_per_step", "processes", "row_length", "teacher")
    return dataclasses.replace(then, **{name: getattr(run, name) for name in known})


def shares_of(flags):
    """[(weight, copies)] of each file of --data_path."""
    return [tuple(how) for _, *how in flags.get("data_path") or [(None, None, 1)]]


def keep_previous(args, name, saved):
    """Renames the files of an earlier run, full_sft_256, to full_sft_previous_256, unless this run
    resumes it. They stay until this one is complete. Removes half-written files of a killed run.
    """
    for path in files_of(args.save_dir, rf"\.{re.escape(name)}", r"\.\d+\.part"):
        path.unlink()
    files = files_of(args.save_dir, re.escape(name))
    if saved or not any(path.suffix == ".pth" for path in files):
        return
    size, numbers = name.removeprefix(args.save_weight), itertools.chain([""], itertools.count(2))
    names = (f"{args.save_weight}_previous{number}" for number in numbers)
    kept = next(free for free in names if not files_of(args.save_dir, re.escape(free + size)))
    for path in reversed(files):  # the log first: where that is refused, nothing has changed
        try:
            path.rename(path.with_name(kept + size + path.name.removeprefix(name)))
        except OSError as error:
            raise UserError(
                f"{path} cannot be renamed: {error.strerror}; close what has it open, or choose "
                "another --save_weight"
            ) from None
    print(f"the earlier run {name} is kept as {kept + size} until this one is complete")
    print(f"to resume it instead: --from_resume 1 --save_weight {kept}")


def files_of(save_dir, name, more=""):
    """The files that a run writes under a name, which is a pattern, with more after each."""
    endings = {".": r"\.pth", "checkpoints": r"_(resume|best|new|step\d+)\.pth"}
    endings["logs"] = r"(\.jsonl|_loss\.(png|svg))"
    return [
        path
        for folder, ending in endings.items()
        for path in sorted((save_dir / folder).glob("*"))
        if re.fullmatch(name + ending + more, path.name)
    ]


def finish(run, args, model, tokenizer, stage, log, lock, where):
    """Leaves the job, completes a finished run, and prints what came out; where says which records
    the latest step was trained on.

    Raises UserError after args.max_bad_steps steps without a finite gradient; exits with code 130
    if the run was interrupted.
    """
    name = checkpoint.file_name(args.save_weight, model.config)
    place = args.save_dir / f"{name}.pth"
    best_at_end = args.save_best_at_end and run.best_score is not None
    if log.steps == 0 and not best_at_end:
        # The run was finished. A kill may have come between its last checkpoint and the weights.
        checkpoint.save_weights(place, args, model, tokenizer, stage, run)
    log.bar.close()
    distributed.end()
    if log.silent:
        return
    finished = run.finished(log.total_steps, args.early_stop_patience)
    hopeless = run.bad_steps >= args.max_bad_steps
    if finished and not hopeless:
        if best_at_end:
            checkpoint.put_best_in_place(args, name)
        remove_previous(args, name)
    lock.release()
    if hopeless and log.steps:
        raise UserError(
            f"{run.bad_steps} steps in a row had no finite gradient; saved at step {run.step}. The "
            f"last one was trained on {where}. Look at these, or lower --learning_rate and start "
            f"again; to resume it: {resume_command(args, stage, run.processes)}"
        )
    total, patience = log.total_steps, args.early_stop_patience
    if not finished:
        print(f"Stopped at step {run.step} of {total}, saved. Go on with:")
        print(resume_command(args, stage, run.processes))
        sys.exit(130)
    if log.steps == 0:
        print(f"This run is finished: {run.step} of {total} steps.")
    elif run.step < total:
        reason = f"{patience} validations in a row without a better result"
        print(f"Stopped at step {run.step} of {total}: {reason}")
    print(f"weights: {place}\nloss curve: {log.draw(args.loss_curve)}")


def remove_previous(args, name):
    """Removes the files of the run before, which `keep_previous` kept."""
    size = name.removeprefix(args.save_weight)
    for path in files_of(args.save_dir, rf"{re.escape(args.save_weight)}_previous\d*{size}"):
        try:
            path.unlink()
        except OSError as error:
            print(f"warning: {path} cannot be removed: {error.strerror}")
