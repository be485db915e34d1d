"""Gated cross-attention, forward: out = residual + gate * softmax(q k^T * scale + mask) v, and its log-sum-exp.

Counted for B sequences, H query heads over G key/value heads of size d, T rows, S source tokens, c bytes an element:

- 4 * B * H * T * S * d FLOP (two products);
- reads c * B * d * (2 * H * T + 2 * G * S) bytes (query and residual, key and value; the latter come from L2 after the
  first of the T blocks), B * S of the mask; writes c * B * H * T * d + 4 * B * H * T (the log-sum-exp).
- bf16, H = G: 2 * S * T / (3 * T + 2 * S) FLOP/byte, 42 at S 64 and T 2048 (memory-bound on an H200), 512 at S 1024
  (compute-bound).

Scores and probabilities stay in registers. The gate is read on the device. Padding of the source at either end is
skipped, and a source that is masked throughout gives ``residual``. Shapes that fit one row block are faster with
``gated_cross_attention_decode``.

Source: LayAlign, adaptive fusion-enhanced attention; the online softmax is FlashAttention's.
The reference is ``layalign.reference.gated_cross_attention``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from layalign_kernels.common import architecture, ceil_div, dot_precision, offset64
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
from layalign_kernels.launch import launch

TABLE: Table = {
    ("half", 64): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 4, 3), (128, 64, 4, 2)),
    ("half", 128): ((128, 32, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
    ("half", 256): ((64, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("fp32", 64): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("fp32", 128): ((32, 32, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2), (32, 32, 8, 2)),
    ("fp32", 256): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
    ("unaligned", 64): ((16, 32, 4, 1),) * 4,
    ("unaligned", 128): ((16, 16, 4, 1),) * 4,
    ("unaligned", 256): ((16, 16, 8, 1),) * 4,
}
# For sources of up to SHORT tokens, by (architecture, padded head size): two programs or more fit a multiprocessor of
# sm_90. They read keys and values twice as often, which is little where these are few.
SHORT = 128
SHORT_TABLE = dict.fromkeys([("sm_90", 64), ("sm_90", 128)], (64, 64, 4, 2))


@triton.jit(do_not_specialize=["T", "S", "stride_mb", "stride_ms"])
def gated_cross_attention_forward_kernel(
    p_q, p_k, p_v, p_gate, p_residual, p_mask, p_out, p_lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_sb, stride_st, stride_sh, stride_mb, stride_ms, T, S, scale,
    H: tl.constexpr, REP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one head. Neighbouring programs share a head's keys and values, which stay in L2."""
    i_t = tl.program_id(0) % tl.cdiv(T, BM)
    i_bh = tl.program_id(0) // tl.cdiv(T, BM)
    i_b, i_h = i_bh // H, i_bh % H
    i_g = i_h // REP
    o_d = tl.arange(0, BD)
    o_t = i_t * BM + tl.arange(0, BM)
    m_t = o_t < T
    p_q += offset64(i_b, stride_qb) + offset64(i_h, stride_qh)
    p_k += offset64(i_b, stride_kb) + offset64(i_g, stride_kg)
    p_v += offset64(i_b, stride_vb) + offset64(i_g, stride_vg)
    if p_mask is not None:
        p_mask += offset64(i_b, stride_mb)
    # [BM, BD]
    b_q = load_rows(p_q, offset64(o_t, stride_qt), m_t, o_d, D, BD)
    b_out, b_lse = attend(
        b_q, p_k, p_v, p_mask, stride_ks, stride_vs, stride_ms, 0, S, scale, o_d, D, BD, BM, BN, NEGATIVE, PRECISION
    )  # fmt: skip
    b_out *= tl.load(p_gate).to(tl.float32)
    if p_residual is not None:
        p_residual += offset64(i_b, stride_sb) + offset64(i_h, stride_sh)
        b_out += load_rows(p_residual, offset64(o_t, stride_st), m_t, o_d, D, BD).to(tl.float32)
    o_row = (offset64(i_b, T) + o_t) * H + i_h
    store_rows(p_out, b_out, o_row * D, m_t, o_d, D, BD)
    tl.store(p_lse + offset64(i_bh, T) + o_t, b_lse, mask=m_t)


def configuration(size: int, dtype: torch.dtype, arch: str, source: int) -> dict[str, int]:
    """Block sizes and launch options of the forward: pure in head size, type, architecture and source tokens."""
    found = SHORT_TABLE.get((arch, padded_head_size(size)))
    if found is not None and source <= SHORT and dtype != torch.float32 and size % 8 == 0:
        return dict(zip(("BM", "BN", "num_warps", "num_stages"), found, strict=True))
    return pick(TABLE, size, dtype, arch)


def gated_cross_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, T, d), twice (B, G, S, d), one number, (B, T, H, d) or None, (B, S) bool or None
    -> out (B, T, H, d) contiguous in the query's type, log-sum-exp (B, H, T) fp32 in base 2.

    Query, key and value have one type, residual and gate any. Strides are free; a tensor whose last one is not 1 is
    copied.
    """
    batch, heads, length, size = query.shape
    out = torch.empty((batch, length, heads, size), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    query, key, value = unit_last(query), unit_last(key), unit_last(value)
    residual = None if residual is None else unit_last(residual)
    options = configuration(size, query.dtype, architecture(query.device), key.shape[2])
    programs = ceil_div(length, options["BM"]) * batch * heads
    launch(
        gated_cross_attention_forward_kernel,
        (programs,),
        p_q=query,
        p_k=key,
        p_v=value,
        p_gate=gate,
        p_residual=residual,
        p_mask=key_mask,
        p_out=out,
        p_lse=lse,
        **strides(q=(query, "bht"), k=(key, "bgs"), v=(value, "bgs"), s=(residual, "bth"), m=(key_mask, "bs")),
        T=length,
        S=key.shape[2],
        **positive_scale(scale, size),
        H=heads,
        REP=heads // key.shape[1],
        D=size,
        BD=padded_head_size(size),
        PRECISION=dot_precision(query.dtype),
        **options,
    )
    return out, lse
