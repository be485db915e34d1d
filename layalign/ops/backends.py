"""Which backend serves an operation, and the reason when one does not.

Backends, in the order in which ``impl="auto"`` tries them on a device:

- ``triton``: GPU kernels in ``layalign_kernels`` (or CPU under ``TRITON_INTERPRET=1``);
- ``cuda``, ``cpp``: the compiled extension ``layalign._C``;
- ``torch``: plain PyTorch (:mod:`layalign.reference`), always there.

Nothing is probed at import time.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from layalign.errors import ArgumentError, BackendError

logger = logging.getLogger("layalign")

BACKENDS = ("triton", "cuda", "cpp", "torch")
OPERATIONS = ("layer_mix", "layer_projection", "gated_cross_attention")

# (operation, backend) -> callable with the operation's own signature. An operation's file fills in its row.
_IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., torch.Tensor]] = {}


@dataclass(frozen=True)
class BackendStatus:
    """One line of :func:`report`: is ``name`` usable on ``device_type``, and if not, why."""

    name: str
    available: bool
    reason: str


def register(operation: str, backend: str, function: Callable[..., torch.Tensor]) -> None:
    """Make ``backend`` serve ``operation``."""
    _IMPLEMENTATIONS[operation, backend] = function


@cache
def capability(backend: str, device_type: str) -> tuple[bool, str]:
    """(usable, reason) for ``backend`` on ``device_type`` ("cpu", "cuda", ...), whatever the operation."""
    if backend == "torch":
        return True, "plain PyTorch, always available"
    package = "layalign_kernels" if backend == "triton" else "layalign._C"
    if importlib.util.find_spec(package) is None:
        return False, f"{package} is not part of this installation"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if backend == "cpp" and device_type != "cpu":
        return False, f"the C++ kernels run on the CPU, the tensors are on {device_type}"
    if backend in ("triton", "cuda") and device_type != "cuda":
        return False, f"{backend} kernels need a GPU, the tensors are on {device_type}"
    return True, f"{package} found"


def serves(operation: str, backend: str, device_type: str) -> tuple[bool, str]:
    """(usable, reason) for one operation of one backend."""
    usable, reason = capability(backend, device_type)
    if usable and (operation, backend) not in _IMPLEMENTATIONS:
        return False, f"{backend} has no {operation} in this version"
    return usable, reason


def report(device_type: str | None = None) -> list[BackendStatus]:
    """The state of every backend on ``device_type`` (default: "cuda" where a GPU is visible, else "cpu")."""
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return [BackendStatus(name, *capability(name, device_type)) for name in BACKENDS]


@cache
def choose(operation: str, device_type: str) -> str:
    """The backend that ``impl="auto"`` takes; logged once per operation and device."""
    for backend in BACKENDS:
        usable, _ = serves(operation, backend, device_type)
        if usable:
            logger.info("layalign.%s on %s: backend %s", operation, device_type, backend)
            return backend
    raise BackendError(f"{operation}: no backend serves device type {device_type}")  # torch always does


def dispatch(operation: str, impl: str, device: torch.device, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run ``operation`` with the backend named by ``impl``, or the best one for ``device`` with "auto".

    Raises:
        ArgumentError: ``impl`` is not a backend's name.
        BackendError: the named backend cannot serve the call; the text gives the reason.
    """
    if impl == "auto":
        impl = choose(operation, device.type)
    else:
        if impl not in BACKENDS:
            raise ArgumentError(f"impl: expected 'auto' or one of {', '.join(BACKENDS)}, got {impl!r}")
        usable, reason = serves(operation, impl, device.type)
        if not usable:
            raise BackendError(f"{operation}: impl={impl!r} cannot serve this call: {reason}")
    return _IMPLEMENTATIONS[operation, impl](*args, **kwargs)
