"""Benchmark results: comparing two files, the report, and a smoke run of the suite that writes them."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_training import save_parts

from layalign.cli import main
from layalign.experiments.bench import results as bench
from layalign.experiments.bench.report import write_report
from layalign.utils.errors import ArgumentError

ROOT = Path(__file__).parents[2]


def row(name: str, median: float, spread: float = 0.02, group: str = "generate", **more: Any) -> dict[str, Any]:
    edges = {"q1": median * (1 - spread / 2), "q3": median * (1 + spread / 2)}
    row = {
        "id": f"{group} / {name}",
        "group": group,
        "name": name,
        "unit": "s",
        "labels": {"batch": 8},
        "clock MHz": None,
    }
    return {**row, "median": median, **edges, "iqr": median * spread, "rounds": 5, **more}


def results(*rows: dict[str, Any], device: str = "one", **changes: Any) -> dict[str, Any]:
    facts = {
        "device": {"type": "cpu", "name": device, "threads": 2},
        "python": "3.11",
        "versions": {"torch": "2"},
        "commit": "abc",
        "changed files": [],
    }
    data = dict(format=1, facts=facts, shapes="cpu", dtype="float32", rows=list(rows), failed=[])
    ceilings = {"copy GB/s": 10.0, "matmul TFLOP/s": 0.1}
    return {**data, "ceilings": ceilings, "left out": {"cuda": "needs a GPU"}, "seconds": 1.0, **changes}


def rich_results() -> dict[str, Any]:
    """A row of every kind."""
    against = {"bare LLM": {"median": 1.0, "iqr": 0.1, "ratio": 1.05, "ratio q1": 1.0, "ratio q3": 1.1, "rounds": 6}}
    against["bare LLM"] |= {"ratio low": 0.987, "ratio high": 1.123}
    target = {"baseline": "bare LLM", "must": 1.08, "aim": 1.03}
    rates = {"GB/s": 5.0, "TFLOP/s": 0.05, "flop per byte": 10.0, "percent of ceiling": 50.0}
    points = {who: {"s": [1e-3, 2e-3], "bytes": [100, 200]} for who in ("layalign", "reference.py")}
    slopes = {who: {"s": 1.0, "bytes": 1.0} for who in points}
    scaling = row("mix over S", 1e-3, group="scaling", points=points, slopes=slopes, against=against, target=None)
    scaling["labels"] = {"sizes": [1, 2]}
    memory = row("mha", 3e6, 0.0, group="memory", against={"reference.py": {"median": 9e6, "ratio": 1 / 3}})
    return results(
        row("mha <b>", 1.05, against=against, target=target),
        row("not met", 2.0, against={"bare LLM": {**against["bare LLM"], "ratio": 2.0}}, target=target),
        row("no baseline", 1.0, against={}, target=target),
        row("rough", 1.0, against={"peft": {"median": 1.0, "ratio": 0.7, "rounds": 2}}),
        row("B1", 1e-3, group="layer_mix", against=against, **rates),
        {**memory, "unit": "bytes"},
        scaling,
    )


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *(str(argument) for argument in arguments)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_a_regression_is_beyond_threshold_and_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(row("slower", 1.0), row("noisy", 1.0, 0.6), row("same", 1.0), row("faster", 1.0), row("gone", 1.0))
    after = results(row("slower", 1.2), row("noisy", 1.2, 0.6), row("same", 1.05), row("faster", 0.5), row("new", 1.0))
    one, two = write(tmp_path / "a.json", before), write(tmp_path / "b.json", after)
    found = {change.id.split(" / ")[1]: change for change in bench.compare(bench.load(one), bench.load(two))}
    assert {name: change.regression for name, change in found.items()} == {
        "slower": True, "noisy": False, "same": False, "faster": False,
    }  # fmt: skip
    assert found["faster"].improvement and found["slower"].ratio == pytest.approx(1.2)
    assert run("--compare", one, two) == 1
    out = capsys.readouterr().out
    assert "regression" in out and "4 rows in both, 1 only in A, 1 only in B: 1 regressed, 0 failed" in out
    assert run("--compare", one, two, "--threshold", "1.3") == 0
    assert run("--compare", one, one) == 0


def against(ratio: float, rounds: int = 5, spread: float = 0.02) -> dict[str, Any]:
    edges = {"ratio q1": ratio * (1 - spread / 2), "ratio q3": ratio * (1 + spread / 2)}
    return {"median": 1.0, "iqr": 0.1, "ratio": ratio, **edges, "rounds": rounds}


def test_a_time_is_judged_by_what_took_turns_with_it(tmp_path: Path) -> None:
    target = {"baseline": "bare", "must": 2.0}
    many, few = against(1.0, 9), against(1.0, 2)
    before = results(
        row("machine slower", 1.0, against={"bare": many}, target=target),
        row("ours slower", 1.0, against={"bare": many}, target=target),
        row("noisy", 1.0, against={"bare": against(1.0, 9, 0.6)}, target=target),
        row("target first", 1.0, against={"other": many, "bare": against(1.0, 3)}, target=target),
        row("most rounds", 1.0, against={"other": against(1.0, 3), "bare": many}),
        row("too few rounds", 1.0, against={"bare": few}, target=target),
        {**row("memory", 1.0, 0.0, against={"bare": {"median": 1.0, "ratio": 1.0}}), "unit": "bytes"},
    )
    worse, much_worse = against(1.2, 9), against(3.0, 9)
    after = results(
        row("machine slower", 2.0, against={"bare": many}, target=target),
        row("ours slower", 1.0, against={"bare": worse}, target=target),
        row("noisy", 1.0, against={"bare": against(1.2, 9, 0.6)}, target=target),
        row("target first", 1.0, against={"other": much_worse, "bare": against(1.0, 3)}, target=target),
        row("most rounds", 1.0, against={"other": against(3.0, 3), "bare": many}),
        row("too few rounds", 1.2, against={"bare": few}, target=target),
        {**row("memory", 1.2, 0.0, against={"bare": {"median": 1.2, "ratio": 1.0}}), "unit": "bytes"},
    )
    one, two = (bench.load(write(tmp_path / f"{i}.json", each)) for i, each in enumerate((before, after)))
    found = {change.id.split(" / ")[1]: (change.by, change.regression) for change in bench.compare(one, two)}
    assert found == {
        "machine slower": ("bare", False),
        "ours slower": ("bare", True),
        "noisy": ("bare", False),
        "target first": ("bare", False),
        "most rounds": ("bare", False),
        "too few rounds": (None, True),
        "memory": (None, True),
    }
    assert all(
        change.improvement == (change.id == "generate / ours slower") for change in bench.compare(two, one) if change.by
    )


def test_what_is_missing_or_failed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a.json", results(row("x", 1.0), row("gone", 1.0)))
    two = write(tmp_path / "b.json", results(row("x", 1.0), row("new", 1.0), failed=["test_y: wrong; not timed"]))
    assert run("--compare", one, two) == 1
    out = capsys.readouterr().out
    assert "only in A: generate / gone\n" in out and "only in B: generate / new\n" in out
    assert "failed in B, not measured: test_y: wrong; not timed\n" in out and "0 regressed, 1 failed" in out
    assert run("--compare", two, one) == 0


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (results(row("x", 1.0), device="two"), "compare: different devices: 'cpu: one, 2 threads' and 'cpu: two"),
        (results(row("x", 1.0), shapes="quick"), "compare: different shapes: 'cpu, float32' and 'quick, float32'"),
        (results({**row("x", 1.0), "labels": {"batch": 4}}),
         "compare: different shapes in 'generate / x': batch is 8 and 4"),
        (results(row("y", 1.0)), "no row in common"),
        (results(row("x", 1.0), row("x", 1.0)), "two rows 'generate / x'"),
        (results({"id": "x"}), "row 0: lacks group, name"),
        (results(row("x", 1.0), format=7), "has format 7, this version reads 1"),
        ({"a": 1}, "has no rows; expected what"),
        ("{", "is not JSON"),
        (results({**row("x", 1.0), "unit": "bytes"}), "compare: different shapes in 'generate / x': unit is 's'"),
        (results({**row("x", 1.0), "unit": "ms"}), "row 0: expected text as id, group and name, s or bytes as unit"),
        (results(row("x", 1.0, group=["x"])), "row 0: expected text as id, group and name"),
        (results(row("x", float("nan"))), "row 0: expected finite numbers 0 <= q1 <= median <= q3, got nan"),
        (results(row("x", -1.0, 0.0)), "row 0: expected finite numbers 0 <= q1 <= median <= q3, got -1.0"),
        (results({**row("x", 1.0), "q1": 1.5}), "row 0: expected finite numbers 0 <= q1 <= median <= q3, got 1.5"),
        (results(row("x", 1.0, against=None)), "row 0: against: expected an object of objects, got None"),
        (results(row("x", 1.0, against={"bare": {}})), "row 0: against: expected a finite ratio for each baseline"),
        (results(row("x", 1.0, against={"bare": {"ratio": "1"}})), "row 0: against: expected a finite ratio"),
        (results(row("x", 1.0, target={"must": 1.0})), "row 0: target: expected an object with its baseline"),
        (results(row("x", 1.0, target={"baseline": "y"})), "row 0: expected finite numbers as target, rates and clock"),
        (results({**row("x", 1.0), "clock MHz": "fast"}), "row 0: expected finite numbers as target, rates and clock"),
        (results(row("x", 1.0, slopes={"layalign": {}}, points={})), "row 0: expected slopes and points by name"),
        (results(row("x", 1.0), ceilings={"copy GB/s": 0}), "ceilings: expected numbers above 0"),
        (results(row("x", 1.0), failed="all"), "failed: expected a list"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_compared(
    second: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write(tmp_path / "a.json", results(row("x", 1.0))), write(tmp_path / "b.json", second)
    assert run("--compare", one, two) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.json", results(row("x", 1.0)))
    for arguments, message in (
        ([], "bench: give --compare A B or --report DIR"),
        (["--compare", tmp_path / "none.json", file], "results: no such file"),
        (["--compare", file, file, "--threshold", "0.5"], "threshold: expected a factor of at least 1"),
        (["--compare", file, file, "--threshold", "nan"], "threshold: expected a factor of at least 1"),
        (["--report", tmp_path / "none"], "results: no such folder"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "cut").mkdir()
    write(tmp_path / "cut" / "bench.json", results(row("x", 1.0)))
    write(tmp_path / "cut" / "other.json", json.dumps(results(row("x", 1.0)))[:-9])
    with pytest.raises(ArgumentError, match="other.json is not JSON"):
        write_report(tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match="has no result file"):
        write_report(tmp_path / "empty")


@pytest.mark.slow
def test_the_report_needs_the_files_alone(tmp_path: Path) -> None:
    write(tmp_path / "bench.json", rich_results())
    write(tmp_path / "facts.json", {"device": "not a result file"})
    assert run("--report", tmp_path) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for plot in ("model", "operations", "roofline", "scaling"):
        assert (tmp_path / f"bench-{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 4 and 'src="bench' not in page
    assert "No GPU result" in page and "mha &lt;b&gt;" in page and "<b>" not in page
    assert page.count('class="met"') == 1 and page.count('class="missed"') == 1 and "not measured" in page
    assert "needs a GPU" in page
    assert "<td>0.987 to 1.123</td>" in page
    assert "1.050 (1.000 to 1.100)" in page and "<td>≈0.700" in page and "<th>rounds</th>" in page
    gpu = copy.deepcopy(results(row("x", 1.0), shapes="gpu"))
    gpu["failed"] = ["test_x: wrong"]
    page = write_report(write(tmp_path / "gpu.json", gpu).parent).read_text(encoding="utf-8")
    assert "No GPU result" not in page and "failed and not measured: test_x: wrong" in page


def test_quantities() -> None:
    found = [bench.quantity(value, "s") for value in (2.0, 3e-3, 4e-6, 5e-9)]
    assert found == ["2 s", "3 ms", "4 us", "5 ns"]
    assert bench.quantity(3 * 2**20, "bytes") == "3.00 MiB"


@pytest.mark.slow
def test_smoke_of_the_suite(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"LAYALIGN_BENCH": "quick", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    chosen = "(source_states and mha) or (test_scaling and layer_mix-S-forward)"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "benchmarks",
         "-k", chosen, "--results", str(tmp_path), "--patience", "2"],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    found = bench.load(tmp_path)
    assert found.shapes == "quick, float32" and not found.gpu
    kinds = {row["group"]: row for row in found.rows.values()}
    assert kinds.keys() == {"aligner to keys and values", "scaling"}
    states = kinds["aligner to keys and values"]
    assert states["against"].keys() == {"reference.py", "published"} and states["target"]["must"] == pytest.approx(
        1 / 3
    )
    assert states["percent of ceiling"] > 0 and states["median"] > 0
    assert json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["patience"] == 2
    assert kinds["scaling"]["slopes"]["layalign"]["bytes"] == pytest.approx(1, abs=0.2)
    assert write_report(tmp_path).is_file()


class Clock:
    """A stopwatch of calls that say how long they take."""

    def once(self, call: Any) -> float:
        return float(call())


@pytest.mark.parametrize(
    ("seconds", "timed", "untimed"),
    [
        ((0.001, 0.1, 0.5), (17, 17, 3), 19),  # one of them is short: all run once more before
        ((0.1, 0.1, 0.2), (9, 9, 9), 2),  # ours may do other things the first time
        ((2.0, 2.0, 2.0), (5, 5, 1), 2),  # the third is only compared with, and slow
        ((3.5, 3.5, 4.0), (3, 3, 1), 1),
        ((6.0, 7.0, 20.0), (3, 3, 1), 0),  # of these the first calls count
    ],
)
def test_calls_take_turns(
    seconds: tuple[float, ...], timed: tuple[int, ...], untimed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from measure import Turns, compared

    calls: list[str] = []

    def taking(name: str, time: float) -> Any:
        return lambda: calls.append(name) or time

    ours, bare, slow = (taking(name, time) for name, time in zip(("ours", "bare", "slow"), seconds, strict=True))
    turns = Turns(Clock(), ours, {"bare": bare, "slow": slow}, seconds=3.6, few=("slow",))  # type: ignore[arg-type]
    for _ in range(turns.rounds):
        turns.baselines()
        turns.ours()
    assert (len(turns.times), len(turns.against["bare"]), len(turns.against["slow"])) == timed
    rough = compared([1.0, 2.0, 6.0, 100.0, 100.0], [4.0, 2.0])  # by the nearest in time
    assert (rough["ratio"], rough["rounds"]) == (pytest.approx(2 / 3), 2)
    assert compared(turns.times, turns.against["bare"])["ratio"] == pytest.approx(seconds[0] / seconds[1])
    assert calls.count("ours") == timed[0] + untimed


def test_a_row_with_a_target_goes_on_until_its_ratio_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from measure import Turns

    def rounds(times: list[float], seconds: float = 3.2, **more: Any) -> int:
        """Of a row whose baseline takes 0.1 s, and ours the times given, over and over."""
        series = itertools.cycle(times)
        calls: dict[str, Any] = {"bare": lambda: 0.1}
        turns = Turns(Clock(), lambda: next(series), calls, seconds, fewest=6, **more)  # type: ignore[arg-type]
        for _ in range(turns.rounds):
            turns.baselines()
            turns.ours()
        assert len(turns.times) == len(turns.against["bare"])
        return len(turns.times)

    quiet, noisy = [0.1, 0.1005], [0.1, 0.12, 0.11, 0.09, 0.105, 0.1, 0.08]
    assert rounds(quiet, judged="bare") == 6 and rounds(quiet) == 15
    assert rounds(noisy, judged="bare") == rounds(noisy) == 14  # for there is no more time
    assert rounds(noisy, seconds=100, judged="bare") == 200
    assert 20 < rounds([0.1, 0.104, 0.096, 0.103, 0.098], seconds=100, judged="bare") < 190
    assert rounds(noisy, judged="bare", patience=0.1) == rounds(quiet, patience=0.1) == 1
    assert rounds(quiet, judged="other") == 15


def test_a_ratio_comes_with_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from measure import compared, interval

    assert interval([1.0] * 5) is None and interval([]) is None
    assert interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    assert interval([float(i) for i in range(20)]) == (5.0, 14.0)  # the tables' ranks: 6 and 15
    generator = random.Random(0)
    misses = 0
    for _ in range(2000):
        found = interval([generator.expovariate(1) for _ in range(15)])
        assert found is not None
        misses += not found[0] <= math.log(2) <= found[1]
    assert 20 <= misses <= 100  # at most one in twenty
    few, many = compared([1.0] * 5, [1.0] * 5), compared([1.0, 2.0] * 3, [1.0] * 6)
    assert bench.interval_text(few) == "" and bench.interval_text(many) == "1.000 to 2.000"


@pytest.mark.slow
def test_patience_is_a_number_above_zero() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "--patience", "0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=240)
    assert result.returncode == 4 and "--patience: expected a number above 0, got 0" in result.stderr


PAGES = [ROOT / "docs/benchmarks.md", ROOT / "docs/backends.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_measured_tables_are_those_of_the_committed_file(page: Path, tmp_path: Path) -> None:
    copied = tmp_path / page.name
    copied.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    assert "<!-- measured: " in copied.read_text(encoding="utf-8")
    command = [sys.executable, "benchmarks/tables.py", "benchmarks/results/cpu", str(copied)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert copied.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), "run `make bench-tables`"


@pytest.mark.slow
def test_a_training_step_beside_the_bare_llm(tmp_path: Path) -> None:
    save_parts(tmp_path)
    command = [
        sys.executable,
        ROOT / "benchmarks" / "training_step.py",
        tmp_path,
        "--rounds",
        "2",
        "--set",
        "mix=shared",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    found = re.findall(r"^(.+?) +(?:[\d.]+ s)? +([\d.]+) of the bare LLM$", output, re.M)
    names, ratios = [name for name, _ in found], [float(ratio) for _, ratio in found]
    assert names == [
        "LayAlign, one step", "bare LLM, forward and backward", "encoder, forward", "LayAlign without the encoder",
    ]  # fmt: skip
    assert ratios[1] == 1 and 0 < ratios[2] < ratios[0]
    assert re.match(r"32 pairs, \d+ of \d+ LLM tokens real, \d+ labels\n", output)
