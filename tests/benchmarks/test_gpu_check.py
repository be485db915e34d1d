"""benchmarks/gpu_check.sh as far as it goes without a GPU: its steps, its time limit, and what a stopped run leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="coreutils' timeout is not here")

ROOT = Path(__file__).parents[2]
QUICK = {**os.environ, "LAYALIGN_BENCH": "quick", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def check(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "benchmarks/gpu_check.sh", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**QUICK, **more}, check=False, timeout=240
    )


@pytest.mark.slow
def test_chosen_steps_run_in_their_order_and_leave_few_files(tmp_path: Path) -> None:
    chosen = "-k 'test_scaling and layer_mix-S-forward' -p no:xdist"
    result = check("-o", str(tmp_path), "-t", "200", "report", "bench", "facts", BENCH=chosen)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [line.removeprefix("== ") for line in result.stdout.splitlines() if line.startswith("== ")]
    assert steps == ["facts", "bench", "report"]
    assert json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))["versions"]["torch"]
    rows = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert [row["group"] for row in rows] == ["scaling"] and "1 passed" in (tmp_path / "check.log").read_text("utf-8")
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_steps_without_time_are_named(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 200\n", encoding="utf-8")
    slow.chmod(0o755)
    result = check("-o", str(tmp_path), "-t", "2", "bench", "facts", PYTHON=str(slow))
    assert result.returncode == 1 and "FAILED: facts bench" in result.stdout
    assert result.stdout.count("not run: no time left") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tset",), "tset: expected a step of build"), (("-t", "soon"), "-t: expected seconds, got soon")],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = check("-o", str(tmp_path / "none"), *arguments)
    assert result.returncode == 2 and message in result.stderr and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_stopped_run_leaves_its_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "benchmarks"]
    chosen = ["-k", "test_scaling and forward", "--results", str(tmp_path), "--patience", "100"]
    environment = {**QUICK, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, *chosen], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "PASSED" in line:
                time.sleep(0.2)  # within the next
                run.send_signal(signal.SIGTERM)
                break
        rest = run.stdout.read()
        assert run.wait(timeout=120) == pytest.ExitCode.INTERRUPTED, rest[-2000:]
    found = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert found["rows"] and found["left out"]["the rows that would follow"] == "the run was stopped before its end"
