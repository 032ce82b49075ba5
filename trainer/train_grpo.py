"""Group relative policy optimization (GRPO): the model answers each question several times, a judge
rewards the answers, and answers that are better than the mean of their group become more probable.

    python trainer/train_grpo.py                              # Tiny World's sums
    python trainer/train_grpo.py --from_weight few --data_path out/sums/practice.jsonl
    python trainer/train_grpo.py --reward mine.py:function    # a reward of your own
    python trainer/train_grpo.py --from_resume 1              # resumes after Ctrl-C

The advantage of an answer is its reward minus the mean of its group. The original GRPO
(arXiv:2402.03300) makes several updates per batch of rollouts, so it clips probability ratios, and
it has a KL term to the initial model. With one update per batch, as in nanochat, the ratios are 1;
the KL term is omitted, as in arXiv:2503.20783.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import choose_from, number, refuse
from common import IGNORE, UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
import numpy as np
import torch
from tqdm import tqdm

from dataset.packing import pad
from dataset.step_plan import batched, to_device
from dataset.tiny_world import PRACTICE, write_missing
from dataset.token_cache import content_hash
from evaluation.rewards import compute_rewards, reward_function
from evaluation.tasks import read_problems
from model.chat_template import render
from model.generation import SamplingParams, generate
from model.moe import router_loss
from model.preference_losses import group_advantages, grpo_loss
from trainer.flags import training_parser
from trainer.optimizer import clip_and_step, compile_layers, make_optimizer, set_learning_rate
from trainer.parameters import choose_trainable
from trainer.runtime import gradient_sync, parallelize, start_runtime, torchrun_process
from trainer.trainer_utils import generating, init_model
from trainer.training_run import RunSpec, TrainingRun, parse_run

STAGE = "grpo"
# With FSDP, each step of `generate` is a collective, and processes need different numbers of them.
UNSUPPORTED = "packing accumulation_steps parallel sample_prompt num_workers strict_data cache_dir"
NO_SIGNAL = """all answers to a question got the same reward, so nothing was learned.
If the rewards are low, begin with weights that solve some of the questions (train_full_sft.py),
take easier ones, or raise --temperature or --group_size; if they are high, take harder questions"""


@dataclass
class Rollout:
    """An answer of the current policy."""

    prompt: list  # token ids
    answer: list  # token ids, with the stop token
    advantage: float

    def __len__(self):
        return len(self.prompt) + len(self.answer)


def sample_answers(model, prompts, args, seed):
    """Sample an answer to each prompt; returns lists of ids, with the stop token. seed: a list of
    int.
    """
    answers = []
    for part in batched(prompts, args.answers_at_once):
        part_seed = int(np.random.SeedSequence([*seed, len(answers)]).generate_state(1)[0])
        params = SamplingParams(args.max_new_tokens, args.temperature, seed=part_seed)
        steps = generate(model, part, params)
        for tokens in zip(*steps, strict=True):  # of one answer
            answers.append([token for token in tokens if token is not None])
    return answers


def as_sample(prompt, answer):
    """Return (input_ids, labels) for a prompt and an answer, lists of ids; the answer is
    supervised.
    """
    return torch.tensor(prompt + answer), torch.tensor([IGNORE] * len(prompt) + answer)


def validate(model, problems, reward, tokenizer, args, runtime):
    """Return {"pass_at_1": mean reward, "pass_at_k": mean over problems of the best reward among k
    answers} on held-out problems. Each process answers its share.
    """
    own_problems = problems[runtime.rank :: runtime.world_size]
    prompts = [problem["prompt_ids"] for problem in own_problems for _ in range(args.pass_k)]
    with generating(model, runtime):
        answers = sample_answers(model, prompts, args, [args.seed, runtime.rank])
    groups = batched(answers, args.pass_k)
    rewards = compute_rewards(reward, own_problems, groups, tokenizer)
    sums = runtime.sum(rewards.mean(dim=1).sum().item(), rewards.amax(dim=1).sum().item())
    return {"pass_at_1": sums[0] / len(problems), "pass_at_k": sums[1] / len(problems)}


def read_questions(args, tokenizer):
    """Read the questions. Returns (training problems, held-out problems, hashes of all files); each
    problem has the ids of its prompt as "prompt_ids". Raises UserError if either list is empty, or
    if a prompt is too long.
    """
    paths = [source.path for source in args.data_path or []]
    if any(source.weight for source in args.data_path or []):
        raise UserError("--data_path: GRPO uses each question once; omit the weights")
    paths = paths or [write_missing(PRACTICE) if args.task == "tiny_world" else None]
    train = [problem for path in paths for problem in read_problems(args.task, path)]
    order = np.random.default_rng(args.seed).permutation(len(train)).tolist()
    num_held_out = 0 if args.val_data_path else math.ceil(args.val_split * len(train))
    held_out = [train[i] for i in order[:num_held_out]]
    if args.val_data_path:
        held_out = read_problems(args.task, args.val_data_path)
    train = [train[i] for i in order[num_held_out:]]
    if not held_out or not train:
        raise UserError("all questions are held out, or none: give --val_split or --val_data_path")
    for problem in train + held_out:
        options = {"add_generation_prompt": True, "tokenizer": tokenizer}
        problem["prompt_ids"], _ = render(problem["prompt"], **options)
    longest = max(len(problem["prompt_ids"]) for problem in train + held_out) + args.max_new_tokens
    if longest > args.max_seq_len:
        limit = f"more than --max_seq_len {args.max_seq_len}"
        raise UserError(f"the longest question and --max_new_tokens: {longest} tokens, {limit}")
    paths += [args.val_data_path] if args.val_data_path else []
    paths += [args.reward.rpartition(":")[0]] if args.reward else []
    return train, held_out, [content_hash(path) for path in paths]


def question_indices_after(step, count, args):
    """Yield the indices of each step's questions, after the first `step` steps."""
    per_epoch = math.ceil(count / args.prompts_per_step)
    while True:
        epoch, index = divmod(step, per_epoch)
        shuffled = np.random.default_rng([args.seed, epoch]).permutation(count).tolist()
        yield batched(shuffled, args.prompts_per_step)[index]
        step += 1


