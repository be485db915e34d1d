"""Measured block sizes of the Triton kernels, and measured plans: all candidates with their times.

``python benchmarks/tune.py FOLDER [PART]`` writes FOLDER/ARCH.json, e.g. sm_90.json, after every part; parts that it
has are left out. PART chooses those whose name contains it. The kernels are compiled by several processes first, since
that takes most of the time. A candidate whose result differs from that of the shipped blocks is an error, not a time.

    {"format": 1, "arch": "sm_90", "facts": {...},
     "blocks": {"forward half 128": {
         "blocks": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},   # the fastest over all shapes
         "shipped": {...}, "gain": 1.07,                                       # shipped time / fastest time
         "shapes": ["B8 T512 S128", ...],
         "candidates": [{"blocks": {...}, "seconds": [one a shape]} or {"blocks": {...}, "error": "..."}]}},
     "plans": {"attention T1 B8 S1024": {"fastest": "decode", "seconds": {"decode": ..., "forward": ...}}}}

A name of ``blocks`` is that of the kernel, then the key of its table. The times of the shapes are weighed equally.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for a dry run

import measure
import operations
from facts import facts
from operations import Operation
from shapes import Shapes, chosen

QUICK = chosen().name == "quick"
ROUNDS = 1 if QUICK else 15
SAME = 1e-2  # relative difference from the result with the shipped blocks, in half precision
Blocks = dict[str, int]


@dataclass(frozen=True)
class Part:
    """One entry of a table.

    Attributes:
        kernel: its name here.
        module: of ``layalign_kernels``; its function ``function`` is replaced.
        argument: the argument that ``configuration`` is called with for this kernel; None for every call.
        size: head size; 0 for the kernels of the layers' mix.
        grid: the values to try of every block size and launch option.
    """

    kernel: str
    module: str
    argument: Any
    size: int
    grid: dict[str, tuple[int, ...]]
    function: str = "configuration"

    @property
    def name(self) -> str:
        return f"{self.kernel} half {self.size}" if self.size else f"{self.kernel} half"

    def candidates(self) -> list[Blocks]:
        """The grid without what spills in every attention kernel, and then compiles for long; two for a dry run."""
        found = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        area = [each.get("BM", 1) * each.get("BN", 1) for each in found]
        found = [each for each, of in zip(found, area, strict=True) if self.size * of <= 2**17 * each["num_warps"]]
        return found[:2] if QUICK else found

    def cases(self, shapes: Shapes) -> dict[str, Callable[[], Any]]:
        """The calls to time, by shape: only the kernel's own pass."""
        if not self.size:
            return {
                f"B{b} S{s}": mix_pass(self.kernel, (b, s), shapes) for b, s in shapes.mix[:2]
            }  # a dozen processes hold them
        decoding = self.kernel.startswith("decode")
        found = {}
        for batch, length, source in shapes.attention:
            if (length == 1) != decoding:
                continue
            pair = self.kernel in ("dq", "dkv", "resident")
            if pair and (self.kernel == "resident") != resident(self.size, source, shapes):
                continue
            heads = shapes.attention_heads[0]
            # Of a group of 4 heads, 16 rows are 4 tokens.
            rows, groups = (self.argument // 4, heads // 4) if decoding else (length, heads)
            sizes = batch, rows, source, heads, groups, self.size
            case = operations.attention(*sizes, shapes.device, shapes.dtype)
            name = f"B{batch} T{rows} S{source} H{heads}/{groups}"
            found[name] = backward(case) if pair else forward(case)
        return found


def forward(case: Operation) -> Callable[[], Any]:
    return torch.no_grad()(lambda: [case.call("triton")])  # type: ignore[no-any-return]


def backward(case: Operation) -> Callable[[], Any]:
    out = case.call("triton")
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, case.leaves, grad, retain_graph=True)


def resident(size: int, source: int, shapes: Shapes) -> bool:
    """Whether the backward keeps so long a source in one program."""
    module: Any = importlib.import_module("layalign_kernels.gated_cross_attention_backward")
    common: Any = importlib.import_module("layalign_kernels.common")
    arch = common.architecture(torch.device(shapes.device))
    return module.resident_configuration(size, source, shapes.dtype, arch) is not None


def mix_pass(kernel: str, shape: tuple[int, int], shapes: Shapes) -> Callable[[], Any]:
    case = operations.layers("layer_mix", *shape, shapes.mix_sizes, shapes.device, shapes.dtype)
    return forward(case) if kernel == "layer_mix forward" else backward(case)


