"""Checks shared by the operations. Every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from layalign.utils.errors import ArgumentError

MAX_LAYERS, MAX_SLOTS = 64, 256  # of one call of a kernel
MAX_SIZE = 2**31 - 1  # of one dimension: kernels index tokens in 32 bits
MAX_ELEMENTS = 2**60 - 1  # of a result: its bytes, 8 per element, are counted in 64 bits
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # not subclasses, which may have no memory of their own
try:
    # Not public. Where another torch lacks one of them, calls only become slower.
    _dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
    _function_modes: Callable[[], int] = torch._C._len_torch_function_stack
    _transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
    _tracing: Callable[[], Any] = torch._C._get_tracing_state
    profiling: Callable[[], bool] = torch.autograd._profiler_enabled
    _ = forward_ad._current_level
    _KNOWN = True
except AttributeError:
    _KNOWN = False


def describe(value: object) -> str:
    """A tensor as ``dtype (shape) on device``, anything else as its type."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        # A nested tensor has no shape.
        shape = "nested" if value.is_nested else tuple(value.shape)
        return f"{layout}{str(value.dtype).removeprefix('torch.')} {shape} on {value.device}"
    return type(value).__name__


def is_plain(value: object) -> bool:
    """Whether ``value`` is a tensor with sizes and strides: sparse, nested, quantised and opaque ones have none."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return not (value.is_nested or value.is_quantized)


def is_floating(value: object) -> bool:
    """Whether ``value`` is a plain tensor of one of :data:`FLOAT_DTYPES`."""
    return is_plain(value) and value.dtype in FLOAT_DTYPES  # type: ignore[attr-defined]


def transforming() -> bool:
    """Whether a functional transform (``torch.func.grad``, ``vmap``, ...) is active.

    Its gradients pass through plain torch only: neither the registered operations nor this library's autograd functions
    support it.
    """
    return _KNOWN and not torch.compiler.is_compiling() and _transforms() is not None


def _watched() -> bool:
    """Whether a mode, trace or transform sees every call that goes through the dispatcher."""
    if not _KNOWN or torch.compiler.is_compiling():
        return True
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or _tracing() is not None
        or forward_ad._current_level >= 0
    )


def can_read_memory(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the memory of a call's tensors may be read without the dispatcher.

    False under ``torch.compile``, ``torch.export``, ``torch.jit.trace``, functional transforms, dispatch and function
    modes and forward-mode differentiation, and where :func:`are_in_memory` is. ``tensors`` are all tensors of the call;
    None stands for an optional one that is absent.
    """
    return not _watched() and are_in_memory(tensors)


