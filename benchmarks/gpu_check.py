"""The whole check on a GPU, in pieces that keep what they have; in a bare checkout, without network or installation.

    benchmarks/gpu_check.sh [-o FOLDER] [-t SECONDS] [-k ROWS] [--again] [PIECE ...]

Pieces, in this order. Planned and longest time in seconds; all of them are planned for 1055 and stopped after 1660.

| piece | planned | at most | what it does | leaves |
|---|---:|---:|---|---|
| primitives | 30 | 60 | one check per PTX instruction that the CUDA kernels use | check.log |
| facts | 10 | 30 | device, driver, versions, commit | facts.json |
| build | 90 | 180 | the extension, for this GPU only | built/ |
| tests * | 150 | 240 | the tests of the operations, on the device | tests.txt |
| tables * | 90 | 150 | block sizes of the Triton kernels, and plans: all candidates with their times | tables/ |
| operations * | 200 | 260 | operations against reference.py, torch's attentions, one GEMM | operations.json |
| graphs * | 40 | 70 | decoding attention of all layers in a CUDA graph | graphs.json |
| model * | 180 | 240 | 7B (random weights) against the bare LLM: step, prefill, decode, memory | model.json |
| sanitize | 15 | 40 | every kernel once, on odd shapes | check.log |
| memcheck, racecheck | 60 each | 100 each | the same under compute-sanitizer | check.log |
| profile * | 60 | 80 | kernels, launches and host waits of a step at 7B | profile.json |
| counters | 60 | 80 | ncu on the operations | counters.csv |
| page | 10 | 30 | one page, also printed; plots and report.html | page.md |

A piece with * goes on where it stopped: every test, row or candidate is kept when it is done. A piece that passed or
failed is not run again unless it is named, and then only for what has not passed. ``--again`` runs from the start.
Without -t a call runs everything that is left. With -t it runs, in order, what fits into so many seconds: a lease of
minutes is used up by the same command, called again; what is stopped may take 20 s more. To go on where a lease ended,
bring FOLDER back.

-k: a pytest expression that chooses tests and rows, e.g. ``-k "forward and mha"``; part of a name for tables.
BENCH: more arguments for the benchmarks, e.g. ``BENCH="--patience 0.3"``. LAYALIGN_COMMIT: the commit of a checkout
without .git. LAYALIGN_BENCH=quick: tiny shapes, on a CPU; the numbers mean nothing.

FOLDER is benchmarks/results/gpu; check.json there says how far each piece is. Exit code 0: every chosen piece has
passed; 1: one failed or is not finished; 2: a wrong argument.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
QUICK = os.environ.get("LAYALIGN_BENCH") == "quick"
BUILD = ROOT / "build" / "gpu"  # objects: a build that was stopped goes on
ENOUGH = 30  # seconds left with which a piece that can go on is worth starting
GRACE = 20  # seconds between SIGTERM and SIGKILL
NO_TESTS = 5  # pytest's exit code where nothing was chosen
Commands = list[list[str]]

# Device-independent tests of tests/ops are left to the CPU.
TESTS = (
    "layer_mix", "layer_projection", "gated_cross_attention", "gated_cross_attention_kernels", "triton_kernels",
    "launch", "extension", "cuda_graphs", "views", "sums",
)  # fmt: skip


# Pieces by their old names.
FORMER = {"bench": ["operations", "graphs", "model"], "report": ["page"]}


class Absent(Exception):
    """What a piece needs is not on this machine; the text says what."""


class Piece(NamedTuple):
    """One piece.

    Attributes:
        planned, most: seconds.
        commands: makes the commands from the folder of the results and the expression of -k. Raises :class:`Absent`.
        resumes: whether it keeps what is done, so that it can be started with little time left.
        leaves: files in the folder that "again" removes.
    """

    planned: int
    most: int
    commands: Callable[[Path, str], Commands]
    resumes: bool = False
    leaves: tuple[str, ...] = ()


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def benchmark(*arguments: object) -> list[str]:
    return python(ROOT / "benchmarks" / str(arguments[0]), *arguments[1:])


def architecture() -> str:
    """Compute capability, like "90"."""
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "90"


def builder(*arguments: object) -> list[str]:
    """A call of csrc/builder.py for this GPU."""
    cuda = ["LAYALIGN_CUDA=0"] if QUICK else ["LAYALIGN_CUDA=1", f"LAYALIGN_CUDA_ARCHS={architecture()}"]
    return ["env", *cuda, *python(ROOT / "csrc" / "builder.py", *arguments)]


def primitives(folder: Path, rows: str) -> Commands:
    if '"ptx"' not in (ROOT / "csrc" / "builder.py").read_text(encoding="utf-8"):
        raise Absent("csrc/builder.py has no ptx")
    programs = BUILD / "ptx"
    run = 'for program in "$0"/*; do if [ -f "$program" ] && [ -x "$program" ]; then "$program" || exit 1; fi; done'
    return [builder("ptx", "--output", programs), ["sh", "-c", run, str(programs)]]


def build(folder: Path, rows: str) -> Commands:
    built = folder / "built"
    keep = f"mkdir -p {shlex.quote(str(built))} && cp {shlex.quote(str(BUILD))}/_C*.so {shlex.quote(str(built))}/"
    return [builder("extension", "--output", BUILD), ["sh", "-c", keep]]


def suite(file: str, keep: str) -> Callable[[Path, str], Commands]:
    """Rows of a file of the benchmarks, kept in a result file of their own."""

    def commands(folder: Path, rows: str) -> Commands:
        chosen = ["-k", rows] if rows else []
        own = ["--results", folder / f"{keep}.json", "--resume", folder / f"{keep}.txt"]
        more = shlex.split(os.environ.get("BENCH", ""))
        command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "resume", *own)
        return [[*command, str(ROOT / "benchmarks" / file), *chosen, *more]]

    return commands


def tests(folder: Path, rows: str) -> Commands:
    files = [str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in TESTS]
    # A file that cannot be imported, for want of a package, does not keep the others from running.
    own = ["--continue-on-collection-errors", "--resume", folder / "tests.txt"]
    command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "resume", *own)
    done = subprocess.run(python("-c", "import xdist"), capture_output=True, check=False)
    if done.returncode == 0 and not QUICK:  # compiling the kernels takes the CPU's cores more than the GPU
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    return [[*command, *files, *(["-k", rows] if rows else [])]]


def sanitizer(tool: str) -> Callable[[Path, str], Commands]:
    def commands(folder: Path, rows: str) -> Commands:
        if shutil.which("compute-sanitizer") is None:
            raise Absent("compute-sanitizer is not here")
        own = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *benchmark("sanitize.py")]
        # One allocation per tensor: within torch's pool a tensor's end is not the end of the allocation.
        return [["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *own]]

    return commands


def counters(folder: Path, rows: str) -> Commands:
    if shutil.which("ncu") is None:
        raise Absent("ncu is not here")
    sections = [word for name in ("SpeedOfLight", "Occupancy", "LaunchStats") for word in ("--section", name)]
    ours = "regex:gated_cross|layer_mix|projection|rows_kernel|dquery|dsource|combine|mix"
    # The clocks are left as they are: they are not ours, and pinned ones are not those of the other pieces.
    own = ["ncu", "--clock-control", "none", "--kernel-name", ours, "--launch-count", "80", *sections]
    keep = ["--csv", "--page", "raw", "--log-file", str(folder / "counters.csv")]
    return [[*own, *keep, *benchmark("kernel_times.py", "--once")]]


PIECES: dict[str, Piece] = {
    "primitives": Piece(30, 60, primitives),
    "facts": Piece(10, 30, lambda folder, _: [benchmark("facts.py", folder / "facts.json")]),
    "build": Piece(90, 180, build),
    "tests": Piece(150, 240, tests, True, ("tests.txt",)),
    "tables": Piece(
        90, 150, lambda folder, rows: [benchmark("tune.py", folder / "tables", *([rows] if rows else []))], True,
        ("tables",),
    ),
    "operations": Piece(
        200, 260, suite("test_operations.py", "operations"), True, ("operations.txt", "operations.json")
    ),
    "graphs": Piece(40, 70, suite("test_graphs.py", "graphs"), True, ("graphs.txt", "graphs.json")),
    "model": Piece(180, 240, suite("test_full_size.py", "model"), True, ("model.txt", "model.json")),
    "sanitize": Piece(15, 40, lambda folder, _: [benchmark("sanitize.py")]),
    "memcheck": Piece(60, 100, sanitizer("memcheck")),
    "racecheck": Piece(60, 100, sanitizer("racecheck")),
    "profile": Piece(
        60, 80, lambda folder, _: [benchmark("kernel_times.py", folder / "profile.json")], True, ("profile.json",)
    ),
    "counters": Piece(60, 80, counters, leaves=("counters.csv",)),
    "page": Piece(10, 30, lambda folder, _: [benchmark("page.py", folder)]),
}  # fmt: skip


class Check:
    """The states of the pieces, kept in check.json, and the log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / "check.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.states = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}

    def done(self, name: str) -> bool:
        """Whether it passed, failed or cannot run here."""
        return self.states.get(name, {}).get("state") in ("passed", "failed", "absent")

    def keep(self, name: str, state: str, seconds: float, note: str = "") -> None:
        """Record how a piece ended."""
        before = self.states.get(name, {}).get("seconds", 0)
        self.states[name] = {"state": state, "seconds": round(before + seconds, 1), "note": note}
        text = json.dumps(self.states, indent=1) + "\n"
        part = self._file.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(self._file)

    def forget(self, name: str) -> None:
        """Remove what a piece left."""
        self.states.pop(name, None)
        for path in (self.folder / left for left in PIECES[name].leaves):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)

    def run(self, name: str, rows: str, seconds: float) -> None:
        """Run a piece for at most so many seconds."""
        begin = time.monotonic()
        self.keep(name, "cut", 0, "was running when this was written")
        try:
            commands = PIECES[name].commands(self.folder, rows)
        except Absent as why:
            self.say(f"== {name}: {why}")
            return self.keep(name, "absent", 0, str(why))
        self.say(f"== {name}")
        state, lines = "passed", [""]
        for command in commands:
            code, lines = self._command(command, begin + seconds - time.monotonic())
            if code == NO_TESTS and "pytest" in command:
                continue  # nothing was chosen, or everything is done
            if code != 0:
                state = "cut" if code == 124 else "failed"
                break
        if state == "passed" and rows and PIECES[name].resumes:
            state = "in part"  # the rows of -k
        took = time.monotonic() - begin
        print("\n".join(lines[-60 if name == "page" else -5 :]), flush=True)
        self.say(f"   {state} after {took:.0f} of {seconds:.0f} s")
        self.keep(name, state, took, lines[-1][:300])

    def _command(self, command: list[str], seconds: float) -> tuple[int, list[str]]:
        """(exit code, 124 where the time was over; what it printed)."""
        with tempfile.TemporaryFile() as output:
            run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
            try:
                code = run.wait(max(seconds, 0.1))
            except BaseException as error:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    os.killpg(run.pid, number)
                    try:
                        run.wait(GRACE)
                        break
                    except subprocess.TimeoutExpired:
                        continue
                code = 124
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
            output.seek(0)
            text = output.read().decode(errors="replace")
        with (self.folder / "check.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n{text}\n")
        return code, [line for line in text.splitlines() if line.strip()] or [""]

    def say(self, text: str) -> None:
        """Print a line, and log it."""
        print(text, flush=True)
        with (self.folder / "check.log").open("a", encoding="utf-8") as log:
            log.write(text + "\n")


