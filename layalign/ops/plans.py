"""How ``layer_projection`` is computed for a shape: one fused kernel, or the mix kernel and then cuBLAS.

The rule, in multiply-adds of one row over all slots (E layers, 2L slots, D_e inputs, D_o outputs, BN output columns a
program):

- two steps write and read x, 2 * 2L * D_e elements a row, and multiply at cuBLAS's rate;
- fused saves that traffic, repeats the mix once per BN output columns (E / BN of the product's work), and multiplies at
  the kernel's own rate. With one weight per slot it reads the E layers once per slot and block instead of x.

So fused is taken where one block holds all outputs (no repetition) and the weight is shared; otherwise two steps.
Tables measured on a device (``tables/<device>.json``) go before the rule: rows of layers, slots, width, outputs,
per_slot and rows, each with the plan that was fastest there. No device has been measured yet.
"""

from __future__ import annotations

import functools
import json
import math
import re
from importlib import resources
from typing import Any

import torch

PLANS = ("fused", "two_step")
COLUMNS = 128  # output columns of one program of the fused kernel


@functools.cache
def table(device_name: str) -> tuple[dict[str, Any], ...]:
    """The measured rows for a device, by its name; none where nothing was measured."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    file = resources.files("layalign.ops") / "tables" / f"{name}.json"
    return tuple(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.is_file() else ()


def rule(layers: int, slots: int, width: int, outputs: int, rows: int, per_slot: bool) -> str:
    """The plan for a shape that nobody measured."""
    return "fused" if not per_slot and outputs <= COLUMNS else "two_step"


def measured(
    entries: tuple[dict[str, Any], ...], layers: int, slots: int, width: int, outputs: int, rows: int, per_slot: bool
) -> str | None:
    """The plan of the entry with the same shape and the nearest number of rows (at most a factor of two away)."""
    shape = (layers, slots, width, outputs, per_slot)
    near = [
        (abs(math.log2(entry["rows"] / rows)), entry["plan"])
        for entry in entries
        if (entry["layers"], entry["slots"], entry["width"], entry["outputs"], entry["per_slot"]) == shape
    ]
    best = min(near, default=None)
    return best[1] if best is not None and best[0] <= 1 else None


def plan(layers: int, slots: int, width: int, outputs: int, rows: int, per_slot: bool, device: torch.device) -> str:
    """The plan for a call: measured where it was, else by the rule."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found = measured(table(name), layers, slots, width, outputs, max(rows, 1), per_slot)
    return found or rule(layers, slots, width, outputs, rows, per_slot)
