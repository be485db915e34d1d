"""Triton on a GPU that is not there: its whole way from a launch to the driver, which writes down what it gets.

The compiler is left out, what stands for a compiled kernel holds no code: no number is computed. For a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from layalign.ops import backends

FILES = (
    "gated_cross_attention",
    "gated_cross_attention_backward",
    "gated_cross_attention_decode",
    "layer_mix",
    "layer_projection",
)


class Launched(NamedTuple):
    """One launch; pointers as addresses, ``device`` as the current one."""

    kernel: str
    programs: int
    stream: int
    arguments: dict[str, Any]
    device: int = 0


class Emulated(DriverBase):
    """A driver with two devices.

    Attributes:
        launches: what was launched.
        compiled: how many kernels were asked of the compiler.
        device, stream: the current device, and device 0's current stream; device 1's has the number after it.
    """

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.compiled, self.device, self.stream = 0, 0, 7
        facts = {"max_shared_mem": 232448}
        self.utils = SimpleNamespace(
            load_binary=lambda *_: ("module", 1, 32, 0, 1024), get_device_properties=lambda _: facts
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            names = source.fn.arg_names
            found = {}
            for place, (name, value) in enumerate(zip(names, rest[-len(names) :], strict=True)):
                value = value.data_ptr() if isinstance(value, Tensor) else value
                if name.startswith("p_"):
                    assert (value is None) == (source.signature[name] == "constexpr"), name
                    aligned = ["tt.divisibility", 16] in source.attrs.get((place,), [])
                    assert not aligned or value % 16 == 0, f"{name}: compiled for multiples of 16 bytes"
                found[name] = value
            self.launches.append(Launched(source.fn.__name__, x * y * z, stream, found, self.device))

        return launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device

    def exchange_device(self, device: int) -> int:
        """As ``torch.cuda._exchange_device``."""
        before = self.device
        self.device = before if device < 0 else device
        return before if device >= 0 else -1

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def _compiled(driver: Emulated, source: Any) -> CompiledKernel:
    driver.compiled += 1
    facts = {"name": source.fn.__name__, "shared": 0, "num_warps": 4, "target": driver.get_current_target()}
    kernel: Any = object.__new__(CompiledKernel)
    kernel.metadata = namedtuple("Metadata", facts)(**facts)
    kernel.src, kernel.name, kernel.hash, kernel.packed_metadata = source, facts["name"], "", ()
    kernel.kernel, kernel.metadata_group, kernel.module, kernel.function, kernel._run = b"", {}, None, None, None
    return kernel


@contextmanager
def emulated_triton(patch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """impl="triton" on CPU tensors, by the way that it takes on a GPU."""
    driver = Emulated()
    patch.setattr(triton.compiler, "compile", lambda source, **_: _compiled(driver, source))
    usable = backends._capability
    patch.setattr(backends, "_capability", lambda b, d: (True, "emulated") if b == "triton" else usable(b, d))
    for name in ("_exchange_device", "_maybe_exchange_device"):
        patch.setattr(torch.cuda, name, driver.exchange_device)
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(driver)
    _forget_compiled()
    try:
        yield driver
    finally:
        vars(triton.runtime.driver).update(before)
        _forget_compiled()


def _forget_compiled() -> None:
    for file in FILES:
        for kernel in vars(importlib.import_module(f"layalign_kernels.{file}")).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()


class OnSecond(Tensor):
    """CPU memory that says that it is a second GPU's."""

    device = torch.device("cuda", 1)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return 1


class SecondDevice(TorchFunctionMode):
    """Within the block, a tensor that is asked of the second GPU is an :class:`OnSecond`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") != OnSecond.device:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).as_subclass(OnSecond)
