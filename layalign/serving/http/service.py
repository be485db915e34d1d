"""One model as a service: admission, the engine, and the life of a call from its text to its last event."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request

from layalign.modeling.tokenization import eos_ids, pad_id
from layalign.serving.http.decoding import Decoder, Inputs
from layalign.serving.http.engine import Done, Engine, Event, Failed, Job, Piece
from layalign.serving.http.health import Health
from layalign.serving.http.messages import ApiError, ChatRequest, CompletionRequest
from layalign.serving.http.metrics import Metrics
from layalign.serving.http.preparing import Preparer
from layalign.serving.http.sampling import Chooser, repetition_penalty
from layalign.serving.http.settings import ServeSettings
from layalign.serving.http.text import TextStream


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class Service:
    """A model with its limits. The methods run in the event loop; the model runs in the engine's thread.

    Args:
        model: a `LayAlignForCausalLM`, which is set to eval mode.
        encoder_tokenizer, llm_tokenizer: its tokenizers.
        settings: the limits.

    Attributes:
        health: state of the server, judged by the last minute's requests.
        open: number of requests between admission and the end of their answer.
        draining: whether new requests are refused.

    Raises:
        ArgumentError: the model's generation configuration asks for something that is not supported.
    """

    def __init__(self, model: Any, encoder_tokenizer: Any, llm_tokenizer: Any, settings: ServeSettings) -> None:
        self.settings, self.metrics, self.health = settings, Metrics(), Health(settings.step_timeout)
        self.penalty = repetition_penalty(model.generation_config)
        self.preparer = Preparer(model, encoder_tokenizer, llm_tokenizer, settings)
        # Tokenizers are not thread-safe: one thread tokenizes, and the engine's thread has its own copy.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="layalign-tokenize")
        self.tokenizer = copy.deepcopy(llm_tokenizer)
        decoder = Decoder(model.eval(), pad_id(encoder_tokenizer))
        ends = frozenset(eos_ids(model, llm_tokenizer))
        self.engine = Engine(decoder, ends, settings.max_batch, settings.max_batch_tokens, self.metrics, self.health)
        self.metrics.queue_length.set_function(lambda: self.engine.waiting)
        self.metrics.batch_rows.set_function(lambda: self.engine.active)
        self.metrics.open.set_function(lambda: self.open)
        self.metrics.healthy.set_function(lambda: not self.engine.problem)
        self.metrics.busy_seconds.set_function(lambda: self.health.running[0])
        self.open, self.draining = 0, False
        self._seconds = 1.0  # running mean of the time per answer

    def start(self) -> None:
        """Start the engine."""
        self.engine.start()

    def close(self) -> None:
        """Stop the engine; unfinished answers fail."""
        self.draining = True
        self.engine.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def admit(self) -> None:
        """Take a place; `release` frees it.

        Raises:
            ApiError: 429 when all places are taken, 503 while the server shuts down.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self.open >= self.settings.max_open:
            rounds = (self.engine.waiting + 1) / self.settings.max_batch
            seconds = min(max(math.ceil(rounds * self._seconds), 1), 60)
            raise ApiError(429, "too many requests are waiting", code="queue_full", retry_after=seconds)
        self.open += 1

    def release(self, seconds: float | None) -> None:
        """Free a place; `seconds` is the time of a complete answer, or None."""
        self.open -= 1
        if seconds is not None:
            self._seconds += 0.1 * (seconds - self._seconds)

    def check_model(self, name: str | None) -> None:
        """Check that a request names this server's model.

        Raises:
            ApiError: 404 for another model.
        """
        if name not in (None, self.settings.model_name):
            raise ApiError(404, f"model: this server has {self.settings.model_name!r}", "model", "model_not_found")

    async def prepare(self, body: CompletionRequest | ChatRequest, emit: Any) -> Job:
        """Check a request and create the engine's job.

        Args:
            body: the parsed body.
            emit: receives the job's events, in the engine's thread.

        Raises:
            ApiError: 400, which names the field; 404 for another model.
        """
        settings = self.settings
        self.check_model(body.model)
        given, name = body.longest
        if given is not None and given > settings.max_new_tokens:
            raise ApiError(400, f"{name}: expected at most {settings.max_new_tokens}", name)
        longest = settings.default_new_tokens if given is None else given

        def tokenized() -> Inputs:
            with self.health.working("tokenizing"):
                return self.preparer(body, longest, name)

        inputs = await asyncio.get_running_loop().run_in_executor(self._tokenizing, tokenized)
        ids = self.preparer.text(inputs) if self.penalty != 1.0 else []
        top_p = 1.0 if body.top_p is None else body.top_p
        chooser = Chooser(body.temperature or 0.0, top_p, body.seed, self.penalty, ids)
        self.metrics.source.inc(len(inputs.source))
        self.metrics.prompt.inc(len(inputs.packed))
        return Job(inputs, chooser, TextStream(self.tokenizer, body.stop), longest, emit, body.stream)


