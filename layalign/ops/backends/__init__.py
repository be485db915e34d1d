"""Which backend serves an operation, and the reason when one does not.

Backends, in the order in which ``impl="auto"`` tries them on a device:

- ``triton``: GPU kernels in ``layalign_kernels`` (``triton.py``);
- ``cuda``, ``cpp``: the compiled extension ``layalign._C`` (``cuda.py``, ``cpp.py``);
- those of :func:`register_backend`;
- ``torch``: plain PyTorch (:mod:`layalign.reference`), always there.

Nothing is probed at import time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from layalign.ops import checks
from layalign.ops import dispatch as torch_dispatch
from layalign.ops.backends.base import Backend, Implementation, KernelBackend
from layalign.ops.backends.cpp import Cpp
from layalign.ops.backends.cuda import Cuda
from layalign.ops.backends.triton import Triton
from layalign.utils.errors import ArgumentError, BackendError, refuse

logger = logging.getLogger("layalign")

Limits = Callable[..., tuple[bool, str]]


@dataclass(frozen=True)
class Operation:
    """What an operation's file tells of it.

    Attributes:
        plain: in plain torch.
        by_kernels: by the launchers of the backend of a name.
        launchers: those it cannot do without.
        limits: (ok, reason) for the sizes that a call's kernels can count.
    """

    plain: Implementation
    by_kernels: Callable[[str], Implementation]
    launchers: tuple[str, ...]
    limits: Limits


@dataclass(frozen=True)
class BackendStatus:
    """One line of :func:`report`: is ``name`` usable on ``device_type``, and if not, why."""

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
        before: which other one ``impl="auto"`` tries after it.

    Raises:
        ArgumentError: its name is taken, "auto" or no identifier; it has functions for operations that there are not;
            there is no backend called ``before``.
    """
    if not isinstance(backend, Backend):
        refuse("backend", "a layalign.ops.backends.Backend", backend)
    name = backend.name
    if not isinstance(name, str) or not name.isidentifier() or name == "auto":
        refuse("backend", "a name that is an identifier and not auto", name)
    if name in _BACKENDS:
        raise ArgumentError(f"backend: there is one of the name {name!r}; unregister_backend takes one's own away")
    if strange := [operation for operation in backend.functions if operation not in _OPERATIONS]:
        refuse("backend", f"functions for some of {', '.join(_OPERATIONS)}", strange[0])
    if before not in _BACKENDS:
        refuse("before", f"one of {', '.join(_BACKENDS)}", before)
    order = list(_BACKENDS.items())
    order.insert(list(_BACKENDS).index(before), (name, backend))
    _settle(dict(order))


def unregister_backend(name: str) -> None:
    """Take a backend away that :func:`register_backend` brought.

    Raises:
        ArgumentError: there is none of that name, or it is the library's own.
    """
    if name not in _BACKENDS or name in OWN:
        refuse("name", "that of a backend of register_backend", name)
    _settle({each: backend for each, backend in _BACKENDS.items() if each != name})


def define(operation: str, definition: Operation) -> None:
    """Add an operation; its file does it."""
    _OPERATIONS[operation] = definition
    _settle(_BACKENDS)


def _settle(registered: dict[str, Backend]) -> None:
    """Make these the backends; calls in other threads see the tables of before or those of after."""
    global _BACKENDS, _IMPLEMENTATIONS
    found: dict[tuple[str, str], Implementation] = {}
    for operation, definition in _OPERATIONS.items():
        for name, backend in registered.items():
            if isinstance(backend, KernelBackend):
                if _has_kernels(backend, definition):
                    found[operation, name] = definition.by_kernels(name)
            elif (function := definition.plain if name == "torch" else backend.functions.get(operation)) is not None:
                found[operation, name] = function
    _BACKENDS, _IMPLEMENTATIONS = registered, found
    _capability.cache_clear()


def _has_kernels(backend: KernelBackend, definition: Operation) -> bool:
    # Ours are asked for a launcher when it is launched: nothing is imported before.
    return backend.name in OWN or all(backend.launcher(each) is not None for each in definition.launchers)


def names() -> tuple[str, ...]:
    """Of all backends, in the order of ``impl="auto"``."""
    return tuple(_BACKENDS)


def operations() -> tuple[str, ...]:
    """Names of all operations."""
    return tuple(_OPERATIONS)


def capability(backend: str, device_type: str) -> tuple[bool, str]:
    """(usable, reason) for ``backend`` on ``device_type`` ("cpu", "cuda", ...), whatever the operation."""
    return _capability(backend, device_type)


# What torch.compiler.assume_constant_result sets; the decorator itself would import all of dynamo, and triton, here.
# On a plain function: torch 2.11 looks through functools.cache and would trace the body.
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _capability(backend: str, device_type: str) -> tuple[bool, str]:
    return _BACKENDS[backend].usable(device_type)


def get(name: str) -> Backend:
    """The backend of a name."""
    return _BACKENDS[name]


def kernels(name: str) -> KernelBackend:
    """The backend of a name, which has kernels."""
    return _BACKENDS[name]  # type: ignore[return-value]


def launcher(backend: str, function: str) -> Callable[..., Any]:
    """The function that launches a backend's kernels.

    The same names and signatures everywhere, so that an operation's schema, fake and gradient are written once.
    """
    found = kernels(backend).launcher(function)
    if found is None:
        raise BackendError(f"impl={backend!r}: has no {function}")
    return found


def serves(operation: str, backend: str, device_type: str) -> tuple[bool, str]:
    """(usable, reason) for one operation of one backend, before its arguments are looked at."""
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
    """The backend that ``impl="auto"`` takes for these arguments; logged when it is first taken.

    In ``torch.export`` plain torch: the program may be loaded on another device, or without this package. Under
    functional transforms too.
    """
    if torch.compiler.is_exporting() or torch_dispatch.transforming():
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


def accepts(operation: str, backend: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """(ok, reason): whether ``backend`` takes these arguments of ``operation``, once it is usable at all."""
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
    """Run ``operation`` with the backend named by ``impl``, or the best one for ``device`` with "auto".

    Raises:
        ArgumentError: ``impl`` is not a backend's name.
        BackendError: the named backend cannot serve the call; the text gives the reason.
    """
    if isinstance(impl, str) and impl == "auto":
        impl = choose(operation, device.type, *args, **kwargs)
    else:
        check_impl(impl)
        usable, reason = serves(operation, impl, device.type)
        if impl != "torch" and torch_dispatch.transforming():
            usable, reason = False, "functional transforms (torch.func) go through plain torch"
        if usable:
            usable, reason = accepts(operation, impl, *args, **kwargs)
        if not usable:
            raise BackendError(f"{operation}: impl={impl!r} cannot serve this call: {reason}")
    return _IMPLEMENTATIONS[operation, impl](*args, **kwargs)


def check_impl(impl: object) -> None:
    """Raises ArgumentError where `impl` is neither "auto" nor a backend's name."""
    if not isinstance(impl, str) or (impl != "auto" and impl not in _BACKENDS):
        refuse("impl", f"'auto' or one of {', '.join(_BACKENDS)}", impl)


class _Torch(Backend):
    """Plain PyTorch, as each operation's file has it."""

    def usable(self, device_type: str) -> tuple[bool, str]:
        return True, "plain PyTorch, always available"


_BACKENDS.update({each.name: each for each in (Triton("triton"), Cuda("cuda"), Cpp("cpp"), _Torch("torch"))})
OWN = tuple(_BACKENDS)
