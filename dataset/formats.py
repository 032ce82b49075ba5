"""Convert records of common data formats to messages.

    text            {"text"}                                                   pretraining
    conversations   {"conversations": [{"role", "content", ...}], "tools"?}    the project's own
    sharegpt        {"conversations": [{"from", "value"}], "system"?, "tools"?}
    openai          {"messages": [{"role", "content", ...}], "tools"?}         UltraChat, too
    ultrachat       {"data": [question, answer, ...]}
    alpaca          {"instruction", "input"?, "output", "system"?, "history"?}
    dolly           {"instruction", "context"?, "response"}
    openorca        {"system_prompt"?, "question", "response"}
    metamath        {"query", "response"}
    openmath        {"question", "generated_solution"}; openmath2: {"problem", ...}
    math            {"problem", "solution"}
    qa              {"question", "answer"}                                     GSM8K
    prompt          {"prompt", "completion"}, texts or lists of messages       trl
    input           {"input", "output"}
    preference      {"chosen", "rejected"} and a prompt, see preference_pairs.py    DPO

The first record in a known format decides the format of a file. A record may also be a list of
messages (nanochat), and a conversation a list of texts, alternating question and answer (LIMA).
"""

import json
import re

from dataset.jsonl import list_hint
from model.chat_template import ROLES, parse_json, require_text

ALIASES = {
    "user": "human user",
    "assistant": "gpt assistant chatgpt bing bard model function_call",
    "system": "system developer",
    "tool": "tool function observation",
}
ROLE_OF = {alias: role for role, aliases in ALIASES.items() for alias in aliases.split()}
KEYS = {  # format: the keys its records have; the first matching format is used
    "preference": ("chosen", "rejected"),
    "conversations": ("conversations",),
    "sharegpt": ("conversations",),
    "openai": ("messages",),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "openorca": ("question", "response"),
    "metamath": ("query", "response"),
    "openmath": ("question", "generated_solution"),
    "openmath2": ("problem", "generated_solution"),
    "math": ("problem", "solution"),
    "qa": ("question", "answer"),
    "prompt": ("prompt", "completion"),
    "input": ("input", "output"),
    "text": ("text",),
    "ultrachat": ("data",),
}
# Keys with which axolotl, LLaMA-Factory, ms-swift, torchtune and verl mark whether a message or a
# record is trained on.
LOSS_WEIGHT_KEYS = ("loss_weight", "weight", "loss_mask", "loss", "train", "training", "trainable")
# A key looks like a mask if it consists of these words only: train_detail and isMasked, but not
# weight_kg.
MASK_WORDS = """mask masks masked unmasked nomask loss noloss lossmask train trained training
    trainable untrained notrain donttrain weight weights supervise supervised
    unsupervised""".split()
MODIFIERS = """is no un do dont not use should skip ignore compute exclude from assistant turn turns
    scale detail flag flags on""".split()


def is_mask_like(key):
    """Return whether a key of a record or a message seems to say what is trained on."""
    words = {word.lower() for word in re.split(r"[_-]|(?<=[a-z])(?=[A-Z])", key)}
    return not words.isdisjoint(MASK_WORDS) and words <= {*MASK_WORDS, *MODIFIERS}


def detect_format(record):
    """Return the name of a record's format. Raises ValueError with the record's keys if it is
    unknown.
    """
    matches = [name for name, keys in KEYS.items() if all(key in record for key in keys)]
    if "ultrachat" in matches and not is_texts(record["data"]):
        matches.remove("ultrachat")
    if not matches:
        keys = ", ".join(map(repr, record)) or "(none)"
        raise ValueError(f"unknown format: a record with the keys {keys}{list_hint(record)}")
    conversation = record.get("conversations")
    if matches[0] == "conversations" and isinstance(conversation, list) and conversation:
        is_sharegpt = isinstance(conversation[0], dict) and "from" in conversation[0]
        return "sharegpt" if is_sharegpt else "conversations"
    return matches[0]


