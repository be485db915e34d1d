"""Timing in turns, measured ceilings, and peak memory.

**Time.** The calls of one row take turns, so that other load on the machine affects all of them. A round times every
baseline once and then ours. A ratio is the median over rounds of ours / baseline within the round. If a slow baseline
was timed in fewer than three rounds, it is the median of our first three times over the baseline's median. If a call of
the row is short (under 2 ms), each call also runs once untimed right before.

On a GPU, CUDA events are used, and the L2 cache is overwritten before each call. That takes some 60 us, in which the
host gets no further ahead: a call of a few launches would be timed with what the launches cost the host. So operations
are timed *queued*: the device waits until the whole call is queued. What a graph or a model is to save is left in:
calls of whole models are timed as they are, and as replays of a CUDA graph (:func:`captured`).

With six or more rounds, a ratio has a 95 % interval. If a target depends on the ratio, rounds continue until that
interval should be narrow, judged by the spread of the first rounds, or until the time is used up.

**Memory.** The peak of bytes alive during a call, minus those alive before it. On a CPU these are all allocations of
torch's allocator, as ``torch.profiler`` records them; scratch memory that oneDNN, MKL or this library's C++ kernels
allocate themselves is not counted. On a GPU: ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import gc
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layalign.experiments.bench.results import FEW_ROUNDS

SHORT, LONG, VERY_LONG, LONGEST = 2e-3, 0.3, 3.0, 5.0  # seconds of a call
NARROW = 0.01  # target for half the width of a ratio's 95 % interval, relative to the ratio
WAIT, LONGEST_WAIT = 2**18, 2**22  # clock cycles of a GPU: 0.13 and 2.1 ms at 2 GHz
CHUNK = 2**26  # elements that are compared at once, in float64


class Stopwatch:
    """Times single calls on one device.

    Args:
        device: "cpu" or "cuda".
        queued: on a GPU, whether the device waits until the whole call is queued, so that launches cost nothing.
    """

    def __init__(self, device: str, queued: bool = False) -> None:
        self.gpu = device == "cuda"
        self._flush = torch.empty(2**28, dtype=torch.int8, device=device) if self.gpu else None
        self._wait = WAIT if queued else 0

    def once(self, call: Callable[[], Any]) -> float:
        """Run ``call`` and wait for it."""
        if self._flush is None:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            if self._wait:
                torch.cuda._sleep(self._wait)
            start.record()
            call()
            end.record()
            early = start.query()  # the device came here before all was queued
            end.synchronize()
            if not (self._wait and early) or self._wait >= LONGEST_WAIT:
                return start.elapsed_time(end) / 1e3
            self._wait *= 2


def medians(watch: Stopwatch, calls: dict[str, Callable[[], Any]], count: int = 5) -> dict[str, float]:
    """Median seconds of each call, measured in turns after one warm-up call each."""
    for call in calls.values():
        call()
    rounds = [{name: watch.once(call) for name, call in calls.items()} for _ in range(count)]
    return {name: statistics.median(each[name] for each in rounds) for name in calls}


class Turns:
    """The rounds of one row: the baselines, and ours, which the caller runs between two rounds.

    Args:
        watch: the stopwatch.
        ours: our call.
        baselines: the other calls, by name.
        seconds: approximate time for all rounds. There are at least ``fewest`` rounds (three if one takes 5 s) and at
            most 200. If every call takes 5 s, the first call counts as a round instead of as a warm-up.
        few: baselines that are timed less often, because no target depends on them: in the first three rounds if a call
            takes over 0.3 s, in the first round if over 1 s, and once before the rounds if over 3 s.
        patience: factor for the number of rounds (still at most 200).
        fewest: minimum number of rounds.
        judged: the baseline that a target refers to. If given, the first rounds are timed here and decide how many are
            enough.
    """

    def __init__(
        self,
        watch: Stopwatch,
        ours: Callable[[], Any],
        baselines: dict[str, Callable[[], Any]],
        seconds: float,
        few: tuple[str, ...] = (),
        patience: float = 1.0,
        fewest: int = 5,
        judged: str | None = None,
    ) -> None:
        self._watch, self._ours, self._baselines = watch, ours, baselines
        self.times: list[float] = []
        self.against: dict[str, list[float]] = {name: [] for name in baselines}
        found = {}
        for name, call in {**baselines, "": ours}.items():
            first = watch.once(call)  # compiles, folds, allocates
            # Our second call differs from the first: weights are folded and kernels are cached.
            found[name] = first if first > (VERY_LONG if name == "" else LONG) else watch.once(call)
        few = tuple(name for name in few if name in found)
        counts = {name: 3 if found[name] < 1 else int(found[name] < VERY_LONG) for name in few}
        self._few = {name: count for name, count in counts.items() if found[name] > LONG}
        whole = [name for name in found if name not in self._few]  # timed in every round
        first_counts = min(found[name] for name in whole) > LONGEST
        if first_counts:
            self.times.append(found[""])
        for name, times in self.against.items():
            if first_counts or self._few.get(name) == 0:
                times.append(found[name])
        self._short = min(found.values()) < SHORT
        per_round = sum(found[name] for name in whole) * (2 if self._short else 1)
        wanted = max(min(3, fewest) if per_round > LONGEST else fewest, seconds / per_round)
        most = max(1, min(200, int(wanted * patience)))
        if judged in whole and most > fewest:
            while len(self.times) < fewest - 1:  # at least one is left for the caller
                self.baselines()
                self.ours()
            most = min(most, enough([a / b for a, b in zip(self.times, self.against[judged], strict=True)], fewest))
        self.rounds = max(1, most - len(self.times))  # still to come

    def baselines(self) -> None:
        """One call of every baseline; ours is warm afterwards."""
        for name, call in self._baselines.items():
            if name not in self._few or len(self.against[name]) < self._few[name]:
                if self._short:
                    call()
                self.against[name].append(self._watch.once(call))
        if self._short:
            self._ours()

    def ours(self) -> None:
        """One call of ours."""
        self.times.append(self._watch.once(self._ours))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of a single value, three times the value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, second, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, second, third


def interval(values: list[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the median of the distribution of ``values``.

    From order statistics, for any distribution; None with fewer than six values.
    """
    count, place, below = len(values), 0, 0.5 ** len(values)
    while below <= 0.025:
        place += 1
        below += math.comb(count, place) * 0.5**count
    ordered = sorted(values)
    return (ordered[place - 1], ordered[count - place]) if place else None


