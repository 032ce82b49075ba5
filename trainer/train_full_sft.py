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
from trainer.runtime import gradient_sync, parallelize, report_lost_process, start_runtime
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

STAGE = "full_sft"


def main(argv=None):
    parser = training_parser(__doc__, save_weight=STAGE, from_weight="pretrain", epochs=1)
    parser.set_defaults(batch_size=2, max_seq_len=768, warmup_steps=20)
    parser.set_defaults(learning_rate=2.2e-3, sample_prompt="Who are you?")
    conversation_flags(parser)
    args, saved = parse_run(parser, argv)

    # Device, model, data.
    runtime = start_runtime(args)
    model, tokenizer, _ = init_model(args, runtime.device, saved)
    choose_trainable(model, tokenizer, args, saved)
    options = conversation_options(args)
    dataset, train, val_dataset, val = open_data(SFTDataset, args, tokenizer, SFT, **options)
    train += replay(dataset, train, args, tokenizer)
    task = None
    if args.best_metric != "val_loss":
        task = TaskScore(args.best_metric, args.val_data_path)
    print_data_summary(dataset, train, val, args)
    plan = StepPlan(dataset, train, args, runtime)

    # Optimizer and run state.
    model.model.grad_checkpoint = args.grad_checkpoint
    if args.use_compile:
        compile_layers(model)
    ddp_model = parallelize(model, args.parallel, runtime.dtype)
    optimizer = make_optimizer(model, args)
    content = dataset.content + val_dataset.content
    progress = Progress(content, len(train), plan.rows_per_step, len(plan), runtime.world_size)
    progress.row_length = plan.row_length
    run = TrainingRun(args, STAGE, model, tokenizer, optimizer, runtime, progress, saved)

    for step, micro_batches in run.steps(plan.after(run.progress.step)):  # 1. rows
        lr = set_learning_rate(optimizer, step, len(plan), args)
        # A step's loss is divided once, by its supervised tokens over all batches and processes.
        num_supervised, num_tokens = runtime.sum(*token_counts(micro_batches))
        step_loss = 0.0
        for i, batch in enumerate(micro_batches):
            input_ids, labels, position_ids, document_ids = to_device(batch, runtime.device)
            with gradient_sync(ddp_model, enabled=i == len(micro_batches) - 1):
                with runtime.autocast:
                    # 2. forward
                    loss = ddp_model(input_ids, position_ids, document_ids, labels=labels)
                    loss = loss / num_supervised
                # 3. backward
                runtime.backward(loss + router_loss(model, len(micro_batches) * runtime.world_size))
            step_loss += loss.detach()
        # 4. clip, 5. update
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


if __name__ == "__main__":
    with report_user_errors(), report_lost_process():
        main()
