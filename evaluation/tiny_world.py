"""The judge of Tiny World's held-out questions (dataset/eval_tiny.jsonl)."""

import re


def is_correct(answer, expected):
    """Whether an answer is right: equal to the expected text, or, where that is a list, holding
    each of its entries as whole words.
    """
    answer = answer.strip()
    if isinstance(expected, str):
        return answer == expected
    return all(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer) for words in expected)
