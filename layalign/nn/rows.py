"""Selected positions of a batch, and modules that run for these positions alone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KEYWORD = "layalign_source"  # the argument by which a pass of the LLM hands its source to every layer
Around = Callable[..., Any]  # (forward, *args, **kwargs) -> the result


class Rows:
    """Selected positions of a batch (B, T).

    Args:
        wanted: (B, T) bool. On a GPU the host waits once for their number.

    Attributes:
        shape: (B, T).
        index: (N,) int64, the positions wanted in the flattened batch, ascending.
    """

    def __init__(self, wanted: Tensor) -> None:
        self.shape = wanted.shape
        self.index = wanted.flatten().nonzero().flatten()
        self._copies: dict[torch.device, Tensor] = {}

    @classmethod
    def at(cls, shape: torch.Size, index: Tensor) -> Rows:
        """The positions ``index``, which the caller knows, without waiting for a device."""
        rows = object.__new__(cls)
        rows.shape, rows.index, rows._copies = shape, index, {}
        return rows

    @classmethod
    def last(cls, shape: torch.Size, count: int, device: torch.device) -> Rows:
        """The last ``count`` positions of each sequence, without waiting for a device."""
        batch, length = shape
        begin = torch.arange(batch, device=device)[:, None] * length
        return cls.at(shape, (begin + torch.arange(length - count, length, device=device)).flatten())

    def __len__(self) -> int:
        return self.index.shape[0]

    def index_on(self, device: torch.device) -> Tensor:
        """``index`` on a device, copied once for all layers there."""
        if self.index.device == device:
            return self.index
        if device not in self._copies:
            self._copies[device] = self.index.to(device)
        return self._copies[device]

    def select(self, states: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return states.flatten(0, 1).index_select(0, self.index_on(states.device))[None]

    def spread(self, states: Tensor) -> Tensor:
        """(1, N, ...) -> (B, T, ...), zeros elsewhere."""
        batch = states.new_zeros((self.shape.numel(), *states.shape[2:]))
        return batch.index_copy_(0, self.index_on(states.device), states[0]).unflatten(0, self.shape)

    def of(self, value: Any) -> bool:
        """Whether ``value`` is a tensor (B, T, D, ...) over all positions of the batch."""
        return isinstance(value, Tensor) and value.dim() >= 3 and value.shape[:2] == self.shape


class Front:
    """Stands for a module's forward while one call is in progress, and wraps it. Several fronts form a chain.

    There is no lock: an interrupt could leave it taken and stop every thread. Two threads that begin at the same moment
    may lose one of their fronts, which costs no more than the work it would have saved.
    """

    def __init__(self, module: nn.Module, function: Around) -> None:
        self.module, self.before = module, module.__dict__.get("forward")
        self.function: Around | None = function  # None: the call is over

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.before or functools.partial(type(self.module).forward, self.module)
        function = self.function
        return forward(*args, **kwargs) if function is None else function(forward, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # no call is in progress in a copy
        return {**self.__dict__, "function": None}


def _past(forward: Any, skips: Callable[[Front], bool]) -> Any:
    while type(forward) is Front and skips(forward):
        forward = forward.before
    return forward


def patched_forward(module: nn.Module) -> Any:
    """The forward that was set on this instance of ``module``, not counting calls in progress; None if none was."""
    return _past(module.__dict__.get("forward"), lambda front: True)


@contextmanager
def put_around(module: nn.Module, function: Around) -> Iterator[None]:
    """Within the block, ``function(forward, *args, **kwargs)`` runs in place of ``module``'s forward.

    It applies to all threads, inside the hooks of ``module``. Blocks may begin and end in any order, in any thread:
    each removes its own front.
    """
    front = Front(module, function)
    try:
        module.__dict__["forward"] = front
        yield
    finally:
        front.function = None
        top = module.__dict__.get("forward")
        first = each = _past(top, _is_over)
        while type(each) is Front:
            each.before = each = _past(each.before, _is_over)
        if first is None:
            module.__dict__.pop("forward", None)
        elif first is not top:
            module.__dict__["forward"] = first


def _is_over(front: Front) -> bool:
    return front.function is None


@contextmanager
def running(module: nn.Module, call: Any) -> Iterator[Callable[[], bool]]:
    """Within the block, a function that tells whether ``module`` is running for the pass whose layers get ``call``.

    It is false in other threads, and while ``module`` runs for another pass nested in that one.
    """
    thread, inside = threading.get_ident(), []

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return forward(*args, **kwargs)
        inside.append(kwargs.get(KEYWORD) is call)
        try:
            return forward(*args, **kwargs)
        finally:
            inside.pop()

    with put_around(module, run):
        yield lambda: threading.get_ident() == thread and bool(inside) and inside[-1]


@contextmanager
def only_rows(
    modules: Iterable[nn.Module], rows: Rows, spread: bool = True, active: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Within the block, ``modules`` compute only the positions of ``rows``.

    Args:
        modules: position-wise maps: each position's result depends on this position alone.
        spread: whether the results are put back to (B, T, ...), zeros elsewhere; otherwise they stay (1, N, ...).
        active: asked in every call whether it counts. By default all calls from this thread count.
    """
    thread = threading.get_ident()
    asked = active or (lambda: threading.get_ident() == thread)

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not asked() or not args or not rows.of(args[0]):
            return forward(*args, **kwargs)
        result = forward(rows.select(args[0]), *args[1:], **kwargs)
        return rows.spread(result) if spread else result

    with ExitStack() as blocks:
        for module in modules:
            blocks.enter_context(put_around(module, run))
        yield


@contextmanager
def only_rows_leave(bodies: Iterable[nn.Module], rows: Rows, call: Any) -> Iterator[list[Tensor]]:
    """Within the block, the outermost of ``bodies`` returns only the positions of ``rows`` as its last hidden state.

    This applies to the pass whose layers get ``call``. Other hooks of the module run first and see all positions.

    Args:
        bodies: the modules between an LLM and its list of layers, outermost first.

    Yields:
        A list that receives the result, (1, N, D). It stays empty if no body returns hidden states of the whole batch.
    """
    entered: list[nn.Module] = []
    selected: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get(KEYWORD) is call:
            entered.append(module)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get(KEYWORD) is not call or entered[:1] != [module] or selected:
            return None
        states: Any = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if not rows.of(states):
            return None
        selected.append(rows.select(states))
        if isinstance(output, tuple):
            return (selected[0], *output[1:])
        return type(output)(**{**output, "last_hidden_state": selected[0]})

    with ExitStack() as handles:
        for module in bodies:
            handles.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            handles.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield selected
