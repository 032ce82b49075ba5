"""An OpenAI-compatible API, and a page that shows the model, with only the standard library.

python eval_llm.py --serve 8000
curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'

Routes: / with /views/NAME and /docs/NAME.md; /v1/chat/completions, /v1/completions, /v1/models;
/health. Each connection has a thread, which reads a request, submits it to the `Batcher`, and
writes the results.
"""

import difflib
import json
import math
import queue
import socket
import sys
import time
import uuid
from contextlib import suppress
from http.server import ThreadingHTTPServer
from urllib.parse import unquote

from common import END_OF_TEXT, ROOT, STOP, UserError
from dataset import formats
from model.chat_template import parse_answer, render, require_text
from serving import views
from serving.batching import Batcher, Request
from serving.handler import ApiError, JsonHandler
from serving.page import page
from serving.streaming import IncrementalDetokenizer

MAX_MESSAGES = 1000  # per chat
MAX_WAITING = 64  # queued requests
ROUTES = {"/v1/chat/completions": True, "/v1/completions": False}  # route: whether it's a chat
# Supported options, and options that don't affect the answer.
SUPPORTED = """model messages prompt stream stream_options stop max_tokens max_completion_tokens
    temperature top_p top_k seed logprobs top_logprobs tools tool_choice parallel_tool_calls
    return_token_ids""".split()
WITHOUT_EFFECT = """user metadata store service_tier safety_identifier prompt_cache_key
    prompt_cache_retention cache_prompt""".split()
