"""The FastAPI application: OpenAI's endpoints, health and metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from layalign.serving.http.engine import Done
from layalign.serving.http.guard import PATHS, Guard
from layalign.serving.http.messages import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Shape,
    error_body,
    first_problem,
)
from layalign.serving.http.service import Call, ClientGone, Service


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application for a service, which it starts and stops.

    Args:
        service: answers the requests; also available as `app.state.service`.
        api_key: key that requests must carry; None requires no key.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(title="layalign serve", lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(
        Guard,  # type: ignore[arg-type]
        settings=service.settings,
        metrics=service.metrics,
        health=service.health,
        api_key=api_key,
    )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    _add_watching(app, service)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(service, request, body)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(service, request, body)

    return app


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        return _state(service.engine.problem, "ok")

    @app.get("/ready")
    async def ready() -> Response:
        return _state("the server is shutting down" if service.draining else service.engine.problem, "ready")

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    entry = {"id": service.settings.model_name, "object": "model", "created": 0, "owned_by": "layalign"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(entry)


async def _answer(service: Service, request: Request, body: CompletionRequest | ChatRequest) -> Response:
    call = Call(service, request, body)
    await call.begin()
    assert call.job is not None
    inputs = call.job.inputs
    name = service.settings.model_name
    with_usage = body.stream_options.include_usage
    shape = Shape(isinstance(body, ChatRequest), name, len(inputs.packed), len(inputs.source), with_usage)
    handed_over = False
    try:
        events = call.events()
        first = await anext(events)  # until then, an error can still set the status
        if body.stream:
            handed_over = True
            return _EventStream(call, shape, first, events)
        while not isinstance(first, Done):
            first = await anext(events)
        response = JSONResponse(shape.whole(first.text, first.reason, first.tokens))
        service.health.answered()
        return response
    except ClientGone:
        return Response(status_code=499)  # only for the metrics
    finally:
        if not handed_over:
            call.end()


class _EventStream(Response):
    """An answer as server-sent events. Starlette's StreamingResponse would wait for the disconnect a second time."""

    def __init__(self, call: Call, shape: Shape, first: Any, events: AsyncIterator[Any]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.call, self.shape, self.first, self.events = call, shape, first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: Any) -> None:
            text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
            message = {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}
            try:
                await asyncio.wait_for(send(message), self.call.left + 1.0)
            except asyncio.TimeoutError:  # a client that does not read must not block its place
                self.call.too_late()
                raise ClientGone from None

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self._write_events(write)
            except ApiError as error:  # the status has been sent already
                await write(error_body(error))
            else:
                self.call.service.health.answered()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientGone, OSError):  # servers may raise OSError on a closed connection
            pass
        finally:
            self.call.end()

    async def _write_events(self, write: Any) -> None:
        event, first = self.first, True
        while not isinstance(event, Done):
            await write(self.shape.piece(event.text, first=first))
            event, first = await anext(self.events), False
        await write(self.shape.piece("", event.reason, first=first))
        if self.shape.with_usage:
            await write(self.shape.last(event.tokens))
        await write("[DONE]")


def _state(problem: str, good: str) -> Response:
    return JSONResponse({"status": problem or good}, 503 if problem else 200)


async def _http_error(request: Request, error: Any) -> Response:
    if error.status_code in (404, 405) and not isinstance(error, ApiError):  # raised by the router
        error.detail = f"{error.detail}: this server has {', '.join(PATHS)}"
    return JSONResponse(error_body(error), error.status_code, headers=error.headers)


async def _invalid(request: Request, error: Any) -> Response:
    message, field = first_problem(error.errors())
    return JSONResponse(error_body(ApiError(400, message, field)), 400)
