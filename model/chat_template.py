"""The chat template (ChatML): a conversation as token ids and their loss mask.

    <|im_start|>system\n{content}<|im_end|>\n
    <|im_start|>user\n{content}<|im_end|>\n
    <|im_start|>assistant\n<think>\n{reasoning}\n</think>\n\n{content}<tool_call>{json}</tool_call><|im_end|>\n
    <|im_start|>tool\n<tool_response>{content}</tool_response><|im_end|>\n

A conversation is rendered as pieces, each with its own mask value and encoded separately. The mask
is built together with the tokens, never by searching for markers, so user text cannot forge
supervised tokens.
"""  # noqa: E501

import json
import re
from array import array
from contextlib import suppress
from functools import lru_cache, partial

from common import (
    END_THINK,
    END_TOOL_CALL,
    END_TOOL_RESPONSE,
    IM_END,
    IM_START,
    THINK,
    TOOL_CALL,
    TOOL_RESPONSE,
)
from model.tokenizer import load_tokenizer

ROLES = ("system", "user", "assistant", "tool")
BATCH_CHARACTERS = 1_000_000  # characters per call of the tokenizer
PART_CHARACTERS = 100_000  # longer texts are encoded in parts of about this length
SEPARATORS = " \n.,;、。，"
WORD_END = re.compile(rf"(?<=[^\W_])(?=[{SEPARATORS}])")
shipped_tokenizer = lru_cache(load_tokenizer)


def render(messages, tools=None, add_generation_prompt=False, tokenizer=None):
    """Render a conversation. Returns (ids, loss_mask), two lists of equal length.

    loss_mask is 1 for supervised tokens: the assistant's output (reasoning, content, tool calls)
    and the <|im_end|> that ends its turn. It is 0 for headers, for the newline after a turn, and
    for everything in system, user and tool turns.

    messages               [{"role", "content", "reasoning_content"?, "tool_calls"?, "tools"?,
                           "loss_weight"?}]; assistant turns with loss_weight 0 aren't supervised
    tools                  functions the assistant may call, as a list or its JSON text; rendered
                           into the system turn. Default: the `tools` of the first message.
    add_generation_prompt  append the header of an assistant turn, for the model to continue
    tokenizer              default: the shipped one

    Raises ValueError, naming the message, if the conversation is malformed.
    """
    conversation = pieces(messages, tools, add_generation_prompt)
    ((ids, loss_mask),) = render_batch([conversation], tokenizer or shipped_tokenizer())
    return list(ids), list(loss_mask)


def pieces(messages, tools=None, add_generation_prompt=False):
    """Split a conversation into a list of (piece, supervised): a piece is text, or the id of a
    control token; supervised is 1 or 0. Arguments and errors as in `render`.
    """
    check_messages(messages)
    tools = parse_list(tools or messages[0].get("tools"), "tools")
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    conversation = []
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"] or ""
        supervised = int(role == "assistant" and message.get("loss_weight", 1) != 0)
        if index == 0 and tools:
            content = f"{content}\n\n{tools_text(tools)}" if content else tools_text(tools)
        body = []
        if role == "assistant" and message.get("reasoning_content"):
            body += [THINK, f"\n{message['reasoning_content']}\n", END_THINK, "\n\n"]
        if role == "tool":
            body += [TOOL_RESPONSE, content, END_TOOL_RESPONSE]
        elif content:
            body += [content]
        for call in parse_list(message.get("tool_calls"), "tool_calls"):
            body += [TOOL_CALL, call_text(call), END_TOOL_CALL]
        body += [IM_END]
        conversation += [(IM_START, 0), (f"{role}\n", 0)]
        conversation += [(piece, supervised) for piece in body]
        conversation += [("\n", 0)]
    if add_generation_prompt:
        conversation += [(IM_START, 0), ("assistant\n", 0)]
    return conversation


def render_batch(conversations, tokenizer):
    """Render many conversations, given as lists of pieces. Returns a list of (ids, loss_mask), as
    arrays, which use a tenth of the memory of lists. Each distinct text is encoded once, on all
    cores.
    """
    texts = set()
    for conversation in conversations:
        texts.update(piece for piece, _ in conversation if isinstance(piece, str))
    token_ids = encode_all(texts, tokenizer)
    rendered = []
    for conversation in conversations:
        ids, loss_mask = array("i"), bytearray()
        for piece, supervised in conversation:
            piece_ids = [piece] if isinstance(piece, int) else token_ids[piece]
            ids.extend(piece_ids)
            loss_mask.extend([supervised] * len(piece_ids))
        rendered.append((ids, loss_mask))
    return rendered


def encode_all(texts, tokenizer):
    """Encode texts; returns {text: ids}. Long texts are encoded in parts, because the library needs
    130 bytes of memory per character of a call.
    """
    token_ids, batch, characters = {text: array("i") for text in texts}, [], 0
    parts = [(text, part) for text in token_ids for part in parts_to_encode(text, tokenizer)]
    for index, (text, part) in enumerate(parts):
        batch.append((text, part))
        characters += len(part)
        if characters > BATCH_CHARACTERS or index == len(parts) - 1:
            encodings = tokenizer.encode_batch_fast([p for _, p in batch], add_special_tokens=False)
            for (text, _), encoding in zip(batch, encodings, strict=True):
                token_ids[text].extend(encoding.ids)
            batch, characters = [], 0
    return token_ids


