"""Supervised fine-tuning (SFT): train a pretrained model to answer in conversations.

    python trainer/train_full_sft.py --from_weight pretrain           # Tiny World's conversations
    python trainer/train_full_sft.py --from_weight pretrain --data_path mine.jsonl
    python trainer/train_full_sft.py --from_resume 1                  # resumes after Ctrl-C
    torchrun --nproc_per_node 2 trainer/train_full_sft.py             # several processes

--help lists the flags.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import report_user_errors  # first: Ctrl-C while torch loads

# isort: split
from dataset.lm_dataset import SFTDataset
from dataset.step_plan import StepPlan, to_device, token_counts
from dataset.tiny_world import SFT
from evaluation.generate_answers import TaskScore
from model.moe import router_loss
from trainer.flags import conversation_flags, training_parser
from trainer.optimizer import clip_and_step, compile_layers, make_optimizer, set_learning_rate
from trainer.parameters import choose_trainable
from trainer.runtime import gradient_sync, parallelize, start_runtime, torchrun_process
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

STAGE = "full_sft"


def main(argv=None):
    parser = training_parser(__doc__, save_weight=STAGE, from_weight="pretrain", epochs=1)
    parser.set_defaults(batch_size=2, max_seq_len=768, warmup_steps=20)
    parser.set_defaults(learning_rate=2.2e-3, sample_prompt="Who are you?")
    conversation_flags(parser)
    args, saved = parse_run(parser, argv)

    # Device, model, data.
    runtime = start_runtime(args)
    model, tokenizer = init_model(args, runtime.device, saved)
    choose_trainable(model, tokenizer, args, saved)
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

    # Optimizer and run state.
    model.model.grad_checkpoint = args.grad_checkpoint
    if args.use_compile:
        compile_layers(model)
    ddp_model = parallelize(model, args.parallel, runtime.dtype)
    optimizer = make_optimizer(model, args)
    spec = RunSpec(
        data=dataset.file_hashes + val_dataset.file_hashes,
        rows=len(train_samples),
        rows_per_step=plan.rows_per_step,
        total_steps=len(plan),
        processes=runtime.world_size,
        row_length=plan.row_length,
    )
    run = TrainingRun(
        args, STAGE, spec, model, tokenizer, optimizer=optimizer, runtime=runtime, saved=saved
    )

    for step, micro_batches in run.steps(plan.steps_after(run.progress.step)):
        # 1. the rows of the step, as micro-batches
        lr = set_learning_rate(optimizer, step, len(plan), args)
        # A step's loss is divided once, by its supervised tokens over all batches and processes.
        num_supervised, num_tokens = runtime.sum(*token_counts(micro_batches))
        step_loss = 0.0
        for i, batch in enumerate(micro_batches):
            input_ids, labels, position_ids, document_ids = to_device(batch, runtime.device)
            with gradient_sync(ddp_model, enabled=i == len(micro_batches) - 1):
                # 2. forward
                with runtime.autocast:
                    loss = ddp_model(input_ids, position_ids, document_ids, labels=labels)
                # 3. backward
                loss = loss / num_supervised
                runtime.backward(loss + router_loss(model, len(micro_batches) * runtime.world_size))
            step_loss += loss.detach()
        # 4. clip, 5. update
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


if __name__ == "__main__":
    with report_user_errors(), torchrun_process():
        main()
