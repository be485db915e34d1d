"""Gated cross-attention for decoding: few rows (T <= 16), split over the source. No gradient, no log-sum-exp.

One program reads its share of one key/value head once for all query heads of the group, whose rows are packed into one
tile. Counted as in ``gated_cross_attention``:

- 4 * B * H * T * S * d FLOP (tiles of 16 rows: more on the tensor cores when T * H / G is smaller);
- reads c * B * d * (2 * G * S + 2 * H * T) bytes, B * G * S of the mask; writes c * B * H * T * d; each part of a split
  writes and reads 4 * B * H * T * (d + 1) bytes. Memory- and launch-bound: H * T / G FLOP/byte in bf16 at large S.

It is one launch, or two where the source is split: the second combines the parts, the gate and the residual. There is
no host sync, and no allocation except the output and partial results, so that it can be captured in a CUDA graph.
Padding at either end of a sequence's source is skipped: a short sequence costs little in a batch with long ones.

Source: LayAlign, adaptive fusion-enhanced attention; splitting over keys is Flash-Decoding's.
The reference is ``layalign.reference.gated_cross_attention``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from layalign_kernels.common import architecture, ceil_div, dot_precision, multiprocessors, next_power_of_2, offset64
from layalign_kernels.gated_cross_attention_common import (
    Table,
    attend,
    load_rows,
    padded_head_size,
    pick,
    positive_scale,
    store_rows,
    strides,
    unit_last,
)
from layalign_kernels.launch import Launch

# By the number of packed rows that a program takes.
TABLES: dict[int, Table] = {
    16: {
        ("half", 64): ((16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 4, 3), (16, 64, 4, 3)),
        ("half", 128): ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)),
        ("half", 256): ((16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 2)),
        ("fp32", 64): ((16, 32, 8, 2), (16, 32, 4, 2), (16, 32, 4, 2), (16, 64, 4, 2)),
        ("fp32", 128): ((16, 16, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 32, 4, 2)),
        ("fp32", 256): ((16, 16, 8, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
        ("unaligned", 64): ((16, 32, 4, 2),) * 4,
        ("unaligned", 128): ((16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 4, 2)),
        ("unaligned", 256): ((16, 16, 8, 2),) * 4,
    },
    32: {
        ("half", 64): ((32, 64, 4, 3), (32, 128, 4, 3), (32, 64, 4, 3), (32, 64, 4, 3)),
        ("half", 128): ((32, 64, 4, 3), (32, 64, 4, 3), (32, 64, 4, 3), (32, 64, 4, 2)),
        ("half", 256): ((32, 32, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2)),
    },
    64: {
        ("half", 64): ((64, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 64, 4, 2)),
        ("half", 128): ((64, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2)),
    },
}

# Programs of a split that fit a multiprocessor, by rows: registers and shared memory of bf16, d 128, on sm_90.
PROGRAMS_PER_PROCESSOR = {16: 3, 32: 2, 64: 2}


@triton.jit(do_not_specialize=["B", "T", "S", "stride_mb", "stride_ms", "splits", "span"])
def gated_cross_attention_decode_kernel(
    p_q, p_k, p_v, p_gate, p_residual, p_mask, p_out, p_part, p_lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_sb, stride_st, stride_sh, stride_mb, stride_ms, B, T, S, splits, span, scale,
    H: tl.constexpr, REP: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM of the REP * T rows of one key/value head over ``span`` source tokens."""
    G: tl.constexpr = H // REP
    i_split = tl.program_id(0) % splits
    i_rest = tl.program_id(0) // splits
    n_r = tl.cdiv(REP * T, BM)
    i_r, i_bg = i_rest % n_r, i_rest // n_r
    i_b, i_g = i_bg // G, i_bg % G
    o_d = tl.arange(0, BD)
    o_r = i_r * BM + tl.arange(0, BM)
    m_r = o_r < REP * T
    o_h, o_t = i_g * REP + o_r // T, o_r % T
    p_q += offset64(i_b, stride_qb)
    p_k += offset64(i_b, stride_kb) + offset64(i_g, stride_kg)
    p_v += offset64(i_b, stride_vb) + offset64(i_g, stride_vg)
    if p_mask is not None:
        p_mask += offset64(i_b, stride_mb)
    # [BM, BD]
    b_q = load_rows(p_q, offset64(o_h, stride_qh) + offset64(o_t, stride_qt), m_r, o_d, D, BD)
    o_first = tl.minimum(i_split * span, S)
    b_out, b_lse = attend(
        b_q, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o_first, tl.minimum(o_first + span, S), scale, o_d,
        D, BD, BM, BN, NEGATIVE, PRECISION,
    )  # fmt: skip
    o_row = (offset64(i_b, T) + o_t) * H + o_h
    if not SPLIT:
        b_out *= tl.load(p_gate).to(tl.float32)
        if p_residual is not None:
            p_residual += offset64(i_b, stride_sb)
            o_base = offset64(o_h, stride_sh) + offset64(o_t, stride_st)
            b_out += load_rows(p_residual, o_base, m_r, o_d, D, BD).to(tl.float32)
        store_rows(p_out, b_out, o_row * D, m_r, o_d, D, BD)
    else:
        o_part = offset64(i_split, B) * T * H + o_row
        store_rows(p_part, b_out, o_part * D, m_r, o_d, D, BD)
        tl.store(p_lse + o_part, b_lse, mask=m_r)


