"""Middleware before the application: checks the key, the type, size and time of the body; counts requests."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from layalign.serving.http.engine import log_error
from layalign.serving.http.health import Health
from layalign.serving.http.messages import ApiError, error_body
from layalign.serving.http.metrics import Metrics
from layalign.serving.http.settings import ServeSettings, checked_key

OPEN_PATHS = ("/health", "/ready")  # without a key, for health probes
PATHS = (*OPEN_PATHS, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


class Guard:
    """ASGI middleware.

    Args:
        app: the application.
        settings: limits of the body.
        metrics: counts requests.
        health: records errors in the server.
        api_key: key that `Authorization: Bearer` must carry; None requires no key.
    """

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, health: Health, api_key: str | None
    ) -> None:
        self.app, self.settings, self.metrics, self.health = app, settings, metrics, health
        self.api_key = None if api_key is None else checked_key("api_key", api_key).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        request_id = uuid.uuid4().hex

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        self.metrics.in_flight.inc()
        try:
            self._check(scope)
            await self.app(scope, self._limited(receive, scope), counted)
        except ApiError as error:
            await _respond(error, scope, receive, counted)
        except Exception as error:  # not re-raised: uvicorn would log its text, which may contain a user's input
            log_error(f"request {request_id} failed", error)
            self.health.failed()
            if not status:
                await _respond(ApiError(500, "an error in the server"), scope, receive, counted)
        finally:
            endpoint = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(endpoint, str(status or 499)).inc()
            self.metrics.request_seconds.labels(endpoint).observe(time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] in OPEN_PATHS:
            return
        if self.api_key is not None:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.api_key):
                raise ApiError(401, "expected the header Authorization: Bearer with this server's key")
        if scope["method"] != "POST":
            return
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # browsers let any site post other types without a CORS preflight
            raise ApiError(415, "content-type: expected application/json")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise ApiError(415, "content-encoding: expected a body that is not compressed")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self.settings.max_body_bytes} bytes", code="too_large")

    def _limited(self, receive: Receive, scope: Scope) -> Receive:
        """`receive` that raises if the body is too long or too slow, whatever its headers say."""
        seen, whole = 0, scope["method"] != "POST"
        until = time.monotonic() + self.settings.body_timeout

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(until - time.monotonic(), 0))
            except asyncio.TimeoutError:
                raise ApiError(408, f"body: expected within {self.settings.body_timeout:g} seconds") from None
            seen += len(message.get("body", b""))
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            if seen > self.settings.max_body_bytes:
                raise self._too_large()
            return message

        return limited


async def _respond(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response: Any = JSONResponse(error_body(error), error.status_code, headers=dict(error.headers or {}))
    await response(scope, receive, send)
