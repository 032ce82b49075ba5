"""Pairs of answers to one conversation, of which one is preferred: from a record to batches."""

import numpy as np

from common import IGNORE
from dataset import formats
from dataset.lm_dataset import TokenDataset
from model.chat_template import pieces, require_text

# Where a record has what comes before the answers.
SHARED = ("prompt", "conversations", "messages", "instruction", "question", "input")


class PairDataset(TokenDataset):
    """Pairs of answers to one conversation, the better first. A sample is both conversations,
    [(input_ids, labels) of the chosen, of the rejected]; a pair that is longer than max_length in
    all is left out.

    In the tokens of the file one follows the other; the mask of the second's first token is 2.
    """

    options = ()

    def to_pieces(self, record, report):
        report["format"] = "preference"
        chosen, rejected, tools = to_pair(record)
        begin, *rest = pieces(rejected, tools)
        return [*pieces(chosen, tools), (begin[0], 2), *rest]

    def spans(self, ids, mask, max_seq_len):
        return []

    def __getitem__(self, index):
        input_ids, labels = super().__getitem__(index)
        file, _, start, end = self.samples[index]
        place = int(np.flatnonzero(self.files[file].mask[start:end] == 2)[0])
        return [(input_ids[:place], labels[:place]), (input_ids[place:], labels[place:])]

    def documents(self, index):
        """Return the documents of a row: 0 is the chosen conversation, 1 the rejected one."""
        return self[index]


def to_pair(record):
    """Return (chosen, rejected, tools): a preference record as two conversations, as `render` takes
    them. What the two share is not supervised.

    Answers are text, a message, or messages; messages that begin with another role than assistant
    are the whole conversation. Raises ValueError for equal or empty answers.
    """
    shared = next((record[key] for key in SHARED if record.get(key)), [])
    if isinstance(shared, str):
        if record.get("input") and shared != record["input"]:
            shared += f"\n{require_text(record['input'], 'it has input')}"
        shared = [{"role": "user", "content": shared}]
    if not isinstance(shared, list):
        raise ValueError(f"the prompt is text or a list of messages, not {shared!r:.200}")
    missing = [key for key in formats.KEYS["preference"] if key not in record]
    if missing:
        raise ValueError(f'there is no "{missing[0]}" in it')
    if formats.message_weights(record, "it", [None]) != [None]:
        raise ValueError("a pair is supervised where its answers differ; mark its messages instead")
    chosen, rejected = (answered(shared, record[key], key) for key in formats.KEYS["preference"])
    for conversation in (chosen, rejected):
        if record.get("system") and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": record["system"]})
    pairs = zip(chosen, rejected, strict=False)
    same = next(
        (i for i, (one, other) in enumerate(pairs) if text_only(one) != text_only(other)), None
    )
    if same is None:
        raise ValueError("chosen equals rejected, or is its beginning")
    for conversation, key in ((chosen, "chosen"), (rejected, "rejected")):
        for turn in conversation[:same]:
            turn["loss_weight"] = 0
        if conversation[same : same + 1] and conversation[same]["role"] != "assistant":
            raise ValueError(f"{key} differs before the answer: in message {same + 1}")
        own = [turn for turn in conversation[same:] if turn["role"] == "assistant"]
        if all(turn.get("loss_weight") == 0 for turn in own):
            raise ValueError(f"{key} has no answer of its own to be trained on")
    return chosen, rejected, record.get("tools")


def text_only(turn):
    """Return a message without its mask."""
    return {key: value for key, value in turn.items() if key != "loss_weight"}


def answered(shared, answer, key):
    """The messages of a conversation and one of its answers; key says which of the two it is."""
    answer = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    answer = [answer] if isinstance(answer, dict) else answer
    if not isinstance(answer, list) or not answer:
        raise ValueError(f"{key} is text, a message or messages, not {answer!r:.200}")
    answer = [formats.message(turn, number) for number, turn in enumerate(answer, 1)]
    if not answer[-1]["content"].strip() and not answer[-1].get("tool_calls"):
        raise ValueError(f"{key} is an empty answer")
    if answer[0]["role"] not in ("assistant", "tool"):
        return answer
    if not shared:
        raise ValueError(f'there is no "prompt", and {key} has no message of a user')
    return [formats.message(turn, number) for number, turn in enumerate(shared, 1)] + answer


def counts(pairs):
    """(pairs, supervised tokens of the chosen answers, tokens without padding) of such a batch."""
    _, labels, _, document_ids = pairs
    supervised = labels != IGNORE
    counted = supervised.any(dim=-1), supervised & (document_ids == 0), document_ids >= 0
    return tuple(int(true.sum()) for true in counted)
