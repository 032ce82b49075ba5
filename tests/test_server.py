"""The server: judged by the openai client, and by what `complete` answers to each prompt alone."""

import base64
import json
import queue
import random
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models

from common import END_THINK, END_TOOL_CALL, IM_END, THINK, TOOL_CALL
from model.causal_lm import CausalLM, ModelConfig
from model.chat_template import parse_answer, render
from model.generation import SamplingParams, complete
from model.tokenizer import load_tokenizer
from serving import server as serving
from serving import start, views
from serving.batching import Batcher, NewToken, Request
from serving.streaming import IncrementalDetokenizer
from tests.conftest import ROOT, opened, run_here, serving_at, write_jsonl

DEFAULTS = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24}
TOKENIZER = load_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(11)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 200}
    return CausalLM(ModelConfig(**shape)).eval()


@contextmanager
def serve(model, chats=True, max_batch=4, start=True, logs=ROOT, hosts=()):
    """A server in a thread, at a free port."""
    models = {"tiny": opened("tiny", model, TOKENIZER, chats, 200)}
    server = serving.Server(models, "127.0.0.1", 0, max_batch, DEFAULTS, logs, hosts)
    server.batcher = server.batchers["tiny"]
    with serving_at(server, start):
        yield server


@pytest.fixture(scope="module")
def running(model):
    with serve(model) as server:
        yield server


def post(server, route, body, **headers):
    """(status, answer) of a request; body is an object or bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://127.0.0.1:{server.server_port}{route}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def raw(server, data):
    """What the server answers to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def alone(model, ids, **options):
    """The text that `complete` gives."""
    (answer,) = complete(model, [ids], **{"max_new_tokens": 24, "temperature": 0} | options)
    return TOKENIZER.decode(answer, skip_special_tokens=False)


def chat_ids(text):
    return render([{"role": "user", "content": text}], add_generation_prompt=True)[0]


CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Who are you?"}]


