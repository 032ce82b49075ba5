"""From the formats in which people keep their data to the project's own.

    text            {"text"}                                                   pretraining
    conversations   {"conversations": [{"role", "content", ...}], "tools"?}    the project's own
    sharegpt        {"conversations": [{"from", "value"}], "system"?, "tools"?}
    openai          {"messages": [{"role", "content", ...}], "tools"?}         UltraChat, too
    alpaca          {"instruction", "input"?, "output", "system"?, "history"?}
    openorca        {"system_prompt"?, "question", "response"}
    math            {"problem", "solution"}
    qa              {"question", "answer"}                                     GSM8K
    prompt          {"prompt", "completion"}

A file is JSONL or one JSON array. Its format is that of its first record in one of these.
"""

import codecs
import json
import os
import re
from pathlib import Path

from common import UserError

ROLES = {
    "user": "human user",
    "assistant": "gpt assistant chatgpt bing bard model function_call",
    "system": "system developer",
    "tool": "tool function observation",
}
ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases.split()}
KEYS = {  # format: the keys that every record of it has; the first format that fits is taken
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
    """Yields (line number, record) of a JSONL file or of one JSON array, never holding it whole.

    What is no JSON object comes as a ValueError in the record's place. A broken array ends there,
    and so does what follows an array. Raises UserError if there is no such file.
    """
    with open_file(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        items = array_items(file) if start.startswith(b"[") else lines(file)
        while True:
            try:
                number, item = next(items, (None, None))
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
            if number is None:
                return
            if not isinstance(item, dict | ValueError):
                item = ValueError(f"not a record in braces, but {type(item).__name__}")
            yield number, item


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
    """What a JSON file says. Raises UserError if it is none."""
    with open_file(path) as file:
        try:
            return json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no JSON: {error}") from None


def is_folder(path):
    """Whether there is a folder; Path.is_dir raises OSError for a name that is too long."""
    return os.path.isdir(path)  # noqa: PTH112


def lines(file):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON: {error.msg}, at character {error.colno}")
        except RecursionError:
            yield number, ValueError("not JSON that can be read: it is nested too deeply")
        except UnicodeDecodeError as error:
            yield number, error
        except ValueError:
            yield number, ValueError(TOO_LONG)


TOO_LONG = "a number in it has more digits than Python reads; write it as text"
SEPARATOR = re.compile(r"[\s,]*")


def array_items(file, piece=1 << 20):
    """The items of a JSON array, decoded one after the other from pieces of the file."""
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
    """(what the JSON at begin says, where it ends); a ValueError if a number in it is too long."""
    try:
        return json.JSONDecoder().raw_decode(text, begin)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return ValueError(TOO_LONG), json.JSONDecoder(parse_int=str).raw_decode(text, begin)[1]


def format_of(record):
    """The name of a record's format. Raises ValueError with the record's keys if it has none."""
    fitting = (name for name, keys in KEYS.items() if all(key in record for key in keys))
    name = next(fitting, None)
    if name is None:
        keys = ", ".join(map(repr, record)) or "(none)"
        raise ValueError(f"a record with the keys {keys} is in no known format")
    turns = record.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
        return "sharegpt"
    return name


def to_text(record):
    """The text of a pretraining record."""
    if "text" not in record:
        raise ValueError(f'there is no "text" in it, only {", ".join(map(repr, record))}')
    return text_of(record["text"], '"text"')


def to_conversation(record, name, notes):
    """(messages, tools) of a record in the named format, as `render` takes them.

    Assistant turns before the first of another are left out, and so are empty ones; the Counter
    notes says how many. Raises ValueError for what cannot be meant: a missing key, an unknown
    role, content that is not text.
    """
    missing = [key for key in KEYS[name] if key not in record]
    if missing:
        raise ValueError(f'there is no "{missing[0]}" in it, as the format {name} has')
    messages = [message(turn, number) for number, turn in enumerate(turns(record, name), 1)]
    kept = []
    for turn in messages:
        assistant = turn["role"] == "assistant"
        said = turn["content"].strip() or turn.get("reasoning_content") or turn.get("tool_calls")
        if assistant and not said:
            notes["empty assistant turns left out"] += 1
        elif assistant and all(before["role"] == "system" for before in kept):
            notes["leading assistant turns left out"] += 1
        else:
            kept.append(turn)
    if not kept:
        raise ValueError("no turn is left of it")
    return kept, record.get("tools") or messages[0].get("tools")


def turns(record, name):
    """The record's turns, each still in the words of its format."""
    system = record.get("system") or record.get("system_prompt")
    found = [{"role": "system", "content": system}] if system else []
    if name in ("conversations", "sharegpt", "openai"):
        listed = record[KEYS[name][0]]
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"a conversation is a list of messages, not {listed!r}")
        return found + listed
    question, answer = (record[key] for key in KEYS[name])
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history is a list of [question, answer], but has {pair!r}")
        found += [{"role": r, "content": c} for r, c in zip(ROLES, pair, strict=False)]
    if record.get("input"):
        question = f"{text_of(question, 'instruction')}\n{text_of(record['input'], 'input')}"
    return found + [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def message(turn, number):
    """A turn in the project's own words. Raises ValueError, naming it by its number."""
    where = f"message {number}"
    if not isinstance(turn, dict) or not {"role", "from"} & set(turn):
        raise ValueError(f'{where} is not {{"role": ..., "content": ...}}: {turn!r:.200}')
    alias = turn["role"] if "role" in turn else turn["from"]
    role = ROLE_OF.get(alias.lower()) if isinstance(alias, str) else None
    if role is None:
        raise ValueError(f"{where} has role {alias!r}; use one of {', '.join(ROLES)}")
    content = turn["content"] if "content" in turn else turn.get("value")
    reasoning = turn.get("reasoning_content") or turn.get("reasoning") or ""
    calls = turn.get("tool_calls") or turn.get("function_call") or []
    if alias.lower() == "function_call":
        content, calls = "", content
    if isinstance(content, list):  # OpenAI's parts
        parts = {"text": [], "reasoning": [], "tool_call": []}
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in list(parts):  # which may be a list or an object
                raise ValueError(f"{where} has a part of type {kind!r}, which is not text")
            parts[kind].append(part[kind] if kind in part else part.get("text", part.get("value")))
        content = "".join(text_of(part, where) for part in parts["text"])
        reasoning = "\n".join(text_of(part, where) for part in parts["reasoning"]) or reasoning
        calls = [json_of(call, where) for call in parts["tool_call"]] or calls
    calls = json_of(calls, where)
    if content is None and calls:
        content = ""
    own = {"role": role, "content": text_of(content, f"{where}: content")}
    if reasoning:
        own["reasoning_content"] = text_of(reasoning, f"{where}: reasoning_content")
    if calls:
        own["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if turn.get("tools"):
        own["tools"] = turn["tools"]
    name = "loss_weight" if "loss_weight" in turn else "weight"
    weight = turn.get(name)
    if weight not in (None, 0, 1):
        raise ValueError(f"{where}: {name} is {weight!r}, not 0 or 1")
    if weight == 0:
        own["loss_weight"] = 0
    return own


def json_of(value, where):
    """Tool calls come as values or as their JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: a tool call is text that is not JSON: {error}") from None


def text_of(value, where):
    """The value, if it is text that UTF-8 can hold. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r:.200}, which is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a character (a lone surrogate): {error}") from None
    return value
