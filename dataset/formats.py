"""Converting records of the usual formats to the project's own.

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
    preference      {"chosen", "rejected"} and what comes before them, see preference_pairs.py DPO

The format of a file is that of its first record in one of these. A record may also be a list of
messages (nanochat), and a conversation a list of texts, question and answer in turn (LIMA).
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
KEYS = {  # format: the keys that every record of it has; the first format that fits is taken
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
# Keys by which axolotl, LLaMA-Factory, ms-swift, torchtune and verl say whether a message, or a
# record, is trained on.
WEIGHTS = ("loss_weight", "weight", "loss_mask", "loss", "train", "training", "trainable")
MASK_LIKE = re.compile(  # what seems to be such a key: train_detail and isMasked, not weight_kg
    r"((is|no|un|do|dont|not|use|should|skip|ignore|compute|exclude|from|assistant|turn)[_-]?)*"
    r"(mask(s|ed)?|loss|train(ed|ing|able)?|weights?|supervised?)"
    r"([_-]?(masks?|masked|loss|weights?|scale|detail|flags?|turns?|on))?",
    re.IGNORECASE,
)


def detect_format(record):
    """The name of a record's format. Raises ValueError with the record's keys if it has none."""
    fitting = (
        name
        for name, keys in KEYS.items()
        if all(key in record for key in keys) and (name != "ultrachat" or is_texts(record["data"]))
    )
    name = next(fitting, None)
    if name is None:
        keys = ", ".join(map(repr, record)) or "(none)"
        hint = list_hint(record)
        raise ValueError(f"a record with the keys {keys} is in no known format{hint}")
    turns = record.get("conversations")
    if name == "conversations" and isinstance(turns, list) and turns:
        return "sharegpt" if isinstance(turns[0], dict) and "from" in turns[0] else name
    return name


def is_texts(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def to_text(record):
    """Return the text of a pretraining record."""
    if "text" not in record:
        keys = ", ".join(map(repr, record))
        raise ValueError(f'there is no "text" in it, only {keys}{list_hint(record)}')
    if message_weights(record, "it", [None]) == [0]:
        raise ValueError("it is marked not to be trained on; leave such a text out")
    return require_text(record["text"], "it has text")


def to_conversation(record, name, notes):
    """Return (messages, tools) of a record in the named format, as `render` takes them.

    Assistant turns before the first turn of a user are left out, unless their loss_weight is 0, and
    so are empty ones; the Counter notes counts them. Raises ValueError for a missing key, an
    unknown role, content that is not text, and a mask that is not understood.
    """
    if name == "preference":
        raise ValueError("it is a pair of answers, for train_dpo.py, not a conversation")
    missing = [key for key in KEYS[name] if key not in record]
    if missing:
        raise ValueError(f'there is no "{missing[0]}" in it, as the format {name} has')
    messages = [message(turn, number) for number, turn in enumerate(turns(record, name), 1)]
    weights = message_weights(record, "the record", [turn.get("loss_weight") for turn in messages])
    kept = []
    for turn, weight in zip(messages, weights, strict=True):
        assistant = turn["role"] == "assistant"
        turn |= {"loss_weight": 0} if weight == 0 else {}
        filled = turn["content"].strip() or turn.get("reasoning_content") or turn.get("tool_calls")
        leading = all(earlier["role"] == "system" for earlier in kept)
        if assistant and not filled:
            notes["empty assistant turns left out"] += 1
        elif assistant and leading and weight != 0:
            notes["leading assistant turns left out"] += 1
        else:
            kept.append(turn)
        if weight == 1 and not assistant:
            notes["turns marked to be trained on, but not the assistant's: they are not"] += 1
    if not kept:
        raise ValueError("no turn is left")
    return kept, record.get("tools") or messages[0].get("tools")


def message_weights(record, name, weights):
    """Return the loss weight of each message, 0, 1 or None, as the keys of its record say, or else
    as weights does. A list has a flag for each message. Raises ValueError for what is not
    understood.
    """
    system = record.get("system") or record.get("system_prompt")
    for key, value in record.items():
        is_text = isinstance(value, str) and value.lower() not in "true false yes no 0 1".split()
        if value is None or is_text or not MASK_LIKE.fullmatch(key):
            continue
        flags = value if isinstance(value, list) else [value] * len(weights)
        if system and len(flags) == len(weights) - 1:
            flags = [None, *flags]  # the system prompt is not in the list of messages
        if len(flags) != len(weights):
            raise ValueError(
                f"{name} has {key} with {len(value)} flags for {len(weights)} messages"
            )
        for number, flag in enumerate(flags):
            weight = parse_loss_weight({key: flag}, name)
            if weight == 0 or (weight == 1 and isinstance(value, list) and weights[number] != 0):
                weights[number] = weight
    return weights


def parse_loss_weight(turn, name):
    """Return 1 or 0, as a message says whether it is supervised, or None if it does not. Raises
    ValueError for a key that seems to say so in another way.
    """
    weights = set()
    for key, value in turn.items():
        if value is None or not MASK_LIKE.fullmatch(key):
            continue
        if key not in (*WEIGHTS, "masked") or value not in (0, 1):
            known = key if key in WEIGHTS else "loss_weight"
            raise ValueError(f"{name} has {key} {value!r:.100}; give {known} 0 or 1")
        weights.add(1 - int(value) if key == "masked" else int(value))
    if len(weights) > 1:
        raise ValueError(f"{name} says both that it is trained on and that it is not")
    return next(iter(weights), None)


def turns(record, name):
    """Return the record's turns, each still in its own format."""
    system = record.get("system") or record.get("system_prompt")
    listed = [{"role": "system", "content": system}] if system else []
    if len(KEYS[name]) == 1:
        conversation = record[KEYS[name][0]]
        if not isinstance(conversation, list) or not conversation:
            raise ValueError(f"a conversation is a list of messages, not {conversation!r}")
        if is_texts(conversation):
            roles = ("user", "assistant") * len(conversation)
            conversation = [make_turn(*pair) for pair in zip(roles, conversation, strict=False)]
        return listed + conversation
    question, answer = (record[key] for key in KEYS[name])
    if isinstance(question, list):  # trl supervises the completion only
        question = [as_context(turn) for turn in question]
    for key in ("input", "context"):
        if record.get(key) and key not in KEYS[name]:
            more = to_content(record[key], f"it has {key}")
            question = f"{to_content(question, 'it has text')}\n{more}"
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"history is a list of [question, answer], not {history!r}")
    for pair in [*history, [question, answer]]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history is a list of [question, answer], but has {pair!r}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            listed += text if isinstance(text, list) else [make_turn(role, text)]
    return listed


