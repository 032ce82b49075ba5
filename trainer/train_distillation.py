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
from trainer.runtime import gradient_sync, parallelize, report_lost_process, start_runtime
from trainer.teacher import build_distillation
from trainer.trainer_utils import (
    conversation_options,
    init_model,
    open_data,
    print_data_summary,
    replay,
    selection_score,
    show_sample,
    validation_loss,
)
from trainer.training_run import Progress, TrainingRun, parse_run

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
    model, tokenizer, _ = init_model(args, runtime.device, saved)
    choose_trainable(model, tokenizer, args, saved)
    if args.offline_dir:
        data = recorded_data(args)
        dataset, train, val_dataset, val = open_data(RecordedDataset, data, tokenizer, None)
    else:
        options = conversation_options(args)
        dataset, train, val_dataset, val = open_data(SFTDataset, args, tokenizer, SFT, **options)
        train += replay(dataset, train, args, tokenizer)
    task = None
    if args.best_metric != "val_loss":
        task = TaskScore(args.best_metric, args.val_data_path)
    print_data_summary(dataset, train, val, args)
    plan = StepPlan(dataset, train, args, runtime)

    # Teacher, optimizer and run state.
    model.model.grad_checkpoint = args.grad_checkpoint
    if args.use_compile:
        compile_layers(model)
    distillation = build_distillation(model, tokenizer, args)
    ddp_model = parallelize(distillation, args.parallel, runtime.dtype)
    optimizer = make_optimizer(model, args)
    content = dataset.content + val_dataset.content
    progress = Progress(content, len(train), plan.rows_per_step, len(plan), runtime.world_size)
    progress.row_length, progress.teacher = plan.row_length, distillation.teacher_hash
    run = TrainingRun(args, STAGE, model, tokenizer, optimizer, runtime, progress, saved)

    for step, micro_batches in run.steps(plan.after(run.progress.step)):
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
        validates = len(val) > 0 and run.is_due(args.val_interval)
        if validates or step == 0 or run.is_due(args.log_interval):
            metrics = {"loss": runtime.sum(step_loss)[0], "lr": lr, "grad_norm": grad_norm}
            if validates:
                metrics |= validation_loss(model, val_dataset, val, args, runtime)
                score = selection_score(model, tokenizer, task, metrics["val_loss"], runtime)
                run.note_score(score)
            run.write_metrics(**metrics)
        if args.sample_interval and run.is_due(args.sample_interval):
            show_sample(model, tokenizer, args, runtime, chat=True)
    run.finish(dataset.where(plan.samples))


def distillation_flags(parser):
    """Add the flags of distillation."""
    add = parser.group("distillation")
    add("teacher_weight", "full_sft", "teacher weights: a name or a path", metavar="NAME")
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
    if args.teacher_weight == parser.get_default("teacher_weight"):
        args.teacher_weight = None
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
    with report_user_errors(), report_lost_process():
        main()
