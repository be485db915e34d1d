"""Layer mix: x[j] = relu(sum_e W[j, e] * h[e] + b[j]) for all 2L slots in one read of the E layers.

Counted for n = B * S rows, width D, in elements of the hidden states' type (c bytes each):

- forward: 2 * 2L * E * n * D FLOP; reads c * n * D * E, writes c * n * D * 2L bytes. In bf16 at E 24, 2L 64 that is
  18 FLOP/byte: memory-bound on tensor cores, about compute-bound without them; hence a (2L x E) @ (E x BN) dot.
- backward: as many FLOP for dW and, when asked for, for dh; reads c * n * D * (2L grad + 2L x + E) bytes, dh writes
  c * n * D * E.

The layers are read in place: their addresses are kernel arguments, from which a kernel forms a block of pointers. So
there is no stack, copy or table on the device. Parameter gradients are reduced in two stages, without atomics.

Source: LayAlign, layer-wise aligner; the reference is ``layalign.reference.layer_mix``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from layalign_kernels.common import (
    aligned16,
    ceil_div,
    dot_precision,
    multiprocessors,
    next_power_of_2,
    offset64,
    pointer_table,
    relu,
)
from layalign_kernels.launch import launch

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
AMD = torch.version.hip is not None
PROGRAMS_PER_PROCESSOR = 3  # of the backward reduction: all run at once


@triton.jit
def load_layers(p_layers, o_e, o_n, offset, E: tl.constexpr, D, m_row, ALIGNED: tl.constexpr):
    """[BE, BN]: the columns o_n of all layers at one row's offset; zero outside."""
    p_h = p_layers[:, None] + (offset + o_n)[None, :]
    if ALIGNED:
        p_h = tl.multiple_of(p_h, (1, 16))
    return tl.load(p_h, mask=(o_e < E)[:, None] & (o_n < D)[None, :] & m_row, other=0.0)


