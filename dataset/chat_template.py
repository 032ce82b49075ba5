"""From a conversation to token ids, with the loss mask born beside them.

    <|im_start|>system\n{content}<|im_end|>\n
    <|im_start|>user\n{content}<|im_end|>\n
    <|im_start|>assistant\n<think>\n{reasoning}\n</think>\n\n{content}<tool_call>{json}</tool_call><|im_end|>\n
    <|im_start|>tool\n<tool_response>{content}</tool_response><|im_end|>\n

Every piece is encoded on its own and knows, as it is written, whether the model is to learn it.
Nothing is searched for afterwards, so no text, whatever it imitates, can turn the mask on.
"""  # noqa: E501

import json
from functools import lru_cache

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
from dataset.tokenizer import load_tokenizer

ROLES = ("system", "user", "assistant", "tool")
shipped_tokenizer = lru_cache(load_tokenizer)


def render(messages, tools=None, add_generation_prompt=False, tokenizer=None):
    """One conversation as (ids, loss_mask), two lists of equal length.

    loss_mask is 1 where the model is to learn the token: what the assistant wrote (reasoning,
    content, tool calls) and the <|im_end|> that ends its turn. It is 0 for every header, for the
    newline after a turn, and for all that system, user and tool wrote.

    messages               [{"role", "content", "reasoning_content"?, "tool_calls"?, "tools"?,
                           "loss_weight"?}]; an assistant's turn of loss_weight 0 is not learned
    tools                  functions that the assistant may call, as a list or its JSON text; they
                           go into the system turn. Default: the `tools` of the first message.
    add_generation_prompt  ends with the header of an assistant's turn, for the model to go on
    tokenizer              default: the shipped one

    Raises ValueError, naming the message, for what is not such a conversation.
    """
    conversation = pieces(messages, tools, add_generation_prompt)
    return render_batch([conversation], tokenizer or shipped_tokenizer())[0]


def render_batch(conversations, tokenizer):
    """What `render` gives for each of many lists of pieces; each distinct text is encoded once,
    on all cores.
    """
    texts = {text for pieces in conversations for text, _ in pieces if isinstance(text, str)}
    texts = sorted(texts)
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids_of = {text: encoding.ids for text, encoding in zip(texts, encoded, strict=True)}
    rendered = []
    for pieces in conversations:
        ids, loss_mask = [], []
        for piece, learn in pieces:
            new = [piece] if isinstance(piece, int) else ids_of[piece]
            ids.extend(new)
            loss_mask.extend([learn] * len(new))
        rendered.append((ids, loss_mask))
    return rendered


def pieces(messages, tools=None, add_generation_prompt=False):
    """A conversation as a list of (piece, learn): a piece is text, or the id of a control token;
    learn is 1 for what the model is to learn. The arguments are those of `render`.
    """
    check(messages)
    tools = as_json(tools or messages[0].get("tools"), "tools")
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    written = []
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"] or ""
        learn = int(role == "assistant" and message.get("loss_weight", 1) != 0)
        if index == 0 and tools:
            content = "\n\n".join(filter(None, [content, tools_text(tools)]))
        written += [(IM_START, 0), (f"{role}\n", 0)]
        if role == "assistant" and message.get("reasoning_content"):
            written += [(THINK, learn), (f"\n{message['reasoning_content']}\n", learn)]
            written += [(END_THINK, learn), ("\n\n", learn)]
        if role == "tool":
            written += [(TOOL_RESPONSE, 0), (content, 0), (END_TOOL_RESPONSE, 0)]
        elif content:
            written += [(content, learn)]
        for call in as_json(message.get("tool_calls"), "tool_calls") or []:
            written += [(TOOL_CALL, learn), (call_text(call), learn), (END_TOOL_CALL, learn)]
        written += [(IM_END, learn), ("\n", 0)]
    if add_generation_prompt:
        written += [(IM_START, 0), ("assistant\n", 0)]
    try:
        "".join(piece for piece, _ in written if isinstance(piece, str)).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"it has half a character (a lone surrogate): {error}") from None
    return written


def parse_answer(ids, tokenizer):
    """What an assistant wrote, as {"content", "reasoning_content"?}: the inverse of `render` for
    one answer, except that tool calls and other control tokens stay in content as text.

    ids  the new ids of an answer, without its header and without the token that ends it

    Reasoning that has no end is all reasoning. The newlines that `render` puts around reasoning
    are removed.
    """
    if THINK not in ids:
        return {"content": tokenizer.decode(ids, skip_special_tokens=False)}
    begin = ids.index(THINK)
    end = ids.index(END_THINK, begin) if END_THINK in ids[begin:] else len(ids)
    before, reasoning, after = (
        tokenizer.decode(part, skip_special_tokens=False)
        for part in (ids[:begin], ids[begin + 1 : end], ids[end + 1 :])
    )
    answer = {"content": before + after.removeprefix("\n\n")}
    reasoning = reasoning.removeprefix("\n").removesuffix("\n")
    return answer | {"reasoning_content": reasoning} if reasoning else answer


def check(messages):
    """Raises ValueError unless messages is a list of {role, content}; says which one is wrong."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a conversation is a list of messages, not {messages!r}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(
                f'message {number} is not {{"role": ..., "content": ...}}: {message!r}'
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {number} has role {message['role']!r}; use one of {', '.join(ROLES)}"
            )
        for key in ("content", "reasoning_content"):
            text = message.get(key)
            if not isinstance(text, str) and (text is not None or key == "content"):
                if key == "content" and text is None and message.get("tool_calls"):
                    continue  # a turn that only calls tools
                raise ValueError(f"message {number} has {key} {text!r}, which is not text")
        if (weight := message.get("loss_weight")) not in (None, 0, 1):
            raise ValueError(f"message {number} has loss_weight {weight!r}; give 0 or 1")
        if message.get("tool_calls") and message["role"] != "assistant":
            raise ValueError(f"message {number} has tool_calls, but only an assistant calls tools")


def as_json(value, key):
    """`tools` and `tool_calls` come as lists or as the JSON text of lists, "" and None as none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key} is text that is not JSON: {error}") from None
    if value and not isinstance(value, list):
        raise ValueError(f"{key} is not a list: {value!r}")
    return value or None


def tools_text(tools):
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return f"You can call these functions:\n{lines}"


def call_text(call):
    """{"name": ..., "arguments": {...}} of a call, also when it comes wrapped as OpenAI's are, or
    with "parameters" as Llama's.
    """
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or "name" not in call:
        raise ValueError(f"a tool call needs a name: {call!r}")
    arguments = call.get("arguments") or call.get("parameters") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of {call['name']} are no JSON: {error}") from None
    return json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)
