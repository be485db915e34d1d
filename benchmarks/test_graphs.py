"""Decoding attention of all layers in one CUDA graph, against torch's, and what a call costs the host without one.

Each layer has keys and values of its own, as in a model, so that they come from memory and not from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import operations
import pytest
import torch
from operations import SDPA, Operation
from shapes import Shapes, chosen
from test_operations import IMPLS, require_right, serving

from layalign.ops import backends

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(chosen().name == "cpu", reason="graphs: left to a GPU"),
]
SHAPES = chosen()
DECODED = [shape for shape in SHAPES.attention if shape[1] == 1]


def of_all(layers: list[Operation], impl: str | None) -> Callable[[], Any]:
    """The attention of every layer; by torch where ``impl`` is None."""

    @torch.no_grad()
    def run() -> Any:
        return [layer.baselines[SDPA]() if impl is None else layer.call(impl) for layer in layers]

    return run


@pytest.mark.parametrize("grouped", [False, True], ids=["mha", "gqa"])
@pytest.mark.parametrize("shape", DECODED, ids=lambda shape: f"B{shape[0]}-S{shape[2]}")
def test_decode_in_a_graph(
    shape: tuple[int, int, int], grouped: bool, rows: Any, benchmark: Any, shapes: Shapes
) -> None:
    batch, length, source = shape
    heads, size = shapes.attention_heads
    sizes = (batch, length, source, heads, heads // 4 if grouped else heads, size)
    layers = [operations.attention(*sizes, shapes.device, shapes.dtype) for _ in range(shapes.graph_layers)]
    usable = [name for name in IMPLS if backends.serves("gated_cross_attention", name, shapes.device)[0]]
    for impl in usable if shapes.device == "cuda" else usable[-1:]:
        serving("gated_cross_attention", impl, shapes.device)
        require_right(layers[0], impl, shapes)
    calls, host = {}, {}
    with torch.no_grad():
        auto = layers[0].auto()
    for name, impl in {auto: auto, SDPA: None, **{name: name for name in usable}}.items():
        call = of_all(layers, impl)
        expected = call()
        calls[name] = measure.captured(call, shapes.device)
        for one, other in zip(calls[name](), expected, strict=True):
            assert torch.equal(one, other), f"{name}: a replay gives other numbers; not timed"
        host[name] = measure.host_seconds(call, shapes.device) / len(layers)
    least = {"moved": len(layers) * layers[0].moved[0], "flop": len(layers) * layers[0].flop[0]}
    labels = {**layers[0].labels, "layers": len(layers), "impl": auto, "auto": auto}
    name = f"B{batch} S{source} H{heads}/{sizes[4]}, {len(layers)} layers {auto}"
    rows.time("decode in a graph", name, calls, labels, queued=True, extra={"host seconds of a layer": host}, **least)