def main(argv=None):
    parser = training_parser(__doc__, save_weight=STAGE, from_weight="full_sft", epochs=1)
    parser.set_defaults(batch_size=32, warmup_steps=5, learning_rate=3e-4, max_seq_len=768)
    parser.set_defaults(min_lr_ratio=0.5, log_interval=1, val_split=0.05, val_interval=20)
    parser.set_defaults(sample_interval=20)
    add, count = parser.group("reinforcement learning"), number(int, 1)
    tasks = choose_from("tiny_world", "gsm8k", "math")
    add("task", "tiny_world", "the task whose judge computes rewards", tasks)
    custom = "a function (prompt, answer, gold) -> number instead"
    add("reward", None, custom, metavar="FILE.py:NAME")
    add("prompts_per_step", 12, "questions per step", count)
    add("group_size", 8, "answers per question", number(int, 2))
    add("temperature", 1.2, "sampling temperature", number(float, 0.01))
    add("max_new_tokens", 48, "maximum length of an answer", count)
    add("answers_at_once", 256, "batch size of the sampling", count)
    add("pass_k", 8, "answers per held-out question", count)
    args, saved = parse_run(parser, argv)
    refuse(args, parser, parser.prog, UNSUPPORTED)
    reward = reward_function(args.task, args.reward)

    # Device, model, questions.
    runtime = start_runtime(args)
    model, tokenizer = init_model(args, runtime.device, saved)
    choose_trainable(model, tokenizer, args, saved)
    problems, held_out, file_hashes = read_questions(args, tokenizer)
    print(f"{len(problems)} questions to train on, {len(held_out)} held out")

    # Optimizer and run state.
    model.model.grad_checkpoint = args.grad_checkpoint
    if args.use_compile:
        compile_layers(model)
    ddp_model = parallelize(model, args.parallel, runtime.dtype)
    optimizer = make_optimizer(model, args)
    total_steps = math.ceil(len(problems) / args.prompts_per_step) * args.epochs
    answers_per_rank = math.ceil(args.prompts_per_step / runtime.world_size) * args.group_size
    max_micro_batches = math.ceil(answers_per_rank / args.batch_size)
    spec = RunSpec(
        data=file_hashes,
        rows=len(problems),
        rows_per_step=args.prompts_per_step,
        total_steps=total_steps,
        processes=runtime.world_size,
    )
    run = TrainingRun(
        args, STAGE, spec, model, tokenizer, optimizer=optimizer, runtime=runtime, saved=saved
    )
    run.log.curves = {name: (name, 1) for name in ("reward", "pass_at_1", "pass_at_k")}
    run.log.unit = "mean reward"
    idle_steps = 0

    for step, indices in run.steps(question_indices_after(run.progress.step, len(problems), args)):
        lr = set_learning_rate(optimizer, step, total_steps, args)
        # 1. Rollouts: sample group_size answers per question.
        questions = [problems[i] for i in indices[runtime.rank :: runtime.world_size]]
        prompts = [question["prompt_ids"] for question in questions for _ in range(args.group_size)]
        with generating(model, runtime):
            answers = sample_answers(model, prompts, args, [args.seed, step, runtime.rank])
        # 2. Rewards and group-relative advantages. Groups with equal rewards have zero advantage.
        groups = batched(answers, args.group_size)
        rewards = compute_rewards(reward, questions, groups, tokenizer)
        advantages = group_advantages(rewards).flatten().tolist()
        has_signal = rewards.amax(dim=1) > rewards.amin(dim=1)
        has_signal = has_signal.repeat_interleave(args.group_size).tolist()
        rollouts = [Rollout(*parts) for parts in zip(prompts, answers, advantages, strict=True)]
        rollouts = [rollout for rollout, useful in zip(rollouts, has_signal, strict=True) if useful]
        rollouts.sort(key=len)  # less padding
        num_supervised = sum(len(rollout.answer) for rollout in rollouts)
        counts = num_supervised, sum(map(len, answers)), len(answers), len(rollouts)
        num_supervised, num_tokens, num_answers, num_rollouts = runtime.sum(*counts)
        # 3. One update.
        micro_batches = batched(rollouts, args.batch_size)
        while runtime.world_size > 1 and len(micro_batches) < max_micro_batches:
            micro_batches.append([])  # all processes need the same number
        if num_supervised == 0:
            micro_batches = []
        step_loss, entropy, grad_norm = 0.0, 0.0, 0.0
        for i, micro_batch in enumerate(micro_batches):
            samples = [as_sample(rollout.prompt, rollout.answer) for rollout in micro_batch]
            advantage = torch.tensor([rollout.advantage for rollout in micro_batch])  # (B,)
            input_ids, labels, _, _ = to_device(pad(samples), runtime.device)
            batch = input_ids, labels, None, None  # right padding: answers don't attend to it
            with gradient_sync(ddp_model, enabled=i == len(micro_batches) - 1):
                with runtime.autocast:
                    loss, batch_entropy = grpo_loss(ddp_model, batch, advantage, args.temperature)
                loss = loss / num_supervised
                runtime.backward(loss + router_loss(model, len(micro_batches) * runtime.world_size))
            step_loss += loss.item()
            entropy += batch_entropy
        if num_supervised:
            grad_norm = clip_and_step(model, optimizer, runtime.scaler, args.grad_clip)
        else:
            idle_steps += 1
        run.end_step(num_tokens, grad_norm)

        # At intervals: validate, log, show a sample.
        should_validate = step == 0 or run.is_due(args.val_interval)
        if should_validate or run.is_due(args.log_interval):
            reward_sum, entropy_sum, loss = runtime.sum(rewards.sum().item(), entropy, step_loss)
            metrics = {"reward": reward_sum / num_answers, "lr": lr}
            metrics |= {"loss": None, "entropy": None, "grad_norm": None}
            metrics["no_signal"] = 1 - num_rollouts / num_answers
            metrics["answer_tokens"] = num_tokens / num_answers
            if num_supervised:
                means = {"entropy": entropy_sum / num_supervised, "grad_norm": grad_norm}
                metrics |= means | {"loss": loss}
            if should_validate:
                metrics |= validate(model, held_out, reward, tokenizer, args, runtime)
                at = f"step {step + 1} of {total_steps}: of held-out questions"
                pass_at_1, pass_at_k = metrics["pass_at_1"], metrics["pass_at_k"]
                tqdm.write(f"{at}, pass_at_1 {pass_at_1:.3f}, pass_at_k {pass_at_k:.3f}")
                run.save_if_best(pass_at_1)
            run.write_metrics(**metrics)
        if args.sample_interval and run.is_due(args.sample_interval) and questions:
            question = questions[0]["prompt"][-1]["content"]
            tqdm.write(f"  {question} -> {tokenizer.decode(answers[0])}: {rewards[0, 0]:g}")
    if idle_steps * 2 > run.log.steps:
        print(f"in {idle_steps} of {run.log.steps} steps no group had a signal: {NO_SIGNAL}")
    run.finish(last_samples="the latest answers")


if __name__ == "__main__":
    with report_user_errors(), torchrun_process():
        main()