def parts_to_encode(text, tokenizer):
    """Split a text into parts of about PART_CHARACTERS whose concatenated ids are the ids of the
    text: it is split after a word, where pre-tokenizers split it anyway.
    """
    parts, start = [], 0
    if len(text) > PART_CHARACTERS and splits_after_words(tokenizer):
        while match := WORD_END.search(text, start + PART_CHARACTERS):
            parts.append(text[start : match.start()])
            start = match.start()
    return [*parts, text[start:]]


def splits_after_words(tokenizer):
    """Return whether splitting a text at WORD_END leaves its ids unchanged."""
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.rstrip or WORD_END.search(token.content) for token in added):
        return False

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    return all(encode(f"ab{mark}cd") == encode("ab") + encode(f"{mark}cd") for mark in SEPARATORS)


def check_messages(messages):
    """Raise ValueError, naming the message, unless messages is a list of {role, content}."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a conversation is a list of messages, not {messages!r}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(
                f'message {number} is not {{"role": ..., "content": ...}}: {message!r}'
            )
        role, calls = message["role"], message.get("tool_calls")
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}; use one of {', '.join(ROLES)}")
        if calls and role != "assistant":
            raise ValueError(f"message {number} has tool_calls, but only an assistant calls tools")
        if message["content"] is not None or not calls:  # only turns with tool calls may lack text
            require_text(message["content"], f"message {number} has content")
        if message.get("reasoning_content") is not None:
            require_text(message["reasoning_content"], f"message {number} has reasoning_content")
        weight = message.get("loss_weight")
        if weight not in (None, 0, 1):
            raise ValueError(f"message {number} has loss_weight {weight!r}; give 0 or 1")


def require_text(value, context):
    """Return value if it is valid Unicode text. Raises ValueError, whose message begins with
    context, e.g. "message 2 has content".
    """
    if not isinstance(value, str):
        raise ValueError(f"{context} {value!r:.200}, which is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{context} with an unpaired surrogate (invalid Unicode): {error}"
        ) from None
    return value


def parse_json(value, name):
    """Return value, parsed as JSON if it is text; None if it is blank. Raises ValueError."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is text that is not JSON: {error}") from None


def parse_list(value, name):
    """Return the list in `tools` or `tool_calls`, a value or JSON text; [] if it is empty."""
    value = parse_json(value, name) or []
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list: {value!r}")
    return value


def tools_text(tools):
    """Return the tools as text for the system turn."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return require_text(f"You can call these functions:\n{lines}", "tools is text")


def call_text(call):
    """Return a tool call as JSON text, {"name": ..., "arguments": {...}}. OpenAI's format wraps it
    in "function"; Llama's names the arguments "parameters".
    """
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or "name" not in call:
        raise ValueError(f"a tool call needs a name: {call!r}")
    arguments = parse_json(call.get("arguments") or call.get("parameters"), "arguments") or {}
    text = json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)
    return require_text(text, "tool_calls is text")


def parse_call(text):
    """Parse a tool call, {"name", "arguments"}; returns None if it is malformed."""

    def reject(constant):  # NaN and Infinity are not JSON
        raise ValueError(constant)

    with suppress(ValueError, RecursionError):
        call = json.loads(text, parse_constant=reject)
        if isinstance(call, dict):
            call = {key: call.get(key) for key in ("name", "arguments")}
            has_types = isinstance(call["name"], str) and isinstance(call["arguments"], dict)
            if has_types and call_text(call):  # call_text raises ValueError for invalid Unicode
                return call
    return None


def parse_answer(ids, tokenizer):
    """Parse generated ids into an assistant message, the inverse of `render`: {"content"}, with
    "reasoning_content" if it reasoned and "tool_calls" if it called tools. If </think> is missing,
    everything is reasoning; malformed calls stay in the content.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    ids, message, calls = list(ids), {}, []
    if ids[:1] == [THINK]:
        end = ids.index(END_THINK) if END_THINK in ids else len(ids)
        message["reasoning_content"] = decode(ids[1:end]).removeprefix("\n").removesuffix("\n")
        ids = ids[end + 1 :]
    begin = ids.index(TOOL_CALL) if TOOL_CALL in ids else len(ids)
    while ids[begin : begin + 1] == [TOOL_CALL] and END_TOOL_CALL in ids[begin:]:
        end = ids.index(END_TOOL_CALL, begin)
        call = parse_call(decode(ids[begin + 1 : end]))
        if call is None:
            break
        calls, ids = [*calls, call], ids[:begin] + ids[end + 1 :]
    content = decode(ids)
    message["content"] = content.removeprefix("\n\n") if "reasoning_content" in message else content
    return message | ({"tool_calls": calls} if calls else {})
