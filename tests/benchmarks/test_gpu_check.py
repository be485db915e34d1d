"""benchmarks/gpu_check.sh as far as it goes without a GPU: every piece on tiny shapes, in a copy without .git; what a
stopped run leaves, and how it goes on; the branches that only a GPU takes, with a stand-in for torch.cuda.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
QUICK = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
QUICK |= {"LAYALIGN_BENCH": "quick", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
PIECES = (
    "primitives", "facts", "build", "tests", "tables", "operations", "graphs", "model", "sanitize", "memcheck",
    "racecheck", "profile", "counters", "page",
)  # fmt: skip


def check(*arguments: str, root: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "benchmarks/gpu_check.sh", *arguments]
    environment = {**QUICK, **more}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False, timeout=280)


def states(folder: Path) -> dict[str, str]:
    found = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    return {name: each["state"] for name, each in found.items()}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as it travels: without .git and what git ignores, but with the compiled extension.

    The builder is replaced: its work takes minutes, and other tests do it. So are the tools of CUDA.
    """
    root = tmp_path_factory.mktemp("bare") / "copy"
    left = shutil.ignore_patterns(".git", ".venv", "build", "results", "__pycache__", ".*_cache", "weights", "dist")
    shutil.copytree(ROOT, root, ignore=left)
    builder = root / "csrc" / "builder.py"
    builder.write_text(
        "import pathlib, sys\n"
        'what, folder = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--output") + 1])\n'
        "folder.mkdir(parents=True, exist_ok=True)\n"
        'if what == "ptx":\n'
        '    (folder / "ptx_check").write_text("#!/bin/sh\\necho 7 primitives: right\\n")\n'
        '    (folder / "ptx_check").chmod(0o755)\n'
        "else:\n"
        '    (folder / "_C.none.so").write_bytes(b"")\n',
        encoding="utf-8",
    )
    tools = root / "tools"
    tools.mkdir()
    for name in ("compute-sanitizer", "ncu"):  # drop their own arguments, run the rest
        text = '#!/bin/sh\nwhile case "${1##*/}" in python*) false;; esac; do shift; done\nexec "$@"\n'
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    return root


ROWS = {
    "tests": "powers_of_two or (test_layer_mix and second_backward)",
    "tables": "decode 16",
    "operations": "forward and B2-T20-S8 and mha and not unpadded",
    "model": "mha and (right or prefill or captured)",
}


