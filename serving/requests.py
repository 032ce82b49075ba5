"""Parse the bodies of the API's requests."""

import difflib
import math

from common import END_OF_TEXT
from dataset import formats
from model.chat_template import render, require_text
from model.generation import SamplingParams
from serving.batching import Request
from serving.handler import ApiError

MAX_MESSAGES = 1000  # per chat
# Supported options, and options that don't affect the answer.
SUPPORTED = """model messages prompt stream stream_options stop max_tokens max_completion_tokens
    temperature top_p top_k seed logprobs top_logprobs tools tool_choice parallel_tool_calls
    return_token_ids""".split()
WITHOUT_EFFECT = """user metadata store service_tier safety_identifier prompt_cache_key
    prompt_cache_retention cache_prompt""".split()
ONLY = {  # options that affect the answer: the only supported value
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
    "functions": [],
    "add_generation_prompt": True,
    "enable_thinking": True,
    "skip_special_tokens": True,
    "typical_p": 1,
    "mirostat": 0,
    "modalities": ["text"],
    "response_format": {"type": "text"},
}


def build_request(served, body, is_chat, defaults):
    """Return the Request of a body; defaults: temperature, top_p, top_k and max_new_tokens. Raises
    ApiError if it is invalid.
    """
    require_supported(body, is_chat)
    try:
        ids = chat_ids(served, body) if is_chat else prompt_ids(served, body.get("prompt"))
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    context = served.model.config.max_position_embeddings
    if len(ids) >= context:
        raise ApiError(400, f"the prompt has {len(ids)} tokens; the context is {context}")
    longest = "max_completion_tokens"
    if body.get(longest) is None:
        longest = "max_tokens"
    params = SamplingParams(
        max_new_tokens=number(body, longest, defaults["max_new_tokens"], 1, math.inf),
        temperature=number(body, "temperature", defaults["temperature"], 0, 100, float),
        top_k=number(body, "top_k", defaults["top_k"], 0, math.inf),
        top_p=number(body, "top_p", defaults["top_p"], 0, 1, float),
        seed=number(body, "seed", None, 0, 2**63 - 1),
    )
    top_logprobs = None
    logprobs = body.get("logprobs")
    if logprobs is not None and logprobs is not False:  # 0: the tokens' own log-probabilities
        top_logprobs = number(body, "top_logprobs" if is_chat else "logprobs", 0, 0, 20)
    return Request(ids, params, top_logprobs)


def require_supported(body, is_chat):
    """Raise ApiError if a body has options that aren't supported on its route."""
    for name, supported in ONLY.items():
        if body.get(name) not in (supported, None):
            raise ApiError(400, f"{name} = {body[name]!r:.100} isn't supported")
    other_route = ("prompt",) if is_chat else ("messages", "tools", "tool_choice")
    for name, value in body.items():
        is_off = value is None or value is False or value in ("", [], {})
        is_known = name in (*SUPPORTED, *WITHOUT_EFFECT, *ONLY) and name not in other_route
        if not is_off and not is_known:
            near = difflib.get_close_matches(name, [*SUPPORTED, *ONLY], 1)
            hint = f"; is {near[0]} meant?" if near and near[0] != name else ""
            raise ApiError(400, f"the option {name:.100} isn't supported{hint}")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs = true")
    if not isinstance(body.get("stream_options") or {}, dict):
        raise ApiError(400, "stream_options is not an object")
    if body.get("stream") not in (None, False, True):
        raise ApiError(400, "stream is not true or false")


def parse_stops(body):
    """Return the stop strings of a body, a list. Raises ApiError if they are invalid."""
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    is_short = isinstance(stops, list) and len(stops) <= 16
    if not is_short or not all(isinstance(stop, str) and 0 < len(stop) < 200 for stop in stops):
        raise ApiError(400, "stop is not text, or up to 16 texts, of up to 200 characters")
    return stops


def chat_ids(served, body):
    """Return the ids of a chat. Raises ValueError."""
    if not served.chats:
        raise ValueError("these weights were only pretrained; use /v1/completions")
    messages, tools = body.get("messages"), body.get("tools")
    if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
        raise ValueError(f"{len(messages)} messages; the limit is {MAX_MESSAGES}")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise ValueError("tool_choice other than auto and none is not supported")
    if body.get("tool_choice") == "none":
        tools = None
    if isinstance(messages, list):
        messages = [formats.to_message(turn, number) for number, turn in enumerate(messages, 1)]
    ids, _ = render(messages, tools, add_generation_prompt=True, tokenizer=served.tokenizer)
    return ids


def prompt_ids(served, prompt):
    """Return the ids of a text to continue. Raises ValueError."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    known = range(served.model.config.vocab_size)
    if isinstance(prompt, str):
        prompt = served.tokenizer.encode(require_text(prompt, "prompt is")).ids
    elif not isinstance(prompt, list) or not all(type(i) is int and i in known for i in prompt):
        raise ValueError("prompt is not one text, or one list of token ids")
    return prompt or [END_OF_TEXT]


def number(body, name, default, low, high, kind=int):
    """Return the number in a field, or the default. Raises ApiError for anything else."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, kind) or not low <= value <= high:
        raise ApiError(400, f"{name} = {value!r:.100}: give a number from {low} to {high}")
    return value
