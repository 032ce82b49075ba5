"""Direct preference optimisation (DPO, arXiv:2305.18290): of two answers to the same conversation,
one becomes more probable and the other less, compared with the model before.

    python trainer/train_dpo.py                               # Tiny World's pairs: short answers
    python trainer/train_dpo.py --from_weight full_sft --data_path mine.jsonl
    python trainer/train_dpo.py --from_resume 1               # resumes after Ctrl-C

The loop is that of train_full_sft.py; what differs is the loss, which compares two answers.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import number
from common import UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
import torch
from tqdm import tqdm

from dataset.loader import StepPlan, batches, cut, epoch_plan, flat, to_device
from dataset.pairs import PairDataset, counts
from dataset.tiny_world.generate import PAIRS
from model.generation import eval_mode
from model.moe import load_balance_loss
from model.policy import pair_log_probabilities, preference_loss
from trainer import checkpoint, distributed
from trainer.arguments import training_parser
from trainer.optimizer import clip_and_step, compile_layers, make_optimizer, set_learning_rate
from trainer.run import Run, begin_run, finish, lock_run, next_command, parse_run, refuse
from trainer.signals import StopSignal
from trainer.trainable import choose_trainable
from trainer.trainer_utils import describe, init_model, open_data, seed_step, show_sample

STAGE = "dpo"
FIGURES = ("loss", "accuracy", "margin", "logp_chosen", "logp_rejected")  # means over pairs


@torch.no_grad()
def reference_of(model, dataset, args, compute):
    """The log-probabilities of all pairs of a dataset before the training, (n, 2), on the CPU. Each
    process computes its share.
    """
    rows = [[sample] for sample in range(len(dataset))]
    plan = cut(rows, args.batch_size)[compute.rank :: compute.world_size]
    found = torch.zeros(len(dataset), 2)
    mine = batches(dataset, plan, args, compute.device)
    with eval_mode(model), compute.autocast:
        for part, batch in zip(plan, mine, strict=True):
            found[flat(part)] = pair_log_probabilities(
                model, to_device(batch, compute.device)
            ).cpu()
    return torch.tensor(compute.sum(*found.flatten().tolist())).view(-1, 2)


@torch.no_grad()
def validate(model, dataset, samples, reference, args, compute):
    """{"val_loss", "val_accuracy", ...}: the FIGURES of pairs that are held out of training. Each
    process computes its share.
    """
    steps = epoch_plan(dataset, samples, args, 0, compute.rank, compute.world_size)
    plan, sums = [micro_batch for step in steps for micro_batch in step], torch.zeros(len(FIGURES))
    found = batches(dataset, plan, args, compute.device)
    with eval_mode(model), compute.autocast:
        for of_batch, batch in zip(plan, found, strict=True):
            policy = pair_log_probabilities(model, to_device(batch, compute.device))
            sums += preference_loss(policy, reference[flat(of_batch)], args.dpo_beta)[1].cpu()
    sums = compute.sum(*sums.tolist())
    return {
        f"val_{name}": figure / len(samples) for name, figure in zip(FIGURES, sums, strict=True)
    }


def main(argv=None):
    parser = training_parser(__doc__, save_weight=STAGE, from_weight="full_sft", epochs=1)
    parser.set_defaults(batch_size=8, max_seq_len=768, warmup_steps=10, learning_rate=2e-4)
    parser.set_defaults(packing=False, val_split=0.1, val_interval=20, sample_prompt="Who are you?")
    add = parser.group("preferences")
    beta = "how much the model may change: less with a larger one"
    add("dpo_beta", 0.1, beta, number(float, 0, above=True))
    sft = "weight of the SFT loss of the chosen answers, against both becoming improbable"
    add("sft_weight", 0.0, sft, number(float, 0))
    args, saved = parse_run(parser, argv)
    refuse(args, parser, "packing teacher_weight offline_dir")

    # Where to compute, what to train, and what to train it on.
    compute = distributed.start(args)
    model, tokenizer, _ = init_model(args, compute.device, saved)
    choose_trainable(model, tokenizer, args, saved)
    lock = lock_run(args, model.config)  # no other run writes the same files
    dataset, train, val_dataset, val = open_data(PairDataset, args, tokenizer, PAIRS)
    describe(dataset, train, val, args)
    plan = StepPlan(dataset, train, args, compute)

    # The reference, the optimizer, and how far the run is.
    run = Run(dataset.content + val_dataset.content, len(train), plan.rows_per_step)
    run.processes = compute.world_size
    parts = [dataset] if val_dataset is dataset else [dataset, val_dataset]
    if not saved:
        run.reference = [reference_of(model, part, args, compute) for part in parts]
    model.model.grad_checkpoint = args.grad_checkpoint
    if args.use_compile:
        compile_layers(model)
    learner = distributed.parallelise(model, args.parallel, compute.dtype)
    optimizer = make_optimizer(model, args)
    run, log = begin_run(run, args, model, optimizer, compute, len(plan), saved)
    if list(map(len, run.reference or [])) != list(map(len, parts)):
        raise UserError("the checkpoint has no reference for this data; start a new run")
    reference, val_reference = run.reference[0], run.reference[-1]
    log.curves = {f"-log p, {name}": (f"logp_{name}", -1) for name in ("chosen", "rejected")}
    log.unit = "nats per answer"
    stop = run.finished(len(plan), args.early_stop_patience)
    signal = StopSignal()
    model.train()

    for micro_batches in [] if stop else plan.after(run.step):
        seed_step(args, run.step, compute.rank)
        lr = set_learning_rate(optimizer, run.step, len(plan), args)
        # The losses of a step are divided once, by the pairs, and by the tokens of the chosen
        # answers, of all batches and processes.
        pairs, chosen, tokens = zip(*map(counts, micro_batches), strict=True)
        all_pairs, all_chosen, tokens = compute.sum(sum(pairs), sum(chosen), sum(tokens))
        figures = torch.zeros(len(FIGURES))
        references = reference[plan.samples].split(pairs)
        for index, (batch, before) in enumerate(zip(micro_batches, references, strict=True)):
            with distributed.sync_gradients(learner, index == len(micro_batches) - 1):
                with compute.autocast:
                    policy = pair_log_probabilities(learner, to_device(batch, compute.device))
                loss, sums = preference_loss(policy, before, args.dpo_beta)
                imitation = -policy[:, 0].sum() / max(1, all_chosen)
                balance = load_balance_loss(model) / (len(micro_batches) * compute.world_size)
                objective = loss / all_pairs + args.sft_weight * imitation
                objective += model.config.router_aux_loss_coef * balance
                # Processes average their gradients, but the sum is needed: hence the factor.
                compute.scaler.scale(objective * compute.world_size).backward()
            figures += sums.cpu()
        grad_norm = clip_and_step(model, optimizer, compute.scaler, args.grad_clip)
        run.advance(tokens, grad_norm)
        log.count(tokens, plan.step_began)

        # Once in a while: validate, log, show a sample, save, stop.
        last = run.step == len(plan)
        validates = (last or run.step % args.val_interval == 0) and val
        if validates or last or run.step == 1 or run.step % args.log_interval == 0:
            means = [figure / all_pairs for figure in compute.sum(*figures.tolist())]
            entry = dict(zip(FIGURES, means, strict=True)) | {"lr": lr, "grad_norm": grad_norm}
            entry |= {"epoch": plan.epoch, "data_wait_s": plan.wait_s}
            if validates:
                entry |= validate(model, val_dataset, val, val_reference, args, compute)
                share = f"{entry['val_accuracy']:.0%} of {len(val)} held-out pairs"
                tqdm.write(f"  the chosen answer has gained more in {share}")
                if run.note_score(-entry["val_loss"]):
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
