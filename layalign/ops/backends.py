"""Which backend serves an operation, and the reason when one does not.

Backends, in the order in which ``impl="auto"`` tries them on a device:

- ``triton``: GPU kernels in ``layalign_kernels`` (on the CPU only when asked for, under ``TRITON_INTERPRET=1``);
- ``cuda``, ``cpp``: the compiled extension ``layalign._C`` (:mod:`layalign.ops.extension`); ``cuda`` serves CPU tensors
  too where its emulation was asked for, on request only;
- ``torch``: plain PyTorch (:mod:`layalign.reference`), always there.

Nothing is probed at import time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from layalign.ops import dispatch as torch_dispatch
from layalign.utils.errors import BackendError, refuse

logger = logging.getLogger("layalign")

BACKENDS = ("triton", "cuda", "cpp", "torch")
OPERATIONS = ("layer_mix", "layer_projection", "gated_cross_attention")

Implementation = Callable[..., torch.Tensor]
Accepts = Callable[..., tuple[bool, str]]

# An operation's file fills in its row: the callable with the operation's own signature, and what it accepts.
_IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {}
_ACCEPTS: dict[tuple[str, str], Accepts] = {}
_PAYS: dict[tuple[str, str], Callable[..., bool]] = {}
_LOGGED: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class BackendStatus:
    """One line of :func:`report`: is ``name`` usable on ``device_type``, and if not, why."""

    name: str
    available: bool
    reason: str


def register(
    operation: str,
    backend: str,
    function: Implementation,
    accepts: Accepts | None = None,
    pays: Callable[..., bool] | None = None,
) -> None:
    """Make ``backend`` serve ``operation``.

    Args:
        accepts: asked for (ok, reason) with the arguments of each call.
        pays: asked under ``impl="auto"`` only, with the same arguments: whether it is faster than plain torch there.
    """
    _IMPLEMENTATIONS[operation, backend] = function
    if pays is not None:
        _PAYS[operation, backend] = pays
    if accepts is not None:
        _ACCEPTS[operation, backend] = accepts


def interpreting() -> bool:
    """Whether Triton runs its kernels on CPU tensors, in Python (for debugging and tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def capability(backend: str, device_type: str) -> tuple[bool, str]:
    """(usable, reason) for ``backend`` on ``device_type`` ("cpu", "cuda", ...), whatever the operation."""
    return _capability(backend, device_type)


# What torch.compiler.assume_constant_result sets; the decorator itself would import all of dynamo, and triton, here.
# On a plain function: torch 2.11 looks through functools.cache and would trace the body.
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _capability(backend: str, device_type: str) -> tuple[bool, str]:
    if backend == "torch":
        return True, "plain PyTorch, always available"
    if backend in ("cpp", "cuda"):
        from layalign.ops import extension

        return extension.available(backend, device_type)
    if importlib.util.find_spec("layalign_kernels") is None:
        return False, "layalign_kernels is not part of this installation"
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if device_type == "cpu" and interpreting():
        return True, "Triton's interpreter (TRITON_INTERPRET=1), on request only"
    if device_type != "cuda":
        return False, f"triton kernels need a GPU, the tensors are on {device_type}"
    return True, "layalign_kernels found"


def launcher(backend: str, file: str, function: str) -> Callable[..., Any]:
    """The function that launches a backend's kernels; ``file`` is its place in ``layalign_kernels``.

    The same names and signatures everywhere, so that an operation's schema, fake and gradient are written once.
    """
    if backend == "triton":
        return getattr(importlib.import_module(f"layalign_kernels.{file}"), function)  # type: ignore[no-any-return]
    from layalign.ops import extension

    return functools.partial(getattr(extension, function), backend)


def serves(operation: str, backend: str, device_type: str) -> tuple[bool, str]:
    """(usable, reason) for one operation of one backend, before its arguments are looked at."""
    usable, reason = capability(backend, device_type)
    if usable and (operation, backend) not in _IMPLEMENTATIONS:
        return False, f"{backend} has no {operation} in this version"
    return usable, reason


def report(device_type: str | None = None) -> list[BackendStatus]:
    """The state of every backend on ``device_type`` (default: "cuda" where a GPU is visible, else "cpu")."""
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return [BackendStatus(name, *capability(name, device_type)) for name in BACKENDS]


def choose(operation: str, device_type: str, *args: Any, **kwargs: Any) -> str:
    """The backend that ``impl="auto"`` takes for these arguments; logged when it is first taken.

    In ``torch.export`` plain torch: the program may be loaded on another device, or without this package. Under
    functional transforms too.
    """
    if torch.compiler.is_exporting() or torch_dispatch.transforming():
        return "torch"
    for backend in BACKENDS:
        if backend in ("triton", "cuda") and device_type == "cpu":
            continue  # interpreted or emulated, thousands of times slower than torch
        usable, _ = serves(operation, backend, device_type)
        if not usable or not accepts(operation, backend, *args, **kwargs)[0]:
            continue
        pays = _PAYS.get((operation, backend))
        if pays is None or pays(*args, **kwargs):
            break
    if not torch.compiler.is_compiling() and (operation, device_type, backend) not in _LOGGED:
        _LOGGED.add((operation, device_type, backend))
        logger.info("layalign.%s on %s: backend %s", operation, device_type, backend)
    return backend


def accepts(operation: str, backend: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """(ok, reason): whether ``backend`` takes these arguments of ``operation``, once it is usable at all."""
    check = _ACCEPTS.get((operation, backend))
    return (True, "") if check is None else check(*args, **kwargs)


def dispatch(operation: str, impl: str, device: torch.device, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run ``operation`` with the backend named by ``impl``, or the best one for ``device`` with "auto".

    Raises:
        ArgumentError: ``impl`` is not a backend's name.
        BackendError: the named backend cannot serve the call; the text gives the reason.
    """
    if isinstance(impl, str) and impl == "auto":
        impl = choose(operation, device.type, *args, **kwargs)
    else:
        if not isinstance(impl, str) or impl not in BACKENDS:
            refuse("impl", f"'auto' or one of {', '.join(BACKENDS)}", impl)
        usable, reason = serves(operation, impl, device.type)
        if impl != "torch" and torch_dispatch.transforming():
            usable, reason = False, "functional transforms (torch.func) go through plain torch"
        if usable:
            usable, reason = accepts(operation, impl, *args, **kwargs)
        if not usable:
            raise BackendError(f"{operation}: impl={impl!r} cannot serve this call: {reason}")
    return _IMPLEMENTATIONS[operation, impl](*args, **kwargs)