def parts(shapes: Shapes) -> list[Part]:
    """The parts, the paper's head size first."""
    found = []
    pair = "gated_cross_attention_backward"
    own = shapes.attention_heads[1]
    for size in (own,) if QUICK else (own, own // 2):
        rows = {"BM": (64, 128, 32), "BN": (64, 32, 128), "num_warps": (8, 4), "num_stages": (2, 3)}
        found += [
            Part("forward", "gated_cross_attention", None, size, {**rows, "BM": (64, 128)}),
            Part("dq", pair, "dq", size, {**rows, "num_stages": (2,)}),
            Part("dkv", pair, "dkv", size, {**rows, "BN": (64, 128)}),
        ]
        if any(length > 1 and resident(size, source, shapes) for _, length, source in shapes.attention):
            grid = {"BM": (32, 16, 64), "num_warps": (8, 4), "num_stages": (2, 1, 3)}
            found.append(Part("resident", pair, None, size, grid, "resident_configuration"))
        for count in (16, 32, 64):
            grid = {"BM": (count,), "BN": (64, 32, 128), "num_warps": (4, 8), "num_stages": (2, 3)}
            found.append(Part(f"decode {count}", "gated_cross_attention_decode", count, size, grid))
    warps = {"num_warps": (4, 8), "num_stages": (2,)}
    found.append(Part("layer_mix forward", "layer_mix", "forward", 0, dict(BN=(128, 64, 256), ROWS=(4, 1, 8), **warps)))
    warps["num_stages"] = (2, 3)
    found.append(Part("layer_mix weight", "layer_mix", "weight", 0, dict(BN=(64, 32, 16, 128), **warps)))
    return found


@contextmanager
def blocks(part: Part, candidate: Blocks, seen: list[Blocks]) -> Iterator[None]:
    """Within the block, the part's kernel is launched with these; ``seen`` gets the shipped ones."""
    module: Any = importlib.import_module(f"layalign_kernels.{part.module}")
    shipped = getattr(module, part.function)

    def configuration(*arguments: Any) -> Blocks | None:
        found: Blocks | None = shipped(*arguments)
        if found is None or (part.argument is not None and part.argument not in arguments):
            return found
        seen.append(found)
        return {**found, **candidate}

    setattr(module, part.function, configuration)
    try:
        yield
    finally:
        setattr(module, part.function, shipped)


@functools.lru_cache(maxsize=1)
def cases(part_index: int) -> dict[str, Callable[[], Any]]:
    shapes = chosen()
    return parts(shapes)[part_index].cases(shapes)


def problem(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def compile_one(part_index: int, candidate: Blocks) -> str:
    """In a process of its own: compile and run a candidate once; why it cannot be, or ""."""
    try:
        with blocks(parts(chosen())[part_index], candidate, []):
            for call in cases(part_index).values():
                call()
            torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, too many registers
        return problem(error)
    return ""


class Timed(NamedTuple):
    """What :func:`times` returns."""

    seconds: list[float]
    results: list[Any]


def times(part: Part, calls: dict[str, Callable[[], Any]], candidate: Blocks, watch: measure.Stopwatch) -> Timed:
    """Median seconds for each shape, and the results."""
    seconds, results = [], []
    with blocks(part, candidate, []):
        for call in calls.values():
            results.append([each.clone() for each in call()])
            for _ in range(0 if QUICK else 2):
                watch.once(call)
            seconds.append(statistics.median(watch.once(call) for _ in range(ROUNDS)))
    return Timed(seconds, results)


def measured(part: Part, index: int, errors: dict[str, str], watch: measure.Stopwatch) -> dict[str, Any]:
    """The entry of a part."""
    calls = cases(index)
    seen: list[Blocks] = []
    with blocks(part, {}, seen):
        for call in calls.values():
            call()
    if not seen:
        raise RuntimeError(f"{part.name}: layalign_kernels.{part.module}.{part.function} was not asked")
    shipped = seen[-1]
    own = times(part, calls, {}, watch)
    found: list[dict[str, Any]] = [{"blocks": {name: shipped[name] for name in part.grid}, "seconds": own.seconds}]
    for candidate in part.candidates():
        if all(shipped.get(name) == value for name, value in candidate.items()):
            continue
        text = errors.get(json.dumps(candidate), "")
        try:
            if text:
                raise RuntimeError(text)
            result = times(part, calls, candidate, watch)
            pairs = zip(itertools.chain(*result.results), itertools.chain(*own.results), strict=True)
            wrong = max(measure.difference(one, other) for one, other in pairs)
            if wrong > SAME:
                raise RuntimeError(f"differs from the shipped blocks by {wrong:.1e}")
            found.append({"blocks": candidate, "seconds": result.seconds})
        except Exception as error:
            found.append({"blocks": candidate, "error": text or problem(error)})
    possible = [each for each in found if "seconds" in each]
    best = min(possible, key=lambda each: sum(math.log(seconds) for seconds in each["seconds"]))
    gain = math.exp(statistics.mean(math.log(a / b) for a, b in zip(own.seconds, best["seconds"], strict=True)))
    return {
        "blocks": best["blocks"],
        "shipped": found[0]["blocks"],
        "gain": gain,
        "shapes": list(calls),
        "candidates": found,
    }


def plans(shapes: Shapes) -> dict[str, Callable[[], dict[str, Callable[[], Any]]]]:
    """For every name, what makes its ways; each must give what the first gives."""

    def attention(batch: int, rows: int, source: int) -> dict[str, Callable[[], Any]]:
        heads, size = shapes.attention_heads
        case = operations.attention(batch, rows, source, heads, heads // 4, size, shapes.device, shapes.dtype)
        op: Any = sys.modules["layalign.ops.gated_cross_attention"]
        return {
            "decode": with_value(op, "MAX_DECODE_ROWS", 10**6, forward(case)),
            "forward": with_value(op, "MAX_DECODE_ROWS", 0, forward(case)),
        }

    def projection(outputs: int) -> dict[str, Callable[[], Any]]:
        layers, slots, width, _ = shapes.mix_sizes
        sizes = layers, slots, width, outputs
        case = operations.layers(
            "layer_projection", *shapes.mix[len(shapes.mix) // 2], sizes, shapes.device, shapes.dtype
        )
        op: Any = sys.modules["layalign.ops.layer_projection"]
        return {
            plan: with_value(op, "choose_plan", lambda *_, plan=plan: plan, forward(case))
            for plan in getattr(op, "PLANS", ("two_step",))
        }

    found: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {}
    for batch, _, source in [shape for shape in shapes.attention if shape[1] == 1]:
        for rows in (1, 32) if QUICK else (1, 4, 8, 16, 32, 64):
            found[f"attention B{batch} T{rows} S{source}"] = functools.partial(attention, batch, rows, source)
    for outputs in (64,) if QUICK else (64, 128, 256, 1024):
        found[f"projection to {outputs}"] = functools.partial(projection, outputs)
    return found


def with_value(module: Any, name: str, value: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` with another value of a module's name, where the module has it."""

    def run() -> Any:
        before = getattr(module, name)
        setattr(module, name, value)
        try:
            return call()
        finally:
            setattr(module, name, before)

    return run


def plan_of(ways: dict[str, Callable[[], Any]], watch: measure.Stopwatch) -> dict[str, Any]:
    first, *others = [call()[0].clone() for call in ways.values()]
    wrong = max([measure.difference(other, first) for other in others], default=0.0)
    if wrong > SAME:
        raise RuntimeError(f"differs by {wrong:.1e}")
    seconds = measure.medians(watch, ways, ROUNDS)
    return {"fastest": min(seconds, key=lambda name: seconds[name]), "seconds": seconds}


def compiled(todo: Sequence[tuple[int, Part]]) -> dict[int, dict[str, str]]:
    """Errors of all candidates by part and candidate, after several processes have compiled them to Triton's cache."""
    jobs = [(index, candidate) for index, part in todo for candidate in part.candidates()]
    workers = min(12, max(1, (os.cpu_count() or 2) - 2))
    found: dict[int, dict[str, str]] = {index: {} for index, _ in todo}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        texts = pool.map(compile_one, *zip(*jobs, strict=True), chunksize=2)
        for (index, candidate), text in zip(jobs, texts, strict=True):
            if text:
                found[index][json.dumps(candidate)] = text
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", nargs="?", default="", help="only parts whose name contains this")
    arguments = parser.parse_args()
    shapes = chosen()
    common: Any = importlib.import_module("layalign_kernels.common")
    arch = common.architecture(torch.device(shapes.device))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder / f"{arch}.json"
    empty: dict[str, Any] = {"format": 1, "arch": arch, "facts": {}, "blocks": {}, "plans": {}, "failed": {}}
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else empty
    found["facts"] = facts(gpu=shapes.device == "cuda")
    found["failed"] = {}

    def keep(kind: str, name: str, make: Callable[[], Any]) -> None:
        try:
            found[kind][name] = make()
        except Exception as error:
            found["failed"][name] = problem(error)
            print(f"{name}: {found['failed'][name]}", flush=True)
        part_file = file.with_suffix(".part")
        part_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part_file.replace(file)

    watch = measure.Stopwatch(shapes.device, queued=True)
    wanted = [
        (index, part)
        for index, part in enumerate(parts(shapes))
        if arguments.part in part.name and part.name not in found["blocks"]
    ]
    # In two halves, so that a run that is stopped has the paper's head size.
    for half in (wanted[: len(wanted) // 2], wanted[len(wanted) // 2 :]):
        errors = compiled(half) if shapes.device == "cuda" and half else {}
        for index, part in half:
            keep("blocks", part.name, lambda: measured(part, index, errors.get(index, {}), watch))  # noqa: B023
            if part.name in found["blocks"]:
                entry = found["blocks"][part.name]
                print(f"{part.name}: {entry['blocks']}, {entry['gain']:.2f} times the shipped {entry['shipped']}")
    for name, make in plans(shapes).items():
        if arguments.part in name and name not in found["plans"]:
            keep("plans", name, lambda: plan_of(make(), watch))  # noqa: B023
            if name in found["plans"]:
                print(f"{name}: {found['plans'][name]['fastest']}")
    if found["failed"]:
        sys.exit("failed: " + "; ".join(f"{name}: {why}" for name, why in found["failed"].items()))


if __name__ == "__main__":
    main()
