"""One run at a time in a folder: who is refused, what a killed holder leaves, what holds without an OS lock."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from tiny import tiny_model

from layalign.data import Example
from layalign.evaluation import evaluate
from layalign.experiments.analysis import analyze
from layalign.experiments.controlled import load_settings, runs
from layalign.experiments.made_up import run_demo
from layalign.training import TrainConfig, train
from layalign.utils import lock
from layalign.utils.errors import ArgumentError, OutputError
from layalign.utils.lock import LOCK, held

REFUSED = "^output_dir: {} is in use by process {} on {}, since .*; expected another folder, or that run to end first"
HOLD = """
import sys, time
from layalign.utils.lock import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
FORK = """
import os, sys, time
from layalign.utils.lock import held
with held(sys.argv[1]):
    if os.fork() == 0:
        print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, program: str = HOLD) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder; its children are in its process group."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_the_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        for _ in range(2):  # being refused takes nothing away from the first
            with pytest.raises(ArgumentError, match=REFUSED.format(tmp_path, other.pid, socket.gethostname())):
                held(tmp_path).__enter__()
    assert (tmp_path / LOCK).exists()  # it was killed
    started = time.monotonic()
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < 1
    assert list(tmp_path.iterdir()) == []


def test_a_forked_process_does_not_keep_the_lock_of_a_killed_one(tmp_path: Path) -> None:
    with holder(tmp_path, FORK) as other:
        other.kill()
        other.wait()
        with held(tmp_path):  # its child still sleeps
            os.killpg(other.pid, 0)


def test_a_process_forked_within_the_block_leaves_it_without_ending_it(tmp_path: Path) -> None:
    status = -1
    with held(tmp_path):
        pid = 0
        try:
            with held(tmp_path):
                pid = os.fork()
                if not pid:
                    with pytest.raises(ArgumentError, match=f"process {os.getppid()} on"):
                        held(tmp_path).__enter__()
        except BaseException:
            os._exit(1)
        if not pid:
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert status == 0 and json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_same_thread_may_take_it_again_and_it_ends_with_the_outermost(tmp_path: Path) -> None:
    found: list[str] = []

    def other() -> None:
        try:
            with held(tmp_path):
                found.append("taken")
        except ArgumentError as error:
            found.append(str(error))

    def ask() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    def fail() -> None:
        with held(tmp_path):
            (tmp_path / "link").symlink_to(tmp_path)
            with held(tmp_path / "link"), held(str(tmp_path)):
                pass
            ask()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    ask()
    assert f"is in use by process {os.getpid()} on" in found[0] and found[1:] == ["taken"]
    assert not any(thread.name == "layalign-lock" for thread in threading.enumerate())


@pytest.mark.slow
def test_many_processes_that_come_and_go_are_never_two(tmp_path: Path) -> None:
    program = """
import os, sys, time
from layalign.utils.lock import held
from layalign.utils.errors import ArgumentError
got, end = 0, time.monotonic() + 1.5
while not got or time.monotonic() < end:
    try:
        with held(sys.argv[1] + "/run"):
            os.mkdir(sys.argv[1] + "/alone")  # fails where somebody is there
            os.rmdir(sys.argv[1] + "/alone")
            got += 1
    except ArgumentError:
        pass
print(got)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
            for _ in range(3)
        ]
        told = [process.communicate(timeout=60) for process in processes]
    assert all(int(out) > 0 for out, _ in told), told


def test_a_file_that_its_holder_removed_in_between_is_not_what_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, removed = lock._lock, []

    def late(handle: int, path: Path, what: str) -> bool:
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        return take(handle, path, what)

    monkeypatch.setattr(lock, "_lock", late)
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_without_locks_signs_of_life_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    program = HOLD.replace("with held", "import fcntl\nfrom layalign.utils import lock\nlock.BEAT = 0.1\nwith held")
    program = program.replace("with held", "def no(*_): raise OSError(95, 'no')\nfcntl.flock = no\nwith held")
    with holder(tmp_path, program) as other:
        with pytest.raises(ArgumentError, match=f"is in use by process {other.pid}"):
            held(tmp_path).__enter__()
        assert "its file system has no locks (Function not implemented)" in caplog.text
        other.kill()
        other.wait()
        with held(tmp_path):  # it is dead, which its number tells
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alive", [True, False])
def test_another_machine_which_the_lock_does_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    file, ended = tmp_path / LOCK, threading.Event()
    record = {"host": "elsewhere", "pid": os.getpid(), "since": "then", "beat": 1}
    file.write_text(json.dumps(record))

    def beat() -> None:
        while alive and not ended.wait(0.1):
            record["beat"] = int(str(record["beat"])) + 1
            with file.open("r+") as opened:
                opened.write(json.dumps(record))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        if alive:
            with pytest.raises(ArgumentError, match=f"process {os.getpid()} on elsewhere, since then"):
                held(tmp_path).__enter__()
        else:
            with held(tmp_path):
                pass
    finally:
        ended.set()
        thread.join()


def test_a_record_that_is_old_or_no_record_stops_nobody(tmp_path: Path) -> None:
    old = json.dumps({"host": "elsewhere", "pid": 1, "since": "then"}).encode()
    started = time.monotonic()
    for content in (old, b"", b"\xff\x00[[[", b"[]", b"[" * 5000):
        (tmp_path / LOCK).write_bytes(content)
        os.utime(tmp_path / LOCK, (1, 1))
        with held(tmp_path):
            pass
    assert time.monotonic() - started < 5


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="^output: .* cannot be written: Not a directory"):
        held(tmp_path / "file" / "run", "output").__enter__()


@contextmanager
def held_by_another_thread(folder: Path) -> Iterator[None]:
    taken, ended = threading.Event(), threading.Event()

    def hold() -> None:
        with held(folder):
            taken.set()
            ended.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    try:
        yield
    finally:
        ended.set()
        thread.join()


def of_train(folder: Path) -> object:
    return train(TrainConfig(output_dir=str(folder), resume=False))


def of_evaluate(folder: Path) -> object:
    examples = [Example("Moja?", "1", "Swahili")]
    return evaluate(lambda texts: ["1"] * len(texts), None, None, "math", examples, folder, resume=False)


def of_demo(folder: Path) -> object:
    return run_demo(folder, progress=False)


def of_experiment(folder: Path) -> object:
    return runs.run(load_settings("smoke"), folder.parents[2], folder.parent.name, 0)


def of_pretraining(folder: Path) -> object:
    return runs.prepare(load_settings("smoke"), folder.parents[1], 0)


def of_analyze(folder: Path) -> object:
    pairs = folder.parent / "sw.tsv"
    pairs.write_text("moja\tone\nmbili\ttwo\n")
    return analyze(tiny_model(), None, None, [f"sw={pairs}"], folder)


@pytest.mark.parametrize("command", [of_train, of_evaluate, of_demo, of_experiment, of_pretraining, of_analyze])
def test_what_writes_for_long_holds_its_folder(tmp_path: Path, command: Callable[[Path], object]) -> None:
    folder = tmp_path / "runs" / load_settings("smoke").systems[0].name / "seed-0"
    if command is of_pretraining:
        folder = tmp_path / "parts" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "kept").write_text("")
    with (
        held_by_another_thread(folder),
        pytest.raises(ArgumentError, match=f"seed-0 is in use by process {os.getpid()}"),
    ):
        command(folder)
    assert [path.name for path in folder.iterdir()] == ["kept"]
