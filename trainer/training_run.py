"""TrainingRun: run state, logging, checkpoints, resuming, finishing."""

import dataclasses
import itertools
import math
import re
import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from common import UserError
from model.weights import file_name
from trainer import checkpoint
from trainer.flags import next_command, parse_args, resume_command
from trainer.metrics import MetricsLog
from trainer.optimizer import learning_rate, load_full_state
from trainer.runtime import seed_step, shut_down
from trainer.signals import RunLock, StopSignal

# Flags that may change when a run is resumed: they don't affect the final weights, except for
# rounding on another device.
MAY_CHANGE = """from_resume force_resume from_weight save_dir save_weight config cache_dir
    device num_workers use_compile grad_checkpoint parallel deterministic log_interval
    save_interval val_interval sample_interval sample_prompt strict_data keep_checkpoints
    early_stop_patience save_best_at_end max_bad_steps offline_dir""".split()
MAY_CHANGE += ["batch_size", "accumulation_steps"]  # rows per step are compared instead
MAY_CHANGE += ["data_path", "val_data_path", "replay_path"]  # contents and weights are compared
QUIET = ("from_resume", "force_resume")  # not reported when changed


@dataclass
class Progress:
    """The progress of a run. Learning rate and random numbers are functions of step and flags."""

    data: list  # the hash of each file
    rows: int  # training samples
    rows_per_step: int
    total_steps: int = 0
    processes: int = 1
    row_length: int | None = None  # of packed rows: see dataset/packing.py
    teacher: str | None = None  # hash of its weights
    step: int = 0
    tokens: int = 0  # trained on
    bad_steps: int = 0  # consecutive steps skipped because of non-finite gradients
    log_bytes: int = 0  # size of the metrics log
    saved_step: int | None = None  # of the latest checkpoint
    best_score: float | None = None
    evaluations_since_best: int = 0
    reference: list | None = None  # DPO: reference log-probs of training and validation pairs

    def advance(self, tokens, grad_norm):
        """Count a step; without a finite gradient it was skipped."""
        self.step += 1
        self.tokens += int(tokens)
        self.bad_steps = 0 if math.isfinite(grad_norm) else self.bad_steps + 1

    def note_score(self, score):
        """Record a validation score (higher is better). Returns whether it is the best so far."""
        is_best = self.best_score is None or score > self.best_score
        if is_best and not math.isnan(score):
            self.best_score, self.evaluations_since_best = score, 0
            return True
        self.evaluations_since_best += 1
        return False

    def is_finished(self, patience):
        """Return whether all steps are done, or `patience` validations brought no improvement."""
        return self.step >= self.total_steps or 0 < patience <= self.evaluations_since_best


