"""When a call may go straight to its kernels.

A call through ``torch.library`` costs 15 to 20 microseconds in Python and the dispatcher, as much as a decoding step's
kernel itself. It buys what nobody asks for in plain inference: gradients, tracing, modes, subclasses. So where none of
them is at work, the launcher is called; in any doubt the registered operation is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
_WATCHERS: tuple[Callable[[], Any], ...]
try:
    # Not public, so their absence in another torch must only cost speed.
    _WATCHERS = (
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._functorch.peek_interpreter_stack,
        torch._C._get_tracing_state,
        torch.autograd._profiler_enabled,
    )
    _ = forward_ad._current_level
except AttributeError:
    _WATCHERS = ()


def unobserved(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing would notice that a call's registered operation is skipped.

    False under ``torch.compile``, ``torch.export``, ``torch.jit.trace``, functional transforms, dispatch and function
    modes, forward-mode differentiation and the profiler; for a tensor that is a subclass or a lazily negated view; and
    where a gradient is asked for. ``tensors`` are all tensors of the call; None stands for one that was not given.
    """
    if torch.compiler.is_compiling() or not _WATCHERS or any(watch() for watch in _WATCHERS):
        return False
    if forward_ad._current_level >= 0:
        return False
    training = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or (training and tensor.requires_grad):
            return False
        if tensor.is_neg() or tensor._is_zerotensor():
            return False  # its memory does not hold its values: the dispatcher brings them there
    return True
