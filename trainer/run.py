"""Where a run is, whether it may go on, and why it ends."""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from common import UserError
from trainer.distributed import load_optimizer

# Flags that a resumed run may change: the weights come out the same, or, with another device,
# nearly the same.
FREE = """from_resume force_resume from_weight save_dir save_weight config cache_dir rebuild_cache
    device num_workers use_compile grad_checkpoint profile parallel deterministic log_interval
    save_interval eval_interval sample_interval sample_prompt strict_data keep_checkpoints
    early_stop_patience save_best_at_end max_bad_steps loss_curve offline_dir""".split()
FREE += ["batch_size", "accumulation_steps"]  # their product with the processes is compared
FREE += ["data_path", "eval_data_path", "replay_path"]  # content and shares are compared
FREE += ["extend_tokens"]  # the checkpoint has the tokens, and `init_model` compares
QUIET = ("from_resume", "force_resume")  # are not worth a line when they differ


@dataclass
class Run:
    """Where a run is. Random numbers and the learning rate follow from the step and the flags."""

    data: list  # the hash of each file
    rows: int
    rows_per_step: int
    processes: int
    teacher: str | None = None  # the hash of its weights
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


def shares_of(flags):
    """[(weight, copies)] of each file of --data_path."""
    return [tuple(how) for _, *how in flags.get("data_path") or [(None, None, 1)]]


def go_on(run, resume, args, optimizer, scaler):
    """Returns the Run of a checkpoint and loads its state into optimizer and scaler; run holds
    what is known of this one before its first step.

    Prints which flags differ. Raises UserError with all that make it another run, unless
    args.force_resume, and if the state does not fit the optimizer.
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
    if shares_of(now) != shares_of(before):
        harm.append("--data_path gives other shares or copies than when the run began")
    if run.teacher != saved.teacher and saved.teacher:
        harm.append("the teacher has other weights than when the run began")
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
    try:
        load_optimizer(optimizer, content["optimizer"])
        scaler.load_state_dict(content["scaler"])
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path}: its optimizer state does not fit this run ({error}). --force_resume 1 cannot "
            f"change what learns or --optimizer, which was {before.get('optimizer')}; start a new "
            f"run from the weights: --from_weight {args.save_weight} --save_weight NAME"
        ) from None
    now_known = ("data", "rows", "rows_per_step", "processes", "teacher")
    return dataclasses.replace(saved, **{name: getattr(run, name) for name in now_known})


def report_end(args, run, total_steps, batch):
    """Says why a run ended before its last step, and how to go on; batch is where the last step's
    rows came from. Ends the program unless the run is done.
    """
    if run.bad_steps >= args.max_bad_steps:
        raise UserError(
            f"{run.bad_steps} steps in a row had no finite gradient; saved at step {run.step}. The "
            f"last one was trained on {batch}. Look at these, or lower --learning_rate and start "
            "anew; --from_resume 1 goes on"
        )
    if run.stalled(args.early_stop_patience):
        print(
            f"Stopped at step {run.step}: {args.early_stop_patience} validations without a better"
        )
    elif run.step < total_steps:
        print(f"Stopped at step {run.step} of {total_steps}, saved. Go on with --from_resume 1.")
        sys.exit(130)
