"""`pytest benchmarks/ [--results DIR] [--patience N]`: the rows of a run, its ceilings, and the result file.

Every test adds rows with the fixture ``rows``. ``--results DIR`` writes them to ``DIR/bench.json`` after each test and
at the end, also if the run is stopped (Ctrl-C, SIGTERM). With the plugin ``resume``, a run adds to the rows of the
tests that an earlier one finished.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import pytest
import resume
import torch
from facts import facts
from shapes import Shapes, chosen

logging.getLogger("transformers").setLevel(logging.ERROR)

ROWS = pytest.StashKey[list[dict[str, Any]]]()
NOTES = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", metavar="DIR", type=Path, help="write every row to DIR/bench.json, or to a file *.json"
    )
    parser.addoption("--patience", metavar="N", type=positive, default=1.0, help="factor for the rounds of every row")


def positive(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[NOTES] = [], {"start": time.time(), "left out": {}}
    file, done = result_file(config), resume.passed(config)
    if done and file is not None and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        config.stash[ROWS] += [row for row in before["rows"] if row.get("test") in done]
        config.stash[NOTES] |= {name: before[name] for name in ("ceilings", "left out")}
        config.stash[NOTES]["start"] -= before["seconds"]
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(PlainPlugin(), "plain-benchmark")
    config.addinivalue_line("markers", "timeout: seconds, where pytest-timeout is installed")
    if importlib.util.find_spec("peft") is None:
        config.stash[NOTES]["left out"]["peft adaption_prompt"] = "the package peft is not installed"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let pytest finish in order on SIGTERM, so that the rows are written."""

    def stop(number: int, frame: Any) -> None:
        session.shouldstop = "stopped by SIGTERM"  # in case a callback swallows the exception
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[-1]).removeprefix("Skipped: ")
        what, _, why = reason.partition(": ")
        LEFT_OUT[what] = why or reason


LEFT_OUT: dict[str, str] = {}
FAILED: list[str] = []


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        text = str(call.excinfo.value).splitlines() or [call.excinfo.typename]
        FAILED.append(f"{item.name}: {text[0]}")


def result_file(config: pytest.Config) -> Path | None:
    """The file of ``--results``."""
    path: Path | None = config.getoption("--results")
    return path if path is None or path.suffix == ".json" else path / "bench.json"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    stopped = exitstatus == pytest.ExitCode.INTERRUPTED
    write(session.config, {"the rows that would follow": "the run was stopped before its end"} if stopped else {})


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Write the rows before the plugin ``resume`` notes that the test has passed."""
    if resume.passes_are_kept(item.config):
        write(item.config, {})


@functools.cache
def measured_on(device: str) -> dict[str, Any]:
    """The facts of this run."""
    return facts(gpu=device == "cuda")


def write(config: pytest.Config, left_out: dict[str, str]) -> None:
    """Write the result file, if one is asked for and there are rows."""
    file, rows, notes = result_file(config), config.stash[ROWS], config.stash[NOTES]
    if file is None or not rows:
        return
    shapes = chosen()
    result = {
        "format": 1,
        "facts": measured_on(shapes.device),
        "shapes": shapes.name,
        "dtype": str(shapes.dtype).removeprefix("torch."),
        "ceilings": notes.get("ceilings", {}),
        "seconds": round(time.time() - notes["start"], 1),
        "patience": config.getoption("--patience"),
        "left out": {**notes["left out"], **LEFT_OUT, **left_out},
        "failed": FAILED,
        "rows": rows,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


class PlainBenchmark:
    """Replaces pytest-benchmark's fixture if that is not installed: no table, the same rows."""

    def __init__(self) -> None:
        self.group, self.name = "", ""
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable[[], Any], setup: Callable[[], Any], rounds: int) -> None:
        """Alternate ``setup`` and ``target``."""
        for _ in range(rounds):
            setup()
            target()


class PlainPlugin:
    """Registered if pytest-benchmark is missing or disabled."""

    @pytest.fixture
    def benchmark(self) -> PlainBenchmark:
        """Replaces pytest-benchmark's fixture."""
        return PlainBenchmark()


