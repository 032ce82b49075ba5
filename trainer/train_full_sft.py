"""Supervised fine-tuning (SFT): a model that can continue text learns to answer in a conversation.
Compare with train_pretrain.py: only the data differs, and what of it carries a loss.

    python trainer/train_full_sft.py --from_weight pretrain           # Tiny World's conversations
    python trainer/train_full_sft.py --from_weight pretrain --data_path mine.jsonl
    python trainer/train_full_sft.py --from_resume 1                  # goes on after Ctrl-C
    torchrun --nproc_per_node 2 trainer/train_full_sft.py             # several processes
"""

import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import report_user_errors  # first: Ctrl-C while torch loads

# isort: split
import torch
from tqdm import tqdm

from dataset.chat_template import render
from dataset.formats import KEYS
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.loader import Source, batches, epoch_plan, mix, split_samples
from dataset.tiny_world.generate import PRETRAIN, SFT, write_missing
from evaluation.run_eval import TASKS, Exam
from model.generation import complete
from model.loss import supervised_tokens
from model.moe import load_balance_loss
from trainer import checkpoint, distributed
from trainer.arguments import number, one_of, parse_training_args, reading, training_parser
from trainer.metrics import MetricsLog, step_profiler
from trainer.optimizer import compile_layers, make_optimizer
from trainer.run import Run, go_on, report_end
from trainer.signals import RunLock, StopSignal
from trainer.teacher import with_teacher
from trainer.trainer_utils import (
    choose_what_learns,
    describe,
    init_model,
    keep_freed_memory,
    learning_rate,
    pick_device,
    pick_dtype,
    seed_step,
    validation_loss,
)


