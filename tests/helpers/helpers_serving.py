"""A served tiny model and its client, in one process and without a network: for tests of `layalign.serving.http`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from layalign.serving.http import ServeSettings
from layalign.serving.http.app import create_app
from layalign.serving.http.decoding import Decoder
from layalign.serving.http.service import Service

ROOT = Path(__file__).parents[2]
SETTINGS = ServeSettings(max_prompt_tokens=1024, max_new_tokens=200, default_new_tokens=8)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

Client = httpx.AsyncClient
Test = Callable[[Service, Client], Awaitable[None]]
Parts = tuple[Any, Any, Any]

sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import serving_case as case  # the model and the questions of the soak
finally:
    sys.path.pop(0)


@cache
def tiny_parts() -> Parts:
    """(model, encoder tokenizer, LLM tokenizer)."""
    return case.tiny_model(), case.byte_tokenizer(add_eos=True), case.byte_tokenizer(add_eos=False)


def run(parts: Parts, test: Test, settings: ServeSettings = SETTINGS, key: str | None = None) -> None:
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
