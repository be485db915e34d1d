"""When a call may go straight to its kernels.

A call through ``torch.library`` costs 15 to 20 microseconds in Python and the dispatcher, as much as a decoding step's
kernel itself. It buys what nobody asks for in plain inference: gradients, tracing, modes, subclasses. So where none of
them is at work, the launcher is called; in any doubt the registered operation is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)
try:
    # Not public, so their absence in another torch must only cost speed.
    _dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
    _function_modes: Callable[[], int] = torch._C._len_torch_function_stack
    _transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
    _tracing: Callable[[], Any] = torch._C._get_tracing_state
    _profiling: Callable[[], bool] = torch.autograd._profiler_enabled
    _ = forward_ad._current_level
    _KNOWN = True
except AttributeError:
    _KNOWN = False


def transforming() -> bool:
    """Whether a functional transform (``torch.func.grad``, ``vmap``, ...) is at work.

    Its gradients pass through plain torch only: neither registered operations nor this library's autograd functions
    have what it asks of them.
    """
    return _KNOWN and not torch.compiler.is_compiling() and _transforms() is not None


def _watched() -> bool:
    """Whether something sees every call that goes through the dispatcher, tensors apart."""
    if not _KNOWN or torch.compiler.is_compiling():
        return True
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or _tracing() is not None
        or forward_ad._current_level >= 0
    )


def plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the memory of a call's tensors may be read past the dispatcher.

    False under ``torch.compile``, ``torch.export``, ``torch.jit.trace``, functional transforms, dispatch and function
    modes and forward-mode differentiation; and for a tensor that is a subclass or a lazily negated view. ``tensors``
    are all tensors of the call; None stands for one that was not given.
    """
    return not _watched() and whole(tensors)


def whole(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the memory of tensors holds their values, as far as the tensors themselves can tell."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_neg() or tensor._is_zerotensor()):
            return False  # neg, zero: the dispatcher brings the values there
    return True


def unprofiled(tensors: Sequence[Tensor | None]) -> bool:
    """:func:`plain`, and no profiler that would show the registered operation by its name."""
    return plain(tensors) and not _profiling()


def unobserved(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing would notice that a call's registered operation is skipped.

    False where its tensors are not :func:`plain`, under the profiler, and where a gradient is asked for.
    """
    if not unprofiled(tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))


def undisturbed() -> bool:
    """Whether nothing here watches calls or profiles."""
    return not (_watched() or _profiling())


def quiet() -> bool:
    """:func:`undisturbed`, and nothing asks for gradients.

    Then :func:`unobserved` hangs on the tensors alone: what many calls of one pass have in common is asked once.
    """
    return undisturbed() and not torch.is_grad_enabled()
