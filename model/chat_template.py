"""From a conversation to token ids and their loss mask.

    <|im_start|>system\n{content}<|im_end|>\n
    <|im_start|>user\n{content}<|im_end|>\n
    <|im_start|>assistant\n<think>\n{reasoning}\n</think>\n\n{content}<tool_call>{json}</tool_call><|im_end|>\n
    <|im_start|>tool\n<tool_response>{content}</tool_response><|im_end|>\n

The conversation is written as pieces. Each piece carries its own mask value and is encoded on its
own. Nothing is searched for afterwards, so no text, whatever it imitates, can turn the mask on.
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
AT_ONCE, LONG_TEXT = 1_000_000, 100_000  # characters that are encoded at once; of a part
SEPARATORS = " \n.,;、。，"
WORD_END = re.compile(rf"(?<=[^\W_])(?=[{SEPARATORS}])")
shipped_tokenizer = lru_cache(load_tokenizer)


def render(messages, tools=None, add_generation_prompt=False, tokenizer=None):
    """One conversation as (ids, loss_mask), two lists of equal length.

    loss_mask is 1 where the token is supervised: what the assistant wrote (reasoning, content, tool
    calls) and the <|im_end|> that ends its turn. It is 0 for every header, for the newline after a
    turn, and for all that system, user and tool wrote.

    messages               [{"role", "content", "reasoning_content"?, "tool_calls"?, "tools"?,
                           "loss_weight"?}]; an assistant's turn of loss_weight 0 is not supervised
    tools                  functions that the assistant may call, as a list or its JSON text; they
                           go into the system turn. Default: the `tools` of the first message.
    add_generation_prompt  ends with the header of an assistant's turn, which the model continues
    tokenizer              default: the shipped one

    Raises ValueError, naming the message, for what is not such a conversation.
    """
    conversation = pieces(messages, tools, add_generation_prompt)
    ((ids, loss_mask),) = render_batch([conversation], tokenizer or shipped_tokenizer())
    return list(ids), list(loss_mask)


def pieces(messages, tools=None, add_generation_prompt=False):
    """A conversation as a list of (piece, supervised): a piece is text, or the id of a control
    token; supervised is 1 or 0. Arguments and errors are those of `render`.
    """
    check(messages)
    tools = list_of(tools or messages[0].get("tools"), "tools")
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    written = []
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
        for call in list_of(message.get("tool_calls"), "tool_calls"):
            body += [TOOL_CALL, call_text(call), END_TOOL_CALL]
        body += [IM_END]
        written += [(IM_START, 0), (f"{role}\n", 0)]
        written += [(piece, supervised) for piece in body]
        written += [("\n", 0)]
    if add_generation_prompt:
        written += [(IM_START, 0), ("assistant\n", 0)]
    return written


def render_batch(conversations, tokenizer):
    """Return the (ids, loss_mask) of each of many lists of pieces, as arrays, which take a tenth of
    the memory of lists. Each distinct text is encoded once, on all cores.
    """
    texts = {text for pieces in conversations for text, _ in pieces if isinstance(text, str)}
    ids_of = encode_all(texts, tokenizer)
    rendered = []
    for pieces in conversations:
        ids, loss_mask = array("i"), bytearray()
        for piece, supervised in pieces:
            new = [piece] if isinstance(piece, int) else ids_of[piece]
            ids.extend(new)
            loss_mask.extend([supervised] * len(new))
        rendered.append((ids, loss_mask))
    return rendered


def encode_all(texts, tokenizer):
    """Return {text: its ids}. Long texts are encoded in parts, because the library needs 130 bytes
    of memory for each character that it encodes at once.
    """
    ids_of, batch, characters = {text: array("i") for text in texts}, [], 0
    parts = [(text, part) for text in ids_of for part in parts_to_encode(text, tokenizer)]
    for index, (text, part) in enumerate(parts):
        batch.append((text, part))
        characters += len(part)
        if characters > AT_ONCE or index == len(parts) - 1:
            encodings = tokenizer.encode_batch_fast([p for _, p in batch], add_special_tokens=False)
            for (text, _), encoding in zip(batch, encodings, strict=True):
                ids_of[text].extend(encoding.ids)
            batch, characters = [], 0
    return ids_of


def parts_to_encode(text, tokenizer):
    """Return the parts of a text, about LONG_TEXT characters each, whose ids, one after the other,
    are the ids of the text: it is cut after a word, where pre-tokenizers split it anyway.
    """
    parts, start = [], 0
    if len(text) > LONG_TEXT and splits_after_words(tokenizer):
        while match := WORD_END.search(text, start + LONG_TEXT):
            parts.append(text[start : match.start()])
            start = match.start()
    return [*parts, text[start:]]


def splits_after_words(tokenizer):
    """Whether a tokenizer gives a text cut at WORD_END the ids of the whole."""
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.rstrip or WORD_END.search(token.content) for token in added):
        return False

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    return all(encode(f"ab{mark}cd") == encode("ab") + encode(f"{mark}cd") for mark in SEPARATORS)


def check(messages):
    """Raises ValueError unless messages is a list of {role, content}; says which one is wrong."""
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
        if message["content"] is not None or not calls:  # a turn that only calls tools has no text
            text_of(message["content"], f"message {number} has content")
        if message.get("reasoning_content") is not None:
            text_of(message["reasoning_content"], f"message {number} has reasoning_content")
        weight = message.get("loss_weight")
        if weight not in (None, 0, 1):
            raise ValueError(f"message {number} has loss_weight {weight!r}; give 0 or 1")


def text_of(value, found):
    """The value, if it is text that UTF-8 can hold. Raises ValueError, which begins with found, say
    "message 2 has content".
    """
    if not isinstance(value, str):
        raise ValueError(f"{found} {value!r:.200}, which is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{found} with half a character (a lone surrogate): {error}") from None
    return value


def json_of(value, name):
    """The value; if it is text, what it is as JSON, or None if it is blank. Raises ValueError."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is text that is not JSON: {error}") from None


