"""Preference pairs: two answers to one prompt, one of them preferred."""

import numpy as np

from common import IGNORE
from dataset import formats
from dataset.lm_dataset import TokenDataset
from model.chat_template import pieces, require_text

# The keys that may hold the prompt.
PROMPT_KEYS = ("prompt", "conversations", "messages", "instruction", "question", "input")


class PairDataset(TokenDataset):
    """Preference pairs. A sample is both conversations, [(input_ids, labels) of the chosen one, of
    the rejected one]; pairs longer than max_length in total are skipped.

    In the file's tokens, the rejected conversation follows the chosen one; the mask of its first
    token is 2.
    """

    def to_pieces(self, record, report):
        report["format"] = "preference"
        chosen, rejected, tools = to_pair(record)
        (first_piece, _), *remaining = pieces(rejected, tools)
        return [*pieces(chosen, tools), (first_piece, 2), *remaining]

    def split_long(self, ids, mask, max_length):
        return []

    def __getitem__(self, index):
        input_ids, labels = super().__getitem__(index)
        file, _, start, end = self.samples[index]
        split = int(np.flatnonzero(self.files[file].mask[start:end] == 2)[0])
        return [(input_ids[:split], labels[:split]), (input_ids[split:], labels[split:])]

    def documents(self, index):
        """Return the sample's documents: 0 is the chosen conversation, 1 the rejected one."""
        return self[index]


def find_prompt(record):
    """Return the prompt of a preference record as a list of messages, [] if it has none."""
    prompt = next((record[key] for key in PROMPT_KEYS if record.get(key)), [])
    if isinstance(prompt, str):
        if record.get("input") and prompt != record["input"]:
            prompt += f"\n{require_text(record['input'], 'it has input')}"
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise ValueError(f"the prompt is text or a list of messages, not {prompt!r:.200}")
    return prompt


def to_pair(record):
    """Convert a preference record. Returns (chosen, rejected, tools): two conversations for
    `render`, whose shared messages aren't supervised.

    Answers are text, a message, or messages; messages that start with another role than assistant
    are the complete conversation. Raises ValueError for equal or empty answers.
    """
    prompt = find_prompt(record)
    missing = [key for key in formats.KEYS["preference"] if key not in record]
    if missing:
        raise ValueError(f'it has no "{missing[0]}"')
    if formats.message_weights(record, "it", [None]) != [None]:
        raise ValueError("only the answers of a pair are supervised; mark single messages instead")
    chosen, rejected = (with_answer(prompt, record[key], key) for key in formats.KEYS["preference"])
    for conversation in (chosen, rejected):
        if record.get("system") and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": record["system"]})
    pairs = zip(chosen, rejected, strict=False)
    num_shared = next(
        (i for i, (a, b) in enumerate(pairs) if without_loss_weight(a) != without_loss_weight(b)),
        None,
    )
    if num_shared is None:
        raise ValueError("the answers are equal, or one is a prefix of the other")
    for conversation, key in ((chosen, "chosen"), (rejected, "rejected")):
        for turn in conversation[:num_shared]:
            turn["loss_weight"] = 0
        if conversation[num_shared]["role"] != "assistant":
            raise ValueError(f"{key} differs before the answer: in message {num_shared + 1}")
        answers = [turn for turn in conversation[num_shared:] if turn["role"] == "assistant"]
        if all(turn.get("loss_weight") == 0 for turn in answers):
            raise ValueError(f"{key} has no supervised answer that differs")
    return chosen, rejected, record.get("tools")


def without_loss_weight(turn):
    """Return a message without its loss_weight."""
    return {key: value for key, value in turn.items() if key != "loss_weight"}


def with_answer(prompt, answer, key):
    """Return the prompt followed by an answer, as messages. key names the answer in errors."""
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    if isinstance(answer, dict):
        answer = [answer]
    if not isinstance(answer, list) or not answer:
        raise ValueError(f"{key} is text, a message or messages, not {answer!r:.200}")
    messages = [formats.to_message(turn, number) for number, turn in enumerate(answer, 1)]
    if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise ValueError(f"{key} is an empty answer")
    if messages[0]["role"] not in ("assistant", "tool"):
        return messages
    if not prompt:
        raise ValueError(f'it has no "prompt", and {key} has no user message')
    return [formats.to_message(turn, number) for number, turn in enumerate(prompt, 1)] + messages


def pair_counts(pairs):
    """Count a batch's pairs, supervised tokens of chosen answers, and tokens without padding."""
    _, labels, _, document_ids = pairs
    supervised = labels != IGNORE
    num_pairs = supervised.any(dim=-1).sum()
    num_supervised = (supervised & (document_ids == 0)).sum()
    num_tokens = (document_ids >= 0).sum()
    return int(num_pairs), int(num_supervised), int(num_tokens)