def test_the_client_of_openai_gets_our_answers(running, model):
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{running.server_port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert [found.id for found in client.models.list().data] == ["tiny"]
    expected = alone(model, chat_ids("Who are you?"))
    answer = client.chat.completions.create(model="tiny", messages=HI)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(chat_ids("Who are you?"))
    assert answer.usage.completion_tokens == 24
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(model="tiny", messages=HI, **options)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "length" and len(parts) > 5
    assert last.usage == answer.usage
    text = client.completions.create(model="tiny", prompt="Nelina lives", max_tokens=9)
    assert answer.object == "chat.completion" and text.object == "text_completion"
    expected = alone(model, TOKENIZER.encode("Nelina lives").ids, max_new_tokens=9)
    assert text.choices[0].text == expected
    with pytest.raises(openai.BadRequestError, match="n = 2 isn't supported"):
        client.chat.completions.create(model="tiny", messages=HI, n=2)
    parts = client.completions.create(model="tiny", prompt=[17], max_tokens=9, stream=True)
    expected = alone(model, [17], max_new_tokens=9)
    assert "".join(part.choices[0].text for part in parts) == expected


def test_the_log_probabilities_are_those_of_the_model(running, model):
    body = {"messages": HI, "logprobs": True, "top_logprobs": 3, "max_tokens": 2}
    _, found = post(running, CHAT, body)
    first = found["choices"][0]["logprobs"]["content"][0]
    with torch.inference_mode():
        logprobs = model(torch.tensor([chat_ids("Who are you?")]))[0, -1].log_softmax(dim=-1)
    values, ids = logprobs.topk(3)
    texts = [TOKENIZER.decode([i], skip_special_tokens=False) for i in ids.tolist()]
    assert [top["token"] for top in first["top_logprobs"]] == texts
    for top, value in zip(first["top_logprobs"], values.tolist(), strict=True):
        assert top["logprob"] == pytest.approx(value, abs=1e-4)
    assert first["logprob"] == pytest.approx(values[0].item(), abs=1e-4)
    ids = chat_ids("Who are you?")
    _, found = post(running, "/v1/completions", {"prompt": ids, "logprobs": 1, "max_tokens": 2})
    second = found["choices"][0]["logprobs"]
    assert second["token_logprobs"][0] == pytest.approx(values[0].item(), abs=1e-4)
    assert list(second["top_logprobs"][0]) == second["tokens"][:1] == texts[:1]
    _, reply = post(running, "/v1/completions", {"prompt": ids, "logprobs": 0, "max_tokens": 2})
    third = reply["choices"][0]["logprobs"]  # 0 asks for the tokens' own, False for none
    assert third["token_logprobs"] == second["token_logprobs"] and third["top_logprobs"] == [{}, {}]
    _, reply = post(running, "/v1/completions", {"prompt": ids, "logprobs": False, "max_tokens": 2})
    assert reply["choices"][0]["logprobs"] is None


def test_each_of_many_requests_gets_its_own_answer(model):
    """Prompts of 1 to 120 tokens, answers of 1 to 40, four at a time: as each alone."""
    asked = [([16 + (7 * i + j) % 900 for j in range(1 + 17 * i % 120)], 1 + 11 * i % 40)
             for i in range(40)]  # fmt: skip
    batcher = Batcher(model, 4, 100)
    requests = [Request(ids, SamplingParams(count, 0.0)) for ids, count in asked]
    for request in requests:
        batcher.submit(request)
    batcher.start()
    for request, (ids, count) in zip(requests, asked, strict=True):
        (expected,) = complete(model, [ids], max_new_tokens=count, temperature=0)
        items = []
        while (item := request.answer.get(timeout=60)) != "length":
            items.append(item.id)
        assert items == expected
    batcher.ended = True
    batcher.join()


def test_an_answer_ends_where_the_context_ends(running, model):
    body = {"prompt": [20] * 190, "max_tokens": 500}
    _, found = post(running, "/v1/completions", body)
    assert found["usage"]["completion_tokens"] == 10
    assert found["choices"][0]["finish_reason"] == "length"
    status, found = post(running, "/v1/completions", {"prompt": [20] * 200})
    assert status == 400 and "200 tokens; the context is 200" in found["error"]["message"]


def test_a_seed_gives_the_same_answer_whatever_else_runs(model):
    def texts(count):
        with serve(model, max_batch=8) as server:
            bodies = [{"messages": HI, "temperature": 3, "seed": i} for i in range(count)]
            found = [None] * count

            def ask(i):
                found[i] = post(server, CHAT, bodies[i])[1]["choices"][0]["message"]["content"]

            threads = [threading.Thread(target=ask, args=[i]) for i in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return found

    some = texts(6)
    assert len(set(some)) == 6
    assert texts(2) == some[:2]


def test_a_stop_string_is_never_written(model, monkeypatch):
    """It begins within one token and ends within another."""
    text = "She lives at the mill. He is a baker, she is a tailor."
    body = {"messages": HI, "stop": ["never said", "ll. He is"]}
    with serve(model, start=False) as server:
        monkeypatch.setattr(server.batcher, "submit", writes(TOKENIZER.encode(text).ids))
        _, found = post(server, CHAT, body)
        choices = streamed(server, body)
    assert found["choices"][0]["message"]["content"] == "She lives at the mi"
    assert found["choices"][0]["finish_reason"] == "stop"
    deltas = [choice["delta"].get("content", "") for choice in choices]
    assert "".join(deltas) == "She lives at the mi" and len(deltas) > 4
    assert choices[-1]["finish_reason"] == "stop"


def writes(ids, reason="stop"):
    """A replacement of `Batcher.submit`: the model writes these ids, each when the one before was
    read.
    """

    def write(request):
        for item in [*map(NewToken, ids), reason]:
            while request.answer.qsize() and not request.cancelled:
                time.sleep(0.001)
            request.answer.put(item)

    return lambda request: threading.Thread(target=write, args=[request], daemon=True).start()


def streamed(server, body, route=CHAT):
    url = f"http://127.0.0.1:{server.server_port}{route}"
    with urllib.request.urlopen(url, json.dumps(body | {"stream": True}).encode()) as answer:
        lines = [line[6:] for line in answer.read().decode().splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def test_reasoning_and_calls_have_fields_of_their_own(model, monkeypatch):
    call = {"name": "weather", "arguments": {"city": "Köln"}}
    ids = [THINK, *TOKENIZER.encode("\nIt is cold. 🙂\n").ids, END_THINK]
    for piece in ("\n\nI look", TOOL_CALL, json.dumps(call, ensure_ascii=False), END_TOOL_CALL):
        ids += [piece] if isinstance(piece, int) else TOKENIZER.encode(piece).ids
    with serve(model, start=False) as server:
        monkeypatch.setattr(server.batcher, "submit", writes(ids))
        tools = [{"type": "function", "function": {"name": "weather"}}]
        _, found = post(server, CHAT, {"messages": HI, "tools": tools})
        choices = streamed(server, {"messages": HI, "tools": tools})
    message = found["choices"][0]["message"]
    assert found["choices"][0]["finish_reason"] == "tool_calls"
    assert message["reasoning_content"] == "It is cold. 🙂" and message["content"] == "I look"
    function = message["tool_calls"][0]["function"]
    assert function["name"] == "weather" and json.loads(function["arguments"]) == call["arguments"]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "It is cold. 🙂"
    assert "".join(delta.get("content", "") for delta in deltas) == "I look"
    assert "\ufffd" not in json.dumps(deltas)  # no half of an emoji
    assert deltas[-1]["tool_calls"][0]["function"] == function
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(model, monkeypatch, stream):
    step, asked = Batcher.step, []
    monkeypatch.setattr(Batcher, "step", lambda *args: time.sleep(0.01) or step(*args))
    with serve(model, max_batch=1) as server:
        submit = server.batcher.submit
        monkeypatch.setattr(server.batcher, "submit", lambda r: asked.append(r) or submit(r))
        body = json.dumps({"messages": HI, "stream": stream, "max_tokens": 150}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.sendall(head + body)
            while not asked or asked[0].num_generated < 3:
                time.sleep(0.01)
        status, _ = post(server, CHAT, {"messages": HI})
        gone = asked[0]
        assert status == 200 and gone.cancelled and 0 < gone.num_generated < 100


def test_too_many_waiting_requests_are_told_so(model, monkeypatch):
    monkeypatch.setattr(serving, "MAX_WAITING", 1)
    with serve(model, start=False) as server:
        waiting = Request([17], SamplingParams(2, 0.0))
        server.batcher.submit(waiting)
        status, found = post(server, CHAT, {"messages": HI})
        assert status == 429 and "1 requests are waiting" in found["error"]["message"]
        waiting.cancelled = True  # it no longer counts
        server.batcher.submit(waiting := Request([17], SamplingParams(2, 0.0)))
        server.batcher.start()
        assert list(iter(lambda: waiting.answer.get(timeout=60), "length"))
        assert post(server, CHAT, {"messages": HI})[0] == 200


def test_a_failure_of_the_model_is_an_error_of_its_requests_alone(model, monkeypatch, capfd):
    def fails(self, request):
        raise RuntimeError("no memory")

    with serve(model) as server:
        for part in ("prefill", "step"):
            with monkeypatch.context() as patch:
                patch.setattr(Batcher, part, fails)
                status, found = post(server, CHAT, {"messages": HI})
            assert status == 500 and found["error"]["type"] == "server_error"
            assert "no memory" in capfd.readouterr().err
            assert post(server, CHAT, {"messages": HI})[0] == 200
        server.batcher.ended = True
        server.batcher.join()
        status, found = post(server, CHAT, {"messages": HI})
        assert status == 500 and "could not be computed" in found["error"]["message"]
        assert raw(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 503")


BAD = {
    "no JSON": (b"{messages", 400, "isn't JSON"),
    "no object": (b"[1]", 400, "isn't a JSON object"),
    "deep": (b"[" * 100_000, 400, "isn't JSON"),
    "large": (b" " * 10_000_000, 413, "the body has 10000000 bytes"),
    "no messages": ({}, 400, "a conversation is a list of messages"),
    "role": ({"messages": [{"role": "x", "content": "y"}]}, 400, "message 1 has role 'x'"),
    "an unpaired surrogate": (
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        400,
        "surrogate",
    ),
    "half a prompt": (b'{"messages":[],"prompt":"\\ud800"}', 400, "option prompt isn't supported"),
    "stream": ({"messages": HI, "stream": "false"}, 400, "stream is not true or false"),
    "stops": ({"messages": HI, "stop": ["x"] * 17}, 400, "up to 16"),
    "penalty": ({"messages": HI, "repetition_penalty": 1.5}, 400, "repetition_penalty = 1.5"),
    "many": ({"messages": HI * 1001}, 400, "1001 messages; the limit is 1000"),
    "temperature": ({"messages": HI, "temperature": "hot"}, 400, "temperature = 'hot'"),
    "NaN": (b'{"messages":[{"role":"user","content":"y"}],"top_p":NaN}', 400, "top_p = nan"),
    "max_tokens": ({"messages": HI, "max_tokens": 1.5}, 400, "max_tokens = 1.5"),
    "bool": ({"messages": HI, "seed": True}, 400, "seed = True"),
    "stop": ({"messages": HI, "stop": [1]}, 400, "stop is not text"),
    "tool_choice": ({"messages": HI, "tool_choice": "required"}, 400, "tool_choice"),
    "long": ({"messages": [{"role": "user", "content": "a b " * 200}]}, 400, "the context is 200"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_an_error_of_the_api(running, name):
    body, status, sentence = BAD[name]
    found, answer = post(running, CHAT, body)
    assert found == status and sentence in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert post(running, CHAT, {"messages": HI, "max_tokens": 1})[0] == 200


def test_a_header_that_lies_is_an_error_of_the_api(running, monkeypatch):
    monkeypatch.setattr(serving.Handler, "timeout", 0.3)
    head = f"POST {CHAT} HTTP/1.1\r\n".encode()
    short = raw(running, head + b"Content-Length: 999\r\n\r\n{}")
    assert short.startswith(b"HTTP/1.1 408") and b"fewer bytes than were announced" in short
    for length in (b"", b"Content-Length: x\r\n"):
        assert raw(running, head + length + b"\r\n{}").startswith(b"HTTP/1.1 411")
    empty = raw(running, head + b"Content-Length: 0\r\n\r\n")
    assert empty.startswith(b"HTTP/1.1 400") and b"JSON" in empty
    negative = raw(running, head + b"Content-Length: -5\r\n\r\n{}")
    assert negative.startswith(b"HTTP/1.1 413") and b"Connection: close" in negative
    # What follows a body that was too short is not read as another request.
    both = raw(running, head + b"Content-Length: 1\r\n\r\n{GET /health HTTP/1.1\r\n\r\n")
    assert both.startswith(b"HTTP/1.1 400") and both.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "path", ["/docs", "/docs/../README.md", "/views/x", "/v1/../../etc/passwd", "/v1/nothing"]
)
def test_an_unknown_path_is_an_error_of_the_api(running, path):
    get = raw(running, f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
    assert get.startswith(b"HTTP/1.1 404") and b'"invalid_request_error"' in get
    assert post(running, path, {})[0] == 404
    put = raw(running, f"PUT {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
    assert put.startswith(b"HTTP/1.1 501") and b'"server_error"' in put
    health = raw(running, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert health.endswith(b'{"status": "ok"}')


def test_pretrained_weights_continue_text_and_do_not_chat(model):
    with serve(model, chats=False) as server:
        for text, ids in (("Nelina lives", TOKENIZER.encode("Nelina lives").ids), ("", [0])):
            _, found = post(server, "/views/turn", {"model": "tiny", "text": text, "ids": [17, 18]})
            assert found["ids"] == [17, 18, *ids]
        status, found = post(server, CHAT, {"messages": HI})
        assert status == 400 and "use /v1/completions" in found["error"]["message"]
        assert post(server, "/v1/completions", {"prompt": "", "max_tokens": 2})[0] == 200
        status, found = post(server, "/v1/completions", {"prompt": "\ud800"})
        assert status == 400 and "prompt is" in found["error"]["message"]


def test_a_port_that_is_taken_is_an_error_of_one_sentence(trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_here("eval_llm.py", "--save_dir", trained, "--serve", port)
    assert done.returncode == 2
    assert f"--serve {port}, --host 127.0.0.1: Address already in use" in done.stderr
    done = run_here("eval_llm.py", "--save_dir", trained, "--serve", 99999)
    assert done.returncode == 2 and "give others" in done.stderr
    done = run_here("eval_llm.py", "--save_dir", trained, "--serve", 0, "--system", "Hi")
    assert done.returncode == 2 and "--serve doesn't support --system" in done.stderr
    done = run_here("eval_llm.py", "--save_dir", trained, "--serve", 0, "--max_batch", 0)
    assert done.returncode == 2 and "--max_batch 0: give a whole number from 1" in done.stderr


def test_the_queue_is_bounded():
    batcher = Batcher(CausalLM(ModelConfig(hidden_size=32, num_hidden_layers=1)), 1, 2)
    for _ in range(2):
        batcher.submit(Request([17], SamplingParams(1, 0.0)))
    with pytest.raises(queue.Full):
        batcher.submit(Request([17], SamplingParams(1, 0.0)))


def head_of(server, **headers):
    """The first line of the answer to a GET with these headers."""
    headers = {"Connection": "close", **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return raw(server, f"GET / HTTP/1.1\r\n{lines}\r\n".encode()).split(b"\r\n")[0]


def test_pages_of_other_sites_are_refused(running):
    here = f"127.0.0.1:{running.server_port}"
    for allowed in ({"Host": here}, {"Host": "localhost"}, {"Host": "[::1]:80"}, {},
                    {"Host": here, "Origin": f"http://{here}"}):  # fmt: skip
        assert head_of(running, **allowed) == b"HTTP/1.1 200 OK", allowed
    for refused in ({"Host": "evil.example"}, {"Host": f"evil.example:{running.server_port}"},
                    {"Host": here, "Origin": "https://evil.example"}, {"Host": "127.0.0.1.nip.io"},
                    {"Host": here, "Origin": "null"}, {"Host": here, "Origin": f"http://{here}0"},
                    {"Host": "evil.example", "Origin": "http://evil.example"}):  # fmt: skip
        assert head_of(running, **refused) == b"HTTP/1.1 403 Forbidden", refused
    for path in (CHAT, "/views/runs", "/v1/completions"):
        status, found = post(running, path, {"messages": HI}, Origin="http://evil.example")
        assert status == 403 and "may not use this server" in found["error"]["message"]


def test_the_page_may_load_nothing_and_is_in_no_frame(running):
    url = f"http://127.0.0.1:{running.server_port}/"
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in text and "http://" not in text.replace("http://www.w3.org", "")
    assert len(text.splitlines()) <= 700
    with urllib.request.urlopen(f"{url}docs/3_model.md") as answer:
        assert answer.read() == (ROOT / "docs/3_model.md").read_bytes()


def test_the_ids_of_an_answer_are_given_with_its_stop_token(model, monkeypatch):
    prompt, ids = chat_ids("Who are you?"), TOKENIZER.encode("I am Köln 🙂").ids

    def submit(request):
        writes(ids)(request)
        request.next_id = IM_END

    body = {"prompt": prompt, "return_token_ids": True}
    with serve(model, start=False) as server:
        monkeypatch.setattr(server.batcher, "submit", submit)
        _, whole = post(server, "/v1/completions", body)
        parts = streamed(server, body, "/v1/completions")
    assert whole["choices"][0]["token_ids"] == [*ids, IM_END]
    assert sum((part["token_ids"] for part in parts), []) == [*ids, IM_END]


BAD_VIEWS = {
    "model": ("tokens", {"model": "other", "ids": [17]}, "there is no model 'other'"),
    "no model": ("tokens", {"model": [], "ids": [17]}, "there is no model"),
    "ids": ("tokens", {"ids": [2048]}, "ids is not a list of token ids"),
    "bool": ("layers", {"ids": [True]}, "ids is not a list of token ids"),
    "none": ("attention", {"ids": []}, "0 tokens; a view can be of 1 to 200"),
    "long": ("tokens", {"ids": [17] * 201}, "201 tokens"),
    "second": ("attention", {"ids": [17], "second": 5}, "text is 5, which is not text"),
    "full": ("turn", {"ids": [17] * 190, "text": "Where does Nelina live?"}, "a view can be of"),
    "an unpaired surrogate": ("turn", {"ids": [], "text": "\ud800"}, "unpaired surrogate"),
    "bad turns": ("turn", {"ids": ["x"], "text": "y"}, "ids is not a list of token ids"),
    "no text": ("compare", {}, "text is None"),
    "one token": ("compare", {"text": ""}, "fewer than two tokens"),
    "format": ("compare", {"text": '{"a": 1}'}, "unknown format"),
    "role": ("compare", {"text": '[{"role": "x", "content": "y"}]'}, "message 1 has role 'x'"),
    "deep": ("compare", {"text": "[" * 100_000 + '{"a":'}, "begins with a bracket"),
    "half": ("compare", {"text": '[{"role": "user", "content": "y"}'}, "is text that is not JSON"),
    "words": ("tokenizer", {"text": 5}, "text is 5"),
    "token": ("token", {"id": 5000}, "ids is not a list of token ids"),
}


@pytest.mark.parametrize("name", BAD_VIEWS)
def test_a_bad_request_for_a_view_is_a_sentence(running, name):
    view, body, sentence = BAD_VIEWS[name]
    status, found = post(running, f"/views/{view}", {"model": "tiny", **body})
    assert status == 400 and sentence in found["error"]["message"]


def test_of_long_texts_a_part_is_shown_with_a_notice(model, monkeypatch):
    monkeypatch.setattr(views, "LAST", 20)
    served = opened("tiny", model, TOKENIZER, True, 40)
    ids = [16 + i for i in range(50)]
    logprobs = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    found = views.tokens(served, ids)
    assert found["notice"] == "The last 20 of 50 tokens are shown." and found["first"] == 30
    surprise = torch.frombuffer(bytearray(base64.b64decode(found["surprise"])), dtype=torch.float32)
    expected = -logprobs[torch.arange(30, 49), ids[31:]]
    torch.testing.assert_close(surprise, expected, atol=1e-4, rtol=1e-4)
    assert found["top"] == logprobs[30:].topk(10).indices.tolist()
    for view in (views.attention, views.layers):
        found = view(served, ids)
        assert found["first"] == 30 and found["ids"] == ids[30:]
        assert found["notice"].startswith("The last 20 of 50 tokens are shown.")
        assert ("tokens before these is not shown" in found["notice"]) == (view is views.attention)
    found = views.compare({"tiny": served}, "a b c d e f g h i j k l m n o p q r s t u v w x y z")
    assert len(found["ids"]) == 20 and "The first 20 of" in found["notice"]
    monkeypatch.setattr(views, "MOST_WEIGHTS", 2 * 1 * 49)  # two layers of one head
    assert len(views.attention(served, ids)["ids"]) == 7
    assert "training had 40 at most" in views.append_turn(served, ids, "Who are you?")["notice"]


def test_the_sum_of_grouped_logits_is_exact():
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2)) * 4
    logits[0] = torch.arange(5000) * -0.001  # most of the sum is in groups
    values, sizes = views.in_groups(logits)
    assert sum(sizes) == 5000 and len(sizes) < 400 and sizes[: views.EXACT] == [1] * views.EXACT
    total = (values + torch.tensor(sizes).log()).logsumexp(dim=-1)
    torch.testing.assert_close(total, logits.logsumexp(dim=-1))
    for temperature in (0.5, 2.0):
        total = (values / temperature + torch.tensor(sizes).log()).logsumexp(dim=-1)
        expected = (logits / temperature).logsumexp(dim=-1)
        torch.testing.assert_close(total, expected, atol=2e-4, rtol=0)


def test_merges_are_replayed_in_the_order_of_training():
    toy = Tokenizer(models.BPE({c: i for i, c in enumerate("abcd")} | {"ab": 4, "cd": 5, "abcd": 6},
                               [("c", "d"), ("a", "b"), ("ab", "cd")]))  # fmt: skip
    steps = [["a", "b", "c", "d"], ["a", "b", "cd"], ["ab", "cd"], ["abcd"]]
    assert views.merges(toy, "abcd") == steps
    assert views.token(opened("", CausalLM(ModelConfig()), TOKENIZER, True, 9), 1)["steps"] == []
    for token in range(16, 2048, 37):  # every token of the shipped tokenizer is its last step
        text = TOKENIZER.id_to_token(token)
        assert views.merges(TOKENIZER, text)[-1] == [text]


def test_several_weights_are_served_by_their_names(trained, tmp_path):
    names = ["--weight", "full_sft,pretrain,none", "--save_dir", trained]
    page = tmp_path / "look.html"
    done = run_here("eval_llm.py", *names, "--export", page, "--prompt", "What is </script>?")
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.count("</script>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert data["models"] == ["full_sft_32", "pretrain_32", "none"]
    prompt = render([{"role": "user", "content": "What is </script>?"}], add_generation_prompt=True)
    assert data["ids"][: data["begun"]] == prompt[0] and data["begun"] < len(data["ids"])
    turns = json.loads(data["text"])
    answer = data["ids"][data["begun"] :]
    answer = answer[:-1] if answer[-1] in (0, IM_END) else answer
    assert turns[0]["content"] == "What is </script>?"
    assert turns[1]["content"] == TOKENIZER.decode(answer, skip_special_tokens=False)
    assert len(set(data["recorded"]["compare"]["losses"].values())) == 3
    assert {"tokens none", "layers pretrain_32", "attention full_sft_32 packed"} <= {
        *data["recorded"]
    }
    for flags, sentence in (
        (["--export", page], "--export needs a name that ends in .html, and --prompt"),
        (["--export", "", "--prompt", "x"], "--export needs a name that ends in .html"),
        (["--export", page, "--prompt", "x", "--max_batch", 2], "doesn't support --max_batch"),
        (["--export", page, "--serve", 0], "--serve doesn't support --export"),
        (["--export", page, "--prompt", "a b " * 2000], "error: --prompt: "),
        (["--export", page, "--prompt", "1" * 2035], "leave no room for an answer; shorten it"),
        (["--export", page, "--prompt", "x", "--lora", "y"], "give it with one --weight"),
        (["--export", page / "x.html", "--prompt", "x"], "cannot be written"),
        (
            ["--export", page, "--prompt", "x", "--weight", "full_sft,full_sft"],
            "give different names",
        ),
    ):
        done = run_here("eval_llm.py", *names, *flags)
        assert done.returncode == 2 and sentence in done.stderr, flags
    done = run_here("eval_llm.py", "--weight", "none", *names[2:], "--serve", 0)
    assert done.returncode == 2 and "--weight none" in done.stderr


def test_what_is_no_http_is_an_error_of_the_api(running):
    for data in (b"BAD\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n", b"GET /" + b"x" * 70_000 + b"\r\n"):
        found = raw(running, data)
        assert b'"invalid_request_error"' in found and b"Traceback" not in found
    assert raw(running, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_log_is_read_again_when_it_has_grown(tmp_path):
    path = write_jsonl(tmp_path / "run.jsonl", [{"step": i, "loss": 9.0 - i} for i in range(1, 3)])
    assert [point[0] for point in views.runs(tmp_path)["runs"][0]["points"]] == [1, 2]
    with path.open("a") as file:
        file.write('5\n{"step": 3, "loss": 1.0, "val_loss": 2.0, "lr": 0.1}\n{"step": 4, "lo')
    assert views.runs(tmp_path)["runs"][0]["points"][-1] == [3, 1.0, 2.0, 0.1]
    lines = [{"step": i, "val_loss": 1.0 if i % 1999 == 0 else None} for i in range(1, 8001)]
    write_jsonl(path, lines)
    steps = [point[0] for point in views.runs(tmp_path)["runs"][0]["points"]]
    assert (
        len(steps) < 510
        and {1, 1999, 3998, 5997, 7996, 8000} <= {*steps}
        and steps == sorted(steps)
    )


def test_a_machine_is_reached_by_its_names_and_by_those_that_are_given(model):
    own = socket.gethostname()
    with serve(model, start=False, hosts=["My.Tunnel.example"]) as server:
        for name in ("host.docker.internal", f"{own}.local", own, "my.tunnel.example:443"):
            assert head_of(server, Host=name) == b"HTTP/1.1 200 OK", name
        status, found = post(server, CHAT, {"messages": HI}, Host="other.example")
    says = "Host other.example isn't this server; to allow it, start with --allowed_hosts"
    assert status == 403 and says in found["error"]["message"]


def test_the_flag_names_hosts(trained, monkeypatch):
    given, idle = [], SimpleNamespace(run=lambda: None)
    monkeypatch.setattr(start, "Server", lambda *how: given.append(how) or idle)
    flags = ["--save_dir", trained, "--serve", 0, "--allowed_hosts", "a.example, b.example:443"]
    assert run_here("eval_llm.py", *flags).returncode == 0
    assert given[0][-1] == ["a.example", "b.example"]


def request_bytes(method, route, body=b"", **headers):
    headers = {"Host": "localhost", "Connection": "close", **headers}
    lines = [f"{method} {route} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(body, size):
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x;note=1\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n"


def test_a_chunked_body_is_read(running):
    """As Roo Code and Spring AI send it."""
    body = json.dumps({"messages": HI, "max_tokens": 3}).encode()
    _, expected = post(running, CHAT, body)
    for end in (b"\r\n", b"Field: 1\r\n\r\n"):
        sent = request_bytes(
            "POST", CHAT, chunked(body, 7) + end, **{"Transfer-Encoding": "chunked"}
        )
        head, _, answer = raw(running, sent).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert json.loads(answer)["choices"] == expected["choices"]
    for wrong, status in (
        (b"zz\r\n{}\r\n0\r\n\r\n", b"400"),
        (b"-1\r\n{}\r\n0\r\n\r\n", b"413"),
        (chunked(b" " * (1 << 20) + body, 1 << 16) + b"\r\n", b"413"),
    ):
        sent = request_bytes("POST", CHAT, wrong, **{"Transfer-Encoding": "chunked"})
        assert raw(running, sent).startswith(b"HTTP/1.1 " + status)
    sent = request_bytes("POST", CHAT, chunked(body, 7), **{"Transfer-Encoding": "gzip, chunked"})
    assert raw(running, sent).startswith(b"HTTP/1.1 501")


def test_two_chunked_requests_of_one_connection(running):
    body = json.dumps({"prompt": [20], "max_tokens": 1}).encode()
    head = {"Transfer-Encoding": "chunked"}
    first = request_bytes("POST", "/v1/completions", chunked(body, 9) + b"\r\n", **head)
    both = first.replace(b"close", b"keep-alive") + first
    assert raw(running, both).count(b"HTTP/1.1 200 OK") == 2


def test_a_packed_body_is_refused_by_its_name(running):
    status, found = post(running, CHAT, b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert status == 415 and "Content-Encoding gzip isn't supported" in found["error"]["message"]


@pytest.mark.parametrize("route", ["/", "/health", "/v1/models"])
def test_head_and_options(running, route):
    whole = raw(running, request_bytes("GET", route))
    assert whole.startswith(b"HTTP/1.1 200 ")
    head = raw(running, request_bytes("HEAD", route))
    same = [line for line in whole.split(b"\r\n\r\n")[0].splitlines() if b"Date" not in line]
    assert [line for line in head.splitlines() if line and b"Date" not in line] == same
    assert head.endswith(b"\r\n\r\n")
    options = raw(running, request_bytes("OPTIONS", route))
    assert options.startswith(b"HTTP/1.1 200") and b"Allow: GET, HEAD, OPTIONS, POST" in options


def test_the_client_of_openai_retrieves_a_model(running):
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{running.server_port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model other/x; there is tiny"):
        client.models.retrieve("other/x")


def test_a_prompt_of_one_list_in_a_list_is_read(running):
    """As lm-eval sends it."""
    plain, nested = (
        post(running, "/v1/completions", {"prompt": prompt, "max_tokens": 4})[1]["choices"]
        for prompt in ([20, 21], [[20, 21]])
    )
    assert plain == nested
    for several in ([[20], [21]], [[]], [[20, "x"]], [[[20]]]):
        status, _ = post(running, "/v1/completions", {"prompt": several, "max_tokens": 1})
        assert status == (200 if several == [[]] else 400), several


def test_stream_options_may_have_more_keys(running):
    body = {"messages": HI, "max_tokens": 2, "stream": True}
    body["stream_options"] = {"include_usage": True, "include_obfuscation": False}
    data = json.dumps(body).encode()
    sent = request_bytes("POST", CHAT, data, **{"Content-Length": len(data)})
    assert b'"completion_tokens": 2' in raw(running, sent)
    status, _ = post(running, CHAT, {"messages": HI, "stream_options": 7})
    assert status == 400


UNKNOWN = {"grammar": "root", "guided_json": {"a": 1}, "structured_outputs": {"a": 1}}
UNKNOWN |= {"json_schema": {"a": 1}, "stop_sequences": ["x"], "max_new_tokens": 3, "temprature": 0}
UNKNOWN |= {"num_predict": 5, "chat_template_kwargs": {"a": 1}, "typical_p": 0.5, "top_a": 0.1}
UNKNOWN |= {"repeat_penalty": 1.1, "mirostat": 2, "reasoning_effort": "low", "options": {"x": 1}}
MEANT = {"temprature": "temperature", "max_new_tokens": "max_tokens"}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_option_that_is_not_known_is_refused_by_name(running, name):
    status, found = post(running, CHAT, {"messages": HI, "max_tokens": 1, name: UNKNOWN[name]})
    message = found["error"]["message"]
    assert status == 400 and name in message and "isn't supported" in message
    if name in MEANT:
        assert f"is {MEANT[name]} meant?" in found["error"]["message"]
    off = {"messages": HI, "max_tokens": 1, name: None, "user": "x", "metadata": {"a": 1}}
    assert post(running, CHAT, off)[0] == 200


def test_options_of_the_other_route_and_off_values_that_change_an_answer_are_refused(running):
    for route, body, name in (
        ("/v1/completions", {"prompt": "x", "messages": HI}, "messages"),
        ("/v1/completions", {"prompt": "x", "tools": [{"a": 1}]}, "tools"),
        (CHAT, {"messages": HI, "prompt": "x"}, "prompt"),
        (CHAT, {"messages": HI, "add_generation_prompt": False}, "add_generation_prompt"),
        (CHAT, {"messages": HI, "enable_thinking": False}, "enable_thinking"),
    ):
        status, found = post(running, route, body | {"max_tokens": 1})
        assert status == 400 and name in found["error"]["message"], name
    status, found = post(running, CHAT, {"messages": HI, "frequency_penality": 1})
    assert status == 400 and "is frequency_penalty meant?" in found["error"]["message"]
    neutral = {"typical_p": 1, "mirostat": 0, "skip_special_tokens": True, "modalities": ["text"]}
    assert post(running, CHAT, {"messages": HI, "max_tokens": 1, **neutral})[0] == 200


def test_a_body_that_is_not_read_is_no_request(running):
    hidden = request_bytes("GET", "/health")
    sent = request_bytes("OPTIONS", "/", hidden, **{"Content-Length": len(hidden)})
    answer = raw(running, sent.replace(b"Connection: close", b"Connection: keep-alive", 1))
    assert answer.count(b"HTTP/1.1") == 1


def test_top_logprobs_alone_are_refused(running):
    for more in ({}, {"logprobs": False}):
        status, found = post(running, CHAT, {"messages": HI, "top_logprobs": 3, **more})
        assert status == 400 and "top_logprobs needs logprobs" in found["error"]["message"]


@pytest.mark.parametrize("parallel, count", [(None, 2), (True, 2), (False, 1)])
def test_one_call_where_only_one_is_asked_for(running, monkeypatch, parallel, count):
    call = TOKENIZER.encode('{"name": "f", "arguments": {}}').ids
    ids = [TOOL_CALL, *call, END_TOOL_CALL] * 2
    answers_with(monkeypatch, running, ids)
    body = {"messages": HI, "max_tokens": 99, "parallel_tool_calls": parallel}
    _, found = post(running, CHAT, body)
    assert len(found["choices"][0]["message"]["tool_calls"]) == count


def answers_with(monkeypatch, server, ids):
    """Lets the server answer with these ids."""

    def submit(request):
        for token in ids:
            request.answer.put(NewToken(token))
        request.answer.put("stop")

    monkeypatch.setattr(server.batcher, "submit", submit)


def test_each_token_of_a_stream_is_decoded_about_once(running, monkeypatch):
    """The whole answer was decoded anew for each token."""
    decoded, decode = [], TOKENIZER.decode

    class Counting:
        def decode(self, ids, **how):
            decoded.append(len(ids))
            return decode(ids, **how)

        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

    ids = [THINK, *TOKENIZER.encode("hm, é 🙂 " * 60).ids, END_THINK]
    ids += TOKENIZER.encode("\n\nLong naïve 日本 answers. " * 60).ids
    monkeypatch.setattr(running.models["tiny"], "tokenizer", Counting(), raising=False)
    arrived = iter([*map(NewToken, ids), "stop"])
    monkeypatch.setattr(serving.Handler, "items", lambda self, request, batcher: arrived)
    monkeypatch.setattr(running.batcher, "submit", lambda request: None)
    data = json.dumps({"messages": HI, "stream": True, "stop": ["#"]}).encode()
    sent = request_bytes("POST", CHAT, data, **{"Content-Length": len(data)})
    answer = raw(running, sent)
    parts = [json.loads(part[6:]) for part in answer.split(b"\n\n") if part.startswith(b"data: {")]
    deltas = [part["choices"][0]["delta"] for part in parts]
    expected = parse_answer(ids, TOKENIZER)
    for field in ("reasoning_content", "content"):
        assert "".join(delta.get(field) or "" for delta in deltas) == expected[field]
    assert len(deltas) > 300 and sum(decoded) < 4 * len(ids)


def test_a_draft_is_always_the_beginning_of_the_answer():
    rng, words = (
        random.Random(3),
        ["\n", "\n\n", "a", "ab", " b", "é", "🙂", "日", "stop", "st", "#"],
    )
    control = [THINK, END_THINK, TOOL_CALL, END_TOOL_CALL]
    pieces = [[token] for token in control] + [TOKENIZER.encode(word).ids for word in words]
    pieces += [[token] for token in TOKENIZER.encode("🙂é日").ids]  # parts of characters
    decode = partial(TOKENIZER.decode, skip_special_tokens=False)
    seen = set()
    for _ in range(3000):
        ids = sum((rng.choice(pieces) for _ in range(rng.randrange(1, 12))), [])
        ids = [THINK, *ids] if rng.random() < 0.5 else ids
        stops = rng.choice([[], ["stop", "#"], ["b"]])
        draft, text = IncrementalDetokenizer(decode, True, stops), {}
        whole = parse_answer(ids, TOKENIZER)
        content = whole["content"]
        cut = min([content.index(stop) for stop in stops if stop in content], default=len(content))
        expected = {**whole, "content": content[:cut]}
        for token in ids:
            draft.add(token)
            if rng.random() < 0.7:
                for field, new in draft.take().items():
                    text[field] = text.get(field, "") + new
            for field, part in text.items():
                assert expected[field].startswith(part), (ids, stops, field)
                assert draft.sent[field] >= len(part)
            if draft.stopped:
                assert text.get("content", "") + draft.ready.get("content", "") == content[:cut]
                break
        seen |= {(draft.stopped, *text)}
    assert len(seen) >= 5


# ----------------------------------------------- the second of something, and values by hand


def drawn_by_hand(model, ids, count, seed, temperature):
    """Draw tokens with one generator from the whole distribution of the model."""
    generator, ids = torch.Generator().manual_seed(seed), list(ids)
    begin = len(ids)
    for _ in range(count):
        with torch.inference_mode():
            p = (model(torch.tensor([ids]))[0, -1].float() / temperature).softmax(dim=-1)
        sums = p.cumsum(dim=0)
        point = torch.rand(1, 1, generator=generator)[0, 0] * sums[-1]
        ids.append(int((sums <= point).sum()))
    return ids[begin:]


@pytest.mark.parametrize("seed", [3, 4])
def test_a_seeded_answer_is_drawn_by_one_generator(running, model, seed):
    ids = [30 + i for i in range(12)]
    expected = drawn_by_hand(model, ids, 9, seed, 1.5)
    assert not set(expected) & {0, IM_END}  # else the answer would end there
    body = {"prompt": ids, "max_tokens": 9, "temperature": 1.5, "seed": seed}
    _, found = post(running, "/v1/completions", body | {"return_token_ids": True})
    assert found["choices"][0]["token_ids"] == expected


def test_the_second_stop_string_stops_too(running, model):
    whole = alone(model, chat_ids("Who are you?"))
    piece = whole[len(whole) // 2 :][:3]
    for stream in (False, True):
        body = {"messages": HI, "max_tokens": 24, "stop": ["nowhere in it", piece]}
        if stream:
            text = "".join(
                part["choices"][0]["delta"].get("content", "")
                for part in events(running, body | {"stream": True})
            )
        else:
            _, found = post(running, CHAT, body)
            text = found["choices"][0]["message"]["content"]
            assert found["choices"][0]["finish_reason"] == "stop"
        assert text == whole[: whole.index(piece)]


def events(server, body):
    """The parts of a streamed answer."""
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
    answer = raw(server, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    lines = [line[6:] for line in answer.decode().split("\n") if line.startswith("data: ")]
    assert lines[-1].strip() == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_second_turn_follows_the_first(running, model):
    turns = [*HI, {"role": "assistant", "content": "A model."}, {"role": "user", "content": "Why?"}]
    ids = render(turns, add_generation_prompt=True)[0]
    _, found = post(running, CHAT, {"messages": turns, "max_tokens": 24})
    assert found["choices"][0]["message"]["content"] == alone(model, ids)
    assert found["usage"]["prompt_tokens"] == len(ids)


def test_the_newer_name_of_the_limit_is_read_and_wins(running):
    for limits, count in (({"max_completion_tokens": 3}, 3), ({"max_tokens": 4}, 4)):
        _, found = post(running, CHAT, {"messages": HI, **limits})
        assert found["usage"]["completion_tokens"] == count
    _, found = post(running, CHAT, {"messages": HI, "max_tokens": 9, "max_completion_tokens": 2})
    assert found["usage"]["completion_tokens"] == 2
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 2


def test_top_k_and_top_p_of_a_request_are_used(running, model):
    expected = alone(model, chat_ids("Who are you?"), max_new_tokens=9)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        body = {"messages": HI, "max_tokens": 9, "temperature": 5, "seed": 1, **narrow}
        _, found = post(running, CHAT, body)
        assert found["choices"][0]["message"]["content"] == expected


def test_the_second_model_answers_what_is_asked_of_it(model):
    torch.manual_seed(8)
    other = CausalLM(model.config).eval()
    models = {
        name: opened(name, m, TOKENIZER, True, 200) for name, m in (("a", model), ("b", other))
    }
    server = serving.Server(models, "127.0.0.1", 0, 2, DEFAULTS, ROOT)
    with serving_at(server):
        for name, of in (("b", other), ("a", model), ("gpt-4o", model)):
            _, found = post(server, CHAT, {"model": name, "messages": HI, "max_tokens": 24})
            text = found["choices"][0]["message"]["content"]
            assert text == alone(of, chat_ids("Who are you?"))
            assert found["model"] == (name if name in models else "a")


def test_the_page_begins_a_second_turn_as_the_template_does(model):
    served = opened("tiny", model, TOKENIZER, True, 200)
    turns = [*HI, {"role": "assistant", "content": "A model."}, {"role": "user", "content": "Why?"}]
    expected = render(turns, add_generation_prompt=True)[0]
    asked = views.append_turn(served, [], "Who are you?")["ids"]
    assert asked == chat_ids("Who are you?")
    answered = asked + TOKENIZER.encode("A model.").ids
    for before in (answered, [*answered, IM_END]):  # an answer that was stopped has no end
        assert views.append_turn(served, before, " Why? ")["ids"] == expected


def test_views_of_a_model_are_computed_one_at_a_time_and_curves_are_read_meanwhile(running):
    answers = []
    body = {"model": "tiny", "id": 17}
    waiting = threading.Thread(target=lambda: answers.append(post(running, "/views/token", body)))
    with views.ONE_AT_A_TIME:
        waiting.start()
        assert post(running, "/views/runs", {})[0] == 200
        time.sleep(0.1)
        assert answers == []
    waiting.join(20)
    assert answers[0][0] == 200


def test_weights_with_another_tokenizer_are_not_served_together(trained, tmp_path, monkeypatch):
    paths = [trained / "full_sft_32.pth", tmp_path / "full_sft_32.pth"]
    content = torch.load(paths[0], weights_only=True)
    tokenizer = json.loads(content["tokenizer"])
    vocab = tokenizer["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    content["tokenizer"] = json.dumps(tokenizer)
    torch.save(content, paths[1])
    flags = ["--save_dir", trained, "--export", tmp_path / "x.html", "--prompt", "x", "--weight"]
    done = run_here("eval_llm.py", *flags, ",".join(map(str, paths)))
    assert done.returncode == 2 and "they have different tokenizers" in done.stderr
    shutil.copy(paths[0], paths[1])  # the same name, and another folder: the second is its path
    done = run_here("eval_llm.py", *flags, ",".join(map(str, paths)))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert data["models"] == ["full_sft_32", str(paths[1])]


def test_reasoning_that_ends_in_half_a_character_is_sent_before_the_answer():
    half = TOKENIZER.encode("\u4f60").ids[:1]
    draft = IncrementalDetokenizer(partial(TOKENIZER.decode, skip_special_tokens=False), True, [])
    for token in (THINK, *TOKENIZER.encode("\nIt rains.").ids, *half):
        draft.add(token)
    assert draft.take() == {}  # the rest of the character may come
    draft.add(END_THINK)
    assert draft.take() == {"reasoning_content": "It rains.\ufffd"}


NEUTRAL = {
    **{"n": 1, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0, "min_p": 0},
    **{"repetition_penalty": 1.0, "min_tokens": 0, "ignore_eos": False, "stop_token_ids": []},
    **{"functions": [], "add_generation_prompt": True, "enable_thinking": True},
    "response_format": {"type": "text"},
}
CHANGING = {
    **{"n": 2, "logit_bias": {"17": -100}, "frequency_penalty": 1, "presence_penalty": -1},
    **{"repetition_penalty": 1.2, "min_tokens": 1, "ignore_eos": True, "stop_token_ids": [17]},
    **{"min_p": 0.1, "functions": [{"name": "f"}], "skip_special_tokens": False, "mirostat": 1},
    **{"typical_p": 0.9, "modalities": ["audio"], "response_format": {"type": "json_object"}},
}


def test_options_that_change_no_answer_are_taken_and_others_refused(running):
    base = {"messages": HI, "max_tokens": 1}
    for name, value in NEUTRAL.items():
        status, found = post(running, CHAT, base | {name: value})
        assert status == 200, (name, found)
    for name, value in CHANGING.items():
        status, found = post(running, CHAT, base | {name: value})
        assert status == 400 and name in found["error"]["message"], name
    text = {"prompt": "x", "max_tokens": 1}
    for name, neutral, changing in (("best_of", 1, 2), ("echo", False, True), ("suffix", "", "y")):
        assert post(running, "/v1/completions", text | {name: neutral})[0] == 200, name
        status, found = post(running, "/v1/completions", text | {name: changing})
        assert status == 400 and name in found["error"]["message"], name


@pytest.mark.parametrize("text", ["He", "I say: He"])
def test_an_answer_that_ends_with_the_beginning_of_a_stop_is_whole(running, monkeypatch, text):
    ids = TOKENIZER.encode(text).ids
    with serve(running.batchers["tiny"].model, start=False) as server:
        monkeypatch.setattr(server.batcher, "submit", writes(ids))
        choices = streamed(server, {"messages": HI, "max_tokens": len(ids), "stop": ["Hello"]})
    assert "".join(choice["delta"].get("content", "") for choice in choices) == text


def test_without_top_logprobs_none_are_listed(running):
    _, found = post(running, CHAT, {"messages": HI, "logprobs": True, "max_tokens": 2})
    assert [token["top_logprobs"] for token in found["choices"][0]["logprobs"]["content"]] == [
        [],
        [],
    ]


def test_tool_choice_none_leaves_the_tools_out_of_the_prompt(running):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    lengths = {}
    for choice in ("auto", "none", None):
        body = {"messages": HI, "max_tokens": 1, "tools": tools, "tool_choice": choice}
        _, found = post(running, CHAT, body)
        lengths[choice] = found["usage"]["prompt_tokens"]
    assert lengths["none"] == len(chat_ids("Who are you?"))
    message = [{"role": "user", "content": "Who are you?"}]
    with_tools = len(render(message, tools, add_generation_prompt=True)[0])
    assert lengths["auto"] == lengths[None] == with_tools > lengths["none"]


def test_the_limits_of_each_number_are_taken_and_what_is_beyond_them_refused(running):
    for name, inside, outside in (
        ("temperature", (0, 100), (-0.01, 100.5)),
        ("top_p", (0, 1), (-0.01, 1.01)),
        ("top_k", (0, 1), (-1, 0.5)),
        ("seed", (0, 2**63 - 1), (-1, 2**63)),
        ("max_tokens", (1, 2), (0, 1.5)),
        ("top_logprobs", (0, 20), (-1, 21)),
    ):
        for values, expected in ((inside, 200), (outside, 400)):
            for value in values:
                body = {"messages": HI, "max_tokens": 1, "logprobs": True, name: value}
                status, answer = post(running, CHAT, body)
                assert status == expected, (name, value, answer)
                assert expected == 200 or answer["error"]["message"].startswith(f"{name} = {value}")


def test_a_server_that_is_stopped_ends_its_threads(model):
    models = {"tiny": opened("tiny", model, TOKENIZER, True, 200)}
    server = serving.Server(models, "127.0.0.1", 0, 2, DEFAULTS, ROOT)
    thread = threading.Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/health"
    assert urllib.request.urlopen(url).status == 200
    server.shutdown()
    thread.join(20)
    assert not thread.is_alive() and not server.batchers["tiny"].is_alive()


def test_a_stop_may_be_one_text_of_several_characters(running, model):
    text = alone(model, chat_ids("Who are you?"))
    stop = text[4:7]
    for given in (stop, [stop], ["never said", stop]):
        _, answer = post(running, CHAT, {"messages": HI, "stop": given})
        assert answer["choices"][0]["message"]["content"] == text[: text.index(stop)]
