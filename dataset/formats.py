"""Reads data files, and converts the usual formats to the project's own.

    text            {"text"}                                                   pretraining
    conversations   {"conversations": [{"role", "content", ...}], "tools"?}    the project's own
    sharegpt        {"conversations": [{"from", "value"}], "system"?, "tools"?}
    openai          {"messages": [{"role", "content", ...}], "tools"?}         UltraChat, too
    alpaca          {"instruction", "input"?, "output", "system"?, "history"?}
    openorca        {"system_prompt"?, "question", "response"}
    math            {"problem", "solution"}
    qa              {"question", "answer"}                                     GSM8K
    prompt          {"prompt", "completion"}
    preference      {"chosen", "rejected"} and what comes before them, see pairs.py      DPO

A file is JSONL or one JSON array. Its format is that of its first record in one of these.
"""

import codecs
import json
import os
import re
from pathlib import Path

from common import UserError
from dataset.chat_template import ROLES, json_of, text_of

ALIASES = {
    "user": "human user",
    "assistant": "gpt assistant chatgpt bing bard model function_call",
    "system": "system developer",
    "tool": "tool function observation",
}
ROLE_OF = {alias: role for role, aliases in ALIASES.items() for alias in aliases.split()}
SEPARATOR = re.compile(r"[\s,]*")  # between the items of an array
KEYS = {  # format: the keys that every record of it has; the first format that fits is taken
    "preference": ("chosen", "rejected"),
    "conversations": ("conversations",),
    "sharegpt": ("conversations",),
    "openai": ("messages",),
    "alpaca": ("instruction", "output"),
    "openorca": ("question", "response"),
    "math": ("problem", "solution"),
    "qa": ("question", "answer"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}


def read_records(path):
    """Yields (line number, record) of a JSONL file or of one JSON array, without holding all of it
    in memory.

    A record is a dict; what is not a JSON object is yielded as a ValueError in its place. Reading
    ends where an array is broken, and at the first value after an array. Raises UserError if there
    is no such file.
    """
    with open_file(path) as file:
        try:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            items = array_items(file) if start.startswith(b"[") else lines(file)
            for number, item in items:
                if not isinstance(item, dict | ValueError):
                    item = ValueError(f"not a record in braces, but {type(item).__name__}")
                yield number, item
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None


def open_file(path):
    """The file at path, open to be read as bytes. Raises UserError if there is none."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file, and data is read more than once; give a file")
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that can be read") from None


def read_json(path):
    """The value of a JSON file. Raises UserError if it is not JSON."""
    with open_file(path) as file:
        try:
            return json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no JSON: {error}") from None


def is_folder(path):
    """Whether path is a folder. Path.is_dir would raise OSError for a name that is too long."""
    return os.path.isdir(path)  # noqa: PTH112


def lines(file):
    """Yields (line number, its value or a ValueError) of a JSONL file."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON: {error.msg}, at character {error.colno}")
        except (ValueError, RecursionError) as error:  # bad UTF-8, a number of too many digits
            yield number, ValueError(f"JSON that cannot be read: {error}")


def array_items(file, piece=1 << 20):
    """Yields (line number, item or ValueError) of a JSON array, decoded from pieces of the file."""
    # A byte that is not UTF-8 becomes a lone surrogate, which makes only its own record a bad one.
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    text = decode(file.read(piece))
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    while True:
        begin = SEPARATOR.match(text, at).end()
        line += text.count("\n", at, begin)
        if text.startswith("]", begin):
            rest = text[begin + 1 :] + decode(file.read(piece))
            if rest.strip():
                line += rest.count("\n", 0, len(rest) - len(rest.lstrip()))
                end = "the JSON array ends before it; give one array, or a record in braces a line"
                yield line, ValueError(end)
            return
        try:
            item, at = decoded(text, begin)
            yield line, item
            line += text.count("\n", begin, at)
        except (json.JSONDecodeError, RecursionError) as error:
            more = file.read(max(piece, len(text) - begin))  # as much again, so retries stay few
            if not more:
                yield line, ValueError(f"not JSON, and the array ends there: {error}")
                return
            text, at = text[begin:] + decode(more), 0


def decoded(text, begin):
    """(the JSON value that begins there, where it ends). A value with a number of too many digits
    is returned as a ValueError.
    """
    try:
        return json.JSONDecoder().raw_decode(text, begin)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        problem = ValueError(f"JSON that cannot be read: {error}")
        return problem, json.JSONDecoder(parse_int=str).raw_decode(text, begin)[1]