LEFT = {
    "facts": "facts.json", "build": "built/_C.none.so", "tests": "tests.txt", "tables": "tables/sm_90.json",
    "operations": "operations.txt", "graphs": "graphs.json", "model": "model.json", "profile": "profile.json",
    "page": "page.md",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_piece_runs_without_a_gpu(bare: Path) -> None:
    """One after another into one folder; those that take long with few rows."""
    folder, path = bare / "found", f"{bare / 'tools'}{os.pathsep}{os.environ['PATH']}"
    kernels = any((bare / "layalign").glob("_C*.so"))  # else there is nothing that the sanitizers could check
    for piece in PIECES:
        if not kernels and piece in ("sanitize", "memcheck", "racecheck"):
            continue
        rows = ["-k", ROWS[piece]] if piece in ROWS else []
        result = check("-o", "found", *rows, piece, root=bare, PATH=path, LAYALIGN_COMMIT="0123456789abcdef")
        assert result.returncode == 0, result.stdout + result.stderr + (folder / "check.log").read_text("utf-8")[-3000:]
        assert states(folder)[piece] == ("in part" if rows else "passed")
        assert piece not in LEFT or (folder / LEFT[piece]).is_file()
        assert piece != "primitives" or "7 primitives: right" in result.stdout
    entry = json.loads((folder / "tables/sm_90.json").read_text(encoding="utf-8"))["blocks"]["decode 16 half 16"]
    assert entry["blocks"] in [each["blocks"] for each in entry["candidates"]] and entry["gain"] >= 1
    row = json.loads((folder / "operations.json").read_text(encoding="utf-8"))["rows"][0]
    assert {"reference.py", "SDPA and gate", "SDPA math and gate"} <= row["against"].keys()
    text = (folder / "page.md").read_text(encoding="utf-8")
    assert "commit 0123456789ab" in text and "the numbers mean nothing" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 18 and all(line.count(" | ") == 4 for line in lines)
    measured = [line for line in lines if "not measured" not in line]
    assert any(line.startswith("| prefill, 32") for line in measured) and len(text.splitlines()) < 60


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_piece_goes_on_where_it_stopped(tmp_path: Path) -> None:
    chosen = "layer_projection and forward and not one-weight"
    first = check("-o", str(tmp_path), "-k", chosen, "operations", BENCH="--maxfail=1")
    assert first.returncode == 0, first.stdout + first.stderr
    kept = json.loads((tmp_path / "operations.json").read_text(encoding="utf-8"))["rows"]
    assert kept
    again = check("-o", str(tmp_path), "-k", "layer_projection and forward", "operations")
    assert again.returncode == 0, again.stdout + again.stderr
    rows = json.loads((tmp_path / "operations.json").read_text(encoding="utf-8"))["rows"]
    assert rows[: len(kept)] == kept and len(rows) == 2 * len(kept)
    assert f"{len(kept)} passed" in again.stdout


def test_what_does_not_fit_is_left_for_the_next_call(tmp_path: Path) -> None:
    slow = tmp_path / "slow"  # stands for every program that a piece runs
    slow.write_text(f'#!/bin/sh\ncase "$*" in *gpu_check.py*) exec {sys.executable} "$@";; esac\nexec sleep 100\n')
    slow.chmod(0o755)
    code = "import sys; sys.executable = sys.argv.pop(1); sys.path.insert(0, 'benchmarks')\n"
    code += "import gpu_check; gpu_check.PIECES['facts'] = gpu_check.PIECES['facts']._replace(planned=1)\n"
    code += "gpu_check.GRACE = 1; sys.exit(gpu_check.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(slow), "-o", str(tmp_path / "out"), "-t", "3", "facts", "build"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=QUICK, check=False, timeout=100)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAILED or not finished: facts (cut) build (not run)" in result.stdout
    assert "== build: not run" in result.stdout


@pytest.mark.slow
def test_a_failed_piece_is_run_again_only_if_it_is_named(tmp_path: Path) -> None:
    wrong = str(tmp_path / "facts-go-here")
    Path(wrong).mkdir()
    (Path(wrong) / "facts.json").mkdir()  # cannot be written
    first = check("-o", wrong, "facts")
    assert first.returncode == 1 and "FAILED or not finished: facts (failed)" in first.stdout
    (Path(wrong) / "facts.json").rmdir()
    assert check("-o", wrong, "facts").returncode == 0 and states(Path(wrong)) == {"facts": "passed"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tset",), "tset: expected a piece of primitives"), (("-t", "soon"), "-t: expected seconds, got soon")],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = check("-o", str(tmp_path / "none"), *arguments)
    assert result.returncode == 2 and message in result.stderr and not (tmp_path / "none").exists()


def test_the_plan_fits_into_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    assert tuple(gpu_check.PIECES) == PIECES
    assert gpu_check.parse(["bench", "report"]).pieces == ["operations", "graphs", "model", "page"]
    planned, most = (sum(getattr(piece, name) for piece in gpu_check.PIECES.values()) for name in ("planned", "most"))
    assert f"planned for {planned} and stopped after {most}." in (gpu_check.__doc__ or "")
    assert most <= 28 * 60 and all(piece.planned <= piece.most < 540 for piece in gpu_check.PIECES.values())
    for name, piece in gpu_check.PIECES.items():
        label = "memcheck, racecheck" if name in ("memcheck", "racecheck") else f"{name} *" if piece.resumes else name
        row = next(line for line in str(gpu_check.__doc__).splitlines() if line.startswith(f"| {label} |"))
        assert [cell.split()[0] for cell in row.split(" | ")[1:3]] == [str(piece.planned), str(piece.most)]


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


class Device:
    """Stands for torch.cuda: a queue whose clock goes on by what is put in, and a host that is slower."""

    def __init__(self) -> None:
        self.device, self.host = 0.0, 0.0
        self.waits: list[int] = []

    def launch(self, seconds: float, host: float = 5e-5) -> None:
        self.host += host
        self.device = max(self.device, self.host) + seconds

    def sleep(self, cycles: int) -> None:
        self.waits.append(cycles)
        self.launch(cycles / 2e9)

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self._device, self._at = device, 0.0

    def record(self) -> None:
        self._at = max(self._device.device, self._device.host)

    def query(self) -> bool:
        return self._at <= self._device.host

    def synchronize(self) -> None:
        self._device.host = max(self._device.host, self._device.device)

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._at - self._at)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = Device()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "_sleep", found.sleep, raising=False)
    return found


