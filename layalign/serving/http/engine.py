"""The thread that owns the model. It admits waiting requests to the batch, runs steps and emits text.

All torch work happens in this thread. Other threads submit a `Job`, may cancel it, and receive its events through the
job's `emit`, which is called in the engine's thread and must not block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import TYPE_CHECKING

from torch import Tensor

from layalign.serving.http.decoding import Decoder, Inputs, State, kept, merged
from layalign.serving.http.sampling import Chooser, choose
from layalign.serving.http.text import TextStream

if TYPE_CHECKING:
    from layalign.serving.http.health import Health
    from layalign.serving.http.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """More text of a streamed answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        reason: "stop" (end token or stop text) or "length".
        text: the whole answer.
        tokens: number of generated tokens.
    """

    reason: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """An answer that failed. `reason` contains nothing of the request's content."""

    reason: str


Event = Piece | Done | Failed
_ENDED = Failed("the model's thread has ended")


@dataclass(eq=False)
class Job:
    """One request inside the engine.

    Attributes:
        inputs: what the model reads.
        chooser: selects the tokens.
        text: turns tokens into text.
        max_new_tokens: maximum length of the answer.
        emit: receives every event, the last one a `Done` or `Failed`; none after `cancel`.
        streamed: whether to emit a `Piece` for new text.
        cancelled: nobody waits for the answer any more; the engine drops the job before its next step.
        tokens: number of tokens generated so far.
        last: the last generated token, or -1.
        arrived: time of arrival (`time.monotonic`).
    """

    inputs: Inputs
    chooser: Chooser
    text: TextStream
    max_new_tokens: int
    emit: Callable[[Event], None]
    streamed: bool = False
    cancelled: bool = False
    tokens: int = 0
    last: int = -1
    arrived: float = field(default_factory=time.monotonic)
    _parts: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Cache entries this job may need."""
        return len(self.inputs.packed) + self.max_new_tokens

    def send(self, event: Event) -> None:
        """Emit an event, unless the job is cancelled."""
        if not self.cancelled:
            self.emit(event)

    def take(self, token: int, ends: frozenset[int]) -> bool:
        """Add a token and emit the text that it completes; returns whether the answer continues."""
        self.tokens, self.last = self.tokens + 1, token
        ended = token in ends
        new = self.text.finish() if ended else self.text.push(token)
        reason = "stop" if ended or self.text.stopped else "length" if self.tokens >= self.max_new_tokens else ""
        if reason == "length":
            new += self.text.finish()
            reason = "stop" if self.text.stopped else reason
        if new:
            self._parts.append(new)
            if self.streamed:
                self.send(Piece(new))
        if reason:
            self.send(Done(reason, "".join(self._parts), self.tokens))
        return not reason


class Engine:
    """A model and its thread.

    Args:
        decoder: runs the model.
        ends: token ids that end an answer.
        max_batch: maximum number of rows.
        max_batch_tokens: maximum of rows times the cache entries of the longest row.
        metrics: counts steps and tokens.
        health: records failures and the step in progress.
    """

    def __init__(
        self, decoder: Decoder, ends: frozenset[int], max_batch: int, max_batch_tokens: int, metrics: Metrics,
        health: Health,
    ) -> None:  # fmt: skip
        self.decoder, self.ends, self.metrics, self.health = decoder, ends, metrics, health
        self.max_batch, self.max_batch_tokens = max_batch, max_batch_tokens
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._state: State | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    # From other threads

    def start(self) -> None:
        """Start the thread, unless it is running."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="layalign-engine", daemon=True)
            self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Stop the thread and fail unfinished jobs. The first call waits up to `timeout` s for the step in progress."""
        with self._changed:
            again, self._closed = self._closed, True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(0.1 if again else timeout)
            if self._thread.is_alive():  # the step hangs
                for job in [*self._waiting, *self._active]:
                    job.send(_ENDED)

    @property
    def problem(self) -> str:
        """Why the server should be restarted; empty if it works."""
        if self._closed or self._thread is None or not self._thread.is_alive():
            return "the model's thread does not run"
        return self.health.problem

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a place in the batch."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Number of jobs in the batch."""
        return len(self._active)

    def submit(self, job: Job) -> None:
        """Queue a job; its events come through `job.emit`."""
        with self._changed:
            if not self._closed:
                self._waiting.append(job)
                self._changed.notify()
                return
        job.send(_ENDED)

    def cancel(self, job: Job) -> None:
        """Drop a job: at once if it waits, before the next step if it runs."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    # In the engine's thread

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._closed or self._waiting or self._active):
                        self._changed.wait()
                    if self._closed:
                        break
                if self._active:
                    self._step()
                joining = self._admitted()
                if joining:
                    self._prefill(joining)
        except BaseException as error:  # a bug here, or interpreter shutdown
            log_error("the engine's thread has ended", error)
        finally:  # no caller may wait forever
            with self._changed:
                self._closed = True
                left = [*self._waiting, *self._active]
                self._waiting.clear()
            self._active, self._state = [], None
            for job in left:
                job.send(_ENDED)

    def _admitted(self) -> list[Job]:
        """Take the waiting jobs that fit into the batch, first come, first served."""
        taken: list[Job] = []
        longest = max((job.longest for job in self._active), default=0)
        with self._changed:
            while self._waiting:
                rows, width = len(self._active) + len(taken) + 1, max(longest, self._waiting[0].longest)
                if rows > self.max_batch or (rows > 1 and rows * width > self.max_batch_tokens):
                    break
                longest = width
                taken.append(self._waiting.popleft())
        now = time.monotonic()
        for job in taken:
            self.metrics.queue_seconds.observe(now - job.arrived)
        return taken

    def _prefill(self, jobs: list[Job]) -> None:
        try:
            with self.health.working("a step"):
                state, logits = self.decoder.prefill([job.inputs for job in jobs])
        except Exception as error:
            if len(jobs) > 1:  # perhaps only one of them fails
                for job in jobs:
                    self._prefill([job])
                return
            self._failed(jobs, error)
            return
        try:
            with self.health.working("a step"):
                going = self._deal(jobs, logits)
                rows = [row for row, goes in enumerate(going) if goes]
                if rows:
                    state = state if len(rows) == len(jobs) else kept(state, rows)
                    self._state = state if self._state is None else merged(self._state, state)
                    self._active += [jobs[row] for row in rows]
        except Exception as error:  # out of memory, for example; the jobs already in the batch continue
            self._failed(jobs, error)
            return
        self.metrics.step_rows.observe(len(jobs))

    def _step(self) -> None:
        jobs = self._active
        try:
            self._keep([not job.cancelled for job in jobs])
            if self._state is None:
                return
            with self.health.working("a step"):  # includes _deal: a GPU's step ends when its tokens are read
                logits = self.decoder.step(self._state, [job.last for job in self._active])
                self.metrics.step_rows.observe(len(self._active))
                self._keep(self._deal(self._active, logits))
        except Exception as error:
            self._active, self._state = [], None
            self._failed(jobs, error)

    def _deal(self, jobs: list[Job], logits: Tensor) -> list[bool]:
        """Give each job its next token; returns whether each continues."""
        going = []
        tokens = choose(logits, [job.chooser for job in jobs])
        lost = tokens.count(None)
        if lost:  # before any answer, since a client may check the health right after it
            self.health.failed(lost)
        for job, token in zip(jobs, tokens, strict=True):
            if job.cancelled:
                going.append(False)
                continue
            if token is None:
                job.send(Failed("the model's logits are not finite"))
                self.metrics.failures.inc()
                going.append(False)
                continue
            if job.tokens == 0:
                self.metrics.first_token_seconds.observe(time.monotonic() - job.arrived)
            self.metrics.generated.inc()
            try:
                going.append(job.take(token, self.ends))
            except Exception as error:  # in this job's text only; the others continue
                self._failed([job], error)
                going.append(False)
        return going

    def _keep(self, going: list[bool]) -> None:
        """Remove the jobs that do not continue from the batch."""
        if all(going) or self._state is None:
            return
        rows = [row for row, goes in enumerate(going) if goes]
        self._active = [self._active[row] for row in rows]
        self._state = kept(self._state, rows) if rows else None

    def _failed(self, jobs: list[Job], error: Exception) -> None:
        self.health.failed(len(jobs))
        self.metrics.failures.inc()
        log_error("a step failed", error)
        for job in jobs:
            job.send(Failed("the model failed"))


def log_error(what: str, error: BaseException) -> None:
    """Log an exception's type and stack, but not its text, which may contain a user's input."""
    trace = [(frame.f_code, line) for frame, line in walk_tb(error.__traceback__)]
    frames = [f"{code.co_filename}:{line} in {code.co_name}" for code, line in trace]
    # stacklevel: `layalign.serving.http.connections.Seldom` counts by the caller's line.
    logger.error("%s: %s\n  %s", what, type(error).__name__, "\n  ".join(frames), stacklevel=2)
