"""GRPO: advantage and loss by hand, exact resume, rewards of one's own, controls."""

import re
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch

from common import IGNORE, IM_END, UserError
from dataset.packing import pad
from evaluation.rewards import compute_rewards, reward_function
from model.causal_lm import CausalLM, ModelConfig
from model.preference_losses import group_advantages, grpo_loss
from model.tokenizer import load_tokenizer
from model.weights import load
from tests.conftest import ROOT, chat, run, run_here, torchrun, write_jsonl
from tests.test_errors import refused
from tests.test_training import assert_equal, assert_like_one, log, stopped_and_resumed, weights
from trainer import train_grpo
from trainer.train_grpo import as_sample, sample_answers

TOKENIZER = load_tokenizer()
REWARDS = """
def short(prompt, answer, gold):
    return -len(answer) / 100

def letters(prompt, answer, gold):
    return answer.count("e") / 10

def nan(prompt, answer, gold):
    return float("nan")

def text(prompt, answer, gold):
    return "good"

def fails(prompt, answer, gold):
    return gold["x"]

def same(prompt, answer, gold):
    return 1.0
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with questions.jsonl, 30 of them, and rewards.py."""
    folder = tmp_path_factory.mktemp("grpo")
    questions = [
        {
            "category": "sum",
            "conversations": [{"role": "user", "content": f"What is {i}?"}],
            "expected": ["number"],
        }
        for i in range(30)
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def grpo(trained, files, out, *more, reward="letters"):
    flags = ["--from_weight", trained / "full_sft_32.pth", "--save_dir", out, "--device", "cpu"]
    flags += ["--data_path", files / "questions.jsonl", "--dtype", "fp32", "--val_interval", 3]
    flags += ["--reward", f"{files / 'rewards.py'}:{reward}"] if reward else []
    flags += ["--prompts_per_step", 6, "--group_size", 4, "--max_new_tokens", 12, "--pass_k", 2]
    return [str(word) for word in [*flags, "--learning_rate", "1e-3", *more]]


def test_the_advantage_is_the_reward_above_the_mean_of_the_group():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]])
    assert group_advantages(rewards).tolist() == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


