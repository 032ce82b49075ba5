"""Rewards of answers: what a task's judge says, or what a function of the user returns."""

import math
import runpy
import sys
from pathlib import Path

import torch

from common import STOP, UserError
from evaluation.tasks import is_right, judge
from model.chat_template import parse_answer


def reward_function(task, own=None):
    """A function (problem, answer) -> reward: 1 or 0, as the task's judge says; or own,
    "FILE.py:name", a function (prompt, answer, gold) -> number. Raises UserError if there is none.
    """
    if own is None:
        return lambda problem, answer: float(is_right(judge(task, answer, problem["gold"], False)))
    path, _, name = own.rpartition(":")
    sys.path.insert(0, str(Path(path).resolve().parent))  # for what stands beside it
    try:
        function = runpy.run_path(path)[name]
    except (Exception, SystemExit) as error:  # whatever the user's file does
        raise UserError(f"--reward {own}: {error!r}; give FILE.py:function") from None
    if not callable(function):
        raise UserError(f"--reward {own}: {name} is no function")
    return lambda problem, answer: function(problem["prompt"], answer, problem["gold"])


def compute_rewards(reward, problems, groups, tokenizer):
    """The rewards of G answers to each of P problems, (P, G); groups are their ids, with the token
    that ended each. Raises UserError for a reward that is not a finite number.
    """
    found = []
    for problem, group in zip(problems, groups, strict=True):
        for ids in group:
            answer = parse_answer(ids[:-1] if ids[-1] in STOP else ids, tokenizer)["content"]
            try:
                value = reward(problem, answer)
                if not math.isfinite(value):
                    raise ValueError("it is not finite")
            except Exception as error:  # whatever the user's function does
                asked = problem["prompt"][-1]["content"]
                raise UserError(
                    f"the reward of {answer!r:.100}, an answer to {asked!r:.100}: {error!r}; it "
                    "must be a finite number"
                ) from None
            found.append(float(value))
    return torch.tensor(found).view(len(problems), -1 if found else 1)
