"""Rewards from a task's judge, or from a user's function."""

import math
import runpy
import sys
from pathlib import Path

import torch

from common import STOP, UserError
from evaluation.tasks import is_right, judge
from model.chat_template import parse_answer


def reward_function(task, custom=None):
    """Return a function (problem, answer) -> reward: 1 or 0 from the task's judge; or from custom,
    "FILE.py:name", a function (prompt, answer, gold) -> number. Raises UserError if it can't be
    loaded.
    """
    if custom is None:
        return lambda problem, answer: float(
            is_right(judge(task, answer, problem["gold"], truncated=False))
        )
    path, _, name = custom.rpartition(":")
    sys.path.insert(0, str(Path(path).resolve().parent))  # so the file can import its neighbours
    try:
        function = runpy.run_path(path)[name]
    except (Exception, SystemExit) as error:  # whatever the user's file does
        raise UserError(f"--reward {custom}: {error!r}; give FILE.py:function") from None
    if not callable(function):
        raise UserError(f"--reward {custom}: {name} isn't a function")
    return lambda problem, answer: function(problem["prompt"], answer, problem["gold"])


def compute_rewards(reward, problems, groups, tokenizer):
    """Return the rewards of G answers to each of P problems, (P, G); groups hold their ids, with
    the stop token. Raises UserError if a reward isn't a finite number.
    """
    rewards = []
    for problem, group in zip(problems, groups, strict=True):
        for ids in group:
            answer = parse_answer(ids[:-1] if ids[-1] in STOP else ids, tokenizer)["content"]
            try:
                value = reward(problem, answer)
                if not math.isfinite(value):
                    raise ValueError("it is not finite")
            except Exception as error:  # whatever the user's function does
                question = problem["prompt"][-1]["content"]
                raise UserError(
                    f"the reward of {answer!r:.100}, an answer to {question!r:.100}: {error!r}; it "
                    "must be a finite number"
                ) from None
            rewards.append(float(value))
    # view(0, -1) would be ambiguous.
    return torch.tensor(rewards).view(len(problems), -1 if rewards else 1)