def is_texts(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def to_text(record):
    """Return the text of a pretraining record."""
    if "text" not in record:
        keys = ", ".join(map(repr, record))
        raise ValueError(f'it has no "text", only {keys}{list_hint(record)}')
    if message_weights(record, "it", [None]) == [0]:
        raise ValueError("it is marked as not trained on; remove it from the file")
    return require_text(record["text"], "it has text")


def to_conversation(record, name, notes):
    """Convert a record of the named format. Returns (messages, tools), the arguments of `render`.

    Empty assistant turns are dropped, and so are assistant turns before the first user turn, unless
    their loss_weight is 0; the Counter notes counts both. Raises ValueError for a missing key, an
    unknown role, content that isn't text, and an ambiguous mask.
    """
    if name == "preference":
        raise ValueError("it is a preference pair (train_dpo.py), not a conversation")
    missing = [key for key in KEYS[name] if key not in record]
    if missing:
        raise ValueError(f'it has no "{missing[0]}", which the format {name} needs')
    turns = to_turns(record, name)
    messages = [to_message(turn, number) for number, turn in enumerate(turns, 1)]
    weights = [message.get("loss_weight") for message in messages]
    weights = message_weights(record, "the record", weights)
    conversation = []
    for message, weight in zip(messages, weights, strict=True):
        is_assistant = message["role"] == "assistant"
        if weight == 0:
            message["loss_weight"] = 0
        has_content = (
            message["content"].strip()
            or message.get("reasoning_content")
            or message.get("tool_calls")
        )
        is_first = all(earlier["role"] == "system" for earlier in conversation)
        if is_assistant and not has_content:
            notes["empty assistant turns dropped"] += 1
        elif is_assistant and is_first and weight != 0:
            notes["leading assistant turns dropped"] += 1
        else:
            conversation.append(message)
        if weight == 1 and not is_assistant:
            notes["non-assistant turns marked as trained on: not supervised"] += 1
    if not conversation:
        raise ValueError("all its turns were dropped")
    return conversation, record.get("tools") or messages[0].get("tools")


def message_weights(record, name, weights):
    """Return the loss weight of each message, 0, 1 or None, from the keys of its record; without
    such a key, return weights. A list has one flag per message. Raises ValueError if a key is
    ambiguous.
    """
    weights = list(weights)
    system = record.get("system") or record.get("system_prompt")
    for key, value in mask_flags(record).items():
        if isinstance(value, str) and value.lower() not in ("true", "false", "yes", "no", "0", "1"):
            continue  # a text, not a flag
        if not isinstance(value, list):
            if parse_flag(key, value, name) == 0:
                weights = [0] * len(weights)
            continue
        flags = value
        if system and len(flags) == len(weights) - 1:
            flags = [None, *flags]  # the system prompt isn't in the list of messages
        if len(flags) != len(weights):
            raise ValueError(
                f"{name} has {key} with {len(value)} flags for {len(weights)} messages"
            )
        for index, flag in enumerate(flags):
            if flag is None:
                continue
            weight = parse_flag(key, flag, name)
            if weights[index] not in (None, weight):
                raise ValueError(f"message {index + 1} is marked both as trained on and as not")
            weights[index] = weight
    return weights


def mask_flags(values):
    """Return the entries of a record or a message whose key looks like a mask."""
    return {k: value for k, value in values.items() if value is not None and is_mask_like(k)}


def parse_flag(key, flag, name):
    """Return a mask flag as a loss weight, 0 or 1. Raises ValueError, which begins with name, if
    the key or the flag isn't known.
    """
    if key not in (*LOSS_WEIGHT_KEYS, "masked") or flag not in (0, 1):
        known = key if key in LOSS_WEIGHT_KEYS else "loss_weight"
        raise ValueError(f"{name} has {key} {flag!r:.100}; give {known} 0 or 1")
    return 1 - int(flag) if key == "masked" else int(flag)


def to_turns(record, name):
    """Return the turns of a record, not yet converted to messages."""
    system = record.get("system") or record.get("system_prompt")
    conversation = [{"role": "system", "content": system}] if system else []
    if len(KEYS[name]) == 1:
        messages = record[KEYS[name][0]]
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"a conversation is a list of messages, not {messages!r}")
        if is_texts(messages):
            messages = [
                make_turn("assistant" if index % 2 else "user", text)
                for index, text in enumerate(messages)
            ]
        return conversation + messages
    question, answer = (record[key] for key in KEYS[name])
    if isinstance(question, list):  # as in trl, only the completion is supervised
        question = [as_context(turn) for turn in question]
    for key in ("input", "context"):
        if record.get(key) and key not in KEYS[name]:
            context = to_content(record[key], f"it has {key}")
            question = f"{to_content(question, 'it has text')}\n{context}"
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"history is a list of [question, answer], not {history!r}")
    for pair in [*history, [question, answer]]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history is a list of [question, answer], but has {pair!r}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            conversation += text if isinstance(text, list) else [make_turn(role, text)]
    return conversation


