"""Soak test of the server: sustained load with every answer checked and memory recorded, then kills and restarts.

``python benchmarks/soak.py --minutes 30 --kill-minutes 5 --output benchmarks/results/serve/soak.json`` creates a tiny
model and starts ``layalign serve`` with it in a separate process. More clients than it has places send requests at
once. Each answer must be the one that ``model.generate`` gave to the single question. Some requests are streamed, some
clients disconnect, malformed requests must get their 4xx, and requests beyond the limit must get 429. At the same time
`soak_idle.py` holds idle connections and requests `/health` every second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from facts import facts
from serving_case import MARGIN, Question, questions, write_checkpoint

ROOT = Path(__file__).parents[1]
LIMITS = {"--max-batch": 8, "--max-queue": 8, "--max-new-tokens": 64, "--max-prompt-tokens": 1024}
CLIENTS = 24  # there are 16 places, so some are always refused
WARM_UP = 180.0  # seconds before the fit of memory starts
PATIENCE = 60.0  # seconds without an answer after which a request counts as lost
BAD = (
    (b"{", 400),
    (b'{"prompt": 5}', 400),
    (b'{"prompt": "  "}', 400),
    (b'{"prompt": "a", "max_tokens": 65}', 400),
    (b'{"prompt": "a", "language": "Klingon"}', 400),
    (b'{"prompt": "a", "model": "gpt"}', 404),
    (b'{"prompt": "' + b"a" * 9000 + b'"}', 400),
    (b" " * 300_000, 413),
)


@dataclass
class Tally:
    """What happened in one phase."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)
    elapsed: float = 0.0


class ServerProcess:
    """`layalign serve` in a separate process, on a port that a restart keeps."""

    def __init__(self, checkpoint: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.checkpoint, self.log = checkpoint, log
        self.process: subprocess.Popen[bytes] | None = None
        self.killed_at = 0.0

    def start(self) -> None:
        command = [sys.executable, "-m", "layalign", "serve", "-c", str(self.checkpoint), "--port", str(self.port)]
        command += ["--device", "cpu", *(str(word) for pair in LIMITS.items() for word in pair)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    async def ready(self, client: httpx.AsyncClient, seconds: float = 180.0) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/ready")).status_code == 200:
                    return
            assert self.process is not None and self.process.poll() is None, self.log.read_text()[-2000:]
            await asyncio.sleep(0.2)
        raise SystemExit("the server did not become ready")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.killed_at = time.monotonic()

    def memory(self) -> float:
        """Resident MiB."""
        assert self.process is not None
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


class Load:
    """Clients that ask until `until`."""

    def __init__(self, server: ServerProcess, pool: list[Question], tally: Tally, until: float) -> None:
        self.server, self.pool, self.tally, self.until = server, pool, tally, until
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.port}",
            timeout=PATIENCE,
            limits=httpx.Limits(max_connections=CLIENTS + 8, max_keepalive_connections=CLIENTS),
        )

    async def ask_until_the_end(self, seed: int) -> None:
        draw, counts = random.Random(seed), self.tally.counts
        kinds = {self._whole: 50, self._chat: 8, self._streamed: 30, self._leaves: 7, self._bad: 5}
        while time.monotonic() < self.until:
            (kind,) = draw.choices(list(kinds), list(kinds.values()))
            try:
                status = await kind(draw)
            except httpx.TimeoutException as error:
                counts["lost"] += 1
                counts[f"lost in {kind.__name__}: {type(error).__name__}"] += 1
            except httpx.TransportError:  # refused or closed, since the server was killed
                counts["connection errors"] += 1
                await asyncio.sleep(0.2)
            else:
                if status == 429:
                    counts["429"] += 1
                    await asyncio.sleep(draw.uniform(0.02, 0.2))
                elif status not in (200, 400, 404, 413):
                    counts[f"unexpected {status}"] += 1

    def _check(self, question: Question, text: str, reason: str, started: float, kind: str) -> None:
        now, tally = time.monotonic(), self.tally
        tally.counts["checked"] += 1
        tally.counts[kind] += 1
        tally.seconds.append(now - started)
        if (text, reason) != (question.text, question.reason):
            tally.counts["wrong"] += 1
            tally.wrong.append({"expected": question.text, "got": text, "reason": reason, "kind": kind})
        if self.server.killed_at:
            tally.recovery.append(now - self.server.killed_at)
            self.server.killed_at = 0.0

    async def _whole(self, draw: random.Random) -> int:
        question, started = draw.choice(self.pool), time.monotonic()
        response = await self.client.post("/v1/completions", json=question.body())
        if response.status_code == 200:
            choice = response.json()["choices"][0]
            self._check(question, choice["text"], choice["finish_reason"], started, "whole")
        return response.status_code

    async def _chat(self, draw: random.Random) -> int:
        question, started = draw.choice(self.pool), time.monotonic()
        body = question.body()
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        response = await self.client.post("/v1/chat/completions", json=body)
        if response.status_code == 200:
            choice = response.json()["choices"][0]
            self._check(question, choice["message"]["content"], choice["finish_reason"], started, "chat")
        return response.status_code

    async def _streamed(self, draw: random.Random, leave_after: int | None = None) -> int:
        question, started, text, reason, ended = draw.choice(self.pool), time.monotonic(), "", "", False
        async with self.client.stream("POST", "/v1/completions", json={**question.body(), "stream": True}) as response:
            if response.status_code != 200:
                return response.status_code
            pieces = 0
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                pieces += 1
                if pieces == 1:
                    self.tally.first.append(time.monotonic() - started)
                if line == "data: [DONE]":
                    ended = True
                    continue
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                text, reason = text + choice["text"], choice["finish_reason"] or reason
                if leave_after is not None and pieces >= leave_after:
                    self.tally.counts["left in the middle"] += 1
                    return 200
        if ended:
            self._check(question, text, reason, started, "streamed")
        else:
            self.tally.counts["streams cut"] += 1
        return 200

    async def _leaves(self, draw: random.Random) -> int:
        if draw.random() < 0.5:
            return await self._streamed(draw, leave_after=draw.choice((1, 2, 5)))
        question = draw.choice(self.pool)
        try:
            asked = self.client.post("/v1/completions", json=question.body())
            return (await asyncio.wait_for(asked, draw.uniform(0.01, 0.3))).status_code
        except asyncio.TimeoutError:
            self.tally.counts["left while waiting"] += 1
            return 200

    async def _bad(self, draw: random.Random) -> int:
        body, expected = draw.choice(BAD)
        headers = {"Content-Type": "application/json"}
        try:
            status = (await self.client.post("/v1/completions", content=body, headers=headers)).status_code
        except httpx.WriteError:  # the server refused the rest of a body that is too long
            status = 413 if expected == 413 else 0
        if status == expected:
            self.tally.counts["4xx"] += 1
        elif status != 429:
            self.tally.counts["4xx missing"] += 1
        return status


