"""Argument checks shared by the operations; every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from layalign.errors import ArgumentError

MAX_LAYERS, MAX_SLOTS = 64, 256  # of one call, for the fused kernels
MIN_TRAINED = 2**18
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """A tensor as ``dtype (shape) on device``, anything else as its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def require_tensor(name: str, value: object, dims: int, shape_text: str) -> None:
    """A floating tensor with ``dims`` dimensions."""
    if not isinstance(value, Tensor) or value.dim() != dims or value.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"{name}: expected a floating tensor {shape_text}, got {describe(value)}")


def require_shape(name: str, value: Tensor, shape: Sequence[int], shape_text: str) -> None:
    """A tensor of exactly ``shape``; ``shape_text`` says what the numbers stand for."""
    if tuple(value.shape) != tuple(shape):
        raise ArgumentError(f"{name}: expected shape {shape_text} = {tuple(shape)}, got {tuple(value.shape)}")


def require_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors on one device."""
    if value.device != other.device:
        raise ArgumentError(f"{name}: expected the device of {other_name} ({other.device}), got {value.device}")


def check_hidden(hidden: object) -> Sequence[Tensor]:
    """E >= 1 floating tensors (B, S, D_e) of one shape, dtype and device."""
    if not isinstance(hidden, (list, tuple)) or not hidden:
        raise ArgumentError(f"hidden: expected a non-empty list of tensors (B, S, D_e), got {describe(hidden)}")
    first = hidden[0]
    require_tensor("hidden[0]", first, 3, "(B, S, D_e)")
    shape, dtype, device = first.shape, first.dtype, first.device
    for i, layer in enumerate(hidden):
        if not isinstance(layer, Tensor) or layer.shape != shape or layer.dtype != dtype or layer.device != device:
            raise ArgumentError(f"hidden[{i}]: expected {describe(first)} like hidden[0], got {describe(layer)}")
    return hidden


def check_mix(hidden: Sequence[Tensor], weight: object, bias: object, prefix: str = "") -> None:
    """The mix's weight (2L, E) and bias (2L,) against the layers they mix."""
    require_tensor(f"{prefix}weight", weight, 2, "(2L, E)")
    assert isinstance(weight, Tensor)
    require_shape(f"{prefix}weight", weight, (weight.shape[0], len(hidden)), "(2L, E)")
    require_same_device(f"{prefix}weight", weight, "hidden[0]", hidden[0])
    if bias is not None:
        require_tensor(f"{prefix}bias", bias, 1, "(2L,)")
        assert isinstance(bias, Tensor)
        require_shape(f"{prefix}bias", bias, (weight.shape[0],), "(2L,)")
        require_same_device(f"{prefix}bias", bias, "hidden[0]", hidden[0])


def is_sm_100(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of compute capability 10."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 10


def kernel_dtype(tensor: Tensor, wide_tiles: bool = False) -> tuple[bool, str]:
    """Whether the fused kernels take a tensor's dtype: (ok, reason).

    Args:
        wide_tiles: the kernel has tiles of 64 rows and more, which Triton 3.7 turns into TF32 on sm_100.
    """
    if tensor.dtype == torch.float64:
        return False, "the kernels compute in float32; float64 is left to impl='torch'"
    exact = tensor.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    if exact and wide_tiles and is_sm_100(tensor.device):
        return False, "on this chip Triton 3.7 would compute float32 products in TF32"
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu":
        return False, "Triton's interpreter computes bfloat16 products wrongly"
    return True, ""


def accepts_mix(backend: str, hidden: Sequence[Tensor], weight: Tensor) -> tuple[bool, str]:
    """Whether a backend's kernels take a layer mix: (ok, reason)."""
    if len(hidden) > MAX_LAYERS or weight.shape[0] > MAX_SLOTS:
        limit = f"{MAX_LAYERS} layers into {MAX_SLOTS} slots"
        return False, f"it mixes at most {limit}, got {len(hidden)} and {weight.shape[0]}"
    if backend == "triton":
        return kernel_dtype(hidden[0], wide_tiles=True)
    from layalign.ops import extension

    return extension.accepts_dtype(hidden[0].dtype)


def cpp_mix_pays(hidden: Sequence[Tensor], weight: Tensor, *rest: object) -> bool:
    """Whether the C++ layer mix beats plain torch: always without gradients, from MIN_TRAINED numbers of x with them.

    Measured on two cores (docs/backends.md): below that, two operations' overhead is more than the kernels save.
    """
    if torch.compiler.is_compiling():
        return True  # whatever the size: asking for it would build one graph for each side of the threshold
    trained = torch.is_grad_enabled() and (weight.requires_grad or any(layer.requires_grad for layer in hidden))
    return not trained or hidden[0].numel() * weight.shape[0] >= MIN_TRAINED


def autocast(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors in the autocast dtype where autocast is on, as torch casts the inputs of its own products."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A block that computes in the dtypes it is given: what a backward casts by hand must not be cast again."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
