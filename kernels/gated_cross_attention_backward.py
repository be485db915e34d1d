"""Gated cross-attention, backward: dq, dk, dv, dgate from the saved log-sum-exp (dresidual is the incoming gradient).

With p = softmax(q k^T * scale), g the gradient of the output, gate a:

    delta_t = sum_s p_ts (g_t . v_s)      dgate = sum_t delta_t      dv_s = a sum_t p_ts g_t
    e_ts = p_ts (g_t . v_s - delta_t)     dq_t = a scale sum_s e_ts k_s     dk_s = a scale sum_t e_ts q_t

delta is computed here, from p, and not from (out - residual): the gate may be zero, and p @ v is not saved.

Counted as in ``gated_cross_attention``:

- dq kernel: 10 * B * H * T * S * d FLOP (five products: two of them in a first pass for delta; 6 when the source fits
  one block), reads c * B * d * (2 * H * T + 2 * G * S) bytes (the latter part twice, from L2), writes c * B * H * T * d
  and 4 * B * H * T (delta).
- dk/dv kernel: 8 * B * H * T * S * d FLOP, reads c * B * d * (2 * G * S + ceil(S / BN) * 2 * H * T), writes
  c * B * d * 2 * G * S; split over T it also writes and reads 8 * B * G * S * d bytes a split.

A source that fits one block (half precision, S <= 128, d 64 or 128, sm_90) takes one kernel for all, with its keys and
values resident: 10 * B * H * T * S * d FLOP (five products), reads c * B * d * (2 * H * T + 2 * G * S) bytes, writes
c * B * d * (H * T + 2 * G * S).

No tensor of size T x S is stored, and there are no atomics: a program owns its rows of dq, or its block of dk and dv,
for which it loops over the heads and rows of the group. Each program has one number of the gate's gradient; a second
stage sums them. The gate is applied last, so that a small one causes no underflow.

Source: LayAlign, adaptive fusion-enhanced attention; the recomputation from the log-sum-exp is FlashAttention's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from layalign_kernels.common import (
    LOG2E,
    architecture,
    ceil_div,
    dot_precision,
    multiprocessors,
    next_power_of_2,
    offset64,
)
from layalign_kernels.gated_cross_attention_common import (
    Table,
    attended,
    attended_range,
    load_rows,
    padded_head_size,
    pick,
    rows_first,
    scale_base2,
    store_rows,
    strides,
    unit_last,
)
from layalign_kernels.launch import launch

TABLES: dict[str, Table] = {
    "dq": {
        ("half", 64): ((128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        ("half", 128): ((64, 32, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2)),
        ("half", 256): ((64, 32, 8, 1), (64, 32, 8, 2), (64, 32, 8, 2), (32, 16, 4, 2)),
        ("fp32", 64): ((32, 32, 8, 2), (32, 16, 4, 1), (32, 32, 4, 2), (32, 32, 4, 2)),
        ("fp32", 128): ((32, 32, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2), (32, 32, 4, 1)),
        ("fp32", 256): ((16, 16, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 4, 1)),
        ("unaligned", 64): ((16, 32, 8, 2),) * 4,
        ("unaligned", 128): ((16, 16, 8, 2),) * 4,
        ("unaligned", 256): ((16, 16, 8, 2),) * 4,
    },
    "dkv": {
        ("half", 64): ((32, 64, 4, 2), (64, 128, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2)),
        ("half", 128): ((32, 64, 8, 2), (32, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 2)),
        ("half", 256): ((32, 32, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (16, 32, 8, 1)),
        ("fp32", 64): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 4, 1)),
        ("fp32", 128): ((16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 4, 1)),
        ("fp32", 256): ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 4, 1)),
        ("unaligned", 64): ((16, 16, 8, 2),) * 4,
        ("unaligned", 128): ((16, 16, 8, 2),) * 4,
        ("unaligned", 256): ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 4, 2)),
    },
}
# (BM, BN, num_warps, num_stages) of the kernel that keeps the whole source, by (head size, BN >= S): for half precision
# on sm_90, where it compiles without spills.
RESIDENT = {
    (64, 64): (32, 64, 4, 2),
    (64, 128): (32, 128, 8, 2),
    (128, 64): (32, 64, 4, 2),
    (128, 128): (32, 128, 8, 2),
}
Gradients = tuple["torch.Tensor | None", "torch.Tensor | None", "torch.Tensor | None", "torch.Tensor | None"]


@triton.jit
def _block(
    b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o_s, i_end, scale, o_d,
    D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p [BM, BN], g . v [BM, BN] and k [BN, BD] of the source tokens o_s."""
    m_s = tl.full(o_s.shape, True, tl.int1)
    if MASKED:
        m_s = attended(p_mask, stride_ms, o_s, i_end)
    b_k = load_rows(p_k, offset64(o_s, stride_ks), m_s, o_d, D, BD)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_p = tl.exp2(b_s - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_s[None, :], b_p, 0.0)
    b_v = load_rows(p_v, offset64(o_s, stride_vs), m_s, o_d, D, BD)
    b_gv = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
    return b_p, b_gv, b_k


