"""Time the operations against plain torch and against the ceilings of the machine, all in one run.

    python benchmarks/kernels_bench.py --output kernels.json [--quick]

First the ceilings are measured (copy bandwidth, matrix rate), then every backend is checked against the reference, and
only what is right is timed. A row: median and quartiles in microseconds, GB/s or TFLOP/s, share of the ceiling, and the
speed as a multiple of layalign/reference.py's (attention also: of torch's scaled_dot_product_attention, then the gate
and the addition), timed by turns. On a GPU the paper's shapes in bf16; on a CPU, or with --quick, smaller ones in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from facts import facts

from layalign import ops, reference
from layalign.ops import backends

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def timed(function: Callable[[], Any], seconds: float = 0.3) -> list[float]:
    """Seconds of single calls, L2 flushed between them on a GPU; at least 5 and at most 200."""
    function()
    times: list[float] = []
    flush = torch.empty(2**28 if GPU else 1, dtype=torch.int8, device=DEVICE)
    deadline = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < deadline and len(times) < 200):
        if GPU:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return times


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """Measured copy bandwidth (GB/s, read and write) and matrix rate (TFLOP/s)."""
    size = 2**30 if GPU else 2**26
    source = torch.empty(size, dtype=torch.int8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = statistics.median(timed(lambda: target.copy_(source)))
    n = 8192 if GPU else 1024
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    product = statistics.median(timed(lambda: a @ b))
    return {"copy GB/s": 2 * size / copy / 1e9, "matmul TFLOP/s": 2 * n**3 / product / 1e12}


def row(
    name: str,
    times: list[float],
    baselines: dict[str, float],
    moved: float,
    flop: float,
    ceiling: dict[str, float],
    **labels: Any,
) -> dict[str, Any]:
    """One result; ``baselines`` are medians in seconds by name, ``moved`` bytes, ``flop`` operations."""
    quartiles = statistics.quantiles(times, n=4)
    median = quartiles[1]
    return {
        "name": name,
        **labels,
        "median us": round(median * 1e6, 2),
        "iqr us": round((quartiles[2] - quartiles[0]) * 1e6, 2),
        **{f"times {other}'s speed": round(base / median, 3) for other, base in baselines.items()},
        "GB/s": round(moved / median / 1e9, 1),
        "share of copy": round(moved / median / 1e9 / ceiling["copy GB/s"], 3),
        "TFLOP/s": round(flop / median / 1e12, 3),
        "share of matmul": round(flop / median / 1e12 / ceiling["matmul TFLOP/s"], 3),
    }


def right(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Close enough to be worth timing."""
    scale = expected.float().abs().max()
    return bool((found.float() - expected.float()).abs().max() <= 3e-2 * scale)


def both_passes(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], Any]:
    """Forward and backward of ``function``."""
    grad = torch.randn_like(function())
    return lambda: torch.autograd.grad(function(), leaves, grad)


def serving(operation: str) -> list[str]:
    """Backends worth timing here: not the interpreter."""
    return [name for name in backends.BACKENDS if name != "torch" and backends.serves(operation, name, DEVICE)[0]]


def by_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Times of several calls that do the same, in turns, so that what else the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            times[name] += timed(call, seconds=0.1)
    return times


def compare(
    name: str,
    calls: dict[str, Callable[[], torch.Tensor]],
    leaves: list[torch.Tensor],
    kinds: tuple[str, ...],
    moved: float,
    flop: float,
    ceiling: dict[str, float],
    **labels: Any,
) -> list[dict[str, Any]]:
    """Rows for the backends among ``calls``; the others are baselines, the first of them what is right."""
    expected = next(iter(calls.values()))()
    for impl, call in calls.items():
        if not right(call(), expected):
            raise SystemExit(f"{name}, {impl}: wrong result, not timed")
    rows = []
    for kind in kinds:
        forward = kind != "forward and backward"
        with torch.set_grad_enabled(not forward):
            wrapped = {impl: call if forward else both_passes(call, leaves) for impl, call in calls.items()}
            times = by_turns(wrapped)
        baselines = {impl: statistics.median(found) for impl, found in times.items() if impl not in backends.BACKENDS}
        scale = 1 if forward else 3
        for impl in times.keys() - baselines.keys():
            rows.append(
                row(name, times[impl], baselines, moved * scale, flop * scale, ceiling, impl=impl, kind=kind, **labels)
            )
    return rows


