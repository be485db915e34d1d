"""The table of what each backend takes, in docs/backends.md: ``python -m layalign.ops.support`` prints it.

It comes from the backends' own checks, called with tensors that have shapes, dtypes and devices but no memory. So the
answers for a GPU are found on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from layalign.ops import backends, checks
from layalign.utils.pages import print_or_write

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEVICES = {"cpu": ("CPU",), "cuda": ("GPU", "GPU, sm_100")}
BEGIN, END = "<!-- written by `make docs` -->", "<!-- end -->"
TRIED = 1024  # a size accepted up to here counts as without limit


@dataclass(frozen=True)
class Support:
    """One row: what ``backend`` takes of ``operation`` on ``device``; limits are the largest sizes accepted."""

    operation: str
    backend: str
    device: str
    dtypes: dict[str, bool]
    limits: dict[str, int | None]


def _arguments(operation: str, device: str, dtype: torch.dtype, **sizes: int) -> tuple[Any, ...]:
    """Arguments of a call with these sizes; tensors without memory."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    if operation == "gated_cross_attention":
        size = sizes.get("head size", 64)
        return empty(1, 2, 3, size), empty(1, 2, 5, size), empty(1, 2, 5, size), empty(1)
    layers, slots = sizes.get("layers", 4), sizes.get("slots", 4)
    mix = [empty(1, 3, 8)] * layers, empty(slots, layers), empty(slots)
    return mix if operation == "layer_mix" else (*mix, empty(6, 8), None)


def _largest(accepted: Callable[[int], bool]) -> int | None:
    """The largest size up to TRIED that is accepted, by bisection; None if TRIED is."""
    if accepted(TRIED):
        return None
    low, high = 0, TRIED
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if accepted(middle) else (low, middle)
    return low


def _row(operation: str, backend: str, device: str) -> Support:
    kind = "cuda" if device.startswith("GPU") else "cpu"

    def ask(dtype: torch.dtype, **sizes: int) -> bool:
        return backends.accepts(operation, backend, *_arguments(operation, kind, dtype, **sizes))[0]

    def limit(name: str) -> int | None:
        return _largest(lambda size: ask(torch.float16, **{name: size}))

    names = ("head size",) if operation == "gated_cross_attention" else ("layers", "slots")
    with mock.patch.object(checks, "is_sm_100", return_value=device.endswith("sm_100")):
        dtypes = {str(dtype).removeprefix("torch."): ask(dtype) for dtype in DTYPES}
        limits = {name: limit(name) for name in names}
    return Support(operation, backend, device, dtypes, limits)


def rows() -> list[Support]:
    """One row per operation, backend and kind of device; a chip only where its answers differ from other GPUs'."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: list[Support] = []
    with FakeTensorMode():
        for operation in backends.operations():
            for backend in backends.OWN:
                for device in backends.get(backend).devices:
                    asked = [_row(operation, backend, name) for name in DEVICES[device]]
                    same = [row for row in asked[1:] if row == replace(asked[0], device=row.device)]
                    found += [row for row in asked if row not in same]
    return found


def markdown() -> str:
    """The rows as a table."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    lines = [
        f"| operation | backend | device | {' | '.join(names)} | limits |",
        "|" + "---|" * (4 + len(names)),
    ]
    for row in rows():
        answers = " | ".join("yes" if row.dtypes[name] else "-" for name in names)
        limits = ", ".join(f"{name} up to {limit}" for name, limit in row.limits.items() if limit is not None) or "none"
        lines.append(f"| `{row.operation}` | `{row.backend}` | {row.device} | {answers} | {limits} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print_or_write(BEGIN, END, markdown)