def test_a_call_that_is_timed_queued_has_no_time_of_its_launches(device: Device) -> None:
    from measure import LONGEST_WAIT, WAIT, Stopwatch

    plain, queued = Stopwatch("cpu"), Stopwatch("cpu", queued=True)
    flush = type("Flush", (), {"zero_": lambda self: device.launch(6e-5)})()
    plain._flush = queued._flush = flush  # type: ignore[assignment]
    call = lambda: [device.launch(1e-6) for _ in range(20)]  # noqa: E731
    assert plain.once(call) > 8e-4  # the host's 20 times 50 us, less what the flush hides
    assert not device.waits
    assert queued.once(call) == pytest.approx(20e-6)
    assert device.waits[0] == WAIT and device.waits[-1] / 2e9 > 1e-3
    count = len(device.waits)
    assert queued.once(call) == pytest.approx(20e-6) and len(device.waits) == count + 1  # the wait is kept
    waiting = lambda: [device.launch(1e-6), Event(device).synchronize()]  # noqa: E731
    queued.once(waiting)  # a call that waits for the device itself is not tried for ever
    assert device.waits[-1] <= LONGEST_WAIT


def test_differences_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import measure

    one, other = torch.randn(7, 11), torch.randn(11, 7).T
    whole = float((one.double() - other.double()).norm() / other.double().norm())
    for chunk in (1, 10, 1000):
        monkeypatch.setattr(measure, "CHUNK", chunk)
        assert measure.difference(one, other) == pytest.approx(whole, rel=1e-12)
        assert measure.difference(one.where(one < 1, torch.nan), other) == float("inf")
    assert measure.difference(torch.zeros(0), torch.zeros(0)) == 0


def test_reference_by_chunks_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import measure
    import operations

    attention = operations.attention(5, 20, 9, 4, 2, 8, "cpu", torch.float32)
    sizes = (3, 4, 6, 10)
    layers = [operations.layers(n, 5, 7, sizes, "cpu", torch.float32) for n in ("layer_mix", operations.PER_SLOT)]
    for case in (attention, *layers):
        grad = torch.randn_like(case.call("torch"))
        whole = case.in_chunks(case.leaves, grad)
        monkeypatch.setattr(operations, "CHUNK", 2 * grad.numel() // 5)  # two sequences
        for one, other in zip(case.in_chunks(case.leaves, grad), whole, strict=True):
            assert measure.difference(one, other) < 1e-5
        monkeypatch.undo()
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_what_waits_for_the_device_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from measure import captured

    x = torch.ones(3)
    assert captured(lambda: x + 1, "cpu")().tolist() == [2, 2, 2]
    for call in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool((x > 0).all())):
        with pytest.raises(RuntimeError, match="cannot be captured"):
            captured(call, "cpu")