class TrainingRun:
    """Everything around the training step: progress, log, checkpoints, and when to stop. Call its
    methods on all ranks; only rank 0 writes files.

    for step, micro_batches in run.steps(batches):
        ...  # forward, backward, update
        run.end_step(num_tokens, grad_norm)
    run.finish(...)

    progress describes the new run; saved is the checkpoint to resume, or None. The files of an
    earlier run with this name are renamed. Raises UserError if another process is training under
    this name, or if the checkpoint belongs to a different run.
    """

    def __init__(self, args, stage, model, tokenizer, optimizer, runtime, progress, saved=None):
        self.args, self.stage, self.runtime = args, stage, runtime
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.name = file_name(args.save_weight, model.config)
        self.weights_path = args.save_dir / f"{self.name}.pth"
        is_first = runtime.rank == 0
        self.lock = RunLock(self.checkpoint_path(".lock")) if is_first else None
        if saved:
            progress = resume(progress, saved, args, model, optimizer, runtime.scaler)
            print_new_schedule(progress, saved["arguments"]["epochs"], args)
        if is_first:
            keep_previous(args, self.name, saved)
        self.progress = progress
        self.log = MetricsLog(args.save_dir / "logs" / f"{self.name}.jsonl", progress, not is_first)
        self.signal = StopSignal()
        self.step_began, self.data_wait_s = 0.0, 0.0

    def checkpoint_path(self, ending):
        """Return the path of a file of this run, e.g. NAME_best.pth for "_best.pth"."""
        return self.args.save_dir / "checkpoints" / f"{self.name}{ending}"

    def steps(self, batches):
        """Yield (step, micro-batches) until the run is finished, interrupted or has diverged.
        batches is an iterator over the steps' micro-batches. Saves a checkpoint at the end and
        every --save_interval steps.
        """
        progress, args = self.progress, self.args
        self.model.train()
        is_over = progress.is_finished(args.early_stop_patience)
        while not is_over:
            self.step_began = time.perf_counter()
            micro_batches = next(batches)
            self.data_wait_s += time.perf_counter() - self.step_began
            seed_step(args, progress.step, self.runtime.rank)
            yield progress.step, micro_batches
            is_over = progress.is_finished(args.early_stop_patience)
            is_over = is_over or progress.bad_steps >= args.max_bad_steps
            is_over = is_over or self.runtime.sum(self.signal.received)[0] > 0
            if is_over or progress.step % args.save_interval == 0:
                checkpoint.save_run(self)

    def end_step(self, num_tokens, grad_norm):
        """Count a step and the tokens it was trained on."""
        self.progress.advance(num_tokens, grad_norm)
        self.log.count(num_tokens, self.step_began)
        if not math.isfinite(grad_norm):
            tqdm.write(f"step {self.progress.step} is skipped: gradient norm is {grad_norm}")

    def is_due(self, interval):
        """Return whether an action every `interval` steps, and after the last, is due."""
        progress = self.progress
        return progress.step % interval == 0 or progress.step == progress.total_steps

    def note_score(self, score):
        """Record a validation score (higher is better); save the weights if it is the best."""
        if self.progress.note_score(score):
            checkpoint.save_weights(self, self.checkpoint_path("_best.pth"))

    def write_metrics(self, loss, lr, grad_norm, **metrics):
        """Add a line to the log."""
        progress = self.progress
        epoch = (progress.step - 1) * self.args.epochs // progress.total_steps
        metrics |= {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        self.log.write(progress, epoch=epoch, data_wait_s=self.data_wait_s, **metrics)

    def finish(self, last_samples, next_script="eval_llm.py"):
        """Shut down the process group, finalize the weights of a finished run, and print a summary
        with the next command. last_samples describes the samples of the latest step.

        Raises UserError if the run has diverged; exits with code 130 if it was interrupted.
        """
        args, progress, log = self.args, self.progress, self.log
        best_at_end = args.save_best_at_end and progress.best_score is not None
        if log.steps == 0 and not best_at_end:
            # Already finished, but maybe killed between the last checkpoint and the weights.
            checkpoint.save_weights(self, self.weights_path)
        log.bar.close()
        shut_down()
        if self.runtime.rank > 0:
            return
        is_finished = progress.is_finished(args.early_stop_patience)
        has_diverged = progress.bad_steps >= args.max_bad_steps
        if is_finished and not has_diverged:
            if best_at_end:
                checkpoint.put_best_in_place(self)
            remove_previous(args, self.name)
        self.lock.release()
        resuming = resume_command(args, self.stage, progress.processes)
        if has_diverged and log.steps:
            raise UserError(
                f"diverged: {progress.bad_steps} consecutive steps had no finite gradient; saved "
                f"at step {progress.step}. The last one was trained on {last_samples}. Check "
                "these, or lower --learning_rate and start again; to resume anyway: "
                f"{resuming}"
            )
        at = f"at step {progress.step} of {progress.total_steps}"
        if not is_finished:
            print(f"Stopped {at}, saved. Resume with:\n{resuming}")
            sys.exit(130)
        if log.steps == 0:
            print(f"This run is already finished: {progress.step} of {progress.total_steps} steps.")
        elif progress.step < progress.total_steps:
            patience = args.early_stop_patience
            print(f"Early stopping {at}: no improvement in {patience} validations")
        print(f"weights: {self.weights_path}\nloss curve: {log.draw()}")
        print(f"next: {next_command(args, next_script)}")


def parse_run(parser, argv, check=None):
    """Return (flags, checkpoint to resume or None). Flags that aren't given default to the resumed
    run's. check: see `parse_args`.
    """
    args, saved = parse_args(parser, argv, check=check), None
    if args.from_resume:
        saved = checkpoint.load_latest(args)
    if saved:
        args = parse_args(parser, argv, saved["arguments"], check)
    return args, saved


def print_new_schedule(progress, epochs, args):
    """Print how the learning rate jumps if a resumed run gets more epochs."""
    if args.epochs > epochs:
        total_steps = progress.total_steps * epochs // args.epochs
        before = learning_rate(max(0, progress.step - 1), total_steps, args)
        lr = learning_rate(progress.step, progress.total_steps, args)
        print(f"the schedule now ends after {args.epochs} epochs instead of {epochs}:", end=" ")
        print(f"the learning rate was {before:.3g} and continues from {lr:.3g}")


def resume(current, saved, args, model, optimizer, scaler):
    """Restore a checkpoint: load the state of optimizer and scaler, and return its Progress.
    current is the Progress of this run before its first step.

    Prints which flags changed. Raises UserError, naming all conflicts, if the checkpoint belongs to
    a different run (unless args.force_resume), or if its state doesn't fit the optimizer.
    """
    try:
        saved_flags, progress = saved["arguments"], Progress(**saved["run"])
    except TypeError as error:
        raise UserError(
            f"{saved['path']} is not a checkpoint of this version ({error}); start a new run"
        ) from None
    flags = checkpoint.plain_flags(args)
    differ = {
        name: f"{name} is {value} and was {saved_flags.get(name)}"
        for name, value in flags.items()
        if value != saved_flags.get(name)
    }
    changes = [name for name in MAY_CHANGE if name in differ]
    if "epochs" in differ and flags["epochs"] > saved_flags["epochs"]:
        changes.append("epochs")
    conflicts = [text for name, text in differ.items() if name not in changes]
    if (current.data, current.rows) != (progress.data, progress.rows):
        conflicts.append("the data has changed since the run began")
    if mixture_weights(flags) != mixture_weights(saved_flags):
        conflicts.append("the weights in --data_path have changed since the run began")
    earlier_row_length = progress.row_length or args.max_seq_len  # earlier versions: always that
    if current.row_length not in (None, earlier_row_length):
        conflicts.append("this version packs the samples into different rows")
    if current.teacher != progress.teacher and progress.teacher:
        conflicts.append("the weights of the teacher have changed since the run began")
    if current.rows_per_step != progress.rows_per_step:
        conflicts.append(
            f"a step takes {current.rows_per_step} rows (batch_size x accumulation_steps x "
            f"processes) and took {progress.rows_per_step}"
        )
    elif current.processes != progress.processes:
        print(
            f"{current.processes} processes resume a run of {progress.processes}: a step takes "
            f"{current.rows_per_step} rows as before, so none is repeated or skipped"
        )
    print("".join(f"{differ[name]}\n" for name in changes if name not in QUIET), end="")
    if conflicts and not args.force_resume:
        raise UserError(
            f"--from_resume 1 resumes the run of {saved['path']}, but {'; '.join(conflicts)}. "
            "Restore these, or use --force_resume 1"
        )
    for text in conflicts:
        print(f"warning: {text}")
    try:
        load_full_state(model, optimizer, saved.pop("optimizer"))  # pop frees the memory
        scaler.load_state_dict(saved["scaler"])
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{saved['path']}: its optimizer state doesn't match this run ({error}). "
            "--force_resume 1 cannot change which weights are trained or --optimizer, which was "
            f"{saved_flags.get('optimizer')}; start a new run from the weights: --from_weight "
            f"{args.save_weight} --save_weight NAME"
        ) from None
    from_current = "data rows rows_per_step total_steps processes row_length teacher".split()
    return dataclasses.replace(progress, **{name: getattr(current, name) for name in from_current})


