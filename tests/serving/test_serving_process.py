"""`layalign serve` as a process: one line when it listens, real connections, real signals."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_serving import ROOT, case

from layalign.cli import main


@contextmanager
def served(checkpoint: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, address) of a running server."""
    command = [sys.executable, "-m", "layalign", "serve", "-c", str(checkpoint), "--port", "0", "--device", "cpu"]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("layalign serve: listening on http://127.0.0.1:"), line + process.communicate()[1]
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))


def wait_for(client: httpx.Client, name: str, value: float) -> None:
    end = time.monotonic() + 30
    while metric(client, name) != value:
        assert time.monotonic() < end, (name, metric(client, name))
        time.sleep(0.05)


@contextmanager
def idle_connections(port: int, count: int) -> Iterator[None]:
    """Connections that send nothing, or half of a header."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 512)), hard))
    lying = []
    try:
        for number in range(count):
            lying.append(socket.create_connection(("127.0.0.1", port), 20))
            lying[-1].sendall((b"", b"GET /health HTTP/1.1\r\nHost: server\r\nX-Slow: ")[number % 2])
        yield
    finally:
        for connection in lying:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def send_nonsense(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(b"\x00\x1b[31m nonsense\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.slow
def test_from_start_to_sigterm(tmp_path: Path) -> None:
    parts = case.write_checkpoint(tmp_path, ends=False)
    questions = case.questions(*parts, 8, seed=1)
    body = {"prompt": "siri kubwa", "task": "source", "max_tokens": 6000, "stream": True}
    options = (
        "--max-batch",
        "8",
        "--max-queue",
        "8",
        "--max-prompt-tokens",
        "1024",
        "--max-new-tokens",
        "6000",
        "--grace",
        "60",
        "--model-name",
        "tiny",
    )
    with (
        served(tmp_path, *options, OMP_NUM_THREADS="1", LAYALIGN_API_KEY="ufunguo\n") as (process, address),
        ThreadPoolExecutor(8) as pool,
    ):
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "a"}).status_code == 401
        connect = partial(httpx.Client, base_url=address, timeout=60, headers={"Authorization": "Bearer ufunguo"})
        client = connect()
        assert client.get("/ready").status_code == 200

        port = int(address.rpartition(":")[2])
        with idle_connections(port, 1100):  # more than it has places for
            assert [httpx.get(f"{address}/health", timeout=20).status_code for _ in range(20)] == [200] * 20
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        for _ in range(30):
            send_nonsense(port)

        def ask(question: Any) -> tuple[str, str]:
            (choice,) = client.post("/v1/completions", json=question.body()).json()["choices"]
            return choice["text"], choice["finish_reason"]

        assert list(pool.map(ask, questions)) == [(question.text, question.reason) for question in questions]

        # A client that closes its connection in the middle of a stream.
        wait_for(client, "layalign_requests_admitted", 0)  # an answer is with its client before its place is given back
        for _ in range(5):  # on a busy machine the whole answer may be there before this process gets to its first line
            with connect() as leaving, leaving.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200
                lines = response.iter_lines()  # kept: the connection is closed with it
                next(lines)
                if metric(client, "layalign_requests_admitted") == 1:
                    break
        else:
            pytest.fail("every stream had ended before it was looked at")
        wait_for(client, "layalign_requests_admitted", 0)
        wait_for(client, "layalign_batch_rows", 0)
        assert metric(client, 'layalign_cancelled_total{reason="disconnect"}') == 1

        def chunks() -> Iterator[bytes]:  # no content-length
            for _ in range(400):
                yield b" " * 1024

        headers = {"Content-Type": "application/json"}
        with connect() as other:
            assert other.post("/v1/completions", content=chunks(), headers=headers).status_code == 413

        # SIGTERM: what runs is finished, what is new is refused, the process ends by itself.
        with client.stream("POST", "/v1/completions", json={**body, "max_tokens": 1500}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            with connect() as other:
                refused = other.post("/v1/completions", json={"prompt": "a"})
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "siri" not in output + errors and "Traceback" not in errors
        assert errors.count("Invalid HTTP request") == 5 and "\x1b" not in errors


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_the_extra_is_named_where_it_is_missing(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as stop:
        main(["serve", "-c", "none"])
    assert stop.value.code == 2
    assert f"{missing} is not installed; pip install 'layalign[serve]'" in capsys.readouterr().err