def enough(values: list[float], fewest: int) -> int:
    """Rounds until the median's interval should be :data:`NARROW`, for normal values with the same quartiles."""
    first, median, third = quartiles(values)
    deviation = (third - first) / 1.349
    return max(fewest, math.ceil((1.96 * 1.2533 * deviation / (NARROW * median)) ** 2))


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    first, median, third = quartiles(values)
    return {"median": median, "q1": first, "q3": third, "iqr": third - first, "rounds": len(values)}


def compared(ours: list[float], other: list[float]) -> dict[str, float]:
    """A baseline's median, and the ratio ours / baseline by rounds.

    With fewer than three rounds of the baseline, the ratio is that of our first three times to the baseline's median.
    They are the nearest in time, and a machine's clock may change within a minute.
    """
    pairs = zip(ours, other if len(other) >= FEW_ROUNDS else [quartiles(other)[1]] * FEW_ROUNDS, strict=False)
    each = [a / b for a, b in pairs]
    ratios, between = summary(each), interval(each)
    return {
        **({} if between is None else {"ratio low": between[0], "ratio high": between[1]}),
        "median": quartiles(other)[1],
        "iqr": quartiles(other)[2] - quartiles(other)[0],
        "ratio": ratios["median"],
        "ratio q1": ratios["q1"],
        "ratio q3": ratios["q3"],
        "rounds": len(other),
    }


def rates(median: float, moved: float, flop: float, ceiling: dict[str, float]) -> dict[str, float]:
    """GB/s, TFLOP/s, and the share of the measured ceilings.

    Args:
        median: seconds.
        moved: bytes that must be read or written, or 0.
        flop: operations, or 0.
        ceiling: the result of :func:`ceilings`.
    """
    if not moved and not flop:
        return {}
    bandwidth, rate = ceiling["copy GB/s"] * 1e9, ceiling["matmul TFLOP/s"] * 1e12
    possible = max(moved / bandwidth, flop / rate)
    return {
        "GB/s": moved / median / 1e9,
        "TFLOP/s": flop / median / 1e12,
        "flop per byte": flop / moved if moved else 0.0,
        "percent of ceiling": 100 * possible / median,
    }