def main(argv=None):
    parser = training_parser(
        __doc__.splitlines()[0],
        save_weight="full_sft",
        from_weight="pretrain",
        epochs=1,
        batch_size=3,
        max_seq_len=256,
        learning_rate=4e-4,
        sample_prompt="Who are you?",
    )
    replay = "pretraining text mixed in against forgetting; default: Tiny World's with its data"
    parser.add_argument("--replay_path", type=Path, metavar="FILE.jsonl", help=replay)
    add = parser.add_argument
    add("--replay_share", type=number(float, 0), default=0.8, help="its rows per conversation")
    form = "of the data: conversations|openai|sharegpt|...; default: that of a file's first record"
    add("--data_format", type=one_of(*KEYS), help=form)
    overlong = "what happens to a conversation longer than --max_seq_len: truncate|drop|split"
    add("--overlong", type=one_of("truncate", "drop", "split"), default="truncate", help=overlong)
    best = f"what makes weights the best: val_loss, or a score: {'|'.join(TASKS)}"
    add("--best_metric", type=one_of("val_loss", *TASKS), default="val_loss", help=best)
    think = "whose reasoning is kept: that of all answers, the last, or none"
    add("--keep_think", type=one_of("all", "last", "none"), default="all", help=think)
    args, resume = parse_training_args(parser, argv)

    # Where to compute, and with whom. Weights stay fp32; autocast computes in dtype.
    keep_freed_memory()
    device = pick_device(args.device, args.deterministic)
    rank, world_size = distributed.start("nccl" if device.type == "cuda" else "gloo")
    model, tokenizer, _ = init_model(args, device, resume)
    if args.from_weight not in (None, "none") or resume:
        choose_what_learns(model, tokenizer, args)
    name = checkpoint.file_name(args.save_weight, model.config)
    folder = args.save_dir / "checkpoints"
    lock = RunLock(folder / f"{name}.lock") if rank == 0 else None
    dtype = pick_dtype(args, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # What to learn from.
    sources = args.data_path or [Source(SFT)]
    replay_path = args.replay_path or (None if args.data_path else PRETRAIN)
    how = {"overlong": args.overlong, "keep_think": args.keep_think, **reading(args, rank)}
    how["data_format"] = args.data_format
    with distributed.first_process_first():
        paths = [write_missing(source.path) for source in sources]
        data = eval_data = SFTDataset(paths, tokenizer, **how)
        train_rows, eval_rows = split_samples(data, args.eval_split, args.seed)
        if args.eval_data_path:
            eval_data = SFTDataset(args.eval_data_path, tokenizer, **how)
            train_rows, eval_rows = range(len(data)), range(len(eval_data))
        train_rows = mix(train_rows, data, sources, args.seed)
        if replay_path and args.replay_share:
            documents = PretrainDataset(
                write_missing(replay_path), tokenizer, **reading(args, rank)
            )
            train_rows += data.mix_in(documents, args.replay_share, args.seed)
    exam = args.best_metric != "val_loss" and Exam(args.best_metric, args.eval_data_path)
    describe(data, train_rows, eval_rows, args)

    # What learns, and how far it is.
    model.model.grad_checkpoint = args.grad_checkpoint
    if args.use_compile:
        compile_layers(model)
    taught = with_teacher(model, tokenizer, args)
    runner = distributed.parallelise(taught, args.parallel, dtype)
    optimizer = make_optimizer(model, args)
    rows_per_step = args.batch_size * args.accumulation_steps * world_size
    content = data.content + eval_data.content
    teacher = getattr(taught, "teacher_hash", None)
    run = Run(content, len(train_rows), rows_per_step, world_size, teacher)
    if resume:
        run = go_on(run, resume, args, optimizer, scaler)
    if rank == 0:
        checkpoint.keep_previous(args, name)
    steps_per_epoch = len(epoch_plan(data, train_rows, args, 0, rank, world_size))
    total_steps = steps_per_epoch * args.epochs
    log = MetricsLog(args.save_dir / "logs" / f"{name}.jsonl", run.log_bytes, silent=rank > 0)
    if run.step >= total_steps or run.stalled(args.early_stop_patience):
        # A kill may have come between the last checkpoint and the weights, so they are written.
        place = args.save_dir / f"{name}.pth"
        if not (args.save_best_at_end and run.best_score is not None):  # else `complete` does
            checkpoint.save_weights(place, args, model, tokenizer, "full_sft", run)
        if rank == 0 and run.bad_steps < args.max_bad_steps:
            checkpoint.complete(args, name, run)
            log.draw(args.loss_curve)
        print(f"This run is finished: {run.step} of {total_steps} steps. weights: {place}")
        return

    profiler = step_profiler(log.path, args.profile and rank == 0)
    stop = StopSignal()
    bar = tqdm(total=total_steps, initial=run.step, unit="step", disable=rank > 0 or None)
    start, start_tokens, data_wait = time.perf_counter(), run.tokens, 0.0
    warm, ended = not args.use_compile, False
    model.train()
    for epoch in range(run.step // steps_per_epoch, args.epochs):
        plan = epoch_plan(data, train_rows, args, epoch, rank, world_size)
        plan = plan[run.step - epoch * steps_per_epoch :]
        loader = batches(data, [rows for rows_of_step in plan for rows in rows_of_step], args)
        for micro_batches in plan:
            seed_step(args, run.step, rank)
            rate = learning_rate(run.step, total_steps, args)
            for group in optimizer.param_groups:
                group["lr"] = rate

            # All micro-batches of the step, to know first how many tokens its loss is divided by.
            began = time.perf_counter()
            fetched = [next(loader) for _ in micro_batches]
            data_wait += time.perf_counter() - began
            supervised = sum(supervised_tokens(labels) for _, labels, *_ in fetched)
            tokens = sum(int(data.lengths[rows].sum()) for rows in micro_batches)
            supervised, tokens = distributed.all_reduce_sum(supervised, tokens, device=device)

            loss = 0.0
            for index, batch in enumerate(fetched):
                input_ids, labels, *where = (part.to(device) for part in batch)
                with distributed.sync_gradients(runner, index == len(fetched) - 1):
                    with autocast:
                        share = runner(input_ids, *where, labels=labels) / supervised
                    objective = share
                    if model.config.use_moe:
                        balance = load_balance_loss(model) / (len(fetched) * world_size)
                        objective = share + model.config.router_aux_loss_coef * balance
                    # The processes take the mean of their gradients; the sum is wanted.
                    scaler.scale(objective * world_size).backward()
                loss = loss + share.detach()

            scaler.unscale_(optimizer)
            longest = args.grad_clip or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), longest)
            grad_norm = distributed.whole(grad_norm).item()
            run.step, run.tokens = run.step + 1, run.tokens + int(tokens)
            if math.isfinite(grad_norm):
                scaler.step(optimizer)
                run.bad_steps = 0
            else:
                tqdm.write(f"step {run.step} is left out: its gradient is {grad_norm}")
                run.bad_steps += 1
            scaler.update()
            optimizer.zero_grad()
            if not warm:
                tqdm.write(f"the first step, compiling, took {time.perf_counter() - start:.0f} s")
                start, start_tokens, warm = time.perf_counter(), run.tokens, True

            # Log, validate, show, save: whatever is due at this step.
            last = run.step == total_steps
            evaluate = (run.step % args.eval_interval == 0 or last) and eval_rows
            if evaluate or last or run.step % args.log_interval == 0 or run.step == 1:
                (loss,) = distributed.all_reduce_sum(loss, device=device)
                speed = (run.tokens - start_tokens) / (time.perf_counter() - start)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", tokens_per_s=f"{speed:.0f}")
                if run.step == 1:
                    new = math.log(model.config.vocab_size) + 0.5
                    tqdm.write(f"first loss {loss:.2f}; new weights: near ln V + 1/2 = {new:.2f}")
                val_loss, by_source = None, {}
                if evaluate:
                    val_loss, by_source = validation_loss(
                        model, eval_data, eval_rows, args, device, autocast, rank, world_size
                    )
                    tqdm.write(f"step {run.step} of {total_steps}: loss {loss:.3f}, ", end="")
                    tqdm.write(f"validation {val_loss:.3f}, {speed:,.0f} tokens/s")
                    score = -val_loss
                    if exam:
                        score = exam.score(model, tokenizer) / world_size
                        (score,) = distributed.all_reduce_sum(
                            score, device=device
                        )  # all agree on it
                        tqdm.write(f"  {args.best_metric} {score:.1%}")
                    if run.judge(score):
                        best = folder / f"{name}_best.pth"
                        checkpoint.save_weights(best, args, model, tokenizer, "full_sft", run)
                run.log_bytes = log.write(
                    step=run.step,
                    epoch=epoch,
                    tokens=run.tokens,
                    loss=loss,
                    val_loss=val_loss,
                    **by_source,
                    lr=rate,
                    grad_norm=grad_norm,
                    tokens_per_s=speed,
                    data_wait_s=data_wait,
                )
            if args.sample_interval and run.step % args.sample_interval == 0:
                question = [{"role": "user", "content": args.sample_prompt}]
                prompt, _ = render(question, add_generation_prompt=True, tokenizer=tokenizer)
                (answer,) = complete(model, [prompt], max_new_tokens=60, temperature=0)
                tqdm.write(f"  {args.sample_prompt} -> {tokenizer.decode(answer)}")
            asked = distributed.all_reduce_sum(stop.received, device=device)[0] > 0
            hopeless = run.bad_steps >= args.max_bad_steps
            done = last or run.stalled(args.early_stop_patience)
            ended = done or asked or hopeless
            if ended or run.step % args.save_interval == 0:
                checkpoint.save_run(args, model, tokenizer, "full_sft", optimizer, scaler, run)
            bar.update()
            profiler.step()
            if ended:
                break
        if ended:
            break
    bar.close()
    distributed.barrier()
    distributed.end()
    if rank > 0:
        return
    if done and not hopeless:
        checkpoint.complete(args, name, run)
    lock.release()
    report_end(args, run, total_steps, data.where(sum(micro_batches, [])))
    print(f"weights: {args.save_dir / name}.pth\nloss curve: {log.draw(args.loss_curve)}")
    print("next: python eval_llm.py")


if __name__ == "__main__":
    with report_user_errors(), distributed.ending_in_plain_words():
        main()
