"""What `/health` says: of failures of every kind, of work that never ends, of clients' own faults, and afterwards."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_serving import COMPLETIONS, SETTINGS, Client, Parts, figures, run, tiny_parts, until

from layalign.serving.http.decoding import Decoder
from layalign.serving.http.engine import Engine
from layalign.serving.http.health import Health
from layalign.serving.http.messages import Shape
from layalign.serving.http.preparing import Preparer
from layalign.serving.http.service import Service
from layalign.serving.http.settings import checked_key
from layalign.serving.http.text import TextStream
from layalign.utils.errors import ArgumentError

BODY = {"prompt": "paka mbwa", "max_tokens": 4}


@pytest.fixture(autouse=True)
def _no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends an answer: each takes steps after its prefill."""
    monkeypatch.setattr("layalign.serving.http.service.eos_ids", lambda model, tokenizer: [])


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny_parts()


async def told(client: Client) -> tuple[int, int]:
    """Statuses of /health and /ready."""
    return (await client.get("/health")).status_code, (await client.get("/ready")).status_code


async def ask(client: Client, **fields: Any) -> int:
    return (await client.post(COMPLETIONS, json={**BODY, **fields})).status_code


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("layalign.serving.http.health.time", SimpleNamespace(monotonic=lambda: now))
    health = Health(longest=60)
    health.failed(16)
    assert not health.problem  # one step: one of its requests may be to blame
    health.failed()
    assert health.problem == "17 requests of the last minute failed, 0 were answered"
    for _ in range(17):
        assert health.problem
        health.answered()
    assert not health.problem  # no longer more than were answered
    now += 30
    for _ in range(2):
        health.failed()
    assert health.problem  # a server that fails half of the time and a little
    now += 31
    assert not health.problem  # two are too few; the older ones are forgotten
    health.failed()
    assert health.problem
    now += 61
    assert not health.problem  # nothing is known any more
    with health.working("a step"):
        now += 60
        assert not health.problem
        now += 1
        assert health.problem.startswith("a step has been running") and health.running == (61, "a step")
    assert not health.problem and health.running[0] == 0


