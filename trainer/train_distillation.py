"""Distillation: SFT with an additional loss between the model (the student) and a teacher.

    python trainer/train_distillation.py --teacher_weight full_sft --from_weight pretrain_small
    python trainer/train_distillation.py --from_weight none --hidden_size 192
    python trainer/train_distillation.py --offline_dir out/offline --from_weight pretrain_small

The loss is in trainer/distillation.py. Compared with train_full_sft.py, only the forward pass and
the data of a recorded teacher differ. --help lists the flags.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import report_user_errors  # first: Ctrl-C while torch loads

# isort: split
from cli import number
from dataset.lm_dataset import SFTDataset
from dataset.step_plan import Source, StepPlan, to_device, token_counts
from dataset.tiny_world import SFT
from evaluation.generate_answers import TaskScore
from model.moe import router_loss
from trainer.flags import conversation_flags, training_parser
from trainer.optimizer import clip_and_step, compile_layers, make_optimizer, set_learning_rate
from trainer.parameters import choose_trainable
from trainer.recorded_teacher import RecordedDataset
from trainer.runtime import gradient_sync, parallelize, start_runtime, torchrun_process
from trainer.teacher import build_distillation
from trainer.trainer_utils import (
    conversation_options,
    init_model,
    open_data,
    print_data_summary,
    replay,
    show_sample,
    task_score,
    validation_loss,
)
from trainer.training_run import RunSpec, TrainingRun, parse_run

STAGE = "full_sft"  # the student is used like SFT weights


def main(argv=None):
    parser = training_parser(__doc__, save_weight="distilled", from_weight="pretrain", epochs=1)
    parser.set_defaults(batch_size=2, max_seq_len=768, warmup_steps=20)
    parser.set_defaults(learning_rate=2.2e-3, sample_prompt="Who are you?")
    conversation_flags(parser)
    distillation_flags(parser)
    args, saved = parse_run(parser, argv, check)

    # Device, student, data.
    runtime = start_runtime(args)
    model, tokenizer = init_model(args, runtime.device, saved)
    choose_trainable(model, tokenizer, args, saved)
    if args.offline_dir:
        data = recorded_data(args)
        dataset, train_samples, val_dataset, val_samples = open_data(
            RecordedDataset, data, tokenizer, None
        )
    else:
        options = conversation_options(args)
        dataset, train_samples, val_dataset, val_samples = open_data(
            SFTDataset, args, tokenizer, SFT, **options
        )
        train_samples += replay(dataset, train_samples, args, tokenizer)
    task = None
    if args.best_metric != "val_loss":
        task = TaskScore(args.best_metric, args.val_data_path)
    print_data_summary(dataset, train_samples, val_samples, args)
    plan = StepPlan(dataset, train_samples, args, runtime)

    # Teacher, optimizer and run state.
    model.model.grad_checkpoint = args.grad_checkpoint
    if args.use_compile:
        compile_layers(model)
    distillation = build_distillation(model, tokenizer, args)
    ddp_model = parallelize(distillation, args.parallel, runtime.dtype)
    optimizer = make_optimizer(model, args)
    spec = RunSpec(
        data=dataset.file_hashes + val_dataset.file_hashes,
        rows=len(train_samples),
        rows_per_step=plan.rows_per_step,
        total_steps=len(plan),
        processes=runtime.world_size,
        row_length=plan.row_length,
        teacher=distillation.teacher_hash,
    )
    run = TrainingRun(
        args, STAGE, spec, model, tokenizer, optimizer=optimizer, runtime=runtime, saved=saved
    )

    for step, micro_batches in run.steps(plan.steps_after(run.progress.step)):
        lr = set_learning_rate(optimizer, step, len(plan), args)
        # A step's loss is divided once, by its supervised tokens over all batches and processes.
        num_supervised, num_tokens = runtime.sum(*token_counts(micro_batches))
        step_loss = 0.0
        for i, batch in enumerate(micro_batches):
            input_ids, labels, position_ids, document_ids = to_device(batch, runtime.device)
            with gradient_sync(ddp_model, enabled=i == len(micro_batches) - 1):
                with runtime.autocast:
                    loss = ddp_model(input_ids, position_ids, document_ids, labels=labels)
                loss = loss / num_supervised
                runtime.backward(loss + router_loss(model, len(micro_batches) * runtime.world_size))
            step_loss += loss.detach()
        grad_norm = clip_and_step(model, optimizer, runtime.scaler, args.grad_clip)
        run.end_step(num_tokens, grad_norm)

        # At intervals: validate, log, show a sample.
        should_validate = len(val_samples) > 0 and run.is_due(args.val_interval)
        if should_validate or step == 0 or run.is_due(args.log_interval):
            metrics = {"loss": runtime.sum(step_loss)[0], "lr": lr, "grad_norm": grad_norm}
            if should_validate:
                metrics |= validation_loss(model, val_dataset, val_samples, args, runtime)
                score = -metrics["val_loss"]
                if task is not None:
                    score = task_score(model, tokenizer, task, runtime)
                run.save_if_best(score)
            run.write_metrics(**metrics)
        if args.sample_interval and run.is_due(args.sample_interval):
            show_sample(model, tokenizer, args, runtime, chat=True)
    run.finish(last_samples=dataset.file_lines(plan.step_samples))


def distillation_flags(parser):
    """Add the flags of distillation."""
    add = parser.group("distillation")
    add(
        "teacher_weight",
        None,
        "teacher weights: a name or a path; default: full_sft",
        metavar="NAME",
    )
    recorded = "recorded hidden states of a teacher, with the data; see export_hidden_states.py"
    add("offline_dir", None, recorded, Path, metavar="DIR")
    share = number(float, 0, 1)
    add("distill_alpha", 0.1, "weight of the data loss; 1 - distill_alpha is the teacher's", share)
    add("distill_temperature", 1.0, "temperature of both distributions", number(float, 0.01))
    add("hidden_weight", 0.0, "weight of the hidden-state MSE", number(float, 0))
    add("aux_layers", "", "further teacher layers to compare, e.g. 1,2", metavar="LAYERS")


def check(args, parser):
    """Return error messages for these flags. --offline_dir replaces --teacher_weight."""
    problems = []
    if args.aux_layers and not args.hidden_weight:
        problems.append("--aux_layers: needs --hidden_weight above 0")
    if args.parallel == "fsdp":
        problems.append("--parallel fsdp: distillation needs unsharded models; use ddp")
    if not args.offline_dir:
        return problems
    folder = args.offline_dir = args.offline_dir.resolve()
    if args.data_path == [Source(folder / "train")]:  # of a checkpoint of an earlier version
        args.data_path = args.val_data_path = None
    for name in ("teacher_weight", "data_path", "val_data_path", "replay_path"):
        if getattr(args, name):
            problems.append(f"--offline_dir includes teacher and data; omit --{name}")
    if not (folder / "manifest.json").is_file():
        problems.append(f"--offline_dir {folder}: no manifest.json; run export_hidden_states.py")
    return problems


def recorded_data(args):
    """Return a copy of the flags with the files of --offline_dir as data."""
    folder = args.offline_dir
    valid = folder / "valid" if (folder / "valid").is_dir() else None
    files = {"data_path": [Source(folder / "train")], "val_data_path": valid}
    return Namespace(**vars(args) | files)


if __name__ == "__main__":
    with report_user_errors(), torchrun_process():
        main()
