"""Direct preference optimization (DPO, arXiv:2305.18290): of two answers to the same prompt, raise
the log-ratio of the chosen one to the frozen reference model over that of the rejected one.

    python trainer/train_dpo.py                               # Tiny World's pairs: short answers
    python trainer/train_dpo.py --from_weight full_sft --data_path mine.jsonl
    python trainer/train_dpo.py --from_resume 1               # resumes after Ctrl-C

Compared with train_full_sft.py, the data are pairs, the loss compares two answers, and the
reference log-probabilities are computed once before training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import number, refuse
from common import UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
import numpy as np
import torch
from tqdm import tqdm

from dataset.preference_pairs import PairDataset, pair_counts
from dataset.step_plan import StepPlan, batched, batches, epoch_plan, flatten, to_device
from dataset.tiny_world import PAIRS
from model.generation import eval_mode
from model.moe import router_loss
from model.preference_losses import dpo_loss, pair_log_probabilities
from trainer.flags import training_parser
from trainer.optimizer import clip_and_step, compile_layers, make_optimizer, set_learning_rate
from trainer.parameters import choose_trainable
from trainer.runtime import gradient_sync, parallelize, start_runtime, torchrun_process
from trainer.trainer_utils import init_model, open_data, print_data_summary, show_sample
from trainer.training_run import RunSpec, TrainingRun, parse_run

STAGE = "dpo"
METRICS = ("loss", "accuracy", "margin", "logp_chosen", "logp_rejected")  # means over pairs


@torch.no_grad()
def reference_log_probs(model, dataset, args, runtime):
    """Return the reference log-probabilities of all pairs of a dataset, (n, 2), on the CPU. Each
    process computes its share.
    """
    rows = [[sample] for sample in range(len(dataset))]
    plan = batched(rows, args.batch_size)[runtime.rank :: runtime.world_size]
    logps = torch.zeros(len(dataset), 2)
    loader = batches(dataset, plan, args, runtime.device)
    with eval_mode(model), runtime.autocast:
        for micro_batch, batch in zip(plan, loader, strict=True):
            batch = to_device(batch, runtime.device)
            logps[flatten(micro_batch)] = pair_log_probabilities(model, batch).cpu()
    return torch.tensor(runtime.sum(*logps.flatten().tolist())).view(-1, 2)


@torch.no_grad()
def validate(model, dataset, samples, reference, args, runtime):
    """Return {"val_loss", "val_accuracy", ...}: METRICS of held-out pairs. Each process computes
    its share.
    """
    steps = epoch_plan(dataset, samples, args, 0, runtime.rank, runtime.world_size)
    plan = flatten(steps)  # micro-batches
    sums = torch.zeros(len(METRICS))
    loader = batches(dataset, plan, args, runtime.device)
    with eval_mode(model), runtime.autocast:
        for micro_batch, batch in zip(plan, loader, strict=True):
            policy = pair_log_probabilities(model, to_device(batch, runtime.device))
            _, batch_sums = dpo_loss(policy, reference[flatten(micro_batch)], args.dpo_beta)
            sums += batch_sums.cpu()
    sums = runtime.sum(*sums.tolist())
    return {f"val_{name}": total / len(samples) for name, total in zip(METRICS, sums, strict=True)}


def main(argv=None):
    parser = training_parser(__doc__, save_weight=STAGE, from_weight="full_sft", epochs=1)
    parser.set_defaults(batch_size=8, max_seq_len=768, warmup_steps=10, learning_rate=2e-4)
    parser.set_defaults(packing=False, val_split=0.1, val_interval=20, sample_prompt="Who are you?")
    add = parser.group("preferences")
    beta = "strength of the KL constraint to the reference (beta)"
    add("dpo_beta", 0.1, beta, number(float, 0, above=True))
    sft = "weight of the SFT loss on chosen answers, which keeps them probable"
    add("sft_weight", 0.0, sft, number(float, 0))
    args, saved = parse_run(parser, argv)
    refuse(args, parser, parser.prog, "packing")

    # Device, model, data.
    runtime = start_runtime(args)
    model, tokenizer = init_model(args, runtime.device, saved)
    choose_trainable(model, tokenizer, args, saved)
    dataset, train_samples, val_dataset, val_samples = open_data(
        PairDataset, args, tokenizer, PAIRS
    )
    print_data_summary(dataset, train_samples, val_samples, args)
    plan = StepPlan(dataset, train_samples, args, runtime)

    # Reference, optimizer and run state.
    spec = RunSpec(
        data=dataset.file_hashes + val_dataset.file_hashes,
        rows=len(train_samples),
        rows_per_step=plan.rows_per_step,
        total_steps=len(plan),
        processes=runtime.world_size,
    )
    datasets = [dataset] if val_dataset is dataset else [dataset, val_dataset]
    references = None
    if not saved:
        references = [reference_log_probs(model, part, args, runtime) for part in datasets]
    model.model.grad_checkpoint = args.grad_checkpoint
    if args.use_compile:
        compile_layers(model)
    ddp_model = parallelize(model, args.parallel, runtime.dtype)
    optimizer = make_optimizer(model, args)
    run = TrainingRun(
        args, STAGE, spec, model, tokenizer, optimizer=optimizer, runtime=runtime, saved=saved
    )
    run.progress.reference = references or run.progress.reference or []
    if [len(log_probs) for log_probs in run.progress.reference] != [len(part) for part in datasets]:
        raise UserError("the checkpoint has no reference for this data; start a new run")
    train_reference, val_reference = run.progress.reference[0], run.progress.reference[-1]
    run.log.curves = {f"-log p, {name}": (f"logp_{name}", -1) for name in ("chosen", "rejected")}
    run.log.unit = "nats per answer"

    for step, micro_batches in run.steps(plan.steps_after(run.progress.step)):
        lr = set_learning_rate(optimizer, step, len(plan), args)
        # A step's losses are divided once, by its pairs and by its tokens of chosen answers, over
        # all batches and processes.
        batch_counts = np.array([pair_counts(batch) for batch in micro_batches])  # (batches, 3)
        num_pairs, num_chosen, num_tokens = runtime.sum(*batch_counts.sum(axis=0))
        step_sums = torch.zeros(len(METRICS))
        # plan.step_samples are the samples of the current step.
        step_reference = train_reference[plan.step_samples].split(batch_counts[:, 0].tolist())
        for i, (batch, reference) in enumerate(zip(micro_batches, step_reference, strict=True)):
            with gradient_sync(ddp_model, enabled=i == len(micro_batches) - 1):
                with runtime.autocast:
                    policy = pair_log_probabilities(ddp_model, to_device(batch, runtime.device))
                loss, sums = dpo_loss(policy, reference, args.dpo_beta)
                sft_loss = -policy[:, 0].sum() / max(1, num_chosen)
                loss = loss / num_pairs + args.sft_weight * sft_loss
                runtime.backward(loss + router_loss(model, len(micro_batches) * runtime.world_size))
            step_sums += sums.cpu()
        grad_norm = clip_and_step(model, optimizer, runtime.scaler, args.grad_clip)
        run.end_step(num_tokens, grad_norm)

        # At intervals: validate, log, show a sample.
        should_validate = len(val_samples) > 0 and run.is_due(args.val_interval)
        if should_validate or step == 0 or run.is_due(args.log_interval):
            means = [total / num_pairs for total in runtime.sum(*step_sums.tolist())]
            metrics = dict(zip(METRICS, means, strict=True)) | {"lr": lr, "grad_norm": grad_norm}
            if should_validate:
                metrics |= validate(model, val_dataset, val_samples, val_reference, args, runtime)
                accuracy = f"{metrics['val_accuracy']:.0%} on {len(val_samples)} held-out pairs"
                tqdm.write(f"  preference accuracy {accuracy}")
                run.save_if_best(-metrics["val_loss"])
            run.write_metrics(**metrics)
        if args.sample_interval and run.is_due(args.sample_interval):
            show_sample(model, tokenizer, args, runtime, chat=True)
    run.finish(last_samples=dataset.file_lines(plan.step_samples))


if __name__ == "__main__":
    with report_user_errors(), torchrun_process():
        main()