def are_in_memory(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the memory of the tensors holds their values: not for subclasses and lazily negated views."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN_TYPES or tensor.is_neg() or tensor._is_zerotensor()):
            return False  # neg, zero: only the dispatcher computes the values
    return True


def require_tensor(name: str, value: object, dims: int, shape_text: str) -> None:
    """A floating tensor with ``dims`` dimensions."""
    if not is_floating(value) or value.dim() != dims:  # type: ignore[attr-defined]
        raise ArgumentError(f"{name}: expected a floating tensor {shape_text}, got {describe(value)}")


def require_addressable(name: str, *sizes: int) -> None:
    """A result of these sizes can be addressed. Whether there is memory for it, the allocation shows."""
    if not torch.compiler.is_compiling() and prod(sizes) > MAX_ELEMENTS:
        raise ArgumentError(f"{name}: expected sizes whose result can be addressed, got one of sizes {tuple(sizes)}")


def require_shape(name: str, value: Tensor, shape: Sequence[int], shape_text: str) -> None:
    """A tensor of exactly ``shape``; ``shape_text`` names its dimensions."""
    if tuple(value.shape) != tuple(shape):
        raise ArgumentError(f"{name}: expected shape {shape_text} = {tuple(shape)}, got {tuple(value.shape)}")


def require_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors on one device."""
    if value.device != other.device:
        raise ArgumentError(f"{name}: expected the device of {other_name} ({other.device}), got {value.device}")


def check_hidden(hidden: object, name: str = "hidden") -> Sequence[Tensor]:
    """E >= 1 floating tensors (B, S, D_e) of one shape, dtype and device."""
    if not isinstance(hidden, (list, tuple)) or not hidden:
        raise ArgumentError(f"{name}: expected a non-empty list of tensors (B, S, D_e), got {describe(hidden)}")
    first = hidden[0]
    require_tensor(f"{name}[0]", first, 3, "(B, S, D_e)")
    shape, dtype, device = first.shape, first.dtype, first.device
    for i, layer in enumerate(hidden):
        if not is_plain(layer) or layer.shape != shape or layer.dtype != dtype or layer.device != device:
            raise ArgumentError(f"{name}[{i}]: expected {describe(first)} like {name}[0], got {describe(layer)}")
    return hidden


def check_mix(hidden: Sequence[Tensor], weight: object, bias: object, prefix: str = "") -> None:
    """The mix's weight (2L, E) and bias (2L,), for these layers."""
    require_tensor(f"{prefix}weight", weight, 2, "(2L, E)")
    assert isinstance(weight, Tensor)
    require_shape(f"{prefix}weight", weight, (weight.shape[0], len(hidden)), "(2L, E)")
    require_same_device(f"{prefix}weight", weight, "hidden[0]", hidden[0])
    require_addressable("hidden", max(weight.shape[0], len(hidden)), *hidden[0].shape)
    if bias is not None:
        require_tensor(f"{prefix}bias", bias, 1, "(2L,)")
        assert isinstance(bias, Tensor)
        require_shape(f"{prefix}bias", bias, (weight.shape[0],), "(2L,)")
        require_same_device(f"{prefix}bias", bias, "hidden[0]", hidden[0])


def check_rows(rows: object, first: Tensor) -> None:
    """Positions (N,) in the flattened (B, S) of the layers, of which ``first`` is one."""
    if not is_plain(rows) or rows.dtype != torch.int64 or rows.dim() != 1:  # type: ignore[attr-defined]
        raise ArgumentError(f"rows: expected int64 positions (N,), got {describe(rows)}")
    require_same_device("rows", rows, "hidden[0]", first)  # type: ignore[arg-type]


def require_rows(rows: Tensor, first: Tensor) -> None:
    """Check that positions of :func:`check_rows` are there and ascend; a GPU asserts it, see :func:`require_true`.

    A kernel would read others from elsewhere, and write the gradient of one that comes twice only once.
    """
    if rows.numel():
        tokens = first.shape[0] * first.shape[1]
        good = (rows[1:] > rows[:-1]).all() & (rows[0] >= 0) & (rows[-1] < tokens)
        require_true(good, "rows: expected ascending positions in the flattened (B, S) of hidden", wait=False)


def select_rows(hidden: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Layers (B, S, D_e) -> copies (1, N, D_e) of the tokens at ``rows``, positions in the flattened (B, S)."""
    return [states.flatten(0, 1).index_select(0, rows)[None] for states in hidden]


def is_sm_100(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of compute capability 10."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 10


def mix_limits(hidden: Sequence[Tensor], weight: Tensor, *rest: object, **options: object) -> tuple[bool, str]:
    """(ok, reason): whether kernels can index a layer mix of these sizes."""
    if len(hidden) > MAX_LAYERS or weight.shape[0] > MAX_SLOTS:
        limit = f"{MAX_LAYERS} layers into {MAX_SLOTS} slots"
        return False, f"it mixes at most {limit}, got {len(hidden)} and {weight.shape[0]}"
    if any(size > MAX_SIZE for size in hidden[0].shape):  # one by one: max() would tie a graph's dynamic sizes
        return False, f"its kernels go up to sizes of {MAX_SIZE}, got {tuple(hidden[0].shape)}"
    return True, ""


ASSERTING = {"cuda"}  # devices that check by themselves while the host goes on


def require_true(good: Tensor, message: str, *, wait: bool = True) -> None:
    """Check a tensor with one bool.

    Args:
        good: it must be true.
        message: the error's text, up to 254 bytes; it names the argument.
        wait: whether the host waits for the device. If not, a GPU asserts it: it prints the message (not with older
            torch) and fails all that comes after, as it does for an index out of range.

    Raises:
        ArgumentError: it is false, and was waited for.
    """
    if not wait and good.device.type in ASSERTING:
        torch._assert_async(good, message)  # type: ignore[no-untyped-call]
    elif not bool(good):
        raise ArgumentError(message)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of products under autocast on the tensor's device; None where autocast is off."""
    kind = tensor.device.type
    if kind == "meta":  # of which torch's functions know nothing
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which torch computes a product of the tensor: autocast does not change float64."""
    return tensor.dtype if tensor.dtype == torch.float64 else autocast_dtype(tensor) or tensor.dtype


def autocast(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors in the autocast dtype where autocast is on, as torch casts the inputs of its own products."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None or tensors[0].dtype == torch.float64:
        return tensors
    return [tensor.to(dtype) for tensor in tensors]


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context without autocast, for a backward that casts its tensors itself."""
    return nullcontext() if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)
