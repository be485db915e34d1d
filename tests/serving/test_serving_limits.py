"""The server in this process: limits, errors, leaving, failures, the end of its life."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from helpers_serving import CHAT, COMPLETIONS, SETTINGS, Client, Parts, Slow, figures, run, tiny_parts, until
from torch import Tensor

from layalign.serving.http.decoding import Decoder, State
from layalign.serving.http.engine import Job
from layalign.serving.http.service import Call, Service

SECRET = "siri kubwa 5521"


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny_parts()


@pytest.fixture
def long_body(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A request whose answer takes all its tokens: no token ends it."""
    monkeypatch.setattr("layalign.serving.http.service.eos_ids", lambda model, tokenizer: [])
    return {"prompt": "paka mbwa", "max_tokens": 200}


# Limits


BAD: list[tuple[str, Any, int, str | None]] = [
    (COMPLETIONS, b"{", 400, None),
    (COMPLETIONS, b"\xff\xfe", 400, None),
    (COMPLETIONS, b"[" * 100_000, 400, None),
    (COMPLETIONS, b"[]", 400, None),
    (COMPLETIONS, b"null", 400, None),
    (COMPLETIONS, {}, 400, "prompt"),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "b"]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a" * 8001]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [""]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt"),
    (COMPLETIONS, {"prompt": None}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [5, 6]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[5, 6]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": " \n"}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a" * 8001}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a" * 600}, 400, "prompt"),  # tokens
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "prompt"),
    (COMPLETIONS, {"prompt": "a", "model": "gpt-9"}, 404, "model"),
    (COMPLETIONS, {"prompt": "a", "task": "chess"}, 400, "task"),
    (COMPLETIONS, {"prompt": "a", "language": "Klingon"}, 400, "language"),
    (COMPLETIONS, {"prompt": "a", "language": ""}, 400, "language"),
    (COMPLETIONS, {"prompt": "a", "llm_prompt": " "}, 400, "llm_prompt"),
    (COMPLETIONS, {"prompt": "a", "llm_prompt": "b", "task": "math"}, 400, "llm_prompt"),
    (COMPLETIONS, {"prompt": "a" * 400, "llm_prompt": "{source}" * 900}, 400, "llm_prompt"),
    (COMPLETIONS, {"prompt": "a", "llm_prompt": "b" * 1025}, 400, "llm_prompt"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 201}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**400}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature"),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p"),
    (COMPLETIONS, {"prompt": "a", "seed": -1}, 400, "seed"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, 400, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 5}, 400, "stop"),
    (COMPLETIONS, {"prompt": "a", "stream": "yes"}, 400, "stream"),
    (COMPLETIONS, {"prompt": "a", "n": 2}, 400, "n"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 5}, 400, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty"),
    (COMPLETIONS, {"prompt": "a", "timeout": 0}, 400, "timeout"),
    (COMPLETIONS, {"prompt": "a", "tools": []}, 400, "tools"),
    (COMPLETIONS, b'{"prompt": "a", "\\ud800": 1}', 400, None),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}] * 2}, 400, "messages"),
    (CHAT, {"messages": [{"role": "system", "content": "a"}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 201}, 400,
     "max_completion_tokens"),
    ("/v1/nothing", {}, 404, None),
    ("/health", {}, 405, None),
]  # fmt: skip


