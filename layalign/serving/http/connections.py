"""Connections waiting for their client: limits on their time and number, and on the log lines they cause."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from layalign.serving.http.metrics import Metrics
from layalign.serving.http.settings import ServeSettings

logger = logging.getLogger(__name__)
SPARE_FILES = 256  # file descriptors for everything else
HEADER = 16 * 1024  # bytes; h11's own limit
_END = re.compile(rb"\n\r?\n")
BACKLOG = 512  # connections that the event loop accepts at once


class Waiting:
    """The connections that wait for their client, longest wait first.

    Args:
        most: maximum number of them.
        settings: timeouts.
        metrics: counts them.
    """

    def __init__(self, most: int, settings: ServeSettings, metrics: Metrics) -> None:
        self.most, self.settings, self.metrics = most, settings, metrics
        self.connections: dict[Connection, None] = {}
        metrics.waiting_connections.set_function(lambda: len(self.connections))

    def add(self, connection: Connection) -> None:
        """Add a connection; if there are too many, close the one that has waited longest."""
        self.connections[connection] = None
        if len(self.connections) > self.most:
            next(iter(self.connections)).drop("crowded")


class Connection(H11Protocol):
    """uvicorn's connection, with a limit on how long it waits for its client.

    It waits for the header and the body of the next request, and for the client to read an answer. After a complete
    request it waits for the server, whose time is limited elsewhere.

    Args:
        waiting: the waiting connections of this server.
        **kwargs: arguments of uvicorn's protocol.
    """

    def __init__(self, waiting: Waiting, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._waiting, self._for = waiting, ""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting.metrics.connections.inc()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.metrics.connections.dec()
        self._wait_for("")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        # h11 limits only an incomplete header.
        if self.conn.their_state is h11.IDLE and len(data) > HEADER and not _END.search(data, 0, HEADER):
            self.send_400_response("Header too long.")
            return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with 400, unless another answer has been started or sent; then close the connection."""
        self._waiting.metrics.malformed.inc()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()
        if self.cycle is not None and not self.cycle.response_complete:  # otherwise uvicorn would answer twice
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def drop(self, reason: str) -> None:
        """Close the connection at once."""
        self._waiting.metrics.closed.labels(reason).inc()
        self._wait_for("")
        self.transport.abort()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if self.flow.write_paused:
            self._wait_for("reading")
        elif self.cycle is None or self.cycle.response_complete:
            self._wait_for("header")
        else:
            self._wait_for("body" if self.cycle.more_body else "")

    def _wait_for(self, what: str) -> None:
        if what == self._for:
            return
        self._for = what
        if self._timer is not None:
            self._timer.cancel()
        settings = self._waiting.settings
        # The guard limits the time of a body and answers 408.
        seconds = {"header": settings.header_timeout, "reading": settings.timeout}.get(what)
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.drop, what)
        self._waiting.connections.pop(self, None)
        if what:
            self._waiting.add(self)


class Seldom(logging.Filter):
    """Limits the log lines per minute from each place in the code; the next line says how many were suppressed.

    Args:
        lines: maximum per minute and place.
    """

    def __init__(self, lines: int = 5) -> None:
        super().__init__()
        self.lines = lines
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}  # place: start of its minute, lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record."""
        now, place = time.monotonic(), (record.pathname, record.lineno)
        since, count = self._seen.get(place, (-math.inf, 0))
        if now - since >= 60:
            if count > self.lines:
                record.msg, record.args = f"{record.getMessage()} ({count - self.lines} more were suppressed)", None
            since, count = now, 0
        self._seen[place] = since, count + 1
        return count < self.lines


def room(settings: ServeSettings) -> int:
    """How many connections may wait: `max_idle`, or fewer if the process cannot open that many files."""
    try:
        import resource
    except ImportError:  # not a Unix
        return settings.max_idle
    others = settings.max_open + SPARE_FILES + BACKLOG
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_idle + others
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings.max_idle
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    most = max(allowed - others, 16)
    if most < settings.max_idle:
        logger.warning("max_idle: reduced to %d connections, because the process may open only %d files", most, allowed)
    return min(most, settings.max_idle)
