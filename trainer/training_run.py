"""TrainingRun: run state, logging, checkpoints, resuming, finishing."""

import dataclasses
import math
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


@dataclass(kw_only=True)
class RunSpec:
    """What a run trains on, and for how long. It must be the same when the run is resumed."""

    data: list  # the hash of each file
    rows: int  # training samples
    rows_per_step: int
    total_steps: int
    processes: int = 1
    row_length: int | None = None  # of packed rows: see dataset/packing.py
    teacher: str | None = None  # hash of its weights


@dataclass
class Progress:
    """The progress of a run. Learning rate and random numbers are functions of step and flags."""

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
            self.best_score = score
            self.evaluations_since_best = 0
            return True
        self.evaluations_since_best += 1
        return False


class TrainingRun:
    """Everything around the training step: progress, log, checkpoints, and when to stop. Call its
    methods on all ranks; only rank 0 writes files.

    for step, micro_batches in run.steps(batches):
        ...  # forward, backward, update
        run.end_step(num_tokens, grad_norm)
    run.finish(...)

    saved is the checkpoint to resume, or None for a new run; the files of an earlier run with this
    name are then renamed. Raises UserError if another process is training under this name, or if
    the checkpoint belongs to a different run.
    """

    def __init__(self, args, stage, spec, model, tokenizer, *, optimizer, runtime, saved):
        self.args, self.stage, self.spec, self.runtime = args, stage, spec, runtime
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.name = file_name(args.save_weight, model.config)
        self.weights_path = args.save_dir / f"{self.name}.pth"
        is_rank_zero = runtime.rank == 0
        self.lock = RunLock(self.checkpoint_path(".lock")) if is_rank_zero else None
        self.progress = Progress()
        if saved:
            self.progress = resume(spec, saved, args, model, optimizer, runtime.scaler)
        if is_rank_zero:
            checkpoint.delete_partial_files(args.save_dir, self.name)
            if not saved:
                checkpoint.keep_previous(args, self.name)
        log_path = args.save_dir / "logs" / f"{self.name}.jsonl"
        self.log = MetricsLog(log_path, self.progress, spec.total_steps, silent=not is_rank_zero)
        self.signal = StopSignal()
        self.step_began = 0.0
        self.data_wait_s = 0.0

    def checkpoint_path(self, ending):
        """Return the path of a file of this run, e.g. NAME_best.pth for "_best.pth"."""
        return self.args.save_dir / "checkpoints" / f"{self.name}{ending}"

    @property
    def is_finished(self):
        """Whether all steps are done, or too many validations brought no improvement."""
        patience = self.args.early_stop_patience
        stopped_early = 0 < patience <= self.progress.evaluations_since_best
        return self.progress.step >= self.spec.total_steps or stopped_early

    @property
    def has_diverged(self):
        """Whether too many consecutive steps had no finite gradient."""
        return self.progress.bad_steps >= self.args.max_bad_steps

    def steps(self, batches):
        """Yield (step, micro-batches) until the run is finished, interrupted or has diverged.
        batches is an iterator over the steps' micro-batches. Saves a checkpoint at the end and
        every --save_interval steps.
        """
        progress = self.progress
        self.model.train()
        is_over = self.is_finished
        while not is_over:
            self.step_began = time.perf_counter()
            micro_batches = next(batches)
            self.data_wait_s += time.perf_counter() - self.step_began
            seed_step(self.args.seed, progress.step, self.runtime.rank)
            yield progress.step, micro_batches
            is_interrupted = self.runtime.sum(self.signal.received)[0] > 0
            is_over = self.is_finished or self.has_diverged or is_interrupted
            if is_over or progress.step % self.args.save_interval == 0:
                checkpoint.save_run(self)

    def end_step(self, num_tokens, grad_norm):
        """Count a step and the tokens it was trained on."""
        self.progress.advance(num_tokens, grad_norm)
        self.log.count(num_tokens, self.step_began)
        if not math.isfinite(grad_norm):
            tqdm.write(f"step {self.progress.step} is skipped: gradient norm is {grad_norm}")

    def is_due(self, interval):
        """Return whether an action every `interval` steps, and after the last, is due."""
        step = self.progress.step
        return step % interval == 0 or step == self.spec.total_steps

    def save_if_best(self, score):
        """Record a validation score (higher is better), and save the weights if it is the best."""
        if self.progress.note_score(score):
            checkpoint.save_weights(self, self.checkpoint_path("_best.pth"))

    def write_metrics(self, **metrics):
        """Add a line to the log."""
        epoch = (self.progress.step - 1) * self.args.epochs // self.spec.total_steps
        self.log.write(self.progress, epoch=epoch, data_wait_s=self.data_wait_s, **metrics)

    def finish(self, *, last_samples):
        """Shut down the process group, finalize the weights of a finished run, and print a summary
        with the next command. last_samples describes the samples of the latest step.

        Raises UserError if the run has diverged; exits with code 130 if it was interrupted.
        """
        args, progress, log = self.args, self.progress, self.log
        if log.steps == 0:
            # Already finished, but maybe killed between the last checkpoint and the weights.
            checkpoint.save_weights(self, self.weights_path)
        log.bar.close()
        shut_down()
        if self.runtime.rank > 0:
            return
        if self.is_finished and not self.has_diverged:
            if args.save_best_at_end and progress.best_score is not None:
                checkpoint.put_best_in_place(self)
            checkpoint.delete_previous(args, self.name)
        self.lock.release()
        resuming = resume_command(args, self.stage, self.spec.processes)
        if self.has_diverged and log.steps:
            raise UserError(
                f"diverged: {progress.bad_steps} consecutive steps had no finite gradient; saved "
                f"at step {progress.step}. The last one was trained on {last_samples}. Check "
                "these, or lower --learning_rate and start again; to resume anyway: "
                f"{resuming}"
            )
        at = f"at step {progress.step} of {self.spec.total_steps}"
        if not self.is_finished:
            print(f"Stopped {at}, saved. Resume with:\n{resuming}")
            sys.exit(130)
        if log.steps == 0:
            print(f"This run is already finished: {at.removeprefix('at ')}.")
        elif progress.step < self.spec.total_steps:
            patience = args.early_stop_patience
            print(f"Early stopping {at}: no improvement in {patience} validations")
        print(f"weights: {self.weights_path}\nloss curve: {log.draw()}")
        print(f"next: {next_command(args, self.stage)}")


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


