"""Whether a server works: what came of the last minute's requests, and how long a step has been running."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

WINDOW = 60.0  # seconds that are looked at
LEAST = 3  # failed requests that are enough


class Health:
    """What happened lately; usable from any thread.

    Nothing is to be told of what is a client's own fault, nor of answers that were given up: left, late, refused for
    want of a place.

    Args:
        longest: seconds that one piece of work (a step of the model, the tokenizing of a text) may take.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._answers: deque[float] = deque()  # times of the whole answers
        self._failures: deque[tuple[float, int]] = deque()  # when, and of how many requests
        self._running: dict[str, float] = {}  # work in progress, and when it began
        self._lock = threading.Lock()

    def answered(self) -> None:
        """A whole answer was given."""
        with self._lock:
            self._forget()
            self._answers.append(time.monotonic())

    def failed(self, requests: int = 1) -> None:
        """The server failed, and so did some requests with it."""
        with self._lock:
            self._forget()
            self._failures.append((time.monotonic(), requests))

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Around a piece of work; one of each name at a time."""
        self._running[what] = time.monotonic()
        try:
            yield
        finally:
            self._running.pop(what, None)

    @property
    def running(self) -> tuple[float, str]:
        """Seconds since the oldest work in progress began, and its name; 0 and none where there is none."""
        now = time.monotonic()
        return max(((now - begun, what) for what, begun in self._running.copy().items()), default=(0.0, ""))

    @property
    def problem(self) -> str:
        """Why the server is to be restarted; empty where it works."""
        seconds, what = self.running
        if seconds > self.longest:
            return f"{what} has been running for more than {self.longest:g} s"
        with self._lock:
            self._forget()
            failed = sum(requests for _, requests in self._failures)
            # One step that failed for many requests may be the fault of one of them.
            if failed >= LEAST and len(self._failures) > 1 and failed > len(self._answers):
                return f"{failed} requests of the last minute failed, {len(self._answers)} were answered"
        return ""

    def _forget(self) -> None:
        since = time.monotonic() - WINDOW
        while self._answers and self._answers[0] < since:
            self._answers.popleft()
        while self._failures and self._failures[0][0] < since:
            self._failures.popleft()
