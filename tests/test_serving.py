"""The server in this process: equal answers in any company, limits, errors, cancelling, failures, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from layalign.errors import ArgumentError
from layalign.serve import ServeSettings
from layalign.serve.app import create_app
from layalign.serve.decoding import Decoder
from layalign.serve.service import Service

ROOT = Path(__file__).parents[1]
SETTINGS = ServeSettings(max_prompt_tokens=1024, max_new_tokens=200, default_new_tokens=8)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SECRET = "siri kubwa 5521"

Client = httpx.AsyncClient
Test = Callable[[Service, Client], Awaitable[None]]


@pytest.fixture(scope="module")
def case() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import serving_case
    finally:
        sys.path.pop(0)
    return serving_case


@pytest.fixture(scope="module")
def parts(case: ModuleType) -> tuple[Any, Any, Any]:
    return case.tiny_model(), case.byte_tokenizer(add_eos=True), case.byte_tokenizer(add_eos=False)


@pytest.fixture(scope="module")
def questions(case: ModuleType, parts: tuple[Any, Any, Any]) -> list[Any]:
    found = [question for question in case.questions(*parts, 24) if question.margin >= case.MARGIN]
    assert len({question.text for question in found}) > len(found) // 2
    return found


def run(parts: tuple[Any, Any, Any], test: Test, settings: ServeSettings = SETTINGS, key: str | None = None) -> None:
    """Run a test with a served model and a client, without any network."""

    async def whole() -> None:
        service = Service(*parts, settings)
        app = create_app(service, key)
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), Client(transport=transport, base_url="http://server") as client:
            await asyncio.wait_for(test(service, client), 120)

    asyncio.run(whole())


def figures(service: Service) -> dict[str, float]:
    """Every value of the metrics page, by name and labels."""
    found = {}
    for family in text_string_to_metric_families(service.metrics.text().decode()):
        for sample in family.samples:
            found["/".join([sample.name, *sample.labels.values()])] = sample.value
    return found


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def pieces(text: str) -> list[Any]:
    """The objects of a stream, which must end as it should."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


class Slow:
    """Makes every step of the decoder take a while, so that something can happen in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> None:
        step = Decoder.step

        def slow(decoder: Decoder, state: Any, tokens: Any) -> Any:
            time.sleep(seconds)
            self.rows.append(len(tokens))
            return step(decoder, state, tokens)

        self.rows: list[int] = []
        monkeypatch.setattr(Decoder, "step", slow)


@pytest.fixture
def long_body(parts: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A request whose answer takes all its tokens: no token ends it."""
    monkeypatch.setattr("layalign.serve.service.eos_ids", lambda model, tokenizer: [])
    return {"prompt": "paka mbwa", "max_tokens": 200}


# Answers


def test_many_at_once_get_what_each_gets_alone(parts: tuple[Any, Any, Any], questions: list[Any]) -> None:
    async def test(service: Service, client: Client) -> None:
        async def whole(question: Any) -> tuple[str, str]:
            (choice,) = (await client.post(COMPLETIONS, json=question.body())).json()["choices"]
            return choice["text"], choice["finish_reason"]

        async def streamed(question: Any) -> tuple[str, str]:
            body = {**question.body(), "stream": True}
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            chunks = pieces((await client.post(CHAT, json=body)).text)
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            return text, chunks[-1]["choices"][0]["finish_reason"]

        expected = [(question.text, question.reason) for question in questions]
        found = await asyncio.gather(*map(whole, questions), *map(streamed, questions))
        assert found == [*expected, *expected]
        counted = figures(service)
        assert counted[f"layalign_requests_total/{COMPLETIONS}/200"] == len(questions)
        assert counted[f"layalign_requests_total/{CHAT}/200"] == len(questions)
        assert counted["layalign_step_rows_bucket/2.0"] < 0.5 * counted["layalign_step_rows_count"]  # was batched
        assert counted["layalign_first_token_seconds_count"] == 2 * len(questions)
        assert counted["layalign_tokens_total/generated"] > 5 * len(questions)
        assert counted["layalign_requests_admitted"] == 0
        await until(lambda: figures(service)["layalign_batch_rows"] == 0)

    run(parts, test, replace(SETTINGS, max_batch=7, max_queue=200))


