"""A server with a page that shows the model, and the routes of OpenAI's API; it needs the standard
library alone.

python eval_llm.py --serve 8000
curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'

Routes: / with /views/NAME and /docs/NAME.md; /v1/chat/completions, /v1/completions, /v1/models;
/health. Each connection has a thread: it reads a request, lets the `Batcher` answer it, and writes
what arrives.
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
from serving.streaming import Draft

MAX_MESSAGES, MAX_WAITING = 1000, 64  # of a chat; requests
ROUTES = {"/v1/chat/completions": True, "/v1/completions": False}  # is it a chat?
# Options that are read, and those that change no answer.
READ = """model messages prompt stream stream_options stop max_tokens max_completion_tokens
    temperature top_p top_k seed logprobs top_logprobs tools tool_choice parallel_tool_calls
    return_token_ids""".split()
WITHOUT_EFFECT = """user metadata store service_tier safety_identifier prompt_cache_key
    prompt_cache_retention cache_prompt""".split()
ONLY = {  # options that change an answer, and the one value that is supported
    **{"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {}},
    **{"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_p": 0},
    **{"min_tokens": 0, "ignore_eos": False, "stop_token_ids": [], "functions": []},
    **{"add_generation_prompt": True, "enable_thinking": True, "skip_special_tokens": True},
    **{"typical_p": 1, "mirostat": 0, "modalities": ["text"]},
    "response_format": {"type": "text"},
}


class Server(ThreadingHTTPServer):
    """models: {name: Served}, the first one for requests that name none of them. defaults: of
    temperature, top_p, top_k, max_new_tokens. logs: the folder of the logs of training.
    allowed_hosts: further names by which it is reached, as that of a tunnel.
    Raises UserError if the port is taken.
    """

    daemon_threads, request_queue_size = True, 128
    allow_reuse_address = sys.platform != "win32"  # there it would share a port that is taken

    def __init__(self, models, host, port, max_batch, defaults, logs, allowed_hosts=()):
        self.models, self.defaults, self.logs = models, defaults, logs
        self.batchers = {
            name: Batcher(served.model, max_batch, MAX_WAITING) for name, served in models.items()
        }
        own = socket.gethostname().lower()
        self.host_names = {"localhost", host.lower(), own, f"{own}.local", "host.docker.internal"}
        self.host_names |= {name.lower() for name in allowed_hosts}
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--serve {port}, --host {host}: {reason}; give others") from None

    def run(self):
        """Answers requests until Ctrl-C."""
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
        health = {"status": "ok" if alive else "no answers can be computed; see the output"}
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
        """(Request, stop strings) of a body."""
        for name, supported in ONLY.items():
            if body.get(name) not in (supported, None):
                raise ApiError(400, f"{name} = {body[name]!r:.100} is not supported")
        other_route = ("prompt",) if chat else ("messages", "tools", "tool_choice")
        for name, value in body.items():
            is_off = value is None or value is False or value in ("", [], {})
            known = name in (*READ, *WITHOUT_EFFECT, *ONLY) and name not in other_route
            if not is_off and not known:
                near = difflib.get_close_matches(name, [*READ, *ONLY], 1)
                hint = f"; is {near[0]} meant?" if near and near[0] != name else ""
                raise ApiError(400, f"the option {name:.100} is not supported{hint}")
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
        longest = "max_completion_tokens"
        longest = "max_tokens" if body.get(longest) is None else longest
        wanted = body.get("logprobs") is not None and body["logprobs"] is not False
        request = Request(
            ids,
            number(body, longest, defaults["max_new_tokens"], 1, math.inf),
            number(body, "temperature", defaults["temperature"], 0, 100, float),
            number(body, "top_k", defaults["top_k"], 0, math.inf),
            number(body, "top_p", defaults["top_p"], 0, 1, float),
            number(body, "seed", None, 0, 2**63 - 1),
            number(body, "top_logprobs" if chat else "logprobs", 0, 0, 20) if wanted else None,
        )
        return request, stops

    def chat_ids(self, body):
        """The ids of a chat. Raises ValueError."""
        if not self.served.chats:
            raise ValueError("these weights were only pretrained; use /v1/completions")
        messages, tools = body.get("messages"), body.get("tools")
        if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
            raise ValueError(f"{len(messages)} messages; the limit is {MAX_MESSAGES}")
        if body.get("tool_choice") not in (None, "auto", "none"):
            raise ValueError("tool_choice other than auto and none is not supported")
        tools = None if body.get("tool_choice") == "none" else tools
        if isinstance(messages, list):
            messages = [formats.message(turn, number) for number, turn in enumerate(messages, 1)]
        return render(messages, tools, True, self.served.tokenizer)[0]

    def prompt_ids(self, prompt):
        """The ids of a text to continue. Raises ValueError."""
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        known = range(self.served.model.config.vocab_size)
        if isinstance(prompt, str):
            prompt = self.served.tokenizer.encode(require_text(prompt, "prompt is")).ids
        elif not isinstance(prompt, list) or not all(type(i) is int and i in known for i in prompt):
            raise ValueError("prompt is not one text, or one list of token ids")
        return prompt or [END_OF_TEXT]

    def answer(self, body, chat):
        """Writes the answer to a request: at once, or as it grows where the body says stream."""
        request, stops = self.build_request(body, chat)
        stream, kind = bool(body.get("stream")), "chat.completion" if chat else "text_completion"
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "model": self.served.name}
        head |= {"object": kind + ".chunk" * (chat and stream), "created": int(time.time())}
        message, tokens = {"role": "assistant", "content": ""}, []
        self.most_calls = 1 if body.get("parallel_tool_calls") is False else None

        def part(key, message, tokens=(), reason=None):
            found = self.choices(chat, key, message, tokens, reason)
            if body.get("return_token_ids"):  # an option of vLLM, with the stop token as there
                ids = [token for token, *_ in tokens]
                ids += [request.next] if reason and request.next in STOP else []
                found["choices"][0]["token_ids"] = ids
            return head | found

        try:
            self.batcher.submit(request)
            if stream:
                self.send_event(part("delta", message))
            for new, of_new, reason in self.growth(request, chat, stops, stream or stops):
                if stream:
                    self.send_event(part("delta", new, of_new, reason))
                for name, value in new.items():
                    message[name] = message[name] + value if name in message else value
                tokens += of_new
        except queue.Full:
            raise ApiError(429, f"{MAX_WAITING} requests wait already; try again later") from None
        finally:
            request.cancelled = True
        usage = {"prompt_tokens": len(request.ids), "completion_tokens": len(tokens)}
        usage["total_tokens"] = sum(usage.values())
        if not stream:
            return self.send(part("message", message, tokens, reason) | {"usage": usage})
        if (body.get("stream_options") or {}).get("include_usage"):
            self.send_event(head | {"choices": [], "usage": usage})
        self.send_event("[DONE]")

    def growth(self, request, chat, stops, grows):
        """Yield (the new text of each field of the message, its tokens, why the answer ends or
        None): once at the end, or whenever there is new text.
        """
        tokens, reported, reason = [], 0, None
        draft = Draft(self.text, chat, stops)
        while not reason:
            item = self.arrival(request)
            if isinstance(item, str):
                reason = item
            else:
                tokens.append(item)
                draft.add(item[0])
            if not reason and (not grows or request.answer.qsize()):
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

    def arrival(self, request):
        """The next token of an answer, or the reason of its end. Raises ConnectionError if the
        client has gone away.
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
                raise ApiError(500, "the answer could not be computed; see the server's output")
            if item is not None:
                return item

    def message(self, ids, chat):
        """The fields of an answer with these ids."""
        if not chat:
            return {"content": self.text(ids)}
        message = parse_answer(ids, self.served.tokenizer)
        if "reasoning_content" in message and message["content"] == "\n":
            message["content"] = ""  # half of the empty line between reasoning and content
        for number, call in enumerate(message.get("tool_calls", [])):
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
            of_api = {"index": number, "id": f"call_{uuid.uuid4().hex}", "type": "function"}
            message["tool_calls"][number] = of_api | {"function": call}
        return message

    def text(self, ids):
        return self.served.tokenizer.decode(ids, skip_special_tokens=False)

    def choices(self, chat, key, message, tokens=(), reason=None):
        """{"choices"} with the one answer, or a part of it, in the form of the route."""
        found = {"index": 0, "finish_reason": reason, "logprobs": None}
        found |= {key: message} if chat else {"text": message.get("content", "")}
        scored = [
            (self.text([token]), value, [(self.text([t]), v) for t, v in top])
            for token, value, top in tokens
            if value is not None
        ]
        if scored and chat:
            scores = [score(*s) | {"top_logprobs": [score(*t) for t in top]} for *s, top in scored]
            found["logprobs"] = {"content": scores}
        elif scored:
            texts, values, tops = zip(*scored, strict=True)
            found["logprobs"] = {"tokens": texts, "token_logprobs": values}
            found["logprobs"]["top_logprobs"] = [dict(top) for top in tops]
        return {"choices": [found]}


def score(text, value):
    half = "\ufffd" in text  # a part of a character
    return {"token": text, "logprob": value, "bytes": None if half else list(text.encode())}


def number(body, name, default, low, high, kind=int):
    """The number in a field, or its default. Raises ApiError for anything else."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, kind) or not low <= value <= high:
        raise ApiError(400, f"{name} = {value!r:.100}: give a number from {low} to {high}")
    return value