@pytest.fixture(scope="session")
def shapes() -> Shapes:
    """The shapes of this run."""
    torch.manual_seed(0)
    return chosen()


@pytest.fixture(scope="session")
def watch(shapes: Shapes) -> measure.Stopwatch:
    """The stopwatch of the device."""
    return measure.Stopwatch(shapes.device)


@pytest.fixture(scope="session")
def ceiling(shapes: Shapes, watch: measure.Stopwatch, pytestconfig: pytest.Config) -> dict[str, float]:
    """The machine's ceilings, measured before the first row."""
    found = measure.ceilings(watch, shapes.dtype, shapes.name == "quick")
    pytestconfig.stash[NOTES]["ceilings"] = found
    return found


class Rows:
    """Measures one row after another and keeps them."""

    def __init__(
        self,
        shapes: Shapes,
        watch: measure.Stopwatch,
        ceiling: dict[str, float],
        config: pytest.Config,
        benchmark: Any,
        test: str,
    ) -> None:
        self.shapes, self.watch, self.ceiling, self._benchmark = shapes, watch, ceiling, benchmark
        self.queued, self._test = queued_watch(shapes.device), test
        self._rows, self._notes = config.stash[ROWS], config.stash[NOTES]
        self._patience = config.getoption("--patience")

    def add(self, group: str, name: str, unit: str, labels: dict[str, Any], values: dict[str, Any]) -> None:
        """Keep a row; ``values`` has at least median, q1 and q3 in ``unit`` ("s" or "bytes")."""
        about = {"id": f"{group} / {name}", "group": group, "name": name, "unit": unit, "test": self._test}
        row = {**about, "labels": labels, **values}
        self._rows.append({**row, "clock MHz": measure.clock(self.shapes.device)})

    def note(self, what: str, why: str) -> None:
        """Record something that is not measured here, and the reason."""
        self._notes["left out"][what] = why

    def time(
        self,
        group: str,
        name: str,
        calls: dict[str, Callable[[], Any]],
        labels: dict[str, Any],
        few: tuple[str, ...] = (),
        moved: float = 0,
        flop: float = 0,
        target: dict[str, Any] | None = None,
        seconds: float | None = None,
        extra: dict[str, Any] | None = None,
        queued: bool = False,
    ) -> None:
        """Time the first of ``calls`` and the others in turns, through pytest-benchmark's fixture.

        ``queued``: on a GPU, without what launches cost the host (:class:`measure.Stopwatch`).
        """
        (headline, ours), *others = calls.items()
        fewest = 6 if target is not None else 3 if self.shapes.name == "cpu" else 5
        seconds = self.shapes.seconds if seconds is None else seconds
        judged = None if target is None else target["baseline"]
        watch = self.queued if queued else self.watch
        turns = measure.Turns(watch, ours, dict(others), seconds, few, self._patience, fewest, judged)
        self._benchmark.group = group
        self._benchmark.name = name
        self._benchmark.pedantic(turns.ours, setup=turns.baselines, rounds=turns.rounds)
        values: dict[str, Any] = dict(measure.summary(turns.times))
        rates = measure.rates(values["median"], moved, flop, self.ceiling)
        against = {other: measure.compared(turns.times, times) for other, times in turns.against.items()}
        self._benchmark.extra_info.update(rates)
        for other, found in against.items():
            self._benchmark.extra_info[f"ours / {other}"] = round(found["ratio"], 3)
        values = {**values, **rates, "against": against, "target": target, **(extra or {})}
        self.add(group, name, "s", {**labels, "ours": headline}, values)


@functools.cache
def queued_watch(device: str) -> measure.Stopwatch:
    """The stopwatch of operations."""
    return measure.Stopwatch(device, queued=True)


@pytest.fixture
def rows(
    shapes: Shapes,
    watch: measure.Stopwatch,
    ceiling: dict[str, float],
    pytestconfig: pytest.Config,
    request: pytest.FixtureRequest,
) -> Rows:
    """Measures the rows of a test; its method ``time`` also needs the fixture ``benchmark``."""
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    return Rows(shapes, watch, ceiling, pytestconfig, benchmark, request.node.nodeid)
