"""Many requests share each step of the model: a step computes the next token of every request that
is running. A request joins before any step, and leaves when it is finished or cancelled, so a short
answer does not wait for a long one (continuous batching, as in Orca, OSDI 2022).

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
from model.generation import eval_mode, make_generator, sample
from model.kv_cache import KVCache
from serving.views import ONE_AT_A_TIME

ROOM = 64  # columns of the cache that are allocated ahead


@dataclass(eq=False)
class Request:
    """A prompt and how to continue it. `answer` receives a tuple for each new token, (id, its
    log-probability, [(id, log-probability)] of the most probable ones), and at the end the reason
    why the answer ends, a str: "stop", "length" or "error".
    """

    ids: list  # of the prompt
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None  # None: no log-probabilities
    answer: queue.Queue = field(default_factory=queue.Queue)
    cancelled: bool = False  # set by the one who no longer waits for the answer
    finished: bool = False
    new: int = 0  # tokens of the answer so far
    generator: torch.Generator | None = None  # of the seed

    def __post_init__(self):
        self.next = self.ids[-1]  # the token that the next step reads
        self.length = len(self.ids) - 1  # tokens that were read


class Batcher(threading.Thread):
    """The thread that computes the answers of all requests, of at most max_batch at a time."""

    def __init__(self, model, max_batch, max_waiting):
        super().__init__(daemon=True)
        self.model, self.max_batch, self.ended = model, max_batch, False
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        if self.device.type == "cpu":
            self.dtype = torch.float32  # as in `generate`
        self.waiting, self.max_waiting, self.running = queue.Queue(), max_waiting, []
        # torch aborts where two threads use an Apple GPU at once; a view of the page is another.
        self.alone = ONE_AT_A_TIME if self.device.type == "mps" else nullcontext()

    def submit(self, request):
        """Lets a request wait for its answer. Raises queue.Full if max_waiting do already."""
        with self.waiting.mutex:
            waiting = sum(not other.cancelled for other in self.waiting.queue)
        if waiting >= self.max_waiting:
            raise queue.Full
        self.waiting.put(request)

    @torch.inference_mode()
    def run(self):
        with eval_mode(self.model), prepacked_weights(self.model, self.max_batch):
            while not self.ended:
                try:
                    self.answer_all()
                except Exception:  # these requests fail, and the server continues
                    traceback.print_exc()
                    for request in self.running:
                        request.answer.put("error")
                    self.running = []

    def answer_all(self):
        cache = None
        while not self.ended:
            rows = [(cache, row, r.length) for row, r in enumerate(self.running) if not r.finished]
            before, self.running = self.running, [r for r in self.running if not r.finished]
            while arrived := self.arrival():
                try:
                    with self.alone:
                        rows.append((self.prefilled(arrived), 0, arrived.length))
                    self.running.append(arrived)
                except Exception:  # no memory for a long prompt, say; the others continue
                    traceback.print_exc()
                    arrived.answer.put("error")
            if not self.running:
                continue
            with self.alone:
                if before != self.running or cache.length == cache.max_length:
                    cache = self.packed(rows)
                self.extend(self.step(cache))

    def arrival(self):
        """The request that waited longest, if there is a place for it, or None."""
        while len(self.running) < self.max_batch:
            try:
                request = self.waiting.get(block=not self.running, timeout=0.1)
            except queue.Empty:
                return None
            if not request.cancelled:
                return request
        return None

    def prefilled(self, request):
        """The KV cache of a prompt without its last token, which is read by the next step."""
        cache = KVCache(self.model.config, 1, request.length, self.device, self.dtype)
        if request.length:
            ids = torch.tensor([request.ids[:-1]], device=self.device)  # (1, T)
            self.model.hidden_states(ids, kv_cache=cache)
        return cache

    def packed(self, rows):
        """One KV cache of rows (cache, row, length), in which all end at the same column."""
        lengths, config = [length for *_, length in rows], self.model.config
        T = max(lengths)
        joint = KVCache(config, len(rows), T + max(ROOM, T // 4), self.device, self.dtype)
        pads = torch.tensor([[T - length] for length in lengths], device=self.device)  # (B, 1)
        column = torch.arange(T, device=self.device)
        documents = torch.where(column < pads, -1, 0) if pads.any() else None  # (B, T)
        joint.extend((len(rows), T), documents)
        for new, (cache, row, length) in enumerate(rows):
            for target, source in zip(
                [*joint.keys, *joint.values], [*cache.keys, *cache.values], strict=True
            ):  # (B, K, T, d) each
                part = source[row, :, cache.length - length : cache.length]
                target[new, :, T - length : T] = part
        return joint

    def step(self, cache):
        """The logits of the token after `next` of each running request, (B, V)."""
        ids = torch.tensor([[r.next] for r in self.running], device=self.device)  # (B, 1)
        positions = torch.tensor([[r.length] for r in self.running], device=self.device)
        documents = torch.zeros_like(ids) if cache.has_documents else None
        return self.model(ids, positions, documents, cache)[:, -1].float()

    def extend(self, logits):
        """Samples the next token of each running request from logits (B, V), and reports it."""
        drawn = []
        for request, row in zip(self.running, logits.split(1), strict=True):  # (1, V) each
            if request.new == 0:
                request.generator = make_generator(request.seed, self.device)
            how = request.temperature, request.top_k, request.top_p, request.generator
            drawn.append(sample(row, *how))
        tokens = torch.cat(drawn)[:, 0].tolist()  # waits for a GPU, as log-probabilities do
        for request, token, row in zip(self.running, tokens, logits, strict=True):
            self.report(request, token, row)

    def report(self, request, token, logits):
        """Reports the next token of a request, which was sampled from logits (V,)."""
        request.next, request.length, request.new = token, request.length + 1, request.new + 1
        full = request.length + 1 >= self.model.config.max_position_embeddings
        reason = "length" if full or request.new >= request.max_tokens else None
        logprob, top = None, []
        if request.top_logprobs is not None:
            logprobs = logits.log_softmax(dim=-1)  # (V,)
            values, ids = logprobs.topk(min(request.top_logprobs, len(logprobs)))
            top = list(zip(ids.tolist(), values.tolist(), strict=True))
            logprob = logprobs[token].item()
        if token in STOP:
            reason = "stop"
        else:
            request.answer.put((token, logprob, top))
        if reason:
            request.answer.put(reason)
        request.finished = bool(reason) or request.cancelled