def mixture_weights(flags):
    """Return the mixture weight of each file of --data_path."""
    return [weight for _, weight, *_ in flags.get("data_path") or [(None, None)]]


def keep_previous(args, name, saved):
    """Rename the files of an earlier run, e.g. full_sft_256 to full_sft_previous_256, unless this
    run resumes it. They are deleted when this run is complete. Also deletes partial files of killed
    runs.
    """
    for path in run_files(args.save_dir, rf"\.{re.escape(name)}", r"\.\d+\.part"):
        path.unlink()
    files = run_files(args.save_dir, re.escape(name))
    if saved or not any(path.suffix == ".pth" for path in files):
        return
    size, numbers = name.removeprefix(args.save_weight), itertools.chain([""], itertools.count(2))
    names = (f"{args.save_weight}_previous{number}" for number in numbers)
    new_name = next(free for free in names if not run_files(args.save_dir, re.escape(free + size)))
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
    endings = {".": r"\.pth", "checkpoints": r"_(resume|best|new|step\d+)\.pth"}
    endings["logs"] = r"(\.jsonl|_loss\.(png|svg))"
    return [
        path
        for folder, ending in endings.items()
        for path in sorted((save_dir / folder).glob("*"))
        if re.fullmatch(name + ending + suffix, path.name)
    ]


def remove_previous(args, name):
    """Delete the files of the earlier run, which `keep_previous` renamed."""
    size = name.removeprefix(args.save_weight)
    for path in run_files(args.save_dir, rf"{re.escape(args.save_weight)}_previous\d*{size}"):
        try:
            path.unlink()
        except OSError as error:
            print(f"warning: {path} cannot be removed: {error.strerror}")
