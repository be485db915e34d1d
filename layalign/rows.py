"""Some positions of a batch, and modules that are called for them alone."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Rows:
    """Positions of a batch (B, T).

    Args:
        wanted: (B, T) bool. On a GPU the host waits here, once, for their number.

    Attributes:
        shape: (B, T).
        index: (N,) int64, the positions wanted in the flattened batch, ascending.
    """

    def __init__(self, wanted: Tensor) -> None:
        self.shape = wanted.shape
        self.index = wanted.flatten().nonzero().flatten()

    @classmethod
    def last(cls, shape: torch.Size, count: int, device: torch.device) -> Rows:
        """The last ``count`` positions of each sequence, without waiting for a device."""
        rows = object.__new__(cls)
        batch, length = shape
        begin = torch.arange(batch, device=device)[:, None] * length
        rows.shape, rows.index = shape, (begin + torch.arange(length - count, length, device=device)).flatten()
        return rows

    def __len__(self) -> int:
        return self.index.shape[0]

    def select(self, states: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return states.flatten(0, 1).index_select(0, self.index.to(states.device))[None]

    def spread(self, states: Tensor) -> Tensor:
        """(1, N, ...) -> (B, T, ...), zeros elsewhere."""
        whole = states.new_zeros((self.shape.numel(), *states.shape[2:]))
        return whole.index_copy(0, self.index.to(states.device), states[0]).unflatten(0, self.shape)

    def of(self, value: Any) -> bool:
        """Whether ``value`` has states of the whole batch."""
        return isinstance(value, Tensor) and value.dim() >= 3 and value.shape[:2] == self.shape


@contextmanager
def only_rows(modules: Iterable[nn.Module], rows: Rows, spread: bool = True) -> Iterator[None]:
    """Within the block, ``modules`` compute only the positions of ``rows`` when this thread calls them.

    Args:
        modules: position-wise maps: each position's result depends on nothing but this position.
        spread: whether the results are put back to (B, T, ...), zeros elsewhere; otherwise they stay (1, N, ...).
    """
    thread = threading.get_ident()
    inside: list[nn.Module] = []

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread or not args or not rows.of(args[0]):
            return None
        inside.append(module)
        return (rows.select(args[0]), *args[1:])

    def put_back(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        if threading.get_ident() != thread or not inside or inside[-1] is not module:
            return None
        inside.pop()
        return rows.spread(result) if spread else None

    with ExitStack() as handles:
        for module in modules:
            handles.callback(module.register_forward_pre_hook(select).remove)
            handles.callback(module.register_forward_hook(put_back).remove)
        yield