def bench_layers(dtype: torch.dtype, quick: bool, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """Layer mix and projection."""
    layers, slots, width, outputs = (8, 24, 512, 768) if quick else (24, 64, 2048, 4096)
    rows = []
    shapes = ((1, 16), (1, 64), (4, 128), (8, 512)) if quick else ((4, 128), (16, 256), (32, 512))
    for batch, length in shapes:
        hidden = [torch.randn(batch, length, width, device=DEVICE).to(dtype) for _ in range(layers)]
        w1, b1 = torch.randn(slots, layers, device=DEVICE).to(dtype), torch.randn(slots, device=DEVICE).to(dtype)
        w2, b2 = torch.randn(outputs, width, device=DEVICE).to(dtype), torch.randn(outputs, device=DEVICE).to(dtype)
        weights = [w.requires_grad_() for w in (w1, b1, w2, b2)]
        n, size = batch * length, hidden[0].element_size()
        for operation, arguments in {
            "layer_mix": (hidden, *weights[:2]),
            "layer_projection": (hidden, *weights),
        }.items():
            moved = size * n * width * (layers + slots) if operation == "layer_mix" else 0
            flop = 2 * n * slots * width * (layers if operation == "layer_mix" else outputs)
            calls = {"reference": lambda a=arguments, o=operation: getattr(reference, o)(*a)}
            for impl in serving(operation):
                calls[impl] = lambda a=arguments, o=operation, i=impl: getattr(ops, o)(*a, impl=i)
            labels = dict(batch=batch, source=length, layers=layers, slots=slots, width=width)
            leaves = [a for a in arguments if isinstance(a, torch.Tensor)]
            kinds = ("forward", "forward and backward")
            rows += compare(operation, calls, leaves, kinds, moved, flop, ceiling, **labels)
    return rows


def bench_attention(dtype: torch.dtype, quick: bool, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """Gated cross-attention with a padding mask and a base."""
    rows = []
    heads, size = (12, 64) if quick else (32, 128)
    few = [(batch, length, source) for batch, length in ((1, 1), (8, 1), (8, 16)) for source in (16, 64, 512)]
    many = [(2, length, source) for length in (64, 512) for source in (16, 64, 512)]
    shapes = (*few, *many) if quick else ((8, 512, 128), (4, 2048, 512), (32, 1, 256), (8, 1, 1024))
    for batch, length, source in shapes:
        for groups in (heads, heads // 4):
            query = torch.randn(batch, length, heads, size, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_()
            key, value = (
                torch.randn(batch, groups, source, size, device=DEVICE).to(dtype).requires_grad_() for _ in range(2)
            )
            base = torch.randn(batch, length, heads, size, device=DEVICE).to(dtype)
            gate = torch.tensor([0.3], device=DEVICE, dtype=dtype, requires_grad=True)
            mask = torch.arange(source, device=DEVICE) < source - torch.arange(batch, device=DEVICE)[:, None]
            arguments = (query, key, value, gate, base)

            def sdpa(q=query, k=key, v=value, g=gate, b=base, m=mask[:, None, None]):
                return b + g * F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True).transpose(1, 2)

            calls = {
                "reference": lambda a=arguments, m=mask: reference.gated_cross_attention(*a, key_mask=m),
                "sdpa and gate": sdpa,
            }
            for impl in serving("gated_cross_attention"):
                calls[impl] = lambda a=arguments, m=mask, i=impl: ops.gated_cross_attention(*a, key_mask=m, impl=i)
            flop = 4 * batch * heads * length * source * size
            moved = query.element_size() * size * batch * (3 * heads * length + 2 * groups * source)
            kinds = ("forward", "forward and backward") if length > 16 else ("decode",)
            labels = dict(batch=batch, queries=length, source=source, heads=heads, groups=groups)
            rows += compare(
                "gated_cross_attention", calls, [query, key, value, gate], kinds, moved, flop, ceiling, **labels
            )
    return rows


def main() -> None:
    """Measure, print a line per row, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    quick = arguments.quick or not GPU
    dtype = torch.bfloat16 if GPU else torch.float32
    ceiling = ceilings(dtype)
    rows = bench_layers(dtype, quick, ceiling) + bench_attention(dtype, quick, ceiling)
    for found in rows:
        print(found, flush=True)
    result = {"facts": facts(), "dtype": str(dtype), "ceilings": ceiling, "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
