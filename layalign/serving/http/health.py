"""Whether a server works, judged by the requests of the last minute and the time of the step in progress."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

WINDOW = 60.0  # seconds
LEAST = 3  # fewer failed requests do not count as a problem


class Health:
    """Records recent answers and failures; thread-safe.

    Do not record errors caused by the client, nor answers that were cancelled, timed out or refused with 429.

    Args:
        longest: seconds that one piece of work (a step of the model, tokenizing a text) may take.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._recent: deque[tuple[float, int]] = deque()  # time, and number of failed requests; 0: a complete answer
        self._running: dict[str, float] = {}  # work in progress, and when it started
        self._lock = threading.Lock()

    def answered(self) -> None:
        """Record a complete answer."""
        self._record(0)

    def failed(self, requests: int = 1) -> None:
        """Record a failure of the server, with the number of requests that it affected, at least 1."""
        self._record(requests)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Time the work in this block; only one block per name at a time."""
        self._running[what] = time.monotonic()
        try:
            yield
        finally:
            self._running.pop(what, None)

    @property
    def running(self) -> tuple[float, str]:
        """Seconds since the oldest work in progress started, and its name; (0.0, "") if there is none."""
        now = time.monotonic()
        return max(((now - begun, what) for what, begun in self._running.copy().items()), default=(0.0, ""))

    @property
    def problem(self) -> str:
        """Why the server should be restarted; empty if it works."""
        seconds, what = self.running
        if seconds > self.longest:
            return f"{what} has been running for more than {self.longest:g} s"
        with self._lock:
            self._forget()
            failures = [requests for _, requests in self._recent if requests]
            failed, answered = sum(failures), len(self._recent) - len(failures)
        # A single failed step does not count: one request of its batch may have caused it.
        if failed >= LEAST and len(failures) > 1 and failed > answered:
            return f"{failed} requests of the last minute failed, {answered} were answered"
        return ""

    def _record(self, failed: int) -> None:
        with self._lock:
            self._forget()
            self._recent.append((time.monotonic(), failed))

    def _forget(self) -> None:
        since = time.monotonic() - WINDOW
        while self._recent and self._recent[0][0] < since:
            self._recent.popleft()