@pytest.mark.parametrize(("llm", "masked"), [("mistral", True), ("gemma2", True), ("gpt2", True), ("llama", False)])
def test_rows_join_and_leave_between_steps(llm: str, masked: bool) -> None:
    """Sliding windows, learned positions, and source padding that is attended to: logits as of each row alone."""
    from tiny import tiny_model

    from layalign.serve.decoding import Inputs, State, kept, merged

    model = tiny_model(llm=llm, mask_encoder_padding=masked)
    decoder, draw = Decoder(model, 0), torch.Generator().manual_seed(0)

    def inputs(source: int, prompt: int) -> Inputs:
        ids = [torch.randint(4, 64, (count,), generator=draw).tolist() for count in (source, prompt)]
        packed = model.pack(torch.ones(1, source), [ids[1]])["input_ids"][0].tolist()
        return Inputs(tuple(ids[0]), tuple(packed))

    rows = [inputs(*sizes) for sizes in ((9, 3), (2, 0), (5, 11), (1, 1))]
    tokens = [torch.randint(4, 64, (8,), generator=draw).tolist() for _ in rows]

    def alone(row: int) -> list[torch.Tensor]:
        state, logits = decoder.prefill([rows[row]])
        return [logits[0]] + [decoder.step(state, [token])[0] for token in tokens[row]]

    expected = [alone(row) for row in range(4)]
    done, members = [0] * 4, [0, 1]
    state, logits = decoder.prefill([rows[0], rows[1]])

    def check(logits: torch.Tensor, which: list[int]) -> None:
        for row, found in zip(which, logits, strict=True):
            torch.testing.assert_close(found, expected[row][done[row]], rtol=1e-4, atol=1e-5)

    def step(state: State) -> None:
        logits = decoder.step(state, [tokens[row][done[row]] for row in members])
        for row in members:
            done[row] += 1
        check(logits, members)

    check(logits, members)
    step(state)
    joining, logits = decoder.prefill([rows[2], rows[3]])
    check(logits, [2, 3])
    state, members = merged(state, joining), [0, 1, 2, 3]
    step(state)
    step(state)
    state, members = kept(state, [3, 1]), [3, 1]  # the longest leave: their padding is cut off
    assert state.width == max(state.lengths) == state.cache.layers[0].keys.shape[2]
    assert state.cache.source.keys[0].shape[2] == max(state.sources) == 2
    for _ in range(4):
        step(state)


