"""Continuous batching (as in Orca, OSDI 2022): each step of the model computes the next token of
all running requests. Requests join before any step and leave when they are finished or cancelled,
so short answers don't wait for long ones.

Shapes: B running requests, V vocabulary, K key/value heads, T columns of the cache, d head size.
"""

import queue
import threading
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from common import STOP
from model.fast_decode import prepacked_weights
from model.generation import SamplingParams, eval_mode, left_padding, make_generator, sample
from model.kv_cache import KVCache
from serving.views import ONE_AT_A_TIME

ROOM = 64  # cache columns that are preallocated


@dataclass(frozen=True)
class NewToken:
    """A token of an answer."""

    id: int
    logprob: float | None = None
    top: tuple = ()  # (id, log-probability) of the most probable tokens


@dataclass(eq=False)
class Request:
    """A prompt and its sampling parameters. `answer` receives a NewToken for each new token, and
    finally the finish reason, a str: "stop", "length" or "error".
    """

    ids: list  # of the prompt
    params: SamplingParams
    top_logprobs: int | None = None  # None: no log-probabilities
    answer: queue.Queue = field(default_factory=queue.Queue)
    cancelled: bool = False  # set when the client disconnects
    finished: bool = False
    num_generated: int = 0
    generator: torch.Generator | None = None  # seeded with params.seed

    def __post_init__(self):
        self.next_id = self.ids[-1]  # input token of the next step
        self.length = len(self.ids) - 1  # tokens in the cache


class Batcher(threading.Thread):
    """The thread that computes the answers, in batches of at most max_batch."""

    def __init__(self, model, max_batch, max_waiting):
        super().__init__(daemon=True)
        self.model = model
        self.max_batch = max_batch
        self.ended = False
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        if self.device.type == "cpu":
            self.dtype = torch.float32  # as in `generate`
        self.waiting = queue.Queue()
        self.max_waiting = max_waiting
        self.running = []
        # torch aborts if two threads use an Apple GPU; the views of the page are another thread.
        self.device_lock = ONE_AT_A_TIME if self.device.type == "mps" else nullcontext()

    def submit(self, request):
        """Queue a request. Raises queue.Full if max_waiting requests are waiting."""
        with self.waiting.mutex:
            num_waiting = sum(not queued.cancelled for queued in self.waiting.queue)
        if num_waiting >= self.max_waiting:
            raise queue.Full
        self.waiting.put(request)

    @torch.inference_mode()
    def run(self):
        with eval_mode(self.model), prepacked_weights(self.model, self.max_batch):
            while not self.ended:
                try:
                    self.serve()
                except Exception:  # fail these requests and continue
                    traceback.print_exc()
                    for request in self.running:
                        request.answer.put("error")
                    self.running = []

    def serve(self):
        """Answer requests until the server ends."""
        cache = None
        while not self.ended:
            previous = self.running
            unfinished = [(row, r) for row, r in enumerate(previous) if not r.finished]
            self.running = [request for _, request in unfinished]
            rows = [(cache, row, request.length) for row, request in unfinished]
            while request := self.next_request():
                try:
                    with self.device_lock:
                        rows.append((self.prefill(request), 0, request.length))
                    self.running.append(request)
                except Exception:  # e.g. no memory for a long prompt; continue with the others
                    traceback.print_exc()
                    request.answer.put("error")
            if not self.running:
                continue
            with self.device_lock:
                if previous != self.running or cache.length == cache.max_length:
                    cache = self.pack(rows)
                self.sample_next(self.step(cache))

    def next_request(self):
        """Return the oldest waiting request if the batch isn't full, or None."""
        while len(self.running) < self.max_batch:
            try:
                request = self.waiting.get(block=not self.running, timeout=0.1)
            except queue.Empty:
                return None
            if not request.cancelled:
                return request
        return None

    def prefill(self, request):
        """Return the KV cache of a prompt except its last token, the input of the next step."""
        cache = KVCache(self.model.config, 1, request.length, self.device, self.dtype)
        if request.length:
            ids = torch.tensor([request.ids[:-1]], device=self.device)  # (1, T)
            self.model.hidden_states(ids, kv_cache=cache)
        return cache

    def pack(self, rows):
        """Merge rows (cache, row, length) into one KV cache, all ending at the same column."""
        lengths = [length for *_, length in rows]
        T = max(lengths)
        max_length = T + max(ROOM, T // 4)
        packed = KVCache(self.model.config, len(rows), max_length, self.device, self.dtype)
        _, _, document_ids = left_padding(lengths, self.device)
        packed.advance(T, document_ids)
        for new_row, (cache, row, length) in enumerate(rows):
            for target, source in zip(
                [*packed.keys, *packed.values], [*cache.keys, *cache.values], strict=True
            ):  # (B, K, T, d) each
                values = source[row, :, cache.length - length : cache.length]
                target[new_row, :, T - length : T] = values
        return packed

    def step(self, cache):
        """Return the next-token logits of all running requests, (B, V)."""
        ids = [[request.next_id] for request in self.running]
        ids = torch.tensor(ids, device=self.device)  # (B, 1)
        positions = [[request.length] for request in self.running]
        positions = torch.tensor(positions, device=self.device)  # (B, 1)
        documents = torch.zeros_like(ids) if cache.has_documents else None
        return self.model(ids, positions, documents, cache)[:, -1].float()

    def sample_next(self, logits):
        """Sample and report the next token of each running request from logits (B, V)."""
        sampled = []
        for request, row in zip(self.running, logits.split(1), strict=True):  # (1, V) each
            if request.num_generated == 0:
                request.generator = make_generator(request.params.seed, self.device)
            sampled.append(sample(row, request.params, request.generator))
        tokens = torch.cat(sampled)[:, 0].tolist()  # a GPU sync, like log-probabilities
        for request, token, row in zip(self.running, tokens, logits, strict=True):
            self.report(request, token, row)

    def report(self, request, token, logits):
        """Report a request's next token, sampled from logits (V,), to its client."""
        request.next_id = token
        request.length += 1
        request.num_generated += 1
        full = request.length + 1 >= self.model.config.max_position_embeddings
        reason = (
            "length" if full or request.num_generated >= request.params.max_new_tokens else None
        )
        logprob = None
        top = ()
        if request.top_logprobs is not None:
            logprobs = logits.log_softmax(dim=-1)  # (V,)
            values, ids = logprobs.topk(min(request.top_logprobs, len(logprobs)))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            logprob = logprobs[token].item()
        if token in STOP:
            reason = "stop"
        else:
            request.answer.put(NewToken(token, logprob, top))
        if reason:
            request.answer.put(reason)
        request.finished = bool(reason) or request.cancelled
