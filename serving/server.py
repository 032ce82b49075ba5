"""An OpenAI-compatible API, and a page that shows the model, with only the standard library.

python eval_llm.py --serve 8000
curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'

Routes: / with /views/NAME and /docs/NAME.md; /v1/chat/completions, /v1/completions, /v1/models;
/health. Each connection has a thread, which reads a request, submits it to the `Batcher`, and
writes the results.
"""

import json
import queue
import socket
import sys
import time
import uuid
from contextlib import suppress
from functools import partial
from http.server import ThreadingHTTPServer
from urllib.parse import unquote

from common import ROOT, STOP, UserError
from model.chat_template import parse_answer
from serving import views
from serving.batching import Batcher
from serving.handler import ApiError, JsonHandler
from serving.page import page
from serving.requests import build_request, parse_stops
from serving.streaming import IncrementalDetokenizer

MAX_WAITING = 64  # queued requests
ROUTES = {"/v1/chat/completions": True, "/v1/completions": False}  # route: whether it's a chat


class Server(ThreadingHTTPServer):
    """The HTTP server. Raises UserError if the port is in use.

    models         {name: OpenModel}; the first is the default
    defaults       temperature, top_p, top_k and max_new_tokens
    logs           folder of the training logs
    allowed_hosts  further host names, e.g. of a tunnel
    """

    daemon_threads = True
    request_queue_size = 128
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
            self.answer(models[name], self.server.batchers[name], body, is_chat=ROUTES[path])
        else:
            raise ApiError(404, f"there is no {path}; there is {', '.join(ROUTES)}")

    def answer(self, served, batcher, body, is_chat):
        """Send the answer to a request, as a stream if the body asks for it."""
        request = build_request(served, body, is_chat, self.server.defaults)
        stops = parse_stops(body)
        stream = bool(body.get("stream"))
        kind = "chat.completion" if is_chat else "text_completion"
        if is_chat and stream:
            kind = "chat.completion.chunk"
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "model": served.name}
        head |= {"object": kind, "created": int(time.time())}
        message = {"role": "assistant", "content": ""}
        tokens = []

        def part(key, message, tokens=(), reason=None):
            choice = make_choice(served, message, key, tokens, reason, is_chat)
            if body.get("return_token_ids"):  # as in vLLM, including the stop token
                choice["token_ids"] = [token.id for token in tokens]
                choice["token_ids"] += (
                    [request.next_id] if reason and request.next_id in STOP else []
                )
            return head | {"choices": [choice]}

        try:
            batcher.submit(request)
            if stream:
                self.send_event(part("delta", message))
            items = self.items(request, batcher)
            options = {"is_chat": is_chat, "stops": stops, "incremental": bool(stream or stops)}
            options["max_calls"] = 1 if body.get("parallel_tool_calls") is False else None
            for new, new_tokens, reason in stream_chunks(served, request, items, **options):
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

    def items(self, request, batcher):
        """Yield the NewTokens of an answer, and finally its finish reason. Raises ConnectionError
        if the client disconnected.
        """
        item = None
        while not isinstance(item, str):
            self.connection.settimeout(0)
            with suppress(BlockingIOError):  # nothing to read: the client waits
                if not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionError
            self.connection.settimeout(self.timeout)
            item = None
            with suppress(queue.Empty):
                item = request.answer.get(timeout=0.5)
            if item == "error" or (item is None and not batcher.is_alive()):
                raise ApiError(500, "the answer could not be computed; see the server log")
            if item is not None:
                yield item


def decode(served, ids):
    """Return ids as text, with the control tokens."""
    return served.tokenizer.decode(ids, skip_special_tokens=False)


def to_message(served, ids, is_chat):
    """Return the message fields of an answer."""
    if not is_chat:
        return {"content": decode(served, ids)}
    message = parse_answer(ids, served.tokenizer)
    if "reasoning_content" in message and message["content"] == "\n":
        message["content"] = ""  # part of the separator between reasoning and content
    for number, call in enumerate(message.get("tool_calls", [])):
        call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
        entry = {"index": number, "id": f"call_{uuid.uuid4().hex}", "type": "function"}
        message["tool_calls"][number] = entry | {"function": call}
    return message


def make_choice(served, message, key, tokens, reason, is_chat):
    """Return an answer, or a chunk of it, in the format of the route: key is message or delta,
    tokens are NewTokens, reason is the finish reason or None.
    """
    choice = {"index": 0, "finish_reason": reason, "logprobs": None}
    choice |= {key: message} if is_chat else {"text": message.get("content", "")}
    scored = [token for token in tokens if token.logprob is not None]
    if not scored:
        return choice
    texts = [decode(served, [token.id]) for token in scored]
    tops = [[(decode(served, [id]), logprob) for id, logprob in token.top] for token in scored]
    if is_chat:
        content = []
        for text, token, top in zip(texts, scored, tops, strict=True):
            top_logprobs = [score(*alternative) for alternative in top]
            content.append(score(text, token.logprob) | {"top_logprobs": top_logprobs})
        choice["logprobs"] = {"content": content}
    else:
        choice["logprobs"] = {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in scored],
            "top_logprobs": [dict(top) for top in tops],
        }
    return choice


def stream_chunks(served, request, items, *, is_chat, stops, incremental, max_calls):
    """Yield (new text of each message field, its tokens, finish reason or None): with incremental
    whenever there is new text, otherwise once at the end. items are the NewTokens and the finish
    reason; max_calls is the number of tool calls to report, None: all.
    """
    tokens = []
    num_reported = 0
    draft = IncrementalDetokenizer(partial(decode, served), is_chat, stops)
    for item in items:
        reason = item if isinstance(item, str) else None
        if reason is None:
            tokens.append(item)
            draft.add(item.id)
            if not incremental or request.answer.qsize():
                continue
        new = draft.take()
        calls = None
        if draft.stopped:
            reason = "stop"
        elif reason:
            message = to_message(served, [token.id for token in tokens], is_chat)
            calls = message.pop("tool_calls", None)
            places = [
                message["content"].index(stop) for stop in stops if stop in message["content"]
            ]
            if places:
                message["content"] = message["content"][: min(places)]
                reason = "stop"
            for name, text in message.items():
                end = text[draft.sent.get(name, 0) :]
                if end:
                    new[name] = new.get(name, "") + end
        if reason and calls:
            new["tool_calls"] = calls[:max_calls]
            reason = "tool_calls"
        if new or reason:
            yield new, tokens[num_reported:], reason
            num_reported = len(tokens)
        if reason:
            return


def score(text, value):
    """Return a token and its log-probability in OpenAI's format."""
    is_partial = "\ufffd" in text  # part of a character
    return {"token": text, "logprob": value, "bytes": None if is_partial else list(text.encode())}
