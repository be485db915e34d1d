"""Shared by the attention kernels: masked loads, the attended range, the online softmax, and helpers of the launchers.

Scores are in base 2: the scale that is passed in contains log2(e), so a log-sum-exp is ``log2(sum(2 ** score))``. It is
-inf where nothing is attended. Rows and columns outside a tensor, masked source tokens and the padding of the head size
are never read: their loads are masked, not multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from layalign_kernels.common import ARCHITECTURES, LOG2E, next_power_of_2, offset64

MASK_BLOCK = tl.constexpr(1024)

# (kind of element, padded head size) -> (BM, BN, num_warps, num_stages) for each of ARCHITECTURES.
Table = dict[tuple[str, int], tuple[tuple[int, int, int, int], ...]]


@triton.jit
def load_rows(p_x, o_row, m_row, o_d, D: tl.constexpr, BD: tl.constexpr):
    """Rows of D elements at 64-bit offsets o_row, zero where m_row is false and in the padding of the head size."""
    p_rows = p_x + o_row[:, None] + o_d[None, :]
    if D == BD:
        b_x = tl.load(p_rows, mask=m_row[:, None], other=0.0)
    else:
        b_x = tl.load(p_rows, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    return b_x


@triton.jit
def store_rows(p_x, b_x, o_row, m_row, o_d, D: tl.constexpr, BD: tl.constexpr):
    """The counterpart of load_rows, in the type of the memory."""
    p_rows = p_x + o_row[:, None] + o_d[None, :]
    if D == BD:
        tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=m_row[:, None])
    else:
        tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def attended(p_mask, stride_ms, o_s, o_end):
    """[BN] bool: inside the source and attended."""
    m_s = o_s < o_end
    if p_mask is not None:
        m_s = m_s & (tl.load(p_mask + offset64(o_s, stride_ms), mask=m_s, other=0) != 0)
    return m_s


@triton.jit
def attended_range(p_mask, stride_ms, o_first, o_end, BN: tl.constexpr):
    """(first, whole, end) of the attended tokens in [o_first, o_end): padding at either end costs one byte per token.

    In [first, whole) are whole blocks of BN tokens without a hole, which need no mask. first >= end where nothing is
    attended. As bounds of the loops over the source, they spare a branch.
    """
    i_first, i_end, n_s = o_first, o_end, o_end - o_first
    if p_mask is not None:
        i_first, i_end, n_s = o_end, o_first, 0
        for o in range(o_first, o_end, MASK_BLOCK):
            o_s = o + tl.arange(0, MASK_BLOCK)
            m_s = attended(p_mask, stride_ms, o_s, o_end)
            i_first = tl.minimum(i_first, tl.min(tl.where(m_s, o_s, o_end), 0))
            i_end = tl.maximum(i_end, tl.max(tl.where(m_s, o_s + 1, o_first), 0))
            n_s += tl.sum(m_s.to(tl.int32), 0)
    i_whole = tl.where(n_s == i_end - i_first, i_end - n_s % BN, i_first)
    return i_first, i_whole, i_end


@triton.jit
def _attend_block(
    b_q, p_k, p_v, m_s, stride_ks, stride_vs, o_s, scale, o_d, b_max, b_sum, b_acc,
    D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax after one more block of source tokens. b_max is scaled; scale > 0."""
    # [BN, BD]
    b_k = load_rows(p_k, offset64(o_s, stride_ks), m_s, o_d, D, BD)
    # [BM, BN]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if MASKED:
        b_s = tl.where(m_s[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - b_new[:, None])  # b_new is finite: the range starts with an attended column
    b_old = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    b_v = load_rows(p_v, offset64(o_s, stride_vs), m_s, o_d, D, BD)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_acc


@triton.jit
def attend(
    b_q, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o_first, o_end, scale, o_d,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(b_q k^T * scale) v over [o_first, o_end), online: ([BM, BD] fp32, log-sum-exp [BM] in base 2).

    The maximum is taken of the products, so that scale and maximum are one multiply-add per score. Hence scale > 0, and
    NEGATIVE says that it is that of -q.
    """
    # [BM], [BM], [BM, BD]
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    if NEGATIVE:
        b_q = -b_q
    i_first, i_whole, i_end = attended_range(p_mask, stride_ms, o_first, o_end, BN)
    # Loops of their own only where a mask costs as much as the products, and where registers last.
    WHOLE: tl.constexpr = D == BD and b_q.dtype.primitive_bitwidth == 16
    if WHOLE:
        for o in range(i_first, i_whole, BN):
            o_s = o + tl.arange(0, BN)
            m_s = tl.full([BN], True, tl.int1)
            b_max, b_sum, b_acc = _attend_block(
                b_q, p_k, p_v, m_s, stride_ks, stride_vs, o_s, scale, o_d, b_max, b_sum, b_acc, D, BD, False, PRECISION
            )  # fmt: skip
    else:
        i_whole = i_first
    for o in range(i_whole, i_end, BN):
        o_s = o + tl.arange(0, BN)
        m_s = attended(p_mask, stride_ms, o_s, i_end)
        b_max, b_sum, b_acc = _attend_block(
            b_q, p_k, p_v, m_s, stride_ks, stride_vs, o_s, scale, o_d, b_max, b_sum, b_acc, D, BD, True, PRECISION
        )  # fmt: skip
    b_some = b_sum > 0.0
    b_acc = b_acc / tl.where(b_some, b_sum, 1.0)[:, None]
    b_lse = tl.where(b_some, b_max + tl.log2(tl.where(b_some, b_sum, 1.0)), float("-inf"))
    return b_acc, b_lse


def scale_base2(scale: float | None, size: int) -> float:
    """The factor that turns dot products into base-2 scores; 1 / sqrt(size) when ``scale`` is None."""
    return float(size**-0.5 if scale is None else scale) * LOG2E


def positive_scale(scale: float | None, size: int) -> dict[str, Any]:
    """The scale of ``attend`` as keywords of a launch: :func:`scale_base2` as (positive scale, sign)."""
    base2 = scale_base2(scale, size)
    return dict(scale=max(abs(base2), 2.0**-126), NEGATIVE=base2 < 0)  # with zero, a masked score would be NaN


def padded_head_size(size: int) -> int:
    """The head size inside the kernels: a power of two, at least 16, so that ``tl.dot`` takes it."""
    return max(16, next_power_of_2(size))


def pick(table: Table, size: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    """The entry of ``table`` for a head size, a type and an architecture, as keywords of a launch.

    fp32 blocks have fewer than 64 rows: at 64, Triton 3.7 gives an sm_100 the tensor cores' TF32 for "ieee" products.
    """
    itemsize = torch.finfo(dtype).bits // 8
    kind = "unaligned" if size * itemsize % 16 else "fp32" if itemsize == 4 else "half"
    chosen = table[kind, max(64, padded_head_size(size))][ARCHITECTURES.index(arch)]
    return dict(zip(("BM", "BN", "num_warps", "num_stages"), chosen, strict=True))


def unit_last(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself when its last stride is one, else a copy: the kernels take every other stride as it is."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def rows_first(states: torch.Tensor, splits: int = 1) -> torch.Tensor:
    """Empty like ``states`` (B, heads, rows, d), in memory of (B, rows, heads, d), the layout of the projections.

    With several splits there is one such tensor for each, in fp32.
    """
    batch, heads, rows, size = states.shape
    strides = rows * heads * size, size, heads * size, 1
    if splits == 1:
        return torch.empty_strided(states.shape, strides, dtype=states.dtype, device=states.device)
    shape = splits, batch, heads, rows, size
    return torch.empty_strided(shape, (batch * strides[0], *strides), dtype=torch.float32, device=states.device)


def strides(**tensors: tuple[torch.Tensor | None, Sequence[str]]) -> dict[str, int]:
    """``stride_<prefix><letter>`` keywords of a launch: strides(q=(query, "bht")) gives stride_qb, _qh, _qt."""
    found: dict[str, int] = {}
    for prefix, (tensor, letters) in tensors.items():
        for dim, letter in enumerate(letters):
            found[f"stride_{prefix}{letter}"] = 0 if tensor is None else tensor.stride(dim)
    return found
