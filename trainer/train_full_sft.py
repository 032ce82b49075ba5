"""Supervised fine-tuning (SFT): a pretrained model learns to answer in a conversation. Compare with
train_pretrain.py: only the data differs, and which of its tokens are supervised.

    python trainer/train_full_sft.py --from_weight pretrain           # Tiny World's conversations
    python trainer/train_full_sft.py --from_weight pretrain --data_path mine.jsonl
    python trainer/train_full_sft.py --from_resume 1                  # resumes after Ctrl-C
    torchrun --nproc_per_node 2 trainer/train_full_sft.py             # several processes

--help lists the flags.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import report_user_errors  # first: Ctrl-C while torch loads

# isort: split
from tqdm import tqdm

from dataset.lm_dataset import SFTDataset
from dataset.loader import StepPlan, to_device, token_counts
from dataset.tiny_world.generate import SFT
from evaluation.answers import TaskScore
from model.moe import load_balance_loss
from trainer import checkpoint, distributed
from trainer.arguments import conversation_flags, training_parser
from trainer.optimizer import clip_and_step, compile_layers, make_optimizer, set_learning_rate
from trainer.run import Run, begin_run, finish, lock_run, next_command, parse_run
from trainer.signals import StopSignal
from trainer.teacher import with_teacher
from trainer.trainable import choose_trainable
from trainer.trainer_utils import (
    conversation_options,
    describe,
    init_model,
    open_data,
    replay,
    score_of,
    seed_step,
    show_sample,
    validation_loss,
)

STAGE = "full_sft"


def main(argv=None, **defaults):
    parser = training_parser(__doc__, save_weight=STAGE, from_weight="pretrain", epochs=1)
    parser.set_defaults(batch_size=2, max_seq_len=768, warmup_steps=20)
    parser.set_defaults(learning_rate=2.2e-3, sample_prompt="Who are you?", **defaults)
    conversation_flags(parser)
    args, saved = parse_run(parser, argv)

    # Where to compute, what to train, and what to train it on.
    compute = distributed.start(args)
    model, tokenizer, _ = init_model(args, compute.device, saved)
    choose_trainable(model, tokenizer, args, saved)
    lock = lock_run(args, model.config)  # no other run writes the same files
    options = conversation_options(args)
    dataset, train, val_dataset, val = open_data(SFTDataset, args, tokenizer, SFT, **options)
    train += replay(dataset, train, args, tokenizer)
    task = args.best_metric != "val_loss" and TaskScore(args.best_metric, args.val_data_path)
    describe(dataset, train, val, args)
    plan = StepPlan(dataset, train, args, compute)

    # The loss, the optimizer, and how far the run is.
    model.model.grad_checkpoint = args.grad_checkpoint
    if args.use_compile:
        compile_layers(model)
    taught = with_teacher(model, tokenizer, args)
    learner = distributed.parallelise(taught, args.parallel, compute.dtype)
    optimizer = make_optimizer(model, args)
    run = Run(dataset.content + val_dataset.content, len(train), plan.rows_per_step)
    run.processes, run.row_length = compute.world_size, plan.row_length
    run.teacher = getattr(taught, "teacher_hash", None)
    run, log = begin_run(run, args, model, optimizer, compute, len(plan), saved)
    stop = run.finished(len(plan), args.early_stop_patience)
    signal = StopSignal()
    model.train()

    for micro_batches in [] if stop else plan.after(run.step):  # 1. rows
        seed_step(args, run.step, compute.rank)
        lr = set_learning_rate(optimizer, run.step, len(plan), args)
        # The loss of a step is divided once, by the supervised tokens of all batches and processes.
        supervised, tokens = compute.sum(*token_counts(micro_batches))
        loss = 0.0
        for index, batch in enumerate(micro_batches):
            input_ids, labels, position_ids, document_ids = to_device(batch, compute.device)
            with distributed.sync_gradients(learner, index == len(micro_batches) - 1):
                with compute.autocast:
                    # 2. forward
                    part = learner(input_ids, position_ids, document_ids, labels=labels)
                    part = part / supervised
                balance = load_balance_loss(model) / (len(micro_batches) * compute.world_size)
                objective = part + model.config.router_aux_loss_coef * balance
                # 3. backward
                # Processes average their gradients, but the sum is needed: hence the factor.
                compute.scaler.scale(objective * compute.world_size).backward()
            loss = loss + part.detach()
        # 4. clip, 5. update
        grad_norm = clip_and_step(model, optimizer, compute.scaler, args.grad_clip)
        run.advance(tokens, grad_norm)
        log.count(tokens, plan.step_began)

        # Once in a while: validate, log, show a sample, save, stop.
        last = run.step == len(plan)
        validate = (last or run.step % args.val_interval == 0) and val
        if validate or last or run.step == 1 or run.step % args.log_interval == 0:
            entry = {"loss": compute.sum(loss)[0], "lr": lr, "grad_norm": grad_norm}
            entry |= {"epoch": plan.epoch, "data_wait_s": plan.wait_s}
            if validate:
                entry |= validation_loss(model, val_dataset, val, args, compute)
                if run.note_score(score_of(model, tokenizer, task, entry["val_loss"], compute)):
                    checkpoint.save_best(args, model, tokenizer, STAGE, run)
            log.write(run, **entry)
        if not math.isfinite(grad_norm):
            tqdm.write(f"step {run.step} is skipped: its gradient is {grad_norm}")
        if args.sample_interval and run.step % args.sample_interval == 0:
            show_sample(model, tokenizer, args, compute, chat=True)
        stop = run.finished(len(plan), args.early_stop_patience)
        stop = stop or run.bad_steps >= args.max_bad_steps
        stop = stop or compute.sum(signal.received)[0] > 0
        if stop or run.step % args.save_interval == 0:
            checkpoint.save_run(args, model, tokenizer, STAGE, optimizer, compute.scaler, run)
        if stop:
            break
    finish(run, args, model, tokenizer, STAGE, log, lock, dataset.where(plan.samples))
    print(f"next: {next_command(args)}")


if __name__ == "__main__":
    with report_user_errors(), distributed.report_lost_process():
        main()
