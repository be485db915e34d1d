"""A launch as data, and the same launch at other addresses without Triton's Python code.

``kernel[grid](...)`` inspects some 40 arguments in every launch. That takes the host several times as long as the
launch itself. In eager decoding, where the GPU waits for the host, it takes longer than the kernel runs. The result of
the inspection depends on the kind of the arguments only. So for calls with other tensors of the same kind, the compiled
kernel and all numbers are kept, and only addresses are passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes; Triton compiles another kernel for other pointers
OLDEST = 3, 4  # the first Triton whose compiled kernels were tested with these arguments


def can_cache_launches() -> bool:
    """Whether launches can be cached: not on AMD's chips, whose kernels depend on the size of a pointer's memory."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= OLDEST and torch.version.hip is None


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """``kernel[grid](**arguments)`` on the device of its tensors, on that device's current stream.

    Triton itself launches on the current device, which cannot read the tensors of another.
    """
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, torch.Tensor))):
        kernel[grid](**arguments)


class Launch(NamedTuple):
    """A launch of ``programs`` programs, with arguments and options by name and pointers as tensors."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def __call__(self) -> None:
        """Launch it by Triton, see :func:`launch`."""
        launch(self.kernel, (self.programs,), **self.arguments)


class CachedLaunch:
    """A launch of which only the addresses change. Made by :meth:`of`."""

    def __init__(self, compiled: CompiledKernel, launch: Launch, pointers: Sequence[str]) -> None:
        self._run = compiled[(launch.programs, 1, 1)]
        tensors = [launch.arguments[name] for name in pointers]
        self._aligned = [i for i, t in enumerate(tensors) if t is not None and t.data_ptr() % ALIGNMENT == 0]
        self._rest = [launch.arguments[name] for name in launch.kernel.arg_names[len(pointers) :]]
        self._device = triton.runtime.driver.active.get_current_device()

    @staticmethod
    def of(launch: Launch) -> CachedLaunch | None:
        """Compile the kernel where that is not done yet, without a launch; None where Triton must launch it.

        The caller has checked :func:`can_cache_launches`. The current device is that of the tensors.
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
        """Whether the addresses are aligned as the kernel was compiled for.

        The caller makes sure that the same ones are None, and that the memory there is of the same kind.
        """
        bits = 0
        for place in self._aligned:
            bits |= addresses[place]  # type: ignore[operator]  # not None where it was aligned
        return bits % ALIGNMENT == 0

    def __call__(self, addresses: Sequence[int | None]) -> None:
        """Launch on the current stream of the kernel's device, at the addresses of its pointers, which :meth:`fits`."""
        driver, device = triton.runtime.driver.active, self._device
        if driver.get_current_device() == device:
            self._run(*addresses, *self._rest, stream=driver.get_current_stream(device))
            return
        with torch.cuda.device(device):
            self._run(*addresses, *self._rest, stream=driver.get_current_stream(device))