ONLY = {  # options that affect the answer: the only supported value
    **{"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {}},
    **{"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_p": 0},
    **{"min_tokens": 0, "ignore_eos": False, "stop_token_ids": [], "functions": []},
    **{"add_generation_prompt": True, "enable_thinking": True, "skip_special_tokens": True},
    **{"typical_p": 1, "mirostat": 0, "modalities": ["text"]},
    "response_format": {"type": "text"},
}


class Server(ThreadingHTTPServer):
    """The HTTP server. Raises UserError if the port is in use.

    models         {name: Served}; the first is the default
    defaults       temperature, top_p, top_k and max_new_tokens
    logs           folder of the training logs
    allowed_hosts  further host names, e.g. of a tunnel
    """

    daemon_threads, request_queue_size = True, 128
    allow_reuse_address = sys.platform != "win32"  # on Windows it would share a used port

    def __init__(self, models, host, port, max_batch, defaults, logs, allowed_hosts=()):
        self.models, self.defaults, self.logs = models, defaults, logs
        self.batchers = {
            name: Batcher(served.model, max_batch, MAX_WAITING) for name, served in models.items()
        }
        hostname = socket.gethostname().lower()
        self.host_names = {"localhost", host.lower(), hostname, f"{hostname}.local"}
        self.host_names.add("host.docker.internal")
        self.host_names |= {name.lower() for name in allowed_hosts}
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--serve {port}, --host {host}: {reason}; give others") from None

    def run(self):
        """Serve requests until Ctrl-C."""
        for batcher in self.batchers.values():
            batcher.start()
        address = f"http://{self.server_address[0]}:{self.server_port}"
        print(f"{address} shows the model in a browser; {address}/v1 answers requests of programs")
        print("Ctrl-C ends it", flush=True)
        try:
            self.serve_forever()
        finally:
            for batcher in self.batchers.values():
                batcher.ended = True
                batcher.join()
            self.server_close()


class Handler(JsonHandler):
    def get(self, path):
        alive = all(batcher.is_alive() for batcher in self.server.batchers.values())
        about = {"object": "model", "created": 0, "owned_by": "seedling"}
        names = list(self.server.models)
        models = [{"id": name} | about for name in names]
        health = {"status": "ok" if alive else "worker died; see the log"}
        if path == "/health":
            self.send(health, 200 if alive else 503)
        elif path == "/v1/models":
            self.send({"object": "list", "data": models})
        elif path.startswith("/v1/models/"):
            name = unquote(path.removeprefix("/v1/models/"))
            if name not in names:
                raise ApiError(404, f"there is no model {name:.100}; there is {', '.join(names)}")
            self.send({"id": name} | about)
        elif path == "/":
            self.send_data(
                page(self.server.models, self.server.defaults, docs="docs"),
                "text/html; charset=utf-8",
            )
        elif path in {f"/docs/{chapter.name}" for chapter in (ROOT / "docs").glob("*.md")}:
            self.send_data((ROOT / path[1:]).read_bytes(), "text/plain; charset=utf-8")
        else:
            raise ApiError(404, f"there is no {path}; there is /, /health, /v1/models")

    def post(self, path, body):
        view, models = path.removeprefix("/views/"), self.server.models
        if view in views.VIEWS:
            try:
                self.send(views.answer(models, self.server.logs, view, body))
            except ValueError as error:
                raise ApiError(400, str(error)) from None
        elif path in ROUTES:
            name = body.get("model")
            name = name if isinstance(name, str) and name in models else next(iter(models))
            self.served, self.batcher = models[name], self.server.batchers[name]
            self.answer(body, ROUTES[path])
        else:
            raise ApiError(404, f"there is no {path}; there is {', '.join(ROUTES)}")

    def build_request(self, body, chat):
        """Validate a request body. Returns (Request, stop strings)."""
        for name, supported in ONLY.items():
            if body.get(name) not in (supported, None):
                raise ApiError(400, f"{name} = {body[name]!r:.100} isn't supported")
        other_route = ("prompt",) if chat else ("messages", "tools", "tool_choice")
        for name, value in body.items():
            is_off = value is None or value is False or value in ("", [], {})
            known = name in (*SUPPORTED, *WITHOUT_EFFECT, *ONLY) and name not in other_route
            if not is_off and not known:
                near = difflib.get_close_matches(name, [*SUPPORTED, *ONLY], 1)
                hint = f"; is {near[0]} meant?" if near and near[0] != name else ""
                raise ApiError(400, f"the option {name:.100} isn't supported{hint}")
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise ApiError(400, "top_logprobs needs logprobs = true")
        if not isinstance(body.get("stream_options") or {}, dict):
            raise ApiError(400, "stream_options is not an object")
        stops, defaults = body.get("stop") or [], self.server.defaults
        stops = [stops] if isinstance(stops, str) else stops
        short = isinstance(stops, list) and len(stops) <= 16
        if not short or not all(isinstance(stop, str) and 0 < len(stop) < 200 for stop in stops):
            raise ApiError(400, "stop is not text, or up to 16 texts, of up to 200 characters")
        if body.get("stream") not in (None, False, True):
            raise ApiError(400, "stream is not true or false")
        try:
            ids = self.chat_ids(body) if chat else self.prompt_ids(body.get("prompt"))
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        context = self.served.model.config.max_position_embeddings
        if len(ids) >= context:
            raise ApiError(400, f"the prompt has {len(ids)} tokens; the context is {context}")
        max_tokens = "max_completion_tokens"
        if body.get(max_tokens) is None:
            max_tokens = "max_tokens"
        logprobs, top_logprobs = body.get("logprobs"), None
        if logprobs is not None and logprobs is not False:  # 0: the tokens' own log-probabilities
            top_logprobs = number(body, "top_logprobs" if chat else "logprobs", 0, 0, 20)
        request = Request(
            ids,
            max_tokens=number(body, max_tokens, defaults["max_new_tokens"], 1, math.inf),
            temperature=number(body, "temperature", defaults["temperature"], 0, 100, float),
            top_k=number(body, "top_k", defaults["top_k"], 0, math.inf),
            top_p=number(body, "top_p", defaults["top_p"], 0, 1, float),
            seed=number(body, "seed", None, 0, 2**63 - 1),
            top_logprobs=top_logprobs,
        )
        return request, stops

    def chat_ids(self, body):
        """Return the ids of a chat. Raises ValueError."""
        if not self.served.chats:
            raise ValueError("these weights were only pretrained; use /v1/completions")
        messages, tools = body.get("messages"), body.get("tools")
        if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
            raise ValueError(f"{len(messages)} messages; the limit is {MAX_MESSAGES}")
        if body.get("tool_choice") not in (None, "auto", "none"):
            raise ValueError("tool_choice other than auto and none is not supported")
        tools = None if body.get("tool_choice") == "none" else tools
        if isinstance(messages, list):
            messages = [formats.to_message(turn, number) for number, turn in enumerate(messages, 1)]
        return render(messages, tools, True, self.served.tokenizer)[0]

    def prompt_ids(self, prompt):
        """Return the ids of a text to continue. Raises ValueError."""
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        known = range(self.served.model.config.vocab_size)
        if isinstance(prompt, str):
            prompt = self.served.tokenizer.encode(require_text(prompt, "prompt is")).ids
        elif not isinstance(prompt, list) or not all(type(i) is int and i in known for i in prompt):
            raise ValueError("prompt is not one text, or one list of token ids")
        return prompt or [END_OF_TEXT]

    def answer(self, body, chat):
        """Send the answer to a request, as a stream if the body asks for it."""
        request, stops = self.build_request(body, chat)
        stream = bool(body.get("stream"))
        kind = "chat.completion" if chat else "text_completion"
        if chat and stream:
            kind = "chat.completion.chunk"
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "model": self.served.name}
        head |= {"object": kind, "created": int(time.time())}
        message, tokens = {"role": "assistant", "content": ""}, []
        self.most_calls = 1 if body.get("parallel_tool_calls") is False else None

        def part(key, message, tokens=(), reason=None):
            chunk = self.choices(chat, key, message, tokens, reason)
            if body.get("return_token_ids"):  # as in vLLM, including the stop token
                ids = [token for token, *_ in tokens]
                ids += [request.next] if reason and request.next in STOP else []
                chunk["choices"][0]["token_ids"] = ids
            return head | chunk

        try:
            self.batcher.submit(request)
            if stream:
                self.send_event(part("delta", message))
            chunks = self.stream_chunks(request, chat, stops, incremental=bool(stream or stops))
            for new, new_tokens, reason in chunks:
                if stream:
                    self.send_event(part("delta", new, new_tokens, reason))
                for name, value in new.items():
                    message[name] = message[name] + value if name in message else value
                tokens += new_tokens
        except queue.Full:
            raise ApiError(429, f"{MAX_WAITING} requests are waiting; try again later") from None
        finally:
            request.cancelled = True
        usage = {"prompt_tokens": len(request.ids), "completion_tokens": len(tokens)}
        usage["total_tokens"] = sum(usage.values())
        if not stream:
            return self.send(part("message", message, tokens, reason) | {"usage": usage})
        if (body.get("stream_options") or {}).get("include_usage"):
            self.send_event(head | {"choices": [], "usage": usage})
        self.send_event("[DONE]")

    def stream_chunks(self, request, chat, stops, incremental):
        """Yield (new text of each message field, its tokens, finish reason or None): with
        incremental whenever there is new text, otherwise once at the end.
        """
        tokens, reported, reason = [], 0, None
        draft = IncrementalDetokenizer(self.text, chat, stops)
        while not reason:
            item = self.next_item(request)
            if isinstance(item, str):
                reason = item
            else:
                tokens.append(item)
                draft.add(item[0])
            if not reason and (not incremental or request.answer.qsize()):
                continue
            new, calls = draft.take(), None
            if draft.stopped:
                reason = "stop"
            elif reason:
                message = self.message([token for token, *_ in tokens], chat)
                calls, content = message.pop("tool_calls", None), message["content"]
                places = [content.index(stop) for stop in stops if stop in content]
                if places:
                    message["content"], reason = content[: min(places)], "stop"
                for name, text in message.items():
                    end = text[draft.sent.get(name, 0) :]
                    new |= {name: new.get(name, "") + end} if end else {}
            if reason and calls:
                new["tool_calls"], reason = calls[: self.most_calls], "tool_calls"
            if new or reason:
                yield new, tokens[reported:], reason
                reported = len(tokens)

    def next_item(self, request):
        """Return the next token of an answer, or its finish reason. Raises ConnectionError if the
        client disconnected.
        """
        while True:
            self.connection.settimeout(0)
            with suppress(BlockingIOError):  # nothing to read: the client waits
                if not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionError
            self.connection.settimeout(self.timeout)
            item = None
            with suppress(queue.Empty):
                item = request.answer.get(timeout=0.5)
            if item == "error" or (item is None and not self.batcher.is_alive()):
                raise ApiError(500, "the answer could not be computed; see the server log")
            if item is not None:
                return item

    def message(self, ids, chat):
        """Return the message fields of an answer."""
        if not chat:
            return {"content": self.text(ids)}
        message = parse_answer(ids, self.served.tokenizer)
        if "reasoning_content" in message and message["content"] == "\n":
            message["content"] = ""  # part of the separator between reasoning and content
        for number, call in enumerate(message.get("tool_calls", [])):
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
            entry = {"index": number, "id": f"call_{uuid.uuid4().hex}", "type": "function"}
            message["tool_calls"][number] = entry | {"function": call}
        return message

    def text(self, ids):
        return self.served.tokenizer.decode(ids, skip_special_tokens=False)

    def choices(self, chat, key, message, tokens=(), reason=None):
        """Return {"choices"} with the answer, or a chunk of it, in the format of the route."""
        choice = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {key: message} if chat else {"text": message.get("content", "")}
        scored = [
            (self.text([token]), value, [(self.text([t]), v) for t, v in top])
            for token, value, top in tokens
            if value is not None
        ]
        if scored and chat:
            scores = [score(*s) | {"top_logprobs": [score(*t) for t in top]} for *s, top in scored]
            choice["logprobs"] = {"content": scores}
        elif scored:
            texts, values, tops = zip(*scored, strict=True)
            choice["logprobs"] = {"tokens": texts, "token_logprobs": values}
            choice["logprobs"]["top_logprobs"] = [dict(top) for top in tops]
        return {"choices": [choice]}


def score(text, value):
    """Return a token and its log-probability in OpenAI's format."""
    is_partial = "\ufffd" in text  # part of a character
    return {"token": text, "logprob": value, "bytes": None if is_partial else list(text.encode())}


def number(body, name, default, low, high, kind=int):
    """Return the number in a field, or the default. Raises ApiError for anything else."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, kind) or not low <= value <= high:
        raise ApiError(400, f"{name} = {value!r:.100}: give a number from {low} to {high}")
    return value