@triton.jit(do_not_specialize=["rows", "T", "splits"])
def gated_cross_attention_decode_combine_kernel(
    p_part, p_lse, p_gate, p_residual, p_out, stride_sb, stride_st, stride_sh, rows, T, splits,
    H: tl.constexpr, BP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program: one of the B * T * H rows from its parts, weighted by their log-sum-exp; then gate and residual."""
    i_row = tl.program_id(0)
    o_d, o_p = tl.arange(0, BD), tl.arange(0, BP)
    m_p = o_p < splits
    o_part = offset64(o_p, rows) + i_row
    # [BP], [BP, BD]
    b_lse = tl.load(p_lse + o_part, mask=m_p, other=float("-inf"))
    b_part = load_rows(p_part, o_part * D, m_p, o_d, D, BD)
    b_max = tl.max(b_lse, 0)
    b_w = tl.exp2(b_lse - tl.where(b_max == float("-inf"), 0.0, b_max))
    b_sum = tl.sum(b_w, 0)
    b_out = tl.sum(b_part * b_w[:, None], 0) / tl.where(b_sum > 0.0, b_sum, 1.0)
    b_out *= tl.load(p_gate).to(tl.float32)
    if p_residual is not None:
        i_h, i_t, i_b = i_row % H, (i_row // H) % T, i_row // H // T
        o_base = offset64(i_b, stride_sb) + offset64(i_t, stride_st) + offset64(i_h, stride_sh)
        b_out += tl.load(p_residual + o_base + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    tl.store(p_out + offset64(i_row, D) + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < D)


def configuration(rows: int, size: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    """Block sizes and launch options for ``rows`` = T * H / G packed rows: pure. Wide tiles only in half precision."""
    fits = 16
    if rows > 16 and dtype != torch.float32 and size % 8 == 0:
        fits = 32 if rows <= 32 or size > 128 else 64
    return pick(TABLES[fits], size, dtype, arch)


def splits_over_source(programs: int, source: int, block: int, room: int) -> int:
    """How many programs share one source: as many as run at once (``room``), each with at least two blocks of it.

    No program is left without a block.
    """
    blocks = ceil_div(source, block)
    wanted = max(1, min(room // max(1, programs), ceil_div(blocks, 2), 64))
    return ceil_div(blocks, ceil_div(blocks, wanted)) if blocks else 1


def gated_cross_attention_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float | None,
    splits: int | None = None,
) -> torch.Tensor:
    """(B, H, T, d), twice (B, G, S, d), one number, (B, T, H, d) or None, (B, S) bool or None -> (B, T, H, d).

    Made for small T, but correct for any. Types and strides as in ``gated_cross_attention_forward``; ``splits``
    overrides :func:`splits_over_source`.
    """
    batch, heads, length, size = query.shape
    out = torch.empty((batch, length, heads, size), dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    query, key, value = unit_last(query), unit_last(key), unit_last(value)
    residual = None if residual is None else unit_last(residual)
    for launch in decode_launches(query, key, value, gate, residual, key_mask, scale, out, splits):
        launch()
    return out


def decode_launches(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float | None,
    out: torch.Tensor,
    splits: int | None = None,
) -> list[Launch]:
    """One launch, or two where the source is split, for inputs whose last strides are one."""
    batch, heads, length, size = query.shape
    groups, source = key.shape[1], key.shape[2]
    repeat = heads // groups
    options = configuration(repeat * length, size, query.dtype, architecture(query.device))
    programs = batch * groups * ceil_div(repeat * length, options["BM"])
    if splits is None:
        room = PROGRAMS_PER_PROCESSOR[options["BM"]] * multiprocessors(query.device)
        splits = splits_over_source(programs, source, options["BN"], room)
    span = max(1, ceil_div(ceil_div(source, options["BN"]), splits)) * options["BN"]
    rows = batch * length * heads
    part = lse = None
    if splits > 1:
        part = torch.empty((splits, rows, size), dtype=torch.float32, device=query.device)
        lse = torch.empty((splits, rows), dtype=torch.float32, device=query.device)
    common: dict[str, Any] = dict(
        p_gate=gate, p_residual=residual, p_out=out, T=length, H=heads, splits=splits, D=size,
        BD=padded_head_size(size), p_part=part, p_lse=lse, **strides(s=(residual, "bth")),
    )  # fmt: skip
    own: dict[str, Any] = dict(
        p_q=query,
        p_k=key,
        p_v=value,
        p_mask=key_mask,
        **strides(q=(query, "bht"), k=(key, "bgs"), v=(value, "bgs"), m=(key_mask, "bs")),
        SPLIT=splits > 1,
        B=batch,
        S=source,
        span=span,
        **positive_scale(scale, size),
        REP=repeat,
        PRECISION=dot_precision(query.dtype),
    )
    found = [Launch(gated_cross_attention_decode_kernel, programs * splits, {**own, **common, **options})]
    if splits > 1:
        combine = dict(rows=rows, BP=next_power_of_2(splits), num_warps=1)
        found.append(Launch(gated_cross_attention_decode_combine_kernel, rows, {**combine, **common}))
    return found
