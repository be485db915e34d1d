"""Time and peak memory over S, T, B, E and L: the exponent p of size ** p, for ours and reference.py.

By design all of them are at most linear. The test requires it of memory, which is counted and not timed.
"""

from __future__ import annotations

from typing import Any

import measure
import operations
import pytest
from operations import REFERENCE, Operation
from shapes import Shapes
from test_operations import require_right

pytestmark = pytest.mark.timeout(600)

LINEAR = 1.1  # an exponent up to here is linear
CASES = [
    *(("layer_mix", dimension) for dimension in ("S", "B", "E", "L")),
    *(("layer_projection", dimension) for dimension in ("S", "B", "E", "L")),
    *(("gated_cross_attention", dimension) for dimension in ("S", "T", "B")),
]


def build(name: str, sizes: dict[str, int], shapes: Shapes) -> Operation:
    """The operation at these sizes."""
    s = sizes
    if name == "gated_cross_attention":
        return operations.attention(s["B"], s["T"], s["S"], s["H"], s["H"], s["d"], shapes.device, shapes.dtype)
    four = s["E"], 2 * s["L"], s["De"], s["Dl"]
    return operations.layers(name, s["B"], s["S"], four, shapes.device, shapes.dtype)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(("name", "dimension"), CASES)
def test_scaling(name: str, dimension: str, backward: bool, rows: Any, benchmark: Any, shapes: Shapes) -> None:
    """The row's own time is ours at the largest size."""
    sizes = [factor * shapes.scaling_sizes[dimension] for factor in shapes.scaling]
    points: dict[str, dict[str, list[float]]] = {"layalign": {"s": [], "bytes": []}, REFERENCE: {"s": [], "bytes": []}}
    for size in sizes:
        operation = build(name, {**shapes.scaling_sizes, dimension: size}, shapes)
        require_right(operation, "auto", shapes)
        calls = operation.passes("auto", backward)
        calls = {"layalign": calls["auto"], REFERENCE: calls[REFERENCE]}
        for who, seconds in measure.medians(rows.queued, calls).items():
            points[who]["s"].append(seconds)
            points[who]["bytes"].append(measure.peak_memory(calls[who], shapes.device, warm=True))
    kind = "forward and backward" if backward else "forward"
    labels = {"operation": name, "over": dimension, "sizes": sizes, "fixed": shapes.scaling_sizes, "pass": kind}
    exponents = {
        who: {unit: measure.slope(sizes, [max(v, 1e-9) for v in values]) for unit, values in found.items()}
        for who, found in points.items()
    }
    extra = {"points": points, "slopes": exponents, "linear": LINEAR}
    title = f"{name} over {dimension}, {kind}"
    rows.time("scaling", title, calls, labels, seconds=shapes.seconds / 4, extra=extra, queued=True)
    benchmark.extra_info.update(time_slope=exponents["layalign"]["s"], memory_slope=exponents["layalign"]["bytes"])
    if shapes.name != "quick":
        found = exponents["layalign"]["bytes"]
        assert found <= LINEAR, f"{title}: memory grows as {dimension} ** {found:.2f}, expected at most linear"