def test_bad_requests_are_told_what_is_wrong(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        for path, body, status, field in BAD:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            response = await client.post(path, content=content, headers={"Content-Type": "application/json"})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (status, field), (content[:80], response.text)
            assert field is None or error["message"].startswith(field)
            assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 300
        response = await client.post(COMPLETIONS, content=b"{}", headers={"Content-Type": "text/plain"})
        assert response.status_code == 415
        assert service.open == 0
        counted = figures(service)
        assert sum(v for k, v in counted.items() if k.startswith("layalign_requests_total")) == len(BAD) + 1
        assert counted["layalign_requests_total/other/404"] == 1
        assert counted["layalign_tokens_total/generated"] == 0

    run(parts, test)


def test_an_answer_must_fit_behind_its_prompt(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        service.preparer.context = 40
        body = {"prompt": "a" * 20, "task": "source"}  # bos, 21 source tokens, boundary, 20 prompt tokens: 43
        response = await client.post(COMPLETIONS, json={**body, "task": "none", "max_tokens": 18})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
        assert (await client.post(COMPLETIONS, json={**body, "task": "none", "max_tokens": 17})).status_code == 200
        chat = {"messages": [{"role": "user", "content": "a" * 20}], "max_completion_tokens": 18}
        response = await client.post(CHAT, json=chat)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "max_completion_tokens")

    run(parts, test)


def test_a_body_that_is_too_long_is_not_read(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        sent = 0

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(1000):
                sent += 1
                yield b" " * 100

        headers = {"Content-Type": "application/json"}
        assert (await client.post(COMPLETIONS, content=chunks(), headers=headers)).status_code == 413
        assert sent < 30
        for length in (2001, 10**30):  # the header alone is enough
            sent, told = 0, {**headers, "Content-Length": str(length)}
            assert (await client.post(COMPLETIONS, content=chunks(), headers=told)).status_code == 413
            assert sent == 0
        nonsense = {**headers, "Content-Length": "-5"}
        assert (await client.post(COMPLETIONS, content=chunks(), headers=nonsense)).status_code == 413

        async def slow() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(5)

        assert (await client.post(COMPLETIONS, content=slow(), headers=headers)).status_code == 408

    run(parts, test, replace(SETTINGS, max_body_bytes=2000, body_timeout=0.3))


@pytest.mark.slow
def test_a_full_server_says_when_to_come_again(
    parts: Parts, long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)

    async def test(service: Service, client: Client) -> None:
        running = [asyncio.create_task(client.post(COMPLETIONS, json={**long_body, "max_tokens": 30}))
                   for _ in range(5)]  # fmt: skip
        await until(lambda: service.open == 5 and service.engine.active == 2)
        assert figures(service)["layalign_queue_length"] == 3
        refused = await client.post(COMPLETIONS, json=long_body)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        assert [(await task).status_code for task in running] == [200] * 5
        assert (await client.post(COMPLETIONS, json={"prompt": "a"})).status_code == 200
        assert max(slow.rows) == 2

    run(parts, test, replace(SETTINGS, max_batch=2, max_queue=3))


def test_the_cache_budget_bounds_the_batch(
    parts: Parts, long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, 0.0)

    async def test(service: Service, client: Client) -> None:
        body = {**long_body, "max_tokens": 20}  # 12 + 20 entries each
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for _ in range(9)))
        assert {answer.status_code for answer in answers} == {200}
        assert max(slow.rows) == 3

    run(parts, test, replace(SETTINGS, max_batch_tokens=3 * 32))


# Giving up


async def leave(app: Any, body: dict[str, Any], gone: asyncio.Event) -> list[Any]:
    """Post as a client that disconnects when `gone` is set; what it was sent."""
    content, sent = json.dumps(body).encode(), []
    messages: list[Any] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if b'"text": "' in message.get("body", b""):
            gone.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": COMPLETIONS,
        "raw_path": COMPLETIONS.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("server", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("streamed", [False, True])
def test_who_leaves_frees_the_place(
    streamed: bool, parts: Parts, long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)

    async def test(service: Service, client: Client) -> None:
        app = client._transport.app  # type: ignore[attr-defined]
        gone, waiting_gone = asyncio.Event(), asyncio.Event()
        body = {**long_body, "stream": streamed}
        first = asyncio.create_task(leave(app, body, gone))
        await until(lambda: service.engine.active == 1 or gone.is_set())
        if not streamed:
            waiting = asyncio.create_task(leave(app, body, waiting_gone))
            await until(lambda: service.engine.waiting == 1)
            waiting_gone.set()  # one that has no place in the batch yet
            await waiting
            assert (service.engine.waiting, service.open, service.engine.active) == (0, 1, 1)
            gone.set()
        await first
        assert service.open == 0
        await until(lambda: service.engine.active == 0)
        assert len(slow.rows) < 60  # of 200 tokens
        assert figures(service)["layalign_cancelled_total/disconnect"] == (1 if streamed else 2)
        assert figures(service)["layalign_batch_rows"] == 0
        assert (await client.post(COMPLETIONS, json={"prompt": "a"})).status_code == 200

    run(parts, test, replace(SETTINGS, max_batch=1, max_queue=1))


@pytest.mark.slow
def test_time_runs_out(parts: Parts, long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)

    async def test(service: Service, client: Client) -> None:
        late = await client.post(COMPLETIONS, json={**long_body, "timeout": 0.3})
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        late = await client.post(COMPLETIONS, json={**long_body, "stream": True})  # the server's own limit
        assert late.status_code == 200 and '"code": "timeout"' in late.text and "[DONE]" not in late.text
        await until(lambda: service.engine.active == 0)
        assert service.open == 0 and len(slow.rows) < 100
        assert figures(service)["layalign_cancelled_total/timeout"] == 2

    run(parts, test, replace(SETTINGS, timeout=0.6))


@pytest.mark.slow
def test_who_does_not_read_is_left(parts: Parts, long_body: dict[str, Any]) -> None:
    async def test(service: Service, client: Client) -> None:
        messages: list[Any] = [{"type": "http.request", "body": json.dumps({**long_body, "stream": True}).encode()}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "root_path": "",
                 "headers": [(b"content-type", b"application/json")]}  # fmt: skip
        await asyncio.wait_for(client._transport.app(scope, receive, send), 10)  # type: ignore[attr-defined]
        assert service.open == 0

    run(parts, test, replace(SETTINGS, timeout=0.3))


@pytest.mark.slow
def test_nothing_of_a_request_stays(parts: Parts) -> None:
    def living() -> Counter[str]:
        gc.collect()
        kinds = {Job, Call, State, Tensor}
        return Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in kinds)

    async def test(service: Service, client: Client) -> None:
        app = client._transport.app  # type: ignore[attr-defined]
        before: Counter[str] = Counter()
        for number in range(12):
            if number == 2:  # the first rounds leave what is made once
                await until(lambda: service.engine.active == 0)
                before = living()
            bodies = [{"prompt": "a" * (1 + number + row), "max_tokens": 4, "stream": row % 2 == 0} for row in range(6)]
            asked = [client.post(COMPLETIONS, json=body) for body in [*bodies, {"prompt": ""}]]
            gone = asyncio.Event()
            gone.set()
            await asyncio.gather(*asked, leave(app, bodies[0], gone))
        await until(lambda: service.engine.active == 0)
        assert living() == before and not before["Job"] + before["Call"] + before["State"]

    run(parts, test)