@triton.jit
def _delta(
    b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o_s, i_end, scale, o_d,
    D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the source tokens o_s add to delta, [BM]."""
    b_p, b_gv, _ = _block(
        b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o_s, i_end, scale, o_d, D, BD, MASKED,
        PRECISION,
    )  # fmt: skip
    return tl.sum(b_p * b_gv, 1)


@triton.jit
def _add_dq(
    b_dq, b_delta, b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o_s, i_end, scale, o_d,
    D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [BM, BD], without gate and scale, after the source tokens o_s."""
    b_p, b_gv, b_k = _block(
        b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o_s, i_end, scale, o_d, D, BD, MASKED,
        PRECISION,
    )  # fmt: skip
    b_e = b_p * (b_gv - b_delta[:, None])
    return tl.dot(b_e.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "S", "stride_mb", "stride_ms"])
def gated_cross_attention_dq_kernel(
    p_q, p_k, p_v, p_gate, p_mask, p_lse, p_g, p_dq, p_delta, p_dgate,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_gb, stride_gt, stride_gh, stride_mb, stride_ms, T, S, scale, dq_scale,
    H: tl.constexpr, REP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ONE_BLOCK: tl.constexpr, NEED_DQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one head; delta in a first pass over the source, dq in a second.

    ONE_BLOCK says that S <= BN: then everything is still in registers when delta is known, and one pass is enough.
    """
    i_t = tl.program_id(0) % tl.cdiv(T, BM)
    i_bh = tl.program_id(0) // tl.cdiv(T, BM)
    i_b, i_h = i_bh // H, i_bh % H
    i_g = i_h // REP
    o_d = tl.arange(0, BD)
    o_t = i_t * BM + tl.arange(0, BM)
    m_t = o_t < T
    p_q += offset64(i_b, stride_qb) + offset64(i_h, stride_qh)
    p_g += offset64(i_b, stride_gb) + offset64(i_h, stride_gh)
    p_k += offset64(i_b, stride_kb) + offset64(i_g, stride_kg)
    p_v += offset64(i_b, stride_vb) + offset64(i_g, stride_vg)
    if p_mask is not None:
        p_mask += offset64(i_b, stride_mb)
    # [BM, BD], [BM, BD], [BM]
    b_q = load_rows(p_q, offset64(o_t, stride_qt), m_t, o_d, D, BD)
    b_g = load_rows(p_g, offset64(o_t, stride_gt), m_t, o_d, D, BD)
    b_lse = tl.load(p_lse + offset64(i_bh, T) + o_t, mask=m_t, other=0.0)
    b_delta = tl.zeros([BM], tl.float32)
    b_dq = tl.zeros([BM, BD], tl.float32)
    i_first, i_whole, i_end = attended_range(p_mask, stride_ms, 0, S, BN)
    if ONE_BLOCK:
        for o in range(i_first, tl.minimum(i_end, i_first + 1)):  # once, or never when nothing is attended
            o_s = o + tl.arange(0, BN)
            b_p, b_gv, b_k = _block(
                b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o_s, i_end, scale, o_d, D, BD, True,
                PRECISION,
            )  # fmt: skip
            b_delta = tl.sum(b_p * b_gv, 1)
            if NEED_DQ:
                b_e = b_p * (b_gv - b_delta[:, None])
                b_dq = tl.dot(b_e.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    else:
        WHOLE: tl.constexpr = D == BD and b_q.dtype.primitive_bitwidth == 16  # as in `attend`
        if WHOLE:
            for o in range(i_first, i_whole, BN):
                b_delta += _delta(
                    b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o + tl.arange(0, BN), i_end,
                    scale, o_d, D, BD, False, PRECISION,
                )  # fmt: skip
        else:
            i_whole = i_first
        for o in range(i_whole, i_end, BN):
            b_delta += _delta(
                b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, o + tl.arange(0, BN), i_end, scale,
                o_d, D, BD, True, PRECISION,
            )  # fmt: skip
        if NEED_DQ:
            if WHOLE:
                for o in range(i_first, i_whole, BN):
                    b_dq = _add_dq(
                        b_dq, b_delta, b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms,
                        o + tl.arange(0, BN), i_end, scale, o_d, D, BD, False, PRECISION,
                    )  # fmt: skip
            for o in range(i_whole, i_end, BN):
                b_dq = _add_dq(
                    b_dq, b_delta, b_q, b_g, b_lse, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms,
                    o + tl.arange(0, BN), i_end, scale, o_d, D, BD, True, PRECISION,
                )  # fmt: skip
    tl.store(p_delta + offset64(i_bh, T) + o_t, b_delta, mask=m_t)
    tl.store(p_dgate + tl.program_id(0), tl.sum(b_delta, 0))
    if NEED_DQ:
        b_dq *= tl.load(p_gate).to(tl.float32) * dq_scale
        o_row = (offset64(i_b, T) + o_t) * H + i_h
        store_rows(p_dq, b_dq, o_row * D, m_t, o_d, D, BD)


@triton.jit(do_not_specialize=["B", "T", "S", "stride_mb", "stride_ms", "splits", "blocks"])
def gated_cross_attention_dkv_kernel(
    p_q, p_k, p_v, p_gate, p_mask, p_lse, p_delta, p_g, p_dk, p_dv,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_gb, stride_gt, stride_gh, stride_mb, stride_ms, B, T, S, scale, dk_scale, splits, blocks,
    H: tl.constexpr, REP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN source tokens of one key/value head and ``blocks`` of the (head of the group, T block) pairs."""
    G: tl.constexpr = H // REP
    i_s = tl.program_id(0) % tl.cdiv(S, BN)
    i_rest = tl.program_id(0) // tl.cdiv(S, BN)
    i_split, i_bg = i_rest % splits, i_rest // splits
    i_b, i_g = i_bg // G, i_bg % G
    o_d = tl.arange(0, BD)
    o_s = i_s * BN + tl.arange(0, BN)
    p_k += offset64(i_b, stride_kb) + offset64(i_g, stride_kg)
    p_v += offset64(i_b, stride_vb) + offset64(i_g, stride_vg)
    if p_mask is not None:
        p_mask += offset64(i_b, stride_mb)
    m_s = attended(p_mask, stride_ms, o_s, S)
    # [BN, BD]
    b_k = load_rows(p_k, offset64(o_s, stride_ks), m_s, o_d, D, BD)
    b_v = load_rows(p_v, offset64(o_s, stride_vs), m_s, o_d, D, BD)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    n_t = tl.cdiv(T, BM)
    i_begin = i_split * blocks
    i_stop = tl.minimum(i_begin + blocks, REP * n_t)
    i_stop = tl.where(tl.max(m_s.to(tl.int32), 0) > 0, i_stop, i_begin)  # a block of padding: no iterations
    for i in range(i_begin, i_stop):
        i_h = i_g * REP + i // n_t
        o_t = (i % n_t) * BM + tl.arange(0, BM)
        m_t = o_t < T
        # [BM, BD], [BM]
        b_q = load_rows(
            p_q + offset64(i_b, stride_qb) + offset64(i_h, stride_qh), offset64(o_t, stride_qt), m_t, o_d, D, BD
        )
        b_g = load_rows(
            p_g + offset64(i_b, stride_gb) + offset64(i_h, stride_gh), offset64(o_t, stride_gt), m_t, o_d, D, BD
        )
        o_row = (offset64(i_b, H) + i_h) * T + o_t
        b_lse = tl.load(p_lse + o_row, mask=m_t, other=0.0)
        # [BN, BM]: rows past T have q = g = delta = 0 and add nothing
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        b_p = tl.where(m_s[:, None], tl.exp2(b_s - b_lse[None, :]), 0.0)
        if NEED_DV:
            b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
        if NEED_DK:
            b_delta = tl.load(p_delta + o_row, mask=m_t, other=0.0)
            b_gv = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
            b_e = b_p * (b_gv - b_delta[None, :])
            b_dk = tl.dot(b_e.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    b_gate = tl.load(p_gate).to(tl.float32)
    o_row = ((offset64(i_split, B) + i_b) * S + o_s) * G + i_g
    if NEED_DK:
        store_rows(p_dk, b_dk * (b_gate * dk_scale), o_row * D, o_s < S, o_d, D, BD)
    if NEED_DV:
        store_rows(p_dv, b_dv * b_gate, o_row * D, o_s < S, o_d, D, BD)


@triton.jit(do_not_specialize=["B", "T", "S", "stride_mb", "stride_ms", "splits", "blocks"])
def gated_cross_attention_resident_kernel(
    p_q, p_k, p_v, p_gate, p_mask, p_lse, p_g, p_dq, p_dk, p_dv, p_dgate,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_gb, stride_gt, stride_gh, stride_mb, stride_ms, B, T, S, scale, grad_scale, splits, blocks,
    H: tl.constexpr, REP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: all S <= BN source tokens of one key/value head, for ``blocks`` of the (head, T block) pairs.

    Scores are transposed, [BN, BM]: dk and dv take them from registers as they are.
    """
    G: tl.constexpr = H // REP
    i_split, i_bg = tl.program_id(0) % splits, tl.program_id(0) // splits
    i_b, i_g = i_bg // G, i_bg % G
    o_d, o_s = tl.arange(0, BD), tl.arange(0, BN)
    p_k += offset64(i_b, stride_kb) + offset64(i_g, stride_kg)
    p_v += offset64(i_b, stride_vb) + offset64(i_g, stride_vg)
    if p_mask is not None:
        p_mask += offset64(i_b, stride_mb)
    m_s = attended(p_mask, stride_ms, o_s, S)
    # [BN, BD]
    b_k = load_rows(p_k, offset64(o_s, stride_ks), m_s, o_d, D, BD)
    b_v = load_rows(p_v, offset64(o_s, stride_vs), m_s, o_d, D, BD)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    b_dgate = tl.zeros([BM], tl.float32)
    b_gate = tl.load(p_gate).to(tl.float32)
    n_t = tl.cdiv(T, BM)
    i_begin = i_split * blocks
    for i in range(i_begin, tl.minimum(i_begin + blocks, REP * n_t)):
        i_h = i_g * REP + i // n_t
        o_t = (i % n_t) * BM + tl.arange(0, BM)
        m_t = o_t < T
        # [BM, BD], [BM]; rows past T have q = g = 0 and add nothing
        b_q = load_rows(
            p_q + offset64(i_b, stride_qb) + offset64(i_h, stride_qh), offset64(o_t, stride_qt), m_t, o_d, D, BD
        )
        b_g = load_rows(
            p_g + offset64(i_b, stride_gb) + offset64(i_h, stride_gh), offset64(o_t, stride_gt), m_t, o_d, D, BD
        )
        b_lse = tl.load(p_lse + (offset64(i_b, H) + i_h) * T + o_t, mask=m_t, other=0.0)
        # [BN, BM]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        b_p = tl.where(m_s[:, None], tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_gv = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
        b_delta = tl.sum(b_p * b_gv, 0)
        b_dgate += b_delta
        b_e = (b_p * (b_gv - b_delta[None, :])).to(b_q.dtype)
        if NEED_DV:
            b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
        if NEED_DK:
            b_dk = tl.dot(b_e, b_q, b_dk, input_precision=PRECISION)
        if NEED_DQ:
            # [BD, BM]
            b_dq = tl.dot(tl.trans(b_k), b_e, input_precision=PRECISION) * (b_gate * grad_scale)
            o_row = (offset64(i_b, T) + o_t) * H + i_h
            store_rows(p_dq, tl.trans(b_dq), o_row * D, m_t, o_d, D, BD)
    tl.store(p_dgate + tl.program_id(0), tl.sum(b_dgate, 0))
    o_row = ((offset64(i_split, B) + i_b) * S + o_s) * G + i_g
    if NEED_DK:
        store_rows(p_dk, b_dk * (b_gate * grad_scale), o_row * D, o_s < S, o_d, D, BD)
    if NEED_DV:
        store_rows(p_dv, b_dv * b_gate, o_row * D, o_s < S, o_d, D, BD)


def configuration(kernel: str, size: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    """Block sizes and launch options of ``kernel`` ("dq" or "dkv"): pure in head size, type and architecture."""
    return pick(TABLES[kernel], size, dtype, arch)


def resident_configuration(size: int, source: int, dtype: torch.dtype, arch: str) -> dict[str, int] | None:
    """As :func:`configuration` for the kernel that keeps ``source`` tokens; None where the two others serve."""
    found = RESIDENT.get((size, max(64, next_power_of_2(source))))
    if found is None or source == 0 or dtype == torch.float32 or arch != "sm_90":
        return None
    return dict(zip(("BM", "BN", "num_warps", "num_stages"), found, strict=True))


def splits_over_rows(programs: int, blocks: int, processors: int) -> int:
    """How many programs share the (head, T block) pairs of one block of the source, so that the device is filled.

    At least four pairs stay with a program and at most 16 programs share: each costs a partial result in memory.
    """
    wanted = min(ceil_div(2 * processors, max(1, programs)), max(1, blocks // 4), 16)
    return ceil_div(blocks, ceil_div(blocks, wanted)) if blocks else 1


def gated_cross_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    key_mask: torch.Tensor | None,
    lse: torch.Tensor,
    scale: float | None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
    splits: int | None = None,
) -> Gradients:
    """grad (B, T, H, d) and the forward's arguments -> dq (B, H, T, d), dk and dv (B, G, S, d), dgate like the gate.

    dq, dk and dv are views of (B, T, H, d) and (B, S, G, d) memory, the layout of the projections. Gradients that
    ``needs`` (dq, dk, dv, dgate) excludes are None. ``splits`` overrides :func:`splits_over_rows`.
    """
    if query.numel() == 0:
        dq, dk, dv = (
            rows_first(x).zero_() if need else None for x, need in zip((query, key, value), needs[:3], strict=True)
        )
        return dq, dk, dv, torch.zeros_like(gate) if needs[3] else None
    grad, query, key, value = (unit_last(tensor) for tensor in (grad, query, key, value))
    need_dq, need_dk, need_dv, need_dgate = needs
    batch, heads, length, size = query.shape
    groups, source = key.shape[1], key.shape[2]
    arch = architecture(query.device)
    dq_options, dkv_options = (configuration(kernel, size, query.dtype, arch) for kernel in ("dq", "dkv"))
    resident = resident_configuration(size, source, query.dtype, arch)
    if resident is not None:
        dkv_options = resident
    pairs = heads // groups * ceil_div(length, dkv_options["BM"])  # of a head and a T block
    programs = ceil_div(source, dkv_options["BN"]) * batch * groups
    if splits is None:
        splits = splits_over_rows(programs, pairs, multiprocessors(query.device))
    base2 = scale_base2(scale, size)
    dq, delta, parts = rows_first(query) if need_dq else None, None, None  # parts: of dgate, one a program
    if resident is not None:
        parts = torch.empty(programs * splits, dtype=torch.float32, device=query.device)
    elif need_dq or need_dk or need_dgate:
        delta = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
        parts = delta.new_empty(ceil_div(length, dq_options["BM"]) * batch * heads)
    # (B, G, S, d), in memory (B, S, G, d); if there are several splits (splits, B, G, S, d), fp32.
    dk, dv = (rows_first(key, splits) if need else None for need in (need_dk, need_dv))
    common: dict[str, Any] = dict(
        p_q=query,
        p_k=key,
        p_v=value,
        p_gate=gate,
        p_mask=key_mask,
        p_lse=lse,
        p_g=grad,
        **strides(q=(query, "bht"), k=(key, "bgs"), v=(value, "bgs"), g=(grad, "bth"), m=(key_mask, "bs")),
        T=length,
        S=source,
        scale=base2,
        H=heads,
        REP=heads // groups,
        D=size,
        BD=padded_head_size(size),
        PRECISION=dot_precision(query.dtype),
    )
    over_rows: dict[str, Any] = dict(
        p_dk=dk,
        p_dv=dv,
        B=batch,
        blocks=ceil_div(pairs, splits),
        splits=splits,
        NEED_DK=need_dk,
        NEED_DV=need_dv,
        **dkv_options,
    )
    if resident is not None:
        launch(
            gated_cross_attention_resident_kernel,
            (programs * splits,),
            **common,
            **over_rows,
            p_dq=dq,
            p_dgate=parts,
            grad_scale=base2 / LOG2E,
            NEED_DQ=need_dq,
        )
    elif parts is not None:
        launch(
            gated_cross_attention_dq_kernel,
            (len(parts),),
            **common,
            p_dq=dq,
            p_delta=delta,
            p_dgate=parts,
            dq_scale=base2 / LOG2E,
            ONE_BLOCK=source <= dq_options["BN"],
            NEED_DQ=need_dq,
            **dq_options,
        )
    if resident is None and (need_dk or need_dv) and key.numel():
        launch(
            gated_cross_attention_dkv_kernel,
            (programs * splits,),
            **common,
            **over_rows,
            p_delta=delta,
            dk_scale=base2 / LOG2E,
        )
    if splits > 1:
        dk, dv = (None if x is None else x.transpose(2, 3).sum(0).to(key.dtype).transpose(1, 2) for x in (dk, dv))
    dgate = parts.sum().to(gate.dtype).reshape(gate.shape) if need_dgate and parts is not None else None
    return dq, dk, dv, dgate
