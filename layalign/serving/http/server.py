"""The server process: uvicorn, signals and shutdown."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import time
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from layalign.serving.http.app import create_app
from layalign.serving.http.connections import BACKLOG, Connection, Seldom, Waiting, room
from layalign.serving.http.service import Service

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, but after the first signal it answers 503 to new requests until the running ones have ended."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        """As uvicorn's; then prints the address."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"layalign serve: listening on http://{host}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, stop at once on the second.

        The signal is not recorded, because uvicorn would raise it again and the exit code would not be 0.
        """
        if self.service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self._drain = asyncio.run_coroutine_threadsafe(self._drained(), self._loop)  # kept, or it might be collected

    async def _drained(self) -> None:
        until = time.monotonic() + self.service.settings.grace
        while self.service.open and time.monotonic() < until:
            await asyncio.sleep(0.05)
        if self.service.open:
            logger.warning("%d requests did not finish within the grace time and are aborted", self.service.open)
            await asyncio.to_thread(self.service.engine.close)  # each of them gets an error
        self.should_exit = True


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def make_server(service: Service, host: str, port: int, api_key: str | None = None) -> Server:
    """Create the server that `run` runs; same arguments."""
    settings = service.settings
    waiting = Waiting(room(settings), settings, service.metrics)
    config = uvicorn.Config(
        create_app(service, api_key),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=5,
        timeout_keep_alive=math.ceil(settings.header_timeout),
        http=partial(Connection, waiting),  # type: ignore[arg-type]
        backlog=BACKLOG,
    )
    return Server(config, service)


def run(service: Service, host: str, port: int, api_key: str | None = None) -> None:
    """Serve until a signal arrives.

    Args:
        service: answers the requests.
        host, port: address to listen on; port 0 takes a free one, which is printed.
        api_key: key that requests must carry. None requires no key and warns if other machines can connect.

    Raises:
        ArgumentError: the key is empty or not valid in a header.
    """
    if api_key is None and not is_loopback(host):
        logger.warning("%s is reachable from other machines without a key; set LAYALIGN_API_KEY", host)
    for name in ("uvicorn.error", "asyncio", "layalign.serving.http.engine"):
        logging.getLogger(name).addFilter(Seldom())
    make_server(service, host, port, api_key).run()
