"""Kernels whose compiled loops are known by construction, for the tests of ``benchmarks/hot_loops.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def one_product(p_w, p_x, p_out, N, stride_x):
    """An iteration reads [16, 64] bf16, 16 bytes for each of 128 threads, for one product of 64 x 64 x 16."""
    o_m, o_k, o_n = tl.arange(0, 64), tl.arange(0, 16), tl.arange(0, 64)
    b_w = tl.load(p_w + o_m[:, None] * 16 + o_k[None, :])
    b_acc = tl.zeros([64, 64], tl.float32)
    for i in range(0, N, 16):
        b_x = tl.load(p_x + (i + o_k)[:, None] * stride_x + o_n[None, :])
        b_acc = tl.dot(b_w, b_x, b_acc)
    tl.store(p_out + o_m[:, None] * 64 + o_n[None, :], b_acc)


@triton.jit
def two_products(p_w, p_x, p_out, N, stride_x):
    """An iteration has a product whose result is the left side of another one, as in an attention."""
    o_m, o_n = tl.arange(0, 64), tl.arange(0, 128)
    b_w = tl.load(p_w + o_m[:, None] * 128 + o_n[None, :])
    b_acc = tl.zeros([64, 128], tl.float32)
    for i in range(0, N, 64):
        b_x = tl.load(p_x + (i + o_m)[:, None] * stride_x + o_n[None, :])
        b_s = tl.dot(b_w, tl.trans(b_x))
        b_acc = tl.dot(tl.exp2(b_s).to(b_x.dtype), b_x, b_acc)
    tl.store(p_out + o_m[:, None] * 128 + o_n[None, :], b_acc)
