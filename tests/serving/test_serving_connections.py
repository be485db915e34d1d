"""Connections that wait for their client: real sockets, and a server in a thread."""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from helpers_serving import COMPLETIONS, SETTINGS, figures, tiny_parts

from layalign.cli import main
from layalign.serving.http import ServeSettings
from layalign.serving.http.connections import BACKLOG, SPARE_FILES, Seldom, room
from layalign.serving.http.server import make_server
from layalign.serving.http.service import Service

GET = b"GET /health HTTP/1.1\r\nHost: server\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: server\r\nContent-Type: application/json\r\n"
QUICK = replace(SETTINGS, header_timeout=0.4, body_timeout=0.4, timeout=1.0)


@contextlib.contextmanager
def listening(settings: ServeSettings) -> Iterator[tuple[Service, int]]:
    """(service, port) of a server in a thread."""
    service = Service(*tiny_parts(), settings)
    server = make_server(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        yield service, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)
        service.close()


def connect(port: int, first: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 20)
    connection.sendall(first)
    return connection


def received(connection: socket.socket) -> bytes:
    """All until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while new := connection.recv(65536):
            data += new
    return data


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    with contextlib.suppress(ConnectionError):
        while True:
            try:
                if not connection.recv(65536):
                    return False
            except BlockingIOError:
                return True
    return False


def healthy(port: int) -> bool:
    connection = connect(port, GET + b"Connection: close\r\n\r\n")
    return received(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_who_sends_no_whole_request_is_closed() -> None:
    with listening(QUICK) as (service, port):
        begin = time.monotonic()
        silent, begun, kept = connect(port), connect(port, GET + b"X-Slow: "), connect(port, GET + b"\r\n")
        unread = connect(port, POST.replace(b"POST", b"GET") + b"Content-Length: 5\r\n\r\n{")  # its body never comes
        body = connect(port, POST + b"Content-Length: 50\r\n\r\n{")
        slow = [begun, kept, unread, body]
        while any(map(is_open, slow)):  # a byte now and then keeps nobody's place
            assert time.monotonic() < begin + 10
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.send(b"a")
            time.sleep(0.05)
        assert not is_open(silent) and time.monotonic() - begin >= 0.4
        late = connect(port, POST + b"Content-Length: 50\r\n\r\n{")
        assert received(late).startswith(b"HTTP/1.1 408")
        assert healthy(port)
        closed = figures(service)["layalign_connections_closed_total/header"]
        assert closed >= 3 and service.open == 0


def test_the_idle_one_that_has_waited_longest_goes_first() -> None:
    settings = replace(QUICK, header_timeout=60.0, body_timeout=60.0, max_idle=12)
    with listening(settings) as (service, port):
        firsts = [b"", GET + b"X-Slow: ", GET + b"\r\n", POST + b"Content-Length: 50\r\n\r\n{"]
        lying = []
        for number in range(40):
            lying.append(connect(port, firsts[number % 4]))
            assert healthy(port)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2}).status_code == 200
            still = [is_open(connection) for connection in lying]
            assert not any(still[:28]) and still[-1] and 2 <= sum(still) <= 12  # those of /health take places too
            seen = figures(service)
            assert seen["layalign_connections_closed_total/crowded"] >= 28
            assert seen["layalign_connections_waiting"] <= 12 and seen["layalign_connections"] <= 13
            assert service.open == 0


@pytest.mark.slow
def test_who_does_not_read_is_closed() -> None:
    with listening(QUICK) as (service, port):
        stalled = connect(port, (GET.replace(b"/health", b"/metrics") + b"\r\n") * 20)
        stalled.close()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        sending = threading.Thread(target=_flood, args=(deaf,), daemon=True)
        sending.start()
        end = time.monotonic() + 60
        while "layalign_connections_closed_total/reading" not in figures(service):
            assert time.monotonic() < end
            assert healthy(port)
            time.sleep(0.1)
        sending.join(20)
        deaf.close()
        assert not sending.is_alive()


def _flood(connection: socket.socket) -> None:
    """Asks again and again and reads nothing, until the connection is gone."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall((GET.replace(b"/health", b"/metrics") + b"\r\n") * 50)


def test_a_body_that_goes_wrong_gets_one_answer_or_none(caplog: pytest.LogCaptureFixture) -> None:
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    with listening(QUICK) as (service, port):
        for wrong in (POST, POST.replace(b"application/json", b"text/plain")):
            for chunk in (b"ZZ\r\n", b"2\r\n{}\r\nZZ\r\n"):
                answer = received(connect(port, wrong + chunked + chunk))
                assert answer.count(b"HTTP/1.1 4") == answer.count(b"HTTP/1.1") <= 1
        for header in (b"X: " + b"a" * 70_000, b"a: b\r\n" * 10_000):
            assert received(connect(port, GET + header + b"\r\n\r\n")).startswith(b"HTTP/1.1 400")
        assert figures(service)["layalign_malformed_requests_total"] == 6
        late = connect(port, POST + b"Content-Length: 300000\r\n\r\n")  # refused by its header; its body comes later
        assert late.recv(65536).startswith(b"HTTP/1.1 413")
        late.sendall(b" " * 300_000 + GET + b"\r\n")
        assert b"HTTP/1.1 200" in received(late)
        assert figures(service)["layalign_malformed_requests_total"] == 6
        late = connect(port, POST.replace(b"application/json", b"text/plain") + chunked)
        assert late.recv(65536).startswith(b"HTTP/1.1 415")
        late.sendall(b"ZZ\r\n")
        assert b"HTTP" not in received(late)
        assert healthy(port) and "Traceback" not in caplog.text and "ASGI" not in caplog.text


def test_a_line_comes_seldom_from_one_place(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now, lines = 0.0, logging.getLogger("test.seldom")
    monkeypatch.setattr("layalign.serving.http.connections.time.monotonic", lambda: now)
    lines.addFilter(Seldom(2))
    for now in [float(second) for second in range(70)]:
        lines.warning("again %d", now)
    assert [record.getMessage() for record in caplog.records if record.name == "test.seldom"] == [
        "again 0", "again 1", "again 60 (58 more were suppressed)", "again 61",
    ]  # fmt: skip


@pytest.mark.parametrize(("soft", "hard", "most"), [(256, 4096, 1024), (5000, 5000, 1024), (1024, 1024, 176)])
def test_places_are_as_many_as_files_may_be_open(
    soft: int, hard: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: now.append(limits))
    settings = ServeSettings()
    assert room(settings) == most
    assert now[-1] == (max(soft, min(hard, 1024 + settings.max_open + SPARE_FILES + BACKLOG)), hard)


def test_an_empty_key_is_refused_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("", "\n", "siri kubwa"):
        monkeypatch.setenv("LAYALIGN_API_KEY", key)
        with pytest.raises(SystemExit) as stop:
            main(["serve", "-c", "none"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "LAYALIGN_API_KEY: expected a key of printable ASCII" in error and "siri" not in error