def list_of(value, name):
    """The list that `tools` or `tool_calls` hold, as a value or as JSON text; [] for none."""
    value = json_of(value, name) or []
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list: {value!r}")
    return value


def tools_text(tools):
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return text_of(f"You can call these functions:\n{lines}", "tools is text")


def call_text(call):
    """The JSON text {"name": ..., "arguments": {...}} of a call. OpenAI's format wraps it in
    "function", Llama's names the arguments "parameters".
    """
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or "name" not in call:
        raise ValueError(f"a tool call needs a name: {call!r}")
    arguments = json_of(call.get("arguments") or call.get("parameters"), "arguments") or {}
    text = json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)
    return text_of(text, "tool_calls is text")


def call_of(text):
    """The call {"name", "arguments"} that a model wrote, or None if it is none."""
    with suppress(ValueError, RecursionError):
        call = json.loads(text, parse_constant=int)  # int("NaN") is a ValueError
        if isinstance(call, dict):
            call = {key: call.get(key) for key in ("name", "arguments")}
            if [*map(type, call.values())] == [str, dict] and call_text(call):
                return call
    return None


def parse_answer(ids, tokenizer):
    """An assistant's message of the ids that a model wrote, the inverse of `render`: {"content"},
    "reasoning_content" where it reasoned first, "tool_calls" where it called tools. Reasoning that
    does not end is all there is; what is not a call stays in the content.
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
        call = call_of(decode(ids[begin + 1 : end]))
        if call is None:
            break
        calls, ids = [*calls, call], ids[:begin] + ids[end + 1 :]
    content = decode(ids)
    message["content"] = content.removeprefix("\n\n") if "reasoning_content" in message else content
    return message | ({"tool_calls": calls} if calls else {})