def format_of(record):
    """The name of a record's format. Raises ValueError with the record's keys if it has none."""
    fitting = (name for name, keys in KEYS.items() if all(key in record for key in keys))
    name = next(fitting, None)
    if name is None:
        keys = ", ".join(map(repr, record)) or "(none)"
        raise ValueError(f"a record with the keys {keys} is in no known format")
    turns = record.get("conversations")
    if name == "conversations" and isinstance(turns, list) and turns:
        return "sharegpt" if isinstance(turns[0], dict) and "from" in turns[0] else name
    return name


def to_text(record):
    """The text of a pretraining record."""
    if "text" not in record:
        raise ValueError(f'there is no "text" in it, only {", ".join(map(repr, record))}')
    return text_of(record["text"], "it has text")


def to_conversation(record, name, notes):
    """(messages, tools) of a record in the named format, as `render` takes them.

    Assistant turns before the first turn of a user are left out, and so are empty ones; the Counter
    notes counts them. Raises ValueError for a missing key, an unknown role, content that is not
    text.
    """
    if name == "preference":
        raise ValueError("it is a pair of answers, for train_dpo.py, not a conversation")
    missing = [key for key in KEYS[name] if key not in record]
    if missing:
        raise ValueError(f'there is no "{missing[0]}" in it, as the format {name} has')
    messages = [message(turn, number) for number, turn in enumerate(turns(record, name), 1)]
    kept = []
    for turn in messages:
        assistant = turn["role"] == "assistant"
        filled = turn["content"].strip() or turn.get("reasoning_content") or turn.get("tool_calls")
        if assistant and not filled:
            notes["empty assistant turns left out"] += 1
        elif assistant and all(before["role"] == "system" for before in kept):
            notes["leading assistant turns left out"] += 1
        else:
            kept.append(turn)
    if not kept:
        raise ValueError("no turn is left")
    return kept, record.get("tools") or messages[0].get("tools")


def turns(record, name):
    """The record's turns, each still in its own format."""
    system = record.get("system") or record.get("system_prompt")
    found = [{"role": "system", "content": system}] if system else []
    if name in ("conversations", "sharegpt", "openai"):
        listed = record[KEYS[name][0]]
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"a conversation is a list of messages, not {listed!r}")
        return found + listed
    question, answer = (record[key] for key in KEYS[name])
    if record.get("input"):
        instruction = text_of(question, "it has instruction")
        question = f"{instruction}\n{text_of(record['input'], 'it has input')}"
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"history is a list of [question, answer], not {history!r}")
    for pair in [*history, [question, answer]]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history is a list of [question, answer], but has {pair!r}")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return found


def message(turn, number):
    """A turn as the project's message. Raises ValueError, which names it by its number."""
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
        parts = parts_of(content, number)
        content = "".join(parts["text"])
        reasoning = "\n".join(parts["reasoning"]) or reasoning
        calls = [json_of(call, f"message {number}: a call") for call in parts["tool_call"]] or calls
    calls = json_of(calls, f"message {number}: a call")
    if content is None and calls:
        content = ""
    converted = {"role": role, "content": text_of(content, f"message {number} has content")}
    if reasoning:
        found = f"message {number} has reasoning_content"
        converted["reasoning_content"] = text_of(reasoning, found)
    if calls:
        converted["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if turn.get("tools"):
        converted["tools"] = turn["tools"]
    name = "loss_weight" if "loss_weight" in turn else "weight"
    weight = turn.get(name)
    if weight not in (None, 0, 1):
        raise ValueError(f"message {number} has {name} {weight!r}; give 0 or 1")
    if weight == 0:
        converted["loss_weight"] = 0
    return converted


def parts_of(content, number):
    """The texts of each type of OpenAI's content parts, as a dict of lists."""
    parts = {"text": [], "reasoning": [], "tool_call": []}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in list(parts):  # a list: a kind that is a list or a dict cannot be hashed
            raise ValueError(f"message {number} has a part of type {kind!r}, which is not text")
        value = part.get(kind, part.get("text", part.get("value")))
        if kind != "tool_call":
            value = text_of(value, f"message {number} has a part")
        parts[kind].append(value)
    return parts
