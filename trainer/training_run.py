"""TrainingRun: the progress of a run, its log and checkpoints, when it stops, and whether a
checkpoint may be resumed.
"""

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
from trainer.runtime import end_job, seed_step
from trainer.signals import RunLock, StopSignal

# Flags that a resumed run may change: the weights come out the same, or, with another device,
# nearly the same.
FREE = """from_resume force_resume from_weight save_dir save_weight config cache_dir
    device num_workers use_compile grad_checkpoint parallel deterministic log_interval
    save_interval val_interval sample_interval sample_prompt strict_data keep_checkpoints
    early_stop_patience save_best_at_end max_bad_steps offline_dir""".split()
FREE += ["batch_size", "accumulation_steps"]  # their product with the processes is compared
FREE += ["data_path", "val_data_path", "replay_path"]  # content and shares are compared
QUIET = ("from_resume", "force_resume")  # are not worth a line when they differ


@dataclass
class Progress:
    """How far a run is. Random numbers and the learning rate follow from the step and the flags."""

    data: list  # the hash of each file
    rows: int  # samples to train on
    rows_per_step: int
    total_steps: int = 0
    processes: int = 1
    row_length: int | None = None  # of packed rows: see dataset/packing.py
    teacher: str | None = None  # the hash of its weights
    step: int = 0
    tokens: int = 0  # trained on
    bad_steps: int = 0  # the latest ones, skipped because their gradients were not finite
    log_bytes: int = 0  # of the metrics log
    saved_step: int | None = None  # the step of the latest checkpoint
    best_score: float | None = None
    evaluations_since_best: int = 0
    reference: list | None = None  # DPO: of training and validation pairs, by the model before

    def advance(self, tokens, grad_norm):
        """Count a step. One without a finite gradient was skipped."""
        self.step += 1
        self.tokens += int(tokens)
        self.bad_steps = 0 if math.isfinite(grad_norm) else self.bad_steps + 1

    def note_score(self, score):
        """Record a validation (higher is better); return whether it is the best so far."""
        is_best = self.best_score is None or score > self.best_score
        if is_best and not math.isnan(score):
            self.best_score, self.evaluations_since_best = score, 0
            return True
        self.evaluations_since_best += 1
        return False

    def is_finished(self, patience):
        """Whether all steps are done, or the last `patience` validations brought nothing better."""
        return self.step >= self.total_steps or 0 < patience <= self.evaluations_since_best