def as_context(turn):
    """Return the turn with loss_weight 0 as its only mask."""
    if not isinstance(turn, dict):
        return turn  # `to_message` reports the error
    turn = {key: value for key, value in turn.items() if not is_mask_like(key)}
    return turn | {"loss_weight": 0}


def make_turn(role, content):
    return {"role": role, "content": content}


def to_content(value, name):
    """Return text unchanged, numbers as text. Raises ValueError; its message begins with name."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return require_text(json.dumps(value) if is_number else value, name)


def to_message(turn, number):
    """Convert a turn to a message. Raises ValueError, naming its number."""
    if not isinstance(turn, dict) or not {"role", "from"} & set(turn):
        raise ValueError(f'message {number} is not {{"role": ..., "content": ...}}: {turn!r:.200}')
    alias = turn.get("role", turn.get("from"))
    role = ROLE_OF.get(alias.lower()) if isinstance(alias, str) else None
    if role is None:
        raise ValueError(f"message {number} has role {alias!r}; use one of {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    reasoning = turn.get("reasoning_content") or turn.get("reasoning")
    calls = turn.get("tool_calls") or turn.get("function_call")
    if alias.lower() == "function_call":
        content, calls = "", content
    if isinstance(content, list):
        parts = split_content(content, number)
        content = "".join(parts["text"])
        reasoning = "\n".join(parts["reasoning"]) or reasoning
        if parts["tool_call"]:
            calls = [parse_json(call, f"message {number}: a call") for call in parts["tool_call"]]
    calls = parse_json(calls, f"message {number}: a call")
    if content is None and calls:
        content = ""
    converted = {"role": role, "content": to_content(content, f"message {number} has content")}
    if reasoning:
        name = f"message {number} has reasoning_content"
        converted["reasoning_content"] = require_text(reasoning, name)
    if calls:
        converted["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if turn.get("tools"):
        converted["tools"] = turn["tools"]
    weights = {parse_flag(k, v, f"message {number}") for k, v in mask_flags(turn).items()}
    if len(weights) > 1:
        raise ValueError(f"message {number} is marked both as trained on and as not trained on")
    for weight in weights:
        converted["loss_weight"] = weight
    return converted


def split_content(content, number):
    """Group the texts of OpenAI's content parts by type; returns a dict of lists."""
    parts = {"text": [], "reasoning": [], "tool_call": []}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in parts:
            raise ValueError(f"message {number} has a part of type {kind!r}, which isn't text")
        value = part.get(kind, part.get("text", part.get("value")))
        if kind != "tool_call":
            value = require_text(value, f"message {number} has a part")
        parts[kind].append(value)
    return parts
