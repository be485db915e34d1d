"""Part of a soak test: idle connections, and a request for the server's health every second.

``python benchmarks/soak_idle.py PORT SECONDS`` prints its results as JSON. It is a separate process, so that its times
are those of the server and not of the busy clients.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import selectors
import socket
import sys
import threading
import time
from collections import Counter
from typing import Any

import numpy as np

COUNT = 1000
KINDS = ("silent", "trickling", "kept alive")
PATIENCE = 10.0  # seconds for an answer of /health
ASK = b"GET /health HTTP/1.1\r\nHost: server\r\n"


class Idle:
    """Connections of each kind, reopened when the server closes them."""

    def __init__(self, port: int) -> None:
        self.port, self.counts = port, Counter[str]()
        self.selector = selectors.DefaultSelector()
        self.open: dict[socket.socket, str] = {}
        self.missing = [KINDS[number % len(KINDS)] for number in range(COUNT)]

    def second(self, most: int = 110) -> None:
        """Open up to `most` missing connections, send a byte, then watch for closed ones for the rest of a second."""
        begin = time.monotonic()
        for kind in self.missing[:most]:
            try:
                connection = socket.create_connection(("127.0.0.1", self.port), 1.0)
            except OSError:  # killed or too busy; retried in the next second
                break
            self.missing.remove(kind)
            self.counts["opened"] += 1
            self.open[connection] = kind
            self.selector.register(connection, selectors.EVENT_READ)
            with contextlib.suppress(OSError):
                if kind != "silent":
                    connection.sendall(ASK + (b"\r\n" if kind == "kept alive" else b"X-Slow: "))
        for connection in [connection for connection, kind in self.open.items() if kind == "trickling"]:
            with contextlib.suppress(OSError):
                connection.sendall(b"a")
        while (left := begin + 1.0 - time.monotonic()) > 0:
            for key, _ in self.selector.select(left):
                self._read(key.fileobj)

    def _read(self, connection: Any) -> None:
        with contextlib.suppress(OSError):
            if connection.recv(4096):
                return
        kind = self.open.pop(connection)
        self.counts[f"closed by the server: {kind}"] += 1
        self.missing.append(kind)
        self.selector.unregister(connection)
        connection.close()


def health(port: int) -> str:
    """Status of `/health`, over a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/health")
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException):
        return "no answer"
    finally:
        connection.close()


def main() -> None:
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle, until = Idle(port), time.monotonic() + seconds
    answers, times, lying = Counter[str](), list[float](), list[int]()

    def ask() -> None:
        while (begin := time.monotonic()) < until:
            answers[health(port)] += 1
            times.append(time.monotonic() - begin)
            time.sleep(max(0.0, begin + 1.0 - time.monotonic()))

    asking = threading.Thread(target=ask)
    asking.start()
    while time.monotonic() < until:
        idle.second()
        lying.append(len(idle.open))
    asking.join()
    lying = lying[10:]  # all have been opened by then
    result = {
        "health": {
            "answers": dict(sorted(answers.items())),
            "seconds": {f"p{q}": round(float(np.percentile(times, q)), 4) for q in (50, 90, 99, 100)},
        },
        "idle connections": {
            "wanted": COUNT,
            "counts": dict(sorted(idle.counts.items())),
            "open": {"mean": round(float(np.mean(lying)), 1), "least": min(lying)} if lying else {},
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
