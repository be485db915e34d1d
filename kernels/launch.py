"""A launch as data, and the same launch again at other addresses without Triton's way through Python.

``kernel[grid](...)`` looks at each of some 40 arguments in every launch, which takes the host several times as long as
the launch itself: in eager decoding, where the host is what everything waits for, more than the kernel takes the GPU.
All it finds hangs on the kind of the arguments. So of a call that comes again with other tensors of the same kind, the
compiled kernel and all numbers are kept, and addresses are handed over alone, as Triton's own tutorials do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes; Triton compiles another kernel for a pointer that is not a multiple
OLDEST = 3, 4  # Triton's version from which compiled kernels were seen to take what is handed over here


def can_cache_launches() -> bool:
    """Whether any launch can be repeated here: for AMD's chips kernels hang on the size of a pointer's memory too."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= OLDEST and torch.version.hip is None


class Launch(NamedTuple):
    """One launch of ``programs`` programs; arguments and options by the kernel's names, its pointers as tensors."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def __call__(self) -> None:
        """Let Triton make it, on the current device's current stream."""
        self.kernel[(self.programs,)](**self.arguments)


class CachedLaunch:
    """A launch with everything but its addresses held fast. Use :meth:`of`, which knows where it applies."""

    def __init__(self, compiled: CompiledKernel, launch: Launch, pointers: Sequence[str]) -> None:
        self._run = compiled[(launch.programs, 1, 1)]
        tensors = [launch.arguments[name] for name in pointers]
        self._aligned = [i for i, t in enumerate(tensors) if t is not None and t.data_ptr() % ALIGNMENT == 0]
        self._rest = [launch.arguments[name] for name in launch.kernel.arg_names[len(pointers) :]]
        self._device = triton.runtime.driver.active.get_current_device()

    @staticmethod
    def of(launch: Launch) -> CachedLaunch | None:
        """Compiled by now or here, not launched; None where only Triton can make this launch.

        The caller has asked :func:`can_cache_launches`; the current device is that of the tensors.
        """
        kernel = launch.kernel
        if type(kernel) is not JITFunction or kernel.pre_run_hooks:
            return None
        pointers = [name for name in kernel.arg_names if name.startswith("p_")]
        if pointers != kernel.arg_names[: len(pointers)] or not set(kernel.arg_names) <= launch.arguments.keys():
            return None
        compiled = kernel.warmup(grid=(launch.programs,), **launch.arguments)
        return CachedLaunch(compiled, launch, pointers) if type(compiled) is CompiledKernel else None

    def fits(self, addresses: Sequence[int | None]) -> bool:
        """Whether the compiled kernel takes these addresses, and the device is the one it was compiled for.

        What lies there, and which of them are None, is the caller's business.
        """
        bits = 0
        for place in self._aligned:
            bits |= addresses[place]  # type: ignore[operator]  # given, as all that were aligned
        return bits % ALIGNMENT == 0 and triton.runtime.driver.active.get_current_device() == self._device

    def __call__(self, addresses: Sequence[int | None]) -> None:
        """Launch on the current stream; the addresses are those of the kernel's pointers, in their order, and fit."""
        self._run(*addresses, *self._rest, stream=triton.runtime.driver.active.get_current_stream(self._device))