def as_context(turn):
    """Return a turn without a mask of its own, marked not to be supervised."""
    if not isinstance(turn, dict):
        return turn  # `message` names it
    turn = {key: value for key, value in turn.items() if not MASK_LIKE.fullmatch(key)}
    return turn | {"loss_weight": 0}


def make_turn(role, content):
    return {"role": role, "content": content}


def to_content(value, name):
    """Return text as it is, and a number as text. Raises ValueError, which begins with name."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return require_text(json.dumps(value) if is_number else value, name)


def message(turn, number):
    """Return a turn as the project's message. Raises ValueError, which names it by its number."""
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
        calls = [
            parse_json(call, f"message {number}: a call") for call in parts["tool_call"]
        ] or calls
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
    weight = parse_loss_weight(turn, f"message {number}")
    return converted if weight is None else converted | {"loss_weight": weight}


def split_content(content, number):
    """The texts of each type of OpenAI's content parts, as a dict of lists."""
    parts = {"text": [], "reasoning": [], "tool_call": []}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in list(parts):  # a list: a kind that is a list or a dict cannot be hashed
            raise ValueError(f"message {number} has a part of type {kind!r}, which is not text")
        value = part.get(kind, part.get("text", part.get("value")))
        if kind != "tool_call":
            value = require_text(value, f"message {number} has a part")
        parts[kind].append(value)
    return parts