def test_the_loss_of_two_groups_of_three_answers_is_that_by_hand():
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(hidden_size=48, num_hidden_layers=2))
    prompts = [[1, 20, 21], [1, 30]]
    answers = [[[40, 2], [41, 42, 2], [43]], [[44, 2], [45, 46, 47, 2], [48, 2]]]
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0]]))
    samples = [as_sample(p, a) for p, group in zip(prompts, answers, strict=True) for a in group]
    loss, entropy = grpo_loss(model, pad(samples), advantages.flatten(), 1.3)
    expected, spread = 0.0, 0.0
    for prompt, group, own in zip(prompts, answers, advantages, strict=True):
        for answer, advantage in zip(group, own, strict=True):
            ids = torch.tensor([prompt + answer])
            chances = (model(ids)[0] / 1.3).softmax(dim=-1)
            for place in range(len(prompt), len(prompt) + len(answer)):
                p = chances[place - 1]
                expected -= advantage * p[ids[0, place]].log()
                spread -= (p * p.log()).sum().item()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert entropy == pytest.approx(spread, rel=1e-4)
    # The gradient moves each answer's log-probability into the direction of its advantage.
    one = grpo_loss(model, pad(samples, 20, 9), advantages.flatten(), 1.3)[0]  # as on a GPU
    for found, other in zip(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(one, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(found, other, atol=1e-4, rtol=1e-4)


def test_rewards_are_those_of_the_judge_or_of_ones_own_function(files):
    problem = {"prompt": [{"role": "user", "content": "27+15?"}], "gold": ["#### 42"]}
    encode = TOKENIZER.encode
    groups = [[[*encode("27+15: 42.\n#### 42").ids, IM_END], [*encode("#### 41").ids, IM_END]]]
    rewards = compute_rewards(reward_function("tiny_world"), [problem], groups, TOKENIZER)
    assert rewards.tolist() == [[1.0, 0.0]]
    own = reward_function("tiny_world", f"{files / 'rewards.py'}:short")
    assert compute_rewards(own, [problem], groups, TOKENIZER)[0, 1] == pytest.approx(-0.07)
    for name in ("nan", "text", "fails"):
        own = reward_function("tiny_world", f"{files / 'rewards.py'}:{name}")
        with pytest.raises(UserError, match=r"an answer to '27\+15\?'.*finite number"):
            compute_rewards(own, [problem], groups, TOKENIZER)
    for text in ("rewards.py", f"{files / 'none.py'}:x", f"{files / 'rewards.py'}:none"):
        with pytest.raises(UserError, match="give FILE.py:function"):
            reward_function("tiny_world", text)


def test_the_rewards_of_the_tutorial_are_what_it_says(monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])  # the folder of a reward is added to it
    careful, brief = (
        reward_function("tiny_world", f"{ROOT / 'bench/rewards.py'}:{name}")
        for name in ("careful", "brief")
    )
    problem = {"prompt": [{"role": "user", "content": "What is 7 + 5?"}], "gold": ["#### 12"]}
    answer = "7+5=12.\n#### 12"  # 15 characters
    assert careful(problem, answer) == pytest.approx(1 + 0.2 - 0.015)
    assert careful(problem, answer + "\nvery 1") == pytest.approx(-0.5 - 0.022)
    assert brief(problem, answer) == pytest.approx(1 - 15 / 10)
    assert brief(problem, "") == 0


def test_answers_are_drawn_by_the_seed_and_end_with_their_stop_token():
    torch.manual_seed(3)
    model = CausalLM(ModelConfig(hidden_size=32, num_hidden_layers=1)).eval()
    with torch.no_grad():
        model.lm_head.weight[IM_END] *= 3
    args = Namespace(max_new_tokens=9, temperature=1.0, answers_at_once=3)
    prompts = [[1, 20 + i] for i in range(7)]
    one, same = (sample_answers(model, prompts, args, [1, 2]) for _ in range(2))
    assert one == same != sample_answers(model, prompts, args, [1, 3])
    assert all(0 < len(ids) <= 9 for ids in one)
    for ids in one:
        assert IM_END not in ids[:-1] and (len(ids) == 9 or ids[-1] in (0, IM_END))


def test_a_reward_that_can_be_earned_grows(trained, files, tmp_path):
    train_grpo.main(grpo(trained, files, tmp_path, "--epochs", 5, "--learning_rate", "1e-2"))
    lines = log(tmp_path, "grpo_32")
    first, last = (sum(line["reward"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    assert last > first + 0.1
    assert lines[0]["pass_at_1"] <= lines[0]["pass_at_k"] and lines[-1]["pass_at_1"] > first
    assert "pass_at_1" in (tmp_path / "logs/grpo_32_loss.svg").read_text()
    trained_length = load(tmp_path / "grpo_32.pth")["training"]["max_seq_len"]
    assert trained_length == 768  # up to there, a chat with these weights forgets nothing


def test_equal_rewards_change_nothing(trained, files, tmp_path, capsys):
    """The control: every group without a signal is counted, and no step is made."""
    train_grpo.main(grpo(trained, files, tmp_path, reward="same"))
    lines = log(tmp_path, "grpo_32")
    assert {line["no_signal"] for line in lines} == {1.0}
    # Nothing was computed: null and not 0, and a sentence says what to do.
    for name in ("loss", "entropy", "grad_norm"):
        assert {line[name] for line in lines} == {None}
    printed = capsys.readouterr().out
    assert f"in {len(lines)} of {len(lines)} steps no group had a signal: all answers" in printed
    assert "--temperature" in printed and "loss none" in printed and "loss 0.000" not in printed
    assert_equal(weights(tmp_path, "grpo_32"), weights(trained))


def test_the_log_counts_the_tokens_of_an_answer_and_samples_are_shown(
    trained, files, tmp_path, capsys
):
    train_grpo.main(grpo(trained, files, tmp_path, "--sample_interval", 2, "--log_interval", 1))
    lines, before = log(tmp_path, "grpo_32"), 0
    for line in lines:
        num_answers = 4 * min(6, 28 - 6 * (line["step"] - 1))
        assert line["answer_tokens"] == (line["tokens"] - before) / num_answers
        before = line["tokens"]
    printed = capsys.readouterr().out
    shown = re.findall(r"^  What is \d+\? -> (.*): ([\d.]+)$", printed, re.M)
    assert len(shown) == 3 and len(lines) == 5  # steps 2, 4 and the last
    for answer, reward in shown:
        assert float(reward) == pytest.approx(answer.count("e") / 10)


@pytest.mark.parametrize("more", [(), ("--use_lora", 1)])
def test_a_run_that_is_stopped_and_resumed_is_the_same_to_the_bit(
    trained, files, tmp_path, monkeypatch, more
):
    name = "lora_grpo_32" if more else "grpo_32"
    more = ["--epochs", 2, "--dropout", 0.1, *more]
    train_grpo.main(grpo(trained, files, tmp_path / "whole", *more))
    parts = tmp_path / "parts"
    command = grpo(trained, files, parts, *more)
    found, lines = stopped_and_resumed(train_grpo, command, parts, name, monkeypatch)
    assert_equal(weights(tmp_path / "whole", name), found)
    assert log(tmp_path / "whole", name) == lines


def test_the_gradient_of_a_step_does_not_depend_on_its_split(trained, files, tmp_path):
    norms = []
    for batch_size in (24, 5):
        out = tmp_path / str(batch_size)
        train_grpo.main(grpo(trained, files, out, "--batch_size", batch_size))
        norms.append(log(out, "grpo_32")[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0


PROCESSES = """
import numpy as np
from trainer import train_grpo
from model.weights import load

def sample_answers(model, prompts, args, seed):
    # Text of the prompt, so that it does not depend on which process is asked.
    found = []
    for index, prompt in enumerate(prompts):
        rng = np.random.default_rng([*prompt, index % args.group_size])
        found.append([*rng.integers(300, 600, size=rng.integers(2, 9)).tolist(), 2])
    return found

train_grpo.sample_answers = sample_answers
train_grpo.main(sys.argv[1:])
"""


def test_two_processes_end_in_the_weights_of_one(trained, files, tmp_path):
    """28 questions, 9 a step: the processes have 5 and 4 of them, and 1 and 0 in the last step."""
    (tmp_path / "driver.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})" + PROCESSES
    )
    for name, launch in ("one", run), ("two", partial(torchrun, 2)):
        more = ["--prompts_per_step", 9, "--batch_size", 11, "--pass_k", 4]
        flags = grpo(trained, files, tmp_path / name, *more)
        done = launch(tmp_path / "driver.py", *flags)
        assert done.returncode == 0, done.stderr
    names = "reward no_signal entropy pass_at_1 pass_at_k loss grad_norm"
    assert_like_one(tmp_path, "grpo_32", names, trained / "full_sft_32.pth")


def test_what_cannot_be_is_a_sentence(trained, files, data, tmp_path):
    def refuses(words, *more, **how):
        done = run_here("trainer/train_grpo.py", *grpo(trained, files, tmp_path, *more, **how))
        refused(done, words)

    refuses("--group_size 1", "--group_size", 1)
    refuses("doesn't support --accumulation_steps", "--accumulation_steps", 2)
    refuses("all questions are held out, or none", "--val_split", 0)
    refuses("doesn't support --parallel", "--parallel", "fsdp")
    refuses("uses each question once", "--data_path", f"{files / 'questions.jsonl'}:2")
    refuses("give --task tiny_world", "--task", "gsm8k")
    refuses("the longest question and --max_new_tokens", "--max_new_tokens", 5000)
    refuses("finite number", reward="nan")
    refuses("line 1: 'expected' is missing", "--data_path", data / "sft.jsonl")
    official = "official files are converted by recipes/prepare_math.py"
    for says, record in (
        (official, {"question": "1+1?", "answer": "#### 2"}),
        (official, {"problem": "1+1?", "solution": "$\\boxed{2}$"}),
        ("give --task gsm8k", {**chat("1+1?", "2"), "question": "1+1?", "source": "gsm8k"}),
    ):
        path = write_jsonl(tmp_path / "x.jsonl", [record])
        refuses(says, "--data_path", path)


def test_the_first_line_of_the_log_is_that_of_its_one_batch(trained, files, tmp_path, monkeypatch):
    results, grpo_loss = [], train_grpo.grpo_loss

    def keep(model, batch, *options):
        loss, entropy = grpo_loss(model, batch, *options)
        results.append((loss.item(), entropy, int((batch[1] != IGNORE).sum())))
        return loss, entropy

    monkeypatch.setattr(train_grpo, "grpo_loss", keep)
    train_grpo.main(grpo(trained, files, tmp_path, "--batch_size", 100))
    (loss, entropy, num_tokens), line = results[0], log(tmp_path, "grpo_32")[0]
    assert line["loss"] == pytest.approx(loss / num_tokens, rel=1e-4)
    assert line["entropy"] == pytest.approx(entropy / num_tokens, rel=1e-4)


def test_the_routers_loss_is_minimised_with_the_others(trained, files, tmp_path, monkeypatch):
    """The mean of the embeddings stands in for it: it falls."""
    counts = []

    def mean(model, count):
        counts.append(count)
        return 1e3 * model.lm_head.weight.mean()

    monkeypatch.setattr(train_grpo, "router_loss", mean)
    flags = ["--optimizer", "adamw", "--weight_decay", 0, "--max_bad_steps", 1, "--batch_size", 5]
    train_grpo.main(grpo(trained, files, tmp_path, *flags))
    # The shares of the micro-batches of a step add up to 1.
    assert sum(1 / count for count in counts) == pytest.approx(len(log(tmp_path, "grpo_32")))
    assert max(counts) > 1
    before, after = weights(trained), weights(tmp_path, "grpo_32")
    assert after["lm_head.weight"].mean() < before["lm_head.weight"].mean() - 1e-3


def test_what_to_do_is_said_where_most_steps_had_no_signal(
    trained, files, tmp_path, monkeypatch, capsys
):
    """Of five steps, two or three without one: half of them and more."""
    compute_rewards = train_grpo.compute_rewards
    for idle in (2, 3):
        steps = []

        def rewards(reward, problems, groups, tokenizer, steps=steps, idle=idle):
            result = compute_rewards(reward, problems, groups, tokenizer)
            steps.append(1)
            result[:, 0] += 1
            return torch.zeros_like(result) if len(steps) <= idle else result

        monkeypatch.setattr(train_grpo, "compute_rewards", rewards)
        monkeypatch.setattr(train_grpo, "validate", lambda *_: {"pass_at_1": 0, "pass_at_k": 0})
        train_grpo.main(grpo(trained, files, tmp_path / str(idle)))
        printed = capsys.readouterr().out
        assert ("steps no group had a signal" in printed) == (idle == 3), printed


def test_a_file_of_rewards_can_import_what_is_beside_it(tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("BONUS = 7", encoding="utf-8")
    code = "from neighbour_of_rewards import BONUS\ndef f(prompt, answer, gold): return BONUS\n"
    (tmp_path / "own.py").write_text(code, encoding="utf-8")
    reward = reward_function("gsm8k", f"{tmp_path / 'own.py'}:f")
    assert reward({"prompt": [], "gold": "1"}, "2") == 7