class TrainingRun:
    """What surrounds the training step: progress, log, checkpoints, and when to stop. Its methods
    are called in every process of a job; only the first one writes.

    for step, micro_batches in run.steps(batches):
        ...  # forward, backward, update
        run.end_step(num_tokens, grad_norm)
    run.finish(...)

    progress is that of a new run, saved the checkpoint to resume or None. The files of an earlier
    run under this name are renamed. Raises UserError if another process trains under it, and if the
    checkpoint is of another run.
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
        """Yield (step, its batches) of an iterator of each step's batches, until the run is
        finished, stopped, or has diverged. Saves a checkpoint then, and every --save_interval.
        """
        progress, args = self.progress, self.args
        self.model.train()
        ends = progress.is_finished(args.early_stop_patience)
        while not ends:
            self.step_began = time.perf_counter()
            of_step = next(batches)
            self.data_wait_s += time.perf_counter() - self.step_began
            seed_step(args, progress.step, self.runtime.rank)
            yield progress.step, of_step
            ends = progress.is_finished(args.early_stop_patience)
            ends = ends or progress.bad_steps >= args.max_bad_steps
            ends = ends or self.runtime.sum(self.signal.received)[0] > 0
            if ends or progress.step % args.save_interval == 0:
                checkpoint.save_run(self)

    def end_step(self, num_tokens, grad_norm):
        """Count a step, of which these tokens were trained on."""
        self.progress.advance(num_tokens, grad_norm)
        self.log.count(num_tokens, self.step_began)
        if not math.isfinite(grad_norm):
            tqdm.write(f"step {self.progress.step} is skipped: its gradient is {grad_norm}")

    def is_due(self, interval):
        """Whether something that is done every `interval` steps, and after the last, is due now."""
        progress = self.progress
        return progress.step % interval == 0 or progress.step == progress.total_steps

    def note_score(self, score):
        """Record a validation (higher is better), and save the weights if they are the best."""
        if self.progress.note_score(score):
            checkpoint.save_weights(self, self.checkpoint_path("_best.pth"))

    def write_metrics(self, loss, lr, grad_norm, **metrics):
        """Add a line to the log."""
        progress = self.progress
        epoch = (progress.step - 1) * self.args.epochs // progress.total_steps
        metrics |= {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        self.log.write(progress, epoch=epoch, data_wait_s=self.data_wait_s, **metrics)

    def finish(self, last_samples, next_script="eval_llm.py"):
        """Leave the job, complete a finished run, and print what came out and the next command.
        last_samples names the samples of the latest step.

        Raises UserError after args.max_bad_steps steps without a finite gradient; exits with code
        130 if the run was interrupted.
        """
        args, progress, log = self.args, self.progress, self.log
        best_at_end = args.save_best_at_end and progress.best_score is not None
        if log.steps == 0 and not best_at_end:
            # The run was finished. A kill may have come between its last checkpoint and the weights
            checkpoint.save_weights(self, self.weights_path)
        log.bar.close()
        end_job()
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
                f"{progress.bad_steps} steps in a row had no finite gradient; saved at step "
                f"{progress.step}. The last one was trained on {last_samples}. Look at these, or "
                f"lower --learning_rate and start again; to resume it: {resuming}"
            )
        at = f"at step {progress.step} of {progress.total_steps}"
        if not is_finished:
            print(f"Stopped {at}, saved. Go on with:\n{resuming}")
            sys.exit(130)
        if log.steps == 0:
            print(f"This run is finished: {progress.step} of {progress.total_steps} steps.")
        elif progress.step < progress.total_steps:
            patience = args.early_stop_patience
            print(f"Stopped {at}: {patience} validations in a row without a better result")
        print(f"weights: {self.weights_path}\nloss curve: {log.draw()}")
        print(f"next: {next_command(args, next_script)}")


def parse_run(parser, argv, check=None):
    """Return (the flags, the checkpoint to resume or None). Flags that are left out are those of
    the resumed run. check: see `parse_args`.
    """
    args, saved = parse_args(parser, argv, check=check), None
    if args.from_resume:
        saved = checkpoint.load_latest(args)
    if saved:
        args = parse_args(parser, argv, saved["arguments"], check)
    return args, saved


def print_new_schedule(progress, epochs, args):
    """Print how the learning rate jumps where a resumed run gets more epochs than it had."""
    if args.epochs > epochs:
        total_steps = progress.total_steps * epochs // args.epochs
        before = learning_rate(max(0, progress.step - 1), total_steps, args)
        lr = learning_rate(progress.step, progress.total_steps, args)
        print(f"the schedule now ends after {args.epochs} epochs instead of {epochs}:", end=" ")
        print(f"the learning rate was {before:.3g} and continues from {lr:.3g}")


def resume(new, saved, args, model, optimizer, scaler):
    """Return the Progress of a checkpoint, whose state is loaded into optimizer and scaler; new is
    the Progress of this run before its first step.

    Prints which flags differ. Raises UserError with all that make it another run, unless
    args.force_resume, and if the state does not fit the optimizer.
    """
    try:
        before, then = saved["arguments"], Progress(**saved["run"])
    except TypeError as error:
        path = saved["path"]
        raise UserError(f"{path} is no checkpoint of this version ({error}); start anew") from None
    now = checkpoint.plain_flags(args)
    differ = {
        name: f"{name} is {value} and was {before.get(name)}"
        for name, value in now.items()
        if value != before.get(name)
    }
    free = [name for name in FREE if name in differ]
    if "epochs" in differ and now["epochs"] > before["epochs"]:
        free.append("epochs")
    harm = [text for name, text in differ.items() if name not in free]
    if (new.data, new.rows) != (then.data, then.rows):
        harm.append("the data is not what it was when the run began")
    if shares_of(now) != shares_of(before):
        harm.append("--data_path gives other shares than when the run began")
    if new.row_length not in (None, then.row_length or args.max_seq_len):  # earlier: always that
        harm.append("samples are packed into other rows than by the version that began the run")
    if new.teacher != then.teacher and then.teacher:
        harm.append("the teacher has other weights than when the run began")
    if new.rows_per_step != then.rows_per_step:
        harm.append(
            f"a step takes {new.rows_per_step} rows (batch_size x accumulation_steps x processes) "
            f"and took {then.rows_per_step}"
        )
    elif new.processes != then.processes:
        print(
            f"{new.processes} processes resume a run of {then.processes}: a step takes "
            f"{new.rows_per_step} rows as before, so none is repeated or left out"
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
    known = ("data", "rows", "rows_per_step", "total_steps", "processes", "row_length", "teacher")
    return dataclasses.replace(then, **{name: getattr(new, name) for name in known})


def shares_of(flags):
    """Return the weight of each file of --data_path."""
    return [weight for _, weight, *_ in flags.get("data_path") or [(None, None)]]


def keep_previous(args, name, saved):
    """Renames the files of an earlier run, full_sft_256, to full_sft_previous_256, unless this run
    resumes it. They stay until this one is complete. Removes half-written files of a killed run.
    """
    for path in run_files(args.save_dir, rf"\.{re.escape(name)}", r"\.\d+\.part"):
        path.unlink()
    files = run_files(args.save_dir, re.escape(name))
    if saved or not any(path.suffix == ".pth" for path in files):
        return
    size, numbers = name.removeprefix(args.save_weight), itertools.chain([""], itertools.count(2))
    names = (f"{args.save_weight}_previous{number}" for number in numbers)
    kept = next(free for free in names if not run_files(args.save_dir, re.escape(free + size)))
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


def run_files(save_dir, name, more=""):
    """The files that a run writes under a name, which is a pattern, with more after each."""
    endings = {".": r"\.pth", "checkpoints": r"_(resume|best|new|step\d+)\.pth"}
    endings["logs"] = r"(\.jsonl|_loss\.(png|svg))"
    return [
        path
        for folder, ending in endings.items()
        for path in sorted((save_dir / folder).glob("*"))
        if re.fullmatch(name + ending + more, path.name)
    ]


def remove_previous(args, name):
    """Removes the files of the run before, which `keep_previous` kept."""
    size = name.removeprefix(args.save_weight)
    for path in run_files(args.save_dir, rf"{re.escape(args.save_weight)}_previous\d*{size}"):
        try:
            path.unlink()
        except OSError as error:
            print(f"warning: {path} cannot be removed: {error.strerror}")