def resume(spec, saved, args, model, optimizer, scaler):
    """Restore a checkpoint: load the state of optimizer and scaler, and return its Progress.

    Prints which flags changed. Raises UserError, naming all conflicts, if the checkpoint belongs to
    a different run (unless args.force_resume), or if its state doesn't fit the optimizer.
    """
    names = {field.name for field in dataclasses.fields(RunSpec)}
    try:
        saved_spec = RunSpec(**{name: saved["run"][name] for name in names & set(saved["run"])})
        progress = {name: value for name, value in saved["run"].items() if name not in names}
        progress = Progress(**progress)
    except TypeError as error:
        raise UserError(
            f"{saved['path']} is not a checkpoint of this version ({error}); start a new run"
        ) from None
    saved_flags = saved["arguments"]
    if args.epochs > saved_flags["epochs"]:
        print_new_schedule(spec.total_steps, progress.step, saved_flags["epochs"], args)
    changes, conflicts = compare_flags(checkpoint.plain_flags(args), saved_flags)
    conflicts += compare_specs(spec, saved_spec, args.max_seq_len)
    for text in changes:
        print(text)
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
    return progress


def print_new_schedule(total_steps, step, epochs, args):
    """Print how the learning rate jumps if a run of some epochs, resumed at a step, gets more."""
    before = learning_rate(max(0, step - 1), total_steps * epochs // args.epochs, args)
    lr = learning_rate(step, total_steps, args)
    print(f"the schedule now ends after {args.epochs} epochs instead of {epochs}:", end=" ")
    print(f"the learning rate was {before:.3g} and continues from {lr:.3g}")


def compare_flags(flags, saved_flags):
    """Compare the flags of a run and of its checkpoint. Returns (changes, conflicts), two lists of
    sentences: flags that may change, and flags that may not.
    """
    changes, conflicts = [], []
    for name, value in flags.items():
        saved_value = saved_flags.get(name)
        if value == saved_value or name in QUIET:
            continue
        is_longer = name == "epochs" and value > saved_value
        sentences = changes if name in MAY_CHANGE or is_longer else conflicts
        sentences.append(f"{name} is {value} and was {saved_value}")
    if mixture_weights(flags) != mixture_weights(saved_flags):
        conflicts.append("the weights in --data_path have changed since the run began")
    return changes, conflicts


def compare_specs(spec, saved_spec, max_seq_len):
    """Return a sentence for each conflict between the specs of a run and of its checkpoint."""
    conflicts = []
    if (spec.data, spec.rows) != (saved_spec.data, saved_spec.rows):
        conflicts.append("the data has changed since the run began")
    saved_row_length = saved_spec.row_length or max_seq_len  # earlier versions: always that
    if spec.row_length not in (None, saved_row_length):
        conflicts.append("this version packs the samples into different rows")
    if saved_spec.teacher and spec.teacher != saved_spec.teacher:
        conflicts.append("the weights of the teacher have changed since the run began")
    if spec.rows_per_step != saved_spec.rows_per_step:
        conflicts.append(
            f"a step takes {spec.rows_per_step} rows (batch_size x accumulation_steps x "
            f"processes) and took {saved_spec.rows_per_step}"
        )
    elif spec.processes != saved_spec.processes:
        print(
            f"{spec.processes} processes resume a run of {saved_spec.processes}: a step takes "
            f"{spec.rows_per_step} rows as before, so none is repeated or skipped"
        )
    return conflicts


def mixture_weights(flags):
    """Return the mixture weight of each file of --data_path."""
    return [weight for _, weight, *_ in flags.get("data_path") or [(None, None)]]