async def watch(server: ServerProcess, tally: Tally, until: float) -> None:
    """Record memory every five seconds."""
    begin = time.monotonic()
    while time.monotonic() < until:
        with contextlib.suppress(psutil.NoSuchProcess):
            tally.memory.append((round(time.monotonic() - begin, 1), round(server.memory(), 2)))
        await asyncio.sleep(5)


async def phase(server: ServerProcess, pool: list[Question], seconds: float, kill_every: float | None) -> Tally:
    """Load the server for some time; with `kill_every`, kill (SIGKILL) and restart it in that interval."""
    tally, begin = Tally(), time.monotonic()
    load = Load(server, pool, tally, begin + seconds)
    await server.ready(load.client)
    tasks = [asyncio.create_task(load.ask_until_the_end(seed)) for seed in range(CLIENTS)]
    tasks.append(asyncio.create_task(watch(server, tally, load.until)))
    script = Path(__file__).with_name("soak_idle.py")
    beside = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(server.port), str(seconds), stdout=asyncio.subprocess.PIPE
    )
    if kill_every is not None:
        while time.monotonic() + kill_every < load.until:
            await asyncio.sleep(kill_every)
            server.kill()
            tally.counts["kills"] += 1
            server.start()
            await server.ready(load.client)
    await asyncio.gather(*tasks)
    tally.elapsed = time.monotonic() - begin
    tally.beside = json.loads((await beside.communicate())[0])
    await asyncio.sleep(1.0)
    page = (await load.client.get("/metrics")).text
    for name in ("layalign_requests_admitted", "layalign_batch_rows", "layalign_queue_length"):
        line = next(line for line in page.splitlines() if line.startswith(name + " "))
        tally.counts[f"left over: {name}"] = int(float(line.split()[1]))
    await load.client.aclose()
    return tally


