"""Layer mix and projection in one kernel: y[j] = relu(sum_e W1[j, e] h[e] + b1[j]) @ W2.T + b2, x never in memory.

Counted for n = B * S rows, 2L slots, E layers, D_e inputs, D_o outputs, c bytes an element:

- the product: 2 * n * 2L * D_e * D_o FLOP; the mix in the prologue adds 2 * n * 2L * E * D_e per block of BN output
  columns, that is E / BN of the product (9% at E 24, BN 256).
- A program holds all slots of BM rows, so it reads E tiles where two kernels would read 2L: the traffic
  of the product's left side falls to E / 2L (3/8 in the paper's set-up), and x (c * n * 2L * D_e bytes) is neither
  written nor read.

Backward recomputes x with the layer-mix kernel and leaves the products to torch (cuBLAS).

Source: LayAlign, layer-wise aligner; the reference is ``layalign.reference.layer_projection``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from layalign_kernels.common import ceil_div, dot_precision, next_power_of_2, offset64, pointer_table, relu
from layalign_kernels.launch import launch
from layalign_kernels.layer_mix import TRITON_DTYPES, same_layout


@triton.jit
def shared_projection_kernel(
    pointers, mix_weight, mix_bias, weight, bias, out, rows, S, D, OUT, slots, stride_b, stride_s,
    E: tl.constexpr, BE: tl.constexpr, BJ: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    HAS_MIX_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BJ slots x BM rows (one tile of BJ * BM) by BN outputs, one weight for all slots."""
    i_row = tl.program_id(0) * BM
    i_j = tl.program_id(2) * BJ
    p_layers = pointer_table(pointers, E, BE, DTYPE)
    o_e, o_j, o_o = tl.arange(0, BE), i_j + tl.arange(0, BJ), tl.program_id(1) * BN + tl.arange(0, BN)
    m_j, m_o = o_j < slots, o_o < OUT
    # [BM * BK]: row and input column of every element of a mixed tile
    o_mk = tl.arange(0, BM * BK)
    o_row = i_row + o_mk // BK
    offset = offset64(o_row // S, stride_b) + offset64(o_row % S, stride_s)
    # [BJ, BE]
    m_w = m_j[:, None] & (o_e < E)[None, :]
    b_mix = tl.load(mix_weight + o_j[:, None] * E + o_e[None, :], mask=m_w, other=0.0).to(DTYPE)
    b_acc = tl.zeros([BJ * BM, BN], tl.float32)
    for i_k in range(0, D, BK):
        o_k = i_k + o_mk % BK
        m_h = (o_e < E)[:, None] & ((o_row < rows) & (o_k < D))[None, :]
        # [BE, BM * BK] -> [BJ, BM * BK]
        b_h = tl.load(p_layers[:, None] + (offset + o_k)[None, :], mask=m_h, other=0.0)
        b_x = tl.dot(b_mix, b_h, input_precision=PRECISION)
        if HAS_MIX_BIAS:
            b_x += tl.load(mix_bias + o_j, mask=m_j, other=0.0).to(tl.float32)[:, None]
        # [BJ * BM, BK]
        b_a = tl.reshape(relu(b_x).to(DTYPE), [BJ * BM, BK])
        o_w = i_k + tl.arange(0, BK)
        # [BK, BN]
        p_w = weight + offset64(o_o, D)[None, :] + o_w[:, None]
        b_w = tl.load(p_w, mask=m_o[None, :] & (o_w < D)[:, None], other=0.0).to(DTYPE)
        b_acc = tl.dot(b_a, b_w, acc=b_acc, input_precision=PRECISION)
    if HAS_BIAS:
        b_acc += tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    # [BJ * BM]: slot and row of every line of the tile
    o_jm = tl.arange(0, BJ * BM)
    o_slot, o_line = i_j + o_jm // BM, i_row + o_jm % BM
    p_y = out + (offset64(o_slot, rows) + o_line)[:, None] * OUT + o_o[None, :]
    m_y = ((o_slot < slots) & (o_line < rows))[:, None] & m_o[None, :]
    tl.store(p_y, b_acc.to(DTYPE), mask=m_y)


def configuration(layers: int, slots: int, outputs: int, itemsize: int) -> dict[str, Any]:
    """Block sizes and launch options: a pure function of the shape and the element size."""
    wide = itemsize == 4
    block_n = max(16, min(next_power_of_2(outputs), 64 if wide else 128))
    block_j = max(16, min(next_power_of_2(slots), 64))
    block_e = max(16, next_power_of_2(layers))
    block_m = max(1, (64 if wide else 128) // block_j)
    warps = 4 if wide else 8
    return dict(BE=block_e, BJ=block_j, BM=block_m, BK=16 if wide else 32, BN=block_n, num_warps=warps, num_stages=2)


def layer_projection_forward(
    hidden: Sequence[torch.Tensor],
    mix_weight: torch.Tensor,
    mix_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """E tensors (B, S, D_e), (2L, E), (2L,) or None, (D_o, D_e), (D_o,) or None -> (2L, B, S, D_o)."""
    hidden = same_layout(hidden)
    first, slots, outputs = hidden[0], mix_weight.shape[0], weight.shape[0]
    batch, length, width = first.shape
    rows = batch * length
    out = torch.empty((slots, batch, length, outputs), dtype=first.dtype, device=first.device)
    if out.numel() == 0:
        return out
    options = configuration(len(hidden), slots, outputs, first.element_size())
    grid = ceil_div(rows, options["BM"]), ceil_div(outputs, options["BN"]), ceil_div(slots, options["BJ"])
    launch(
        shared_projection_kernel,
        grid,
        pointers=hidden,
        mix_weight=mix_weight.contiguous(),
        mix_bias=None if mix_bias is None else mix_bias.contiguous(),
        weight=weight.contiguous(),
        bias=bias if bias is None else bias.contiguous(),
        out=out,
        rows=rows,
        S=length,
        D=width,
        OUT=outputs,
        slots=slots,
        stride_b=first.stride(0),
        stride_s=first.stride(1),
        E=len(hidden),
        HAS_MIX_BIAS=mix_bias is not None,
        HAS_BIAS=bias is not None,
        DTYPE=TRITON_DTYPES[first.dtype],
        PRECISION=dot_precision(first.dtype),
        **options,
    )
    return out
