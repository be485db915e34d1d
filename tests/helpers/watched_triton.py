"""Watches what Triton kernels access in the interpreter: only elements of their arguments, no race between programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter

Access = tuple[np.ndarray, int]  # addresses, program


def elements(tensors: list[torch.Tensor]) -> np.ndarray:
    """The sorted addresses of all elements: of a view those that it shows, not those between them."""
    parts = []
    for tensor in tensors:
        offsets = np.zeros(1, dtype=np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
        parts.append(tensor.data_ptr() + offsets * tensor.element_size())
    return np.unique(np.concatenate([*parts, np.zeros(0, dtype=np.int64)]))


def by_program(accesses: list[Access]) -> np.ndarray:
    """The different pairs of an address and a program that accesses it."""
    pairs = [np.stack([addresses, np.full_like(addresses, program)], 1) for addresses, program in accesses]
    return np.unique(np.concatenate([*pairs, np.zeros((0, 2), dtype=np.int64)]), axis=0)


class Watch:
    """In the place of the interpreter's memory; ``problems``: what is wrong, ``kernels``: what ran."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.problems: list[str] = []
        self.kernels: list[str] = []
        self.begin("")

    def begin(self, kernel: str) -> None:
        self.kernels.append(kernel)
        self.tensors: list[torch.Tensor] = []
        self.inside: np.ndarray | None = None
        self.reads: list[Access] = []
        self.writes: list[Access] = []

    def end(self) -> None:
        reads, writes = by_program(self.reads), by_program(self.writes)
        both = np.unique(np.concatenate([writes, reads[np.isin(reads[:, 0], writes[:, 0])]]), axis=0)
        if len(np.unique(writes[:, 0])) < len(writes):
            self.problems.append(f"{self.kernels[-1]}: two programs write one element")
        elif len(np.unique(both[:, 0])) < len(both):
            self.problems.append(f"{self.kernels[-1]}: a program reads what another one writes")

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        if self.inside is None:
            self.inside = elements(self.tensors)
        pointers, mask = np.broadcast_arrays(pointers, mask)
        addresses = pointers[mask.astype(bool)].astype(np.int64)
        place = np.searchsorted(self.inside, addresses).clip(max=len(self.inside) - 1)
        if addresses.size and not (self.inside[place] == addresses).all():
            self.problems.append(f"{self.kernels[-1]}: a {kind} outside of the arguments' elements")
        program = sum(index << (21 * axis) for axis, index in enumerate(interpreter.interpreter_builder.grid_idx))
        (self.reads if kind == "load" else self.writes).append((addresses, program))

    def load(self, pointers: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        self.access("load", pointers, mask)
        return self.memory.load(pointers, mask, *rest)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        self.access("store", pointers, mask)
        return self.memory.store(pointers, value, mask)

    def __getattr__(self, name: str) -> Any:
        assert not name.startswith("atomic"), "atomics are not watched"
        return getattr(self.memory, name)


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch every launch in the interpreter."""
    watch = Watch(interpreter._interpreter)
    convert, call = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def converted(argument: Any) -> Any:
        if hasattr(argument, "data_ptr"):
            watch.tensors.append(argument)
        return convert(argument)

    def called(executor: Any, *arguments: Any, **named: Any) -> Any:
        watch.begin(executor.fn.__name__)
        result = call(executor, *arguments, **named)
        watch.end()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", watch)
        patch.setattr(interpreter, "_implicit_cvt", converted)
        patch.setattr(interpreter.GridExecutor, "__call__", called)
        yield watch