# Failures


@pytest.mark.parametrize("where", ["step", "prefill"])
def test_a_failure_ends_its_requests_and_no_others(
    where: str, parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, poison = getattr(Decoder, where), len(SECRET) + 1

    def failing(decoder: Decoder, *arguments: Any) -> Any:
        state_or_rows = arguments[0]
        sizes = state_or_rows.sources if where == "step" else [len(row.source) for row in state_or_rows]
        if poison in sizes:
            raise RuntimeError(f"no luck with {SECRET}")
        return original(decoder, *arguments)

    monkeypatch.setattr(Decoder, where, failing)

    async def test(service: Service, client: Client) -> None:
        bodies = [{"prompt": "a" * size, "max_tokens": 4, "language": "sw"} for size in (3, 4, 5)]
        bad = {"prompt": SECRET, "max_tokens": 4}
        with caplog.at_level(logging.DEBUG):
            answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in [*bodies, bad]))
        statuses = [answer.status_code for answer in answers]
        assert statuses[-1] == 500 and answers[-1].json()["error"]["type"] == "server_error"
        if where == "prefill":  # the others of the same prefill are read again, one by one
            assert statuses[:-1] == [200] * 3
        assert (await client.post(COMPLETIONS, json=bodies[0])).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert service.open == 0 and figures(service)["layalign_failures_total"] == 1
        assert "RuntimeError" in caplog.text and "decoding" not in answers[-1].text
        assert "siri" not in caplog.text + answers[-1].text

    run(parts, test)


def test_an_error_in_the_server_is_logged_with_its_request(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(self: Service, body: Any, emit: Any) -> Any:
        raise RuntimeError(SECRET)

    async def test(service: Service, client: Client) -> None:
        monkeypatch.setattr(Service, "prepare", failing)
        response = await client.post(COMPLETIONS, json={"prompt": SECRET})
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert f"request {response.headers['x-request-id']} failed: RuntimeError" in caplog.text
        assert SECRET not in caplog.text + response.text and service.open == 0

    run(parts, test)


def test_logits_that_are_not_finite_fail_their_row_alone(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decoder.step

    def broken(decoder: Decoder, state: Any, tokens: Any) -> Any:
        logits = step(decoder, state, tokens)
        logits[[size == 9 for size in state.sources]] = float("nan")
        return logits

    monkeypatch.setattr(Decoder, "step", broken)

    async def test(service: Service, client: Client) -> None:
        bodies = [{"prompt": "a" * size, "max_tokens": 4, "llm_prompt": "b"} for size in (6, 7, 8)]
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))
        assert [answer.status_code for answer in answers] == [200, 200, 500]

    run(parts, test)


def test_a_model_that_always_fails_is_reported(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(decoder: Decoder, rows: Any) -> Any:
        raise RuntimeError("gone")

    async def test(service: Service, client: Client) -> None:
        assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 200
        monkeypatch.setattr(Decoder, "prefill", failing)
        for _ in range(3):
            assert (await client.post(COMPLETIONS, json={"prompt": "a"})).status_code == 500
        assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 503

    run(parts, test)


@pytest.mark.slow
def test_shutting_down_refuses_the_new_and_ends_the_running(
    parts: Parts, long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch)

    async def test(service: Service, client: Client) -> None:
        short = asyncio.create_task(client.post(COMPLETIONS, json={**long_body, "max_tokens": 20}))
        endless = asyncio.create_task(client.post(COMPLETIONS, json=long_body))
        await until(lambda: service.engine.active == 2)
        service.draining = True
        refused = await client.post(COMPLETIONS, json=long_body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert (await short).status_code == 200
        service.engine.close()  # the grace time is over
        assert (await endless).status_code == 503
        assert service.open == 0

    run(parts, test)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "layalign-engine"]