def test_positions_of_a_stream(parts: tuple[Any, Any, Any]) -> None:
    async def test(service: Service, client: Client) -> None:
        body = {"prompt": "paka", "stream": True, "max_tokens": 6, "stream_options": {"include_usage": True}}
        response = await client.post(COMPLETIONS, json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = pieces(response.text)
        assert len({chunk["id"] for chunk in chunks}) == 1 and len(chunks) > 3  # as it comes, not at the end
        whole = (await client.post(COMPLETIONS, json={"prompt": "paka", "max_tokens": 6})).json()
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert whole["usage"]["source_tokens"] == 5 and whole["usage"]["prompt_tokens"] == 7

    run(parts, test)


def test_drawn_answers_follow_their_seed_in_any_company(parts: tuple[Any, Any, Any]) -> None:
    async def test(service: Service, client: Client) -> None:
        async def drawn(**fields: Any) -> str:
            body = {"prompt": "paka mbwa", "max_tokens": 12, "temperature": 1.5, **fields}
            return str((await client.post(COMPLETIONS, json=body)).json()["choices"][0]["text"])

        alone = [await drawn(seed=seed) for seed in range(4)]
        assert len(set(alone)) == 4
        assert await asyncio.gather(*(drawn(seed=seed) for seed in range(4))) == alone
        assert await drawn() != await drawn()
        greedy = await drawn(temperature=0.0)
        assert await drawn(top_p=1e-6, seed=1) == greedy != alone[1]

    run(parts, test)


def test_a_repetition_penalty_of_the_model_is_kept(parts: tuple[Any, Any, Any], case: ModuleType) -> None:
    config = parts[0].generation_config
    config.repetition_penalty = 1.7
    try:
        expected, _, _ = case.single_answer(*parts, "paka mbwa", "source", 16)
        config.repetition_penalty = 1.0
        assert case.single_answer(*parts, "paka mbwa", "source", 16)[0] != expected
        config.repetition_penalty = 1.7

        async def test(service: Service, client: Client) -> None:
            body = {"prompt": "paka mbwa", "task": "source", "max_tokens": 16}
            bodies = [body, {**body, "prompt": "nyumba"}, body]
            answers = await asyncio.gather(*(client.post(COMPLETIONS, json=each) for each in bodies))
            texts = [answer.json()["choices"][0]["text"] for answer in answers]
            assert texts[0] == texts[2] == expected != texts[1]

        run(parts, test)
        config.no_repeat_ngram_size = 2
        with pytest.raises(ArgumentError, match="generation_config: no_repeat_ngram_size=2"):
            Service(*parts, SETTINGS)
    finally:
        config.repetition_penalty, config.no_repeat_ngram_size = 1.0, 0


# Limits


BAD: list[tuple[str, Any, int, str | None]] = [
    (COMPLETIONS, b"{", 400, None),
    (COMPLETIONS, b"\xff\xfe", 400, None),
    (COMPLETIONS, b"[" * 100_000, 400, None),
    (COMPLETIONS, b"[]", 400, None),
    (COMPLETIONS, b"null", 400, None),
    (COMPLETIONS, {}, 400, "prompt"),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a"]}, 400, "prompt"),
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


def test_bad_requests_are_told_what_is_wrong(parts: tuple[Any, Any, Any]) -> None:
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


def test_an_answer_must_fit_behind_its_prompt(parts: tuple[Any, Any, Any]) -> None:
    async def test(service: Service, client: Client) -> None:
        service.preparer.context = 40
        body = {"prompt": "a" * 20, "task": "source"}  # bos, 21 source tokens, boundary, 20 prompt tokens: 43
        response = await client.post(COMPLETIONS, json={**body, "task": "none", "max_tokens": 18})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
        assert (await client.post(COMPLETIONS, json={**body, "task": "none", "max_tokens": 17})).status_code == 200

    run(parts, test)


def test_a_body_that_is_too_long_is_not_read(parts: tuple[Any, Any, Any]) -> None:
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
        assert (await client.post(COMPLETIONS, content=b" " * 2001, headers=headers)).status_code == 413

        async def slow() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(5)

        assert (await client.post(COMPLETIONS, content=slow(), headers=headers)).status_code == 408

    run(parts, test, replace(SETTINGS, max_body_bytes=2000, body_timeout=0.3))


def test_a_full_server_says_when_to_come_again(
    parts: tuple[Any, Any, Any], long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
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
    parts: tuple[Any, Any, Any], long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
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
    streamed: bool, parts: tuple[Any, Any, Any], long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
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


def test_time_runs_out(parts: tuple[Any, Any, Any], long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_who_does_not_read_is_left(parts: tuple[Any, Any, Any], long_body: dict[str, Any]) -> None:
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


# Failures


@pytest.mark.parametrize("where", ["step", "prefill"])
def test_a_failure_ends_its_requests_and_no_others(
    where: str, parts: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


def test_logits_that_are_not_finite_fail_their_row_alone(
    parts: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_model_that_always_fails_is_reported(parts: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(decoder: Decoder, rows: Any) -> Any:
        raise RuntimeError("gone")

    async def test(service: Service, client: Client) -> None:
        assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 200
        monkeypatch.setattr(Decoder, "prefill", failing)
        for _ in range(3):
            assert (await client.post(COMPLETIONS, json={"prompt": "a"})).status_code == 500
        assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 503

    run(parts, test)


def test_shutting_down_refuses_the_new_and_ends_the_running(
    parts: tuple[Any, Any, Any], long_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
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


# Keys


def test_a_key_is_asked_for(parts: tuple[Any, Any, Any]) -> None:
    async def test(service: Service, client: Client) -> None:
        body = {"prompt": "a"}
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "siri"}, {"Authorization": "Bearer é"}):
            raw = {name: value.encode() for name, value in headers.items()}
            response = await client.post(COMPLETIONS, json=body, headers=raw)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/health")).status_code == 200
        good = {"Authorization": "Bearer siri"}
        assert (await client.post(COMPLETIONS, json=body, headers=good)).status_code == 200
        models = (await client.get("/v1/models", headers=good)).json()
        assert [model["id"] for model in models["data"]] == ["layalign"]
        assert not any(name.startswith("access-control") for name in response.headers)

    run(parts, test, key="siri")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    import threading

    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "layalign-engine"]
