"""Small pieces shared by the kernels: 64-bit offsets, a table of pointers, rounding, numeric modes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


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