def seconds(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected seconds, got {text}")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", dest="folder", type=Path, default=Path("benchmarks/results/gpu"), metavar="FOLDER")
    parser.add_argument("-t", dest="seconds", type=seconds, metavar="SECONDS")
    parser.add_argument("-k", dest="rows", default="", metavar="ROWS")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("pieces", nargs="*", metavar="PIECE")
    found = parser.parse_args(arguments)
    found.pieces = [name for given in found.pieces for name in FORMER.get(given, [given])]
    for name in found.pieces:
        if name not in PIECES:
            parser.error(f"{name}: expected a piece of {' '.join(PIECES)}")
    return found


def main(arguments: list[str]) -> int:
    """Run the pieces."""
    begin = time.monotonic()
    options = parse(arguments)
    os.chdir(ROOT)
    check = Check(options.folder.resolve())
    chosen = [name for name in PIECES if not options.pieces or name in options.pieces]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as paths:
        (Path(paths) / "layalign_kernels").symlink_to(ROOT / "kernels")  # as an installation has it
        own = [str(ROOT), paths, str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, own)), "PYTHONUNBUFFERED": "1"}
        os.environ.setdefault("LAYALIGN_BENCH", "gpu")
        for name in chosen:
            if options.again:
                check.forget(name)
            passed = check.states.get(name, {}).get("state") == "passed"
            # The page is made of what the others left, so every call makes it again.
            if name != "page" and (passed or (check.done(name) and not options.pieces)):
                continue
            left = float("inf") if options.seconds is None else options.seconds - (time.monotonic() - begin)
            piece = PIECES[name]
            if name != "page" and "page" in chosen:
                left -= PIECES["page"].planned
            if left < min(piece.planned, ENOUGH if piece.resumes else piece.planned):
                check.say(f"== {name}: not run, {left:.0f} s left")
                continue
            take_built(check.folder)
            check.run(name, options.rows, min(piece.most, left))
    fine = ("passed", "absent", "in part") if options.rows else ("passed", "absent")
    states = {name: check.states.get(name, {}).get("state", "not run") for name in chosen}
    left_over = [f"{name} ({state})" for name, state in states.items() if state not in fine]
    if left_over:
        print("FAILED or not finished: " + " ".join(left_over))
        return 1
    print(f"passed: {' '.join(chosen)}; results in {options.folder}")
    return 0


def take_built(folder: Path) -> None:
    """Put the extension that was built earlier, perhaps on a machine before this one, beside the package."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    built, place = folder / "built" / name, ROOT / "layalign" / name
    if built.is_file() and not (place.is_file() and place.stat().st_mtime >= built.stat().st_mtime):
        shutil.copyfile(built, place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
