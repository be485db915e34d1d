"""Which backend serves an operation, and why another does not.

``impl="auto"`` tries the backends in this order:

- ``triton``: GPU kernels in ``layalign_kernels`` (``triton.py``);
- ``cuda``, ``cpp``: the compiled extension ``layalign._C`` (``cuda.py``, ``cpp.py``);
- those of :func:`register_backend`;
- ``torch``: plain PyTorch (:mod:`layalign.reference`), always available.

Nothing is probed at import time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from layalign.ops import checks, extension
from layalign.ops.backends import triton
from layalign.ops.backends.base import Backend, Implementation, KernelBackend
from layalign.ops.backends.cpp import Cpp
from layalign.ops.backends.cuda import Cuda
from layalign.ops.backends.triton import Triton
from layalign.utils.errors import ArgumentError, BackendError, refuse

logger = logging.getLogger("layalign")

Limits = Callable[..., tuple[bool, str]]


@dataclass(frozen=True)
class Operation:
    """An operation, as its file registers it.

    Attributes:
        plain: its implementation in plain torch.
        by_kernels: its implementation by the launchers of a backend, from the backend's name.
        launchers: names of the launchers that it needs.
        limits: (ok, reason) for a call: whether kernels can index tensors of these sizes.
    """

    plain: Implementation
    by_kernels: Callable[[str], Implementation]
    launchers: tuple[str, ...]
    limits: Limits


@dataclass(frozen=True)
class BackendStatus:
    """One line of :func:`report`: whether the backend ``name`` is usable, and the reason."""

    name: str
    available: bool
    reason: str


_BACKENDS: dict[str, Backend] = {}  # in the order of impl="auto"
_OPERATIONS: dict[str, Operation] = {}
_IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {}  # by operation and backend
_LOGGED: set[tuple[str, str, str]] = set()


def register_backend(backend: Backend, before: str = "torch") -> None:
    """Make ``impl=backend.name`` known in every operation, module and configuration.

    Args:
        backend: a :class:`Backend` or :class:`KernelBackend`.
        before: the backend that ``impl="auto"`` tries next.

    Raises:
        ArgumentError: the name is taken, "auto" or not an identifier; a function is for an operation that does not
            exist; ``before`` is not a backend's name.
    """
    if not isinstance(backend, Backend):
        refuse("backend", "a layalign.ops.backends.Backend", backend)
    name = backend.name
    if not isinstance(name, str) or not name.isidentifier() or name == "auto":
        refuse("backend", "a name that is an identifier and not auto", name)
    if name in _BACKENDS:
        raise ArgumentError(f"backend: expected a new name, got {name!r}; unregister_backend removes a registered one")
    if strange := [operation for operation in backend.functions if operation not in _OPERATIONS]:
        refuse("backend", f"functions for some of {', '.join(_OPERATIONS)}", strange[0])
    if before not in _BACKENDS:
        refuse("before", f"one of {', '.join(_BACKENDS)}", before)
    order = list(_BACKENDS.items())
    order.insert(list(_BACKENDS).index(before), (name, backend))
    _settle(dict(order))


def unregister_backend(name: str) -> None:
    """Remove a backend that :func:`register_backend` added.

    Raises:
        ArgumentError: no registered backend has that name; the library's own cannot be removed.
    """
    if name not in _BACKENDS or name in OWN:
        refuse("name", "a backend added by register_backend", name)
    _settle({each: backend for each, backend in _BACKENDS.items() if each != name})


def define(operation: str, definition: Operation) -> None:
    """Add an operation; its own file calls this."""
    _OPERATIONS[operation] = definition
    _settle(_BACKENDS)


def _settle(registered: dict[str, Backend]) -> None:
    """Replace the tables of backends; calls in other threads see the old ones or the new ones, never a mixture."""
    global _BACKENDS, _IMPLEMENTATIONS
    found: dict[tuple[str, str], Implementation] = {}
    for operation, definition in _OPERATIONS.items():
        for name, backend in registered.items():
            if isinstance(backend, KernelBackend):
                if backend.launchers.keys() >= set(definition.launchers):
                    found[operation, name] = definition.by_kernels(name)
            elif (function := definition.plain if name == "torch" else backend.functions.get(operation)) is not None:
                found[operation, name] = function
    _BACKENDS, _IMPLEMENTATIONS = registered, found
    _capability.cache_clear()


def names() -> tuple[str, ...]:
    """Names of all backends, in the order of ``impl="auto"``."""
    return tuple(_BACKENDS)


def capability(backend: str, device_type: str) -> tuple[bool, str]:
    """(usable, reason) for ``backend`` on ``device_type`` ("cpu", "cuda", ...), for any operation."""
    return _capability(backend, device_type)


# The attribute that torch.compiler.assume_constant_result sets; the decorator itself would import dynamo and triton.
# Set on a plain function: torch 2.11 looks through functools.cache and would trace the body.
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _capability(backend: str, device_type: str) -> tuple[bool, str]:
    return _BACKENDS[backend].usable(device_type)


def get(name: str) -> Backend:
    """The backend of a name."""
    return _BACKENDS[name]


def launcher(backend: str, function: str) -> Callable[..., Any]:
    """The function that launches a backend's kernel.

    All backends have the same names and signatures, so that an operation's schema, fake and gradient are written once.
    """
    return _BACKENDS[backend].launchers[function]  # type: ignore[attr-defined, no-any-return]


def launched(function: str) -> Callable[..., Any]:
    """The implementation of an operation by the launcher ``function`` of the backend, which is its last argument."""

    def run(*arguments: Any) -> Any:
        return launcher(arguments[-1], function)(*arguments[:-1])

    return run


def serves(operation: str, backend: str, device_type: str) -> tuple[bool, str]:
    """(usable, reason) for one operation of one backend, for any arguments."""
    usable, reason = capability(backend, device_type)
    if usable and (operation, backend) not in _IMPLEMENTATIONS:
        return False, f"{backend} has no {operation}"
    return usable, reason


def report(device_type: str | None = None) -> list[BackendStatus]:
    """The state of every backend on ``device_type`` (default: "cuda" where a GPU is visible, else "cpu")."""
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return [BackendStatus(name, *capability(name, device_type)) for name in _BACKENDS]


def choose(operation: str, device_type: str, *args: Any, **kwargs: Any) -> str:
    """The backend that ``impl="auto"`` chooses for these arguments; its first choice is logged.

    It is plain torch in ``torch.export``, because the program may be loaded on another device or without this package,
    and under functional transforms.
    """
    if torch.compiler.is_exporting() or checks.transforming():
        return "torch"
    name = "torch"
    for name, backend in _BACKENDS.items():  # torch is the last
        if device_type in backend.on_request or not serves(operation, name, device_type)[0]:
            continue
        if accepts(operation, name, *args, **kwargs)[0] and backend.pays(operation, *args, **kwargs):
            break
    if not torch.compiler.is_compiling() and (operation, device_type, name) not in _LOGGED:
        _LOGGED.add((operation, device_type, name))
        logger.info("layalign.%s on %s: backend %s", operation, device_type, name)
    return name


def reads_rows(operation: str, impl: str, device_type: str, *args: Any) -> bool:
    """Whether the backend that serves these arguments takes ``rows``: see :class:`KernelBackend`."""
    name = choose(operation, device_type, *args) if impl == "auto" else impl
    return getattr(_BACKENDS.get(name), "reads_rows", False)


def accepts(operation: str, backend: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """(ok, reason): whether a usable ``backend`` takes these arguments of ``operation``."""
    has = _BACKENDS[backend]
    if isinstance(has, KernelBackend):
        states = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        ok, reason = _OPERATIONS[operation].limits(*args, **kwargs)
        if ok:
            ok, reason = has.accepts_dtype(operation, checks.compute_dtype(states), states.device)
        if not ok:
            return ok, reason
    return has.accepts(operation, *args, **kwargs)


def dispatch(operation: str, impl: str, device: torch.device, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run ``operation`` with the backend ``impl``, or with the one that :func:`choose` gives for "auto".

    Raises:
        ArgumentError: ``impl`` is not a backend's name.
        BackendError: the named backend cannot serve the call; the message gives the reason.
    """
    if isinstance(impl, str) and impl == "auto":
        impl = choose(operation, device.type, *args, **kwargs)
    else:
        check_impl(impl)
        usable, reason = serves(operation, impl, device.type)
        if impl != "torch" and checks.transforming():
            usable, reason = False, "functional transforms (torch.func) go through plain torch"
        if usable:
            usable, reason = accepts(operation, impl, *args, **kwargs)
        if not usable:
            raise BackendError(f"{operation}: impl={impl!r} cannot serve this call: {reason}")
    return _IMPLEMENTATIONS[operation, impl](*args, **kwargs)


def check_impl(impl: object) -> None:
    """Raise ArgumentError where ``impl`` is neither "auto" nor a backend's name."""
    if not isinstance(impl, str) or (impl != "auto" and impl not in _BACKENDS):
        refuse("impl", f"'auto' or one of {', '.join(_BACKENDS)}", impl)


class _Torch(Backend):
    """Plain PyTorch: each operation's ``plain``."""

    def usable(self, device_type: str) -> tuple[bool, str]:
        return True, "plain PyTorch, always available"


_BACKENDS["triton"] = Triton("triton", triton.launchers())
_BACKENDS["cuda"] = Cuda("cuda", extension.launchers("cuda"))
_BACKENDS["cpp"] = Cpp("cpp", extension.launchers("cpp"))
_BACKENDS["torch"] = _Torch("torch")
OWN = tuple(_BACKENDS)