def _tree() -> str:
    """Git's tree hash of the server's source, which a rebase does not change."""
    command = ["git", "rev-parse", "HEAD:layalign/serving/http"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()


def _alike(pool: list[Question]) -> float:
    """Share of question pairs with the same answer, for which swapped answers would go unnoticed."""
    counts = Counter((question.text, question.reason) for question in pool)
    pairs = len(pool) * (len(pool) - 1)
    return sum(count * (count - 1) for count in counts.values()) / pairs


def summary(tally: Tally) -> dict[str, Any]:
    """The numbers of a phase."""
    times = [(t, m) for t, m in tally.memory if t >= min(WARM_UP, tally.elapsed / 3)]
    slope = float(np.polyfit(*np.array(times).T, 1)[0] * 3600) if len(times) > 2 else None
    quantiles = {f"p{q}": round(float(np.percentile(tally.seconds, q)), 4) for q in (50, 90, 99)}
    first = {f"p{q}": round(float(np.percentile(tally.first, q)), 4) for q in (50, 90, 99)} if tally.first else {}
    return {
        **tally.beside,
        "seconds": round(tally.elapsed, 1),
        "counts": {name: tally.counts[name] for name in sorted({*tally.counts, "wrong", "lost", "4xx missing"})},
        "wrong answers": tally.wrong[:20],
        "answers per second": round(tally.counts["checked"] / tally.elapsed, 2),
        "answer seconds": quantiles,
        "first piece seconds": first,
        "memory MiB": {
            "after warm-up": times[0][1] if times else None,
            "last": times[-1][1] if times else None,
            "largest": max((m for _, m in tally.memory), default=None),
            "MiB per hour": None if slope is None else round(slope, 2),
            "samples": tally.memory,
        },
        "seconds from kill to a right answer": [round(seconds, 2) for seconds in tally.recovery],
    }


async def soak(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both phases."""
    parts = write_checkpoint(folder / "checkpoint")
    made = questions(*parts, arguments.questions)
    pool = [question for question in made if question.margin >= MARGIN]
    server = ServerProcess(folder / "checkpoint", folder / "server.log")
    server.start()
    result: dict[str, Any] = {
        "facts": facts(),
        "tree of layalign/serve": _tree(),
        "limits": LIMITS,
        "clients": CLIENTS,
        "cores": os.cpu_count(),
        "questions": len(pool),
        "questions left out": len(made) - len(pool),
        "margin": MARGIN,
        "chance that another question's answer passes": round(_alike(pool), 4),
    }
    try:
        result["saturation"] = summary(await phase(server, pool, 60 * arguments.minutes, None))
        result["load average"] = round(os.getloadavg()[2], 2)  # of the last 15 minutes
        if arguments.kill_minutes > 0:
            killed = await phase(server, pool, 60 * arguments.kill_minutes, arguments.kill_every)
            result["kills"] = {**summary(killed), "every": arguments.kill_every}
            del result["kills"]["memory MiB"]
        assert server.process is not None
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(30)
        result["SIGTERM"] = {"exit code": code, "seconds": round(time.monotonic() - begin, 2)}
    finally:
        if server.process is not None and server.process.poll() is None:
            server.process.kill()
    log = server.log.read_text(errors="replace")
    result["errors in the log"] = sum("failed" in line or "Traceback" in line for line in log.splitlines())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kill-minutes", type=float, default=5.0)
    parser.add_argument("--kill-every", type=float, default=30.0, help="seconds")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(soak(arguments, Path(folder)))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("saturation", "kills"):
        shown = {key: value for key, value in result.get(name, {}).items() if key != "memory MiB"}
        print(json.dumps(shown, indent=1, ensure_ascii=False))
    memory = result["saturation"]["memory MiB"]
    print({key: value for key, value in memory.items() if key != "samples"}, result.get("SIGTERM"))
    bad = sum(result[name]["counts"][key] for name in ("saturation", "kills") if name in result
              for key in ("wrong", "lost", "4xx missing"))  # fmt: skip
    unhealthy = {**result["saturation"]["health"]["answers"], "200": 0}
    bad += sum(unhealthy.values())
    sys.exit(f"{bad} wrong, lost, let through or not healthy" if bad else 0)


if __name__ == "__main__":
    main()