def ceilings(watch: Stopwatch, dtype: torch.dtype, quick: bool) -> dict[str, float]:
    """Measure copy bandwidth (read plus write, beyond the caches) and the rate of a matrix product."""
    device = "cuda" if watch.gpu else "cpu"
    size = 2**30 if watch.gpu else (2**22 if quick else 2**27)
    source = torch.empty(size, dtype=torch.int8, device=device).random_()  # zeros may be read from one page, or packed
    target = torch.empty_like(source)
    n = 8192 if watch.gpu else (256 if quick else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    found = medians(watch, {"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {"copy GB/s": 2 * size / found["copy"] / 1e9, "matmul TFLOP/s": 2 * n**3 / found["product"] / 1e12}


def peak_memory(
    call: Callable[[], Any], device: str, forget: Callable[[], None] | None = None, warm: bool = False
) -> int:
    """Peak of bytes alive during ``call``, minus those alive before; see the module for what is counted.

    Args:
        call: the call. It must free what it allocates, because on a CPU the profiler does not see memory freed that was
            allocated before.
        device: "cpu" or "cuda".
        forget: drops what ``call`` keeps for the next call.
        warm: whether everything that is allocated only once exists already; otherwise one call is made first.
    """

    def whole() -> None:
        call()
        if forget is not None:
            forget()

    if not warm:
        whole()
    gc.collect()  # garbage of earlier calls must not be freed within this one
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        whole()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    gc.disable()  # no collection at a random moment either
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            whole()
    finally:
        gc.enable()
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    alive, peak = 0, 0
    for _, change in sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda e: e[0]):
        alive += change
        peak = max(peak, alive)
    return peak


class _Uncapturable(TorchDispatchMode):
    """Refuses what a CUDA graph cannot record: operations for which the host reads memory of the device."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_consecutive")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.READS or by_mask:
            raise RuntimeError(f"cannot be captured: {func.name()} reads from the device")
        return func(*args, **(kwargs or {}))


def captured(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """A replay of ``call`` as a CUDA graph, which returns the same tensors each time.

    On a CPU it is ``call`` itself, after a check that nothing in it waits for the device.

    Raises:
        RuntimeError: it cannot be captured.
    """
    if device != "cuda":
        with _Uncapturable():
            call()
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, folds, allocates
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def host_seconds(call: Callable[[], Any], device: str, count: int = 20) -> float:
    """Median seconds that the host needs to queue ``call``; on a CPU, to run it."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        if device == "cuda":
            torch.cuda.synchronize()
    return statistics.median(times)


def clock(device: str) -> float | None:
    """The current clock in MHz (GPU: of the multiprocessors; CPU: mean over the cores); None if unknown."""
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        try:
            return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            return None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError, IndexError):
        return None
    return round(statistics.mean(found), 1) if found else None


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference in the Frobenius norm; infinite for NaN, infinity or another shape.

    In chunks: the copies in float64 of a projection at B 32, S 512 would take 100 GB.
    """
    if found.shape != expected.shape:
        return float("inf")
    error = norm = torch.zeros((), dtype=torch.float64, device=expected.device)
    for one, other in zip(*(x.detach().reshape(-1).split(CHUNK) for x in (found, expected)), strict=True):
        wide = other.double()
        error = error + (one.double() - wide).square().sum()
        norm = norm + wide.square().sum()
    relative = float(error.sqrt() / norm.sqrt().clamp(min=1e-12))
    return relative if math.isfinite(relative) else float("inf")


def slope(sizes: list[int], values: list[float]) -> float:
    """The exponent p of values ~ sizes ** p, by least squares on the logarithms."""
    return float(
        statistics.linear_regression(*[torch.tensor(v).double().log().tolist() for v in (sizes, values)]).slope
    )