@triton.jit
def layer_offset(i_row, m_row, index, S, stride_b, stride_s):
    """Where a row's numbers begin in every layer: the rows are all tokens, or those at the positions ``index``."""
    i_token = i_row
    if index is not None:
        i_token = tl.load(index + i_row, mask=m_row, other=0)
    return offset64(i_token // S, stride_b) + offset64(i_token % S, stride_s)


@triton.jit
def layer_mix_forward_kernel(
    pointers, weight, bias, index, out, rows, S, D, slots, stride_b, stride_s,
    E: tl.constexpr, BE: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN columns of ROWS rows, BJ slots.

    Programs that follow one another have the columns of the same rows, then their next slots: h comes from DRAM once.
    """
    columns = tl.cdiv(D, BN)
    i_n, i_block = tl.program_id(0) % columns, tl.program_id(0) // columns
    i_j, i_first = i_block % tl.cdiv(slots, BJ) * BJ, i_block // tl.cdiv(slots, BJ) * ROWS
    p_layers = pointer_table(pointers, E, BE, DTYPE)
    o_e, o_j, o_n = tl.arange(0, BE), i_j + tl.arange(0, BJ), i_n * BN + tl.arange(0, BN)
    m_j = o_j < slots
    # [BJ, BE], [BJ, 1]
    b_w = tl.load(weight + o_j[:, None] * E + o_e[None, :], mask=m_j[:, None] & (o_e < E)[None, :], other=0.0).to(DTYPE)
    b_b = tl.zeros([BJ, 1], tl.float32)
    if HAS_BIAS:
        b_b = tl.load(bias + o_j, mask=m_j, other=0.0).to(tl.float32)[:, None]
    for i in range(ROWS):
        i_row = i_first + i
        m_row = i_row < rows
        offset = layer_offset(i_row, m_row, index, S, stride_b, stride_s)
        # [BE, BN]
        b_h = load_layers(p_layers, o_e, o_n, offset, E, D, m_row, ALIGNED)
        # [BJ, BN]
        b_x = relu(tl.dot(b_w, b_h, input_precision=PRECISION) + b_b)
        p_x = out + offset64(o_j, rows)[:, None] * D + (offset64(i_row, D) + o_n)[None, :]
        tl.store(p_x, b_x.to(DTYPE), mask=m_j[:, None] & (o_n < D)[None, :] & m_row)


@triton.jit
def load_grad(grad, x, offset_g, offset_x, stride_gj, slot_x, o_j, o_n, m_j, D, m_row):
    """[BJ, BN]: the gradient where the relu passes it, else zero."""
    m_g = m_j[:, None] & (o_n < D)[None, :] & m_row
    b_g = tl.load(grad + offset64(o_j, stride_gj)[:, None] + (offset_g + o_n)[None, :], mask=m_g, other=0.0)
    b_x = tl.load(x + offset64(o_j, slot_x)[:, None] + (offset_x + o_n)[None, :], mask=m_g, other=0.0)
    return tl.where(b_x > 0, b_g, tl.zeros_like(b_g))


@triton.jit
def layer_mix_weight_kernel(
    pointers, grad, x, index, partial_weight, partial_bias, rows, S, D, slots, stride_b, stride_s,
    stride_gj, stride_gb, stride_gs, tiles, tiles_per_program,
    E: tl.constexpr, BE: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr,
    ALIGNED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First stage of dW and db: one program sums its share of the (row, column block) tiles for all slots."""
    i_p = tl.program_id(0)
    p_layers = pointer_table(pointers, E, BE, DTYPE)
    o_e, o_j = tl.arange(0, BE), tl.arange(0, BJ)
    m_j = o_j < slots
    columns = tl.cdiv(D, BN)
    # [BJ, BE], [BJ]
    b_dw = tl.zeros([BJ, BE], tl.float32)
    b_db = tl.zeros([BJ], tl.float32)
    for i in range(tiles_per_program):
        i_tile = i_p * tiles_per_program + i
        i_row = i_tile // columns
        m_row = i_tile < tiles
        o_n = (i_tile % columns) * BN + tl.arange(0, BN)
        offset = layer_offset(i_row, m_row, index, S, stride_b, stride_s)
        if index is not None:  # grad and x have the chosen tokens alone
            offset_g = offset64(i_row, stride_gs)
        else:
            offset_g = offset64(i_row // S, stride_gb) + offset64(i_row % S, stride_gs)
        # [BE, BN], [BJ, BN]
        b_h = load_layers(p_layers, o_e, o_n, offset, E, D, m_row, ALIGNED)
        slot_x = offset64(rows, D)
        b_g = load_grad(grad, x, offset_g, offset64(i_row, D), stride_gj, slot_x, o_j, o_n, m_j, D, m_row).to(DTYPE)
        b_dw = tl.dot(b_g, tl.trans(b_h), acc=b_dw, input_precision=PRECISION)
        b_db += tl.sum(b_g.to(tl.float32), 1)
    p_dw = partial_weight + offset64(i_p, slots * E) + o_j[:, None] * E + o_e[None, :]
    tl.store(p_dw, b_dw, mask=m_j[:, None] & (o_e < E)[None, :])
    tl.store(partial_bias + offset64(i_p, slots) + o_j, b_db, mask=m_j)


@triton.jit
def layer_mix_hidden_kernel(
    grad, x, weight, out, rows, S, D, slots, stride_gj, stride_gb, stride_gs,
    E: tl.constexpr, BE: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh[e] = sum_j W[j, e] * g[j]: BN columns of ROWS rows, all layers; neighbouring programs as in the forward."""
    columns = tl.cdiv(D, BN)
    i_first = tl.program_id(0) // columns * ROWS
    o_e, o_j = tl.arange(0, BE), tl.arange(0, BJ)
    o_n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    m_j = o_j < slots
    # [BE, BJ]
    b_w = tl.load(weight + o_j[None, :] * E + o_e[:, None], mask=m_j[None, :] & (o_e < E)[:, None], other=0.0).to(DTYPE)
    for i in range(ROWS):
        i_row = i_first + i
        m_row = i_row < rows
        offset_g = offset64(i_row // S, stride_gb) + offset64(i_row % S, stride_gs)
        # [BJ, BN], [BE, BN]
        b_g = load_grad(grad, x, offset_g, offset64(i_row, D), stride_gj, offset64(rows, D), o_j, o_n, m_j, D, m_row)
        b_dh = tl.dot(b_w, b_g.to(DTYPE), input_precision=PRECISION)
        p_dh = out + offset64(o_e, rows)[:, None] * D + (offset64(i_row, D) + o_n)[None, :]
        tl.store(p_dh, b_dh.to(DTYPE), mask=(o_e < E)[:, None] & (o_n < D)[None, :] & m_row)


def configuration(layers: int, slots: int, width: int, itemsize: int, kernel: str, amd: bool) -> dict[str, Any]:
    """Block sizes and launch options: a pure function of the shape, the element size and the maker of the chip.

    ``kernel`` is "forward", "weight" or "hidden". The latter two keep all slots in one block, so their columns shrink
    as the slots grow.
    """
    block_e = max(16, next_power_of_2(layers))
    all_slots = max(16, next_power_of_2(slots))
    columns = max(16, next_power_of_2(width))
    half = itemsize == 2 and not amd
    if kernel == "forward":
        block_j = min(all_slots, 64)
        block_n = min(columns, 64 if block_e > 32 and not half else 128)
        warps = 8 if block_j * block_n > (4096 if amd else 2048) and not half else 4
    else:
        block_j = all_slots
        budget = (4096 if itemsize == 2 else 1024) // (2 if block_e > 32 else 1)
        block_n = max(16, min(columns, 64, budget * 2 // all_slots))
        warps = 4 if all_slots <= (64 if half else 32) else 16 if itemsize == 4 and all_slots > 128 and not amd else 8
    found = dict(BE=block_e, BJ=block_j, BN=block_n, num_warps=warps, num_stages=3 if kernel == "weight" else 2)
    # More rows for programs whose weights fit registers beside all else.
    return found if kernel == "weight" else dict(found, ROWS=4 if block_e * block_j * itemsize <= 8192 else 1)


def same_layout(hidden: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The layers with one common set of strides and a unit last one: as they are, or all contiguous."""
    strides = hidden[0].stride()
    if strides[-1] == 1 and all(h.stride() == strides for h in hidden):
        return tuple(hidden)
    return tuple(h.contiguous() for h in hidden)


def _common(hidden: Sequence[torch.Tensor], rows: torch.Tensor | None) -> dict[str, Any]:
    first = hidden[0]
    return dict(
        S=first.shape[1],
        D=first.shape[2],
        rows=first.shape[0] * first.shape[1] if rows is None else len(rows),
        E=len(hidden),
        DTYPE=TRITON_DTYPES[first.dtype],
        PRECISION=dot_precision(first.dtype),
    )


def layer_mix_forward(
    hidden: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """E tensors (B, S, D), (2L, E), (2L,) or None -> (2L, B, S, D), contiguous.

    With ``rows`` (N,) int64, positions in the flattened (B, S): (2L, 1, N, D).
    """
    hidden = same_layout(hidden)
    first, slots = hidden[0], weight.shape[0]
    shape = first.shape[:2] if rows is None else (1, len(rows))
    out = torch.empty((slots, *shape, first.shape[2]), dtype=first.dtype, device=first.device)
    if out.numel() == 0:
        return out
    options = configuration(len(hidden), slots, first.shape[2], first.element_size(), "forward", AMD)
    common = _common(hidden, rows)
    blocks = ceil_div(common["rows"], options["ROWS"]) * ceil_div(slots, options["BJ"])
    launch(
        layer_mix_forward_kernel,
        (blocks * ceil_div(common["D"], options["BN"]),),
        pointers=hidden,
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        index=None if rows is None else rows.contiguous(),
        out=out,
        slots=slots,
        stride_b=first.stride(0),
        stride_s=first.stride(1),
        HAS_BIAS=bias is not None,
        ALIGNED=aligned16(*hidden),
        **common,
        **options,
    )
    return out


def layer_mix_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    hidden: Sequence[torch.Tensor],
    weight: torch.Tensor,
    need_weight: bool,
    need_hidden: bool,
    *,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of weight (2L, E) and bias (2L,), both fp32, and of the layers (E, B, S, D); None where not needed.

    Args:
        grad: (2L, B, S, D), or with ``rows`` (2L, 1, N, D).
        x: the forward's output; its sign says where the relu let through.
        rows: as in the forward. The other tokens' gradients are zero.
    """
    hidden = same_layout(hidden)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    x = x.contiguous()
    first, slots = hidden[0], weight.shape[0]
    shape = len(hidden), slots, first.shape[2], first.element_size()
    common = _common(hidden, rows)
    strides = dict(stride_gj=grad.stride(0), stride_gb=grad.stride(1), stride_gs=grad.stride(2))
    weight_grad = bias_grad = hidden_grad = None
    if need_weight:
        options = configuration(*shape, "weight", AMD)
        tiles = common["rows"] * ceil_div(common["D"], options["BN"])
        per_program = max(1, ceil_div(tiles, PROGRAMS_PER_PROCESSOR * multiprocessors(grad.device)))
        programs = ceil_div(tiles, per_program)
        partial_weight = torch.empty((programs, slots, len(hidden)), dtype=torch.float32, device=grad.device)
        partial_bias = torch.empty((programs, slots), dtype=torch.float32, device=grad.device)
        if programs:
            launch(
                layer_mix_weight_kernel,
                (programs,),
                pointers=hidden,
                grad=grad,
                x=x,
                index=None if rows is None else rows.contiguous(),
                partial_weight=partial_weight,
                partial_bias=partial_bias,
                slots=slots,
                stride_b=first.stride(0),
                stride_s=first.stride(1),
                tiles=tiles,
                tiles_per_program=per_program,
                ALIGNED=aligned16(*hidden),
                **strides,
                **common,
                **options,
            )
        weight_grad, bias_grad = partial_weight.sum(0), partial_bias.sum(0)
    if need_hidden:
        hidden_grad = torch.empty((len(hidden), *x.shape[1:]), dtype=first.dtype, device=first.device)
        if hidden_grad.numel():
            options = configuration(*shape, "hidden", AMD)
            common["S"] = x.shape[2]
            launch(
                layer_mix_hidden_kernel,
                (ceil_div(common["rows"], options["ROWS"]) * ceil_div(common["D"], options["BN"]),),
                grad=grad,
                x=x,
                weight=weight.contiguous(),
                out=hidden_grad,
                slots=slots,
                **strides,
                **common,
                **options,
            )
        if rows is not None:
            whole = hidden_grad.new_zeros((len(hidden), first.shape[0] * first.shape[1], first.shape[2]))
            hidden_grad = whole.index_copy_(1, rows, hidden_grad[:, 0]).unflatten(1, first.shape[:2])
    return weight_grad, bias_grad, hidden_grad
