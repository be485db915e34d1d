"""Small pieces shared by the kernels: facts of the device, 64-bit offsets, a table of pointers, numeric modes."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n (1 for n <= 1)."""
    return 1 if n <= 1 else 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for non-negative a and positive b."""
    return -(-a // b)


def dot_precision(dtype: torch.dtype) -> str:
    """Precision mode of ``tl.dot``: fp32 inputs keep full fp32 unless torch itself is allowed TF32."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


@functools.cache
def _device_facts(device_type: str, index: int | None) -> tuple[str, int]:
    if device_type != "cuda":
        return "sm_90", 1  # the interpreter
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    if torch.version.hip is not None:
        return "gfx942", properties.multi_processor_count
    # The sm_80 configurations stay below 99 KB of shared memory: they also serve 8.6, 8.9 and 12.x.
    names = {9: "sm_90", 10: "sm_100"}
    return names.get(properties.major, "sm_80"), properties.multi_processor_count


def architecture(device: torch.device) -> str:
    """The member of ARCHITECTURES whose configurations serve ``device``."""
    return _device_facts(device.type, device.index)[0]


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device`` (1 under the interpreter)."""
    return _device_facts(device.type, device.index)[1]


def aligned16(*tensors: torch.Tensor) -> bool:
    """Whether every row of every tensor starts on 16 bytes, so that loads may be 128 bits wide."""
    return all(
        tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        and tensor.shape[-1] * tensor.element_size() % 16 == 0
        for tensor in tensors
    )


@triton.jit
def offset64(index, stride):
    """index * stride in 64 bits: the cast comes before the multiply, else a large tensor wraps."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, as torch does; a GPU's plain maximum makes it zero."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pointer_table(pointers, E: tl.constexpr, BE: tl.constexpr, DTYPE: tl.constexpr):
    """A block of BE pointers from a tuple of E: layers are read in place, without a stack or a table on the device."""
    # [BE]
    o_e = tl.arange(0, BE)
    p_layers = tl.zeros([BE], tl.int64)
    for i_e in tl.static_range(E):
        p_layers = tl.where(o_e == i_e, pointers[i_e].to(tl.int64), p_layers)
    return p_layers.to(tl.pointer_type(DTYPE))