class Call:
    """One request. Call `end` after `begin`, whatever happens in between; it frees the place and cancels the job.

    Args:
        service: answers the request.
        request: used to notice that the client disconnects; its body must have been read.
        body: the parsed body.
    """

    def __init__(self, service: Service, request: Request, body: CompletionRequest | ChatRequest) -> None:
        self.service, self.request, self.body = service, request, body
        self.job: Job | None = None
        self._started = time.monotonic()
        self._until = self._started + min(body.timeout or service.settings.timeout, service.settings.timeout)
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()  # None: the client is gone
        self._gone: asyncio.Task[None] | None = None
        self._whole = False

    async def begin(self) -> None:
        """Take a place and start the work.

        Raises:
            ApiError: 429 or 503 (see `Service.admit`), 504 if time is up, or what `Service.prepare` raises. The call
                has been ended then.
        """
        self.service.admit()
        try:
            loop = asyncio.get_running_loop()

            def emit(event: Event) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._events.put_nowait, event)

            try:
                self.job = await asyncio.wait_for(self.service.prepare(self.body, emit), self.left)
            except asyncio.TimeoutError:
                raise self.too_late() from None
            self.job.arrived = self._started
            self._gone = asyncio.create_task(self._wait_for_disconnect())
            self.service.engine.submit(self.job)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Free the place, and cancel the answer if it is not complete."""
        if self._gone is not None:
            self._gone.cancel()
        if self.job is not None and not self._whole:
            self.service.engine.cancel(self.job)
        self.service.release(time.monotonic() - self._started if self._whole else None)

    async def events(self) -> AsyncIterator[Piece | Done]:
        """The events of the answer; the last one is a `Done`.

        Raises:
            ApiError: 500 if the model failed, 503 if the server is shutting down, 504 if time is up.
            ClientGone: the client disconnected.
        """
        while True:
            event = await self._next()
            if event is None:
                self.service.metrics.cancelled.labels("disconnect").inc()
                raise ClientGone
            if isinstance(event, Failed):
                if self.service.draining:
                    raise ApiError(503, "the server is shutting down", code="shutting_down")
                raise ApiError(500, event.reason)
            self._whole = isinstance(event, Done)
            yield event
            if self._whole:
                return

    @property
    def left(self) -> float:
        """Seconds until the timeout."""
        return max(self._until - time.monotonic(), 0.0)

    async def _next(self) -> Event | None:
        if not self._events.empty():
            return self._events.get_nowait()
        try:
            return await asyncio.wait_for(self._events.get(), self.left)
        except asyncio.TimeoutError:
            raise self.too_late() from None

    def too_late(self) -> ApiError:
        """Count a timeout and return its error."""
        self.service.metrics.cancelled.labels("timeout").inc()
        return ApiError(504, "the answer took too long", code="timeout")

    async def _wait_for_disconnect(self) -> None:
        try:
            while (await self.request.receive())["type"] != "http.disconnect":
                pass
        finally:
            self._events.put_nowait(None)
