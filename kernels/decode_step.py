"""EXPERIMENTAL, not measured on a GPU yet: both attentions of one decode step in one launch.

out = softmax(q K^T * scale + bias) V + gate * softmax(q k^T * scale + mask) v, with K, V the self-attention's cache and
k, v the source. One new token a sequence, so causality is the cache's length (or its mask).

Counted for B sequences, H query heads over G key/value heads of size d, C cached and S source tokens, c bytes each:

- 4 * B * H * (C + S) * d FLOP (tiles of 16 rows);
- reads c * B * d * (2 * G * (C + S) + H) bytes and the masks, writes c * B * H * d. Against two launches it saves the
  self-attention's output written and read (2 * c * B * H * d bytes) and one launch a layer.

One program owns a key/value head of a sequence and neither attention is split: it takes B * G of about twice the
processors to fill a device. For small batches over long caches the split kernels are the better choice.

Source: LayAlign, adaptive fusion-enhanced attention, at T = 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from layalign_kernels.ahead_of_time import Entry
from layalign_kernels.attention_tiles import (
    SHIPPED,
    architecture,
    attend,
    load_rows,
    padded_head_size,
    pick,
    scale_base2,
    shipped_entry,
    store_rows,
    strides,
    unit_last,
)
from layalign_kernels.common import ceil_div, dot_precision, offset64
from layalign_kernels.gated_decode import TABLES


def configuration(size: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    """Block sizes and launch options: those of ``gated_decode`` at 16 rows."""
    return pick(TABLES[16], size, dtype, arch)


@triton.jit(
    do_not_specialize=["C", "S", "stride_mb", "stride_ms", "stride_mcb", "stride_mcs", "stride_ab", "stride_ah"]
)
def decode_step_kernel(
    p_q, p_ck, p_cv, p_cache_mask, p_bias, p_k, p_v, p_key_mask, p_gate, p_out,
    stride_qb, stride_qh, stride_cb, stride_cg, stride_cs, stride_eb, stride_eg, stride_es,
    stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_mcb, stride_mcs, stride_ab, stride_ah, stride_as, stride_mb, stride_ms, C, S, scale,
    H: tl.constexpr, REP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM of the heads of one key/value head, over the whole cache and the whole source."""
    G: tl.constexpr = H // REP
    n_r: tl.constexpr = (REP + BM - 1) // BM
    i_r, i_bg = tl.program_id(0) % n_r, tl.program_id(0) // n_r
    i_b, i_g = i_bg // G, i_bg % G
    o_d = tl.arange(0, BD)
    o_r = i_r * BM + tl.arange(0, BM)
    m_r = o_r < REP
    o_h = i_g * REP + o_r
    # [BM, BD]
    b_q = load_rows(p_q + offset64(i_b, stride_qb), offset64(o_h, stride_qh), m_r, o_d, D, BD)
    p_ck += offset64(i_b, stride_cb) + offset64(i_g, stride_cg)
    p_cv += offset64(i_b, stride_eb) + offset64(i_g, stride_eg)
    p_k += offset64(i_b, stride_kb) + offset64(i_g, stride_kg)
    p_v += offset64(i_b, stride_vb) + offset64(i_g, stride_vg)
    if p_cache_mask is not None:
        p_cache_mask += offset64(i_b, stride_mcb)
    if p_bias is not None:
        p_bias += offset64(i_b, stride_ab)
    if p_key_mask is not None:
        p_key_mask += offset64(i_b, stride_mb)
    o_bias = offset64(tl.where(m_r, o_h, 0), stride_ah)
    b_source, _ = attend(
        b_q, p_k, p_v, p_key_mask, None, None, stride_ks, stride_vs, stride_ms, 0, 0, S, scale, o_d, D, BD, BM, BN,
        PRECISION,
    )  # fmt: skip
    b_self, _ = attend(
        b_q, p_ck, p_cv, p_cache_mask, p_bias, o_bias, stride_cs, stride_es, stride_mcs, stride_as, 0, C, scale, o_d,
        D, BD, BM, BN, PRECISION,
    )  # fmt: skip
    b_out = b_self + tl.load(p_gate).to(tl.float32) * b_source
    store_rows(p_out, b_out, (offset64(i_b, H) + o_h) * D, m_r, o_d, D, BD)


def decode_step(
    query: torch.Tensor,
    cache_key: torch.Tensor,
    cache_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    *,
    cache_mask: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Self-attention over the cache plus the gated attention to the source, for one new token.

    Args:
        query: (B, H, 1, d).
        cache_key, cache_value: (B, G, C, d), the new token included.
        key, value: (B, G, S, d), the source, in the query's type like the cache.
        gate: one number, on the device.
        cache_mask: None, bool (B, C), true where attended, or a floating (B or 1, H or 1, 1, C) that is added to the
            scores. A row with nothing to attend (-inf throughout) contributes zero.
        key_mask: (B, S) bool or None.
        scale: factor on both scores, 1 / sqrt(d) by default.

    Returns:
        (B, 1, H, d), contiguous, in the query's type.
    """
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    out = torch.empty((batch, 1, heads, size), dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    query, key, value = unit_last(query), unit_last(key), unit_last(value)
    cache_key, cache_value = unit_last(cache_key), unit_last(cache_value)
    bias = None
    if cache_mask is not None and cache_mask.dtype != torch.bool:
        bias, cache_mask = cache_mask.expand(batch, heads, 1, cache_key.shape[2])[:, :, 0], None
    options = configuration(size, query.dtype, architecture(query.device))
    with torch.cuda.device_of(query):
        decode_step_kernel[(batch * groups * ceil_div(heads // groups, options["BM"]),)](
            p_q=query,
            p_ck=cache_key,
            p_cv=cache_value,
            p_cache_mask=cache_mask,
            p_bias=bias,
            p_k=key,
            p_v=value,
            p_key_mask=key_mask,
            p_gate=gate,
            p_out=out,
            **strides(
                q=(query, "bh"),
                c=(cache_key, "bgs"),
                e=(cache_value, "bgs"),
                k=(key, "bgs"),
                v=(value, "bgs"),
                mc=(cache_mask, "bs"),
                a=(bias, "bhs"),
                m=(key_mask, "bs"),
            ),
            C=cache_key.shape[2],
            S=key.shape[2],
            scale=scale_base2(scale, size),
            H=heads,
            REP=heads // groups,
            D=size,
            BD=padded_head_size(size),
            PRECISION=dot_precision(query.dtype),
            **options,
        )
    return out


def ahead_of_time(arch: str = "sm_90") -> list[Entry]:
    """Every shipped configuration of this file's kernel on ``arch``, a member of ARCHITECTURES."""
    found = []
    for shipped in SHIPPED:
        size, dtype, _ = shipped
        config = configuration(size, dtype, arch)
        for label, absent in (("boolean mask", "p_bias"), ("additive mask", "p_cache_mask")):
            constants = {absent: None}
            types = dict(p_bias="*fp32")
            found.append(shipped_entry(f"decode step {label}", decode_step_kernel, config, shipped, constants, types))
    return found