def raising(error: Exception) -> Callable[[Any], Any]:
    def wrapped(old: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise type(error)(*error.args)  # the same one would hold the frames of all that it passed through

        return call

    return wrapped


def not_finite(old: Any) -> Any:
    def call(*args: Any) -> Any:
        found = old(*args)
        return (found[0], found[1] * float("nan")) if isinstance(found, tuple) else found * float("nan")

    return call


FAULT = raising(RuntimeError("no"))
FAILURES = {
    "steps": (Decoder, "step", FAULT, {}),
    "steps, streamed": (Decoder, "step", FAULT, {"stream": True}),
    "prefills": (Decoder, "prefill", FAULT, {}),
    "out of memory": (Decoder, "step", raising(torch.OutOfMemoryError("no")), {}),
    "NaN in steps": (Decoder, "step", not_finite, {}),
    "NaN in steps, streamed": (Decoder, "step", not_finite, {"stream": True}),
    "NaN in prefills": (Decoder, "prefill", not_finite, {}),
    "tokenizing": (Preparer, "__call__", FAULT, {}),
    "the service": (Service, "prepare", FAULT, {}),
    "text": (TextStream, "_decode", FAULT, {}),
    "the answer's shape": (Shape, "whole", FAULT, {}),
    "a stream's shape": (Shape, "piece", FAULT, {"stream": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_server_that_fails_every_request_says_so_until_it_answers_again(
    name: str, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, make, fields = FAILURES[name]

    async def test(service: Service, client: Client) -> None:
        assert await ask(client, **fields) == 200
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, make(getattr(owner, attribute)))
            for number in range(4):
                try:
                    answer = await client.post(COMPLETIONS, json={**BODY, **fields})
                    assert answer.status_code == 500 or (fields and "[DONE]" not in answer.text)
                except AssertionError:
                    assert name == "a stream's shape"  # broken off, which this transport does not take
                assert await told(client) == ((503, 503) if number >= 2 else (200, 200))
            assert "failed" in (await client.get("/health")).json()["status"]
            assert figures(service)["layalign_healthy"] == 0
        for _ in range(3):  # as many answers as failures, with the first
            assert await told(client) == (503, 503)
            assert await ask(client, **fields) == 200
        assert await told(client) == (200, 200) and figures(service)["layalign_healthy"] == 1

    run(parts, test)


def test_what_clients_do_wrong_says_nothing(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decoder.step

    def poisoned(decoder: Decoder, state: Any, tokens: Any) -> Any:
        if 9 in state.sources:
            raise RuntimeError("no")
        return step(decoder, state, tokens)

    monkeypatch.setattr(Decoder, "step", poisoned)

    async def test(service: Service, client: Client) -> None:
        wrong: list[tuple[dict[str, Any], int]] = [
            ({"prompt": ""}, 400), ({"model": "gpt"}, 404), ({"timeout": 1e-9}, 504), ({"max_tokens": 0}, 400),
        ]  # fmt: skip
        for fields, status in wrong * 3:
            assert await ask(client, **fields) == status
        assert await told(client) == (200, 200)
        for _ in range(4):  # one request that always fails, among as many good ones
            assert await ask(client, prompt="a" * 8) == 500
            assert await ask(client) == 200
        assert await told(client) == (200, 200)

    run(parts, test)


@pytest.mark.slow
@pytest.mark.parametrize("where", [(Decoder, "step", "a step"), (Preparer, "__call__", "tokenizing")])
def test_work_that_does_not_end_is_told(
    where: tuple[Any, str, str], parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, name = where
    old, go_on = getattr(owner, attribute), threading.Event()

    def stuck(*args: Any, **kwargs: Any) -> Any:
        go_on.wait(20)
        return old(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, stuck)

    async def test(service: Service, client: Client) -> None:
        try:
            asked = asyncio.create_task(ask(client, timeout=0.6))
            assert await told(client) == (200, 200)
            assert await asked == 504 and service.open == 0  # its place is free, whatever hangs
            health = await client.get("/health")
            assert (health.status_code, health.json()["status"]) == (
                503, f"{name} has been running for more than 0.2 s",
            )  # fmt: skip
            assert figures(service)["layalign_step_running_seconds"] > 0.2
        finally:
            go_on.set()
        assert await ask(client) == 200
        assert await told(client) == (200, 200)

    run(parts, test, replace(SETTINGS, step_timeout=0.2))


def test_a_step_that_does_not_end_holds_up_no_shutdown(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(Decoder, "step", lambda *args: go_on.wait(60))

    async def test(service: Service, client: Client) -> None:
        try:
            asked = asyncio.create_task(client.post(COMPLETIONS, json=BODY))
            await until(lambda: service.engine.active == 1)
            service.draining = True
            await asyncio.to_thread(service.engine.close, 0.1)
            answer = await asyncio.wait_for(asked, 20)  # while the step goes on
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        finally:
            go_on.set()

    run(parts, test)
    end = time.monotonic() + 20
    while any(thread.name == "layalign-engine" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_thread_that_has_ended_is_told(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(service: Service, client: Client) -> None:
        monkeypatch.setattr(Engine, "_admitted", raising(KeyError("a bug")))
        assert await ask(client) == 500
        assert await told(client) == (503, 503)
        assert (await client.get("/health")).json()["status"] == "the model's thread does not run"
        assert await ask(client) == 500

    run(parts, test)


def test_an_error_in_one_answers_text_is_its_own(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    push = TextStream.push

    def failing(stream: TextStream, token: int) -> str:
        if stream.stops == ("poison",):
            raise RuntimeError("no")
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", failing)

    async def test(service: Service, client: Client) -> None:
        asked = [ask(client, max_tokens=20, stop=["poison"] if number == 1 else ["none"]) for number in range(4)]
        assert await asyncio.gather(*asked) == [200, 500, 200, 200]

    run(parts, test)


def test_no_temperature_ends_the_step_of_others(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        asked = [ask(client, temperature=cold, seed=1) for cold in (1e-5, 1e-20, 1e-38, 1e-45, 5e-324, 0)]
        assert set(await asyncio.gather(*asked)) == {200}

    run(parts, test)


def test_a_key_is_read_without_its_line_end() -> None:
    assert checked_key("KEY", "siri-5521\r\n") == checked_key("KEY", "  siri-5521\t") == "siri-5521"
    for bad in ("", " \n", "siri 5521", "siri\n5521", "sirí", "siri\x00", "siri\x7f", "\udcff"):
        with pytest.raises(ArgumentError, match="^KEY: expected a key of printable ASCII") as error:
            checked_key("KEY", bad)
        assert "siri" not in str(error.value)


def test_a_key_with_a_line_end_opens(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        good = {"Authorization": "Bearer siri"}
        assert (await client.post(COMPLETIONS, json=BODY, headers=good)).status_code == 200
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 401

    run(parts, test, key="siri\n")
