"""Tensors whose rows lie more than 2^31 elements apart: offsets are counted in 64 bits.

Of the memory that is asked for only a few pages are ever touched.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layalign import ops
from layalign.ops import backends

FAR = 2**31 + 64
BACKENDS = [name for name in ("triton", "cuda", "cpp", "torch") if backends.capability(name, "cpu")[0]]


def far_apart(tensor: Tensor, dim: int = 0) -> Tensor:
    """The same numbers, the two parts along ``dim`` 2^31 elements and more from each other."""
    assert tensor.shape[dim] == 2
    try:
        memory = torch.empty(FAR + tensor.numel(), dtype=tensor.dtype)
    except RuntimeError:
        pytest.skip("not even the address space can be had here")
    stride = [FAR if i == dim else step for i, step in enumerate(tensor.contiguous().stride())]
    return memory.as_strided(tensor.shape, stride).copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 20], ids=["decoding", "whole"])
@pytest.mark.parametrize("impl", BACKENDS)
def test_gated_cross_attention_finds_rows_2_31_elements_apart(impl: str, length: int) -> None:
    torch.manual_seed(0)
    query, key, value, residual = (
        torch.randn(2, *shape).half().requires_grad_()
        for shape in ((2, length, 16), (2, 5, 16), (2, 5, 16), (length, 2, 16))
    )
    near = [query, key, value, torch.tensor([0.5]).requires_grad_(), residual]
    mask, weight = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), torch.randn(2, length, 2, 16).half()
    far = [far_apart(query), far_apart(key, 1), far_apart(value), near[3], far_apart(residual)]
    found = []
    for tensors, own_mask, grad in ((near, mask, weight), (far, far_apart(mask), far_apart(weight))):
        out = ops.gated_cross_attention(*tensors, key_mask=own_mask, impl=impl)
        found.append([out, *torch.autograd.grad(out, tensors, grad)])
        with torch.no_grad():
            found[-1].append(ops.gated_cross_attention(*tensors, key_mask=own_mask, impl=impl))
    # torch's products choose their code by the strides, and may then round otherwise: by one place of fp16.
    rounding = 2**-10 if impl == "torch" else 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=rounding, atol=0)


@pytest.mark.parametrize("impl", BACKENDS)
def test_layer_mix_finds_rows_2_31_elements_apart(impl: str) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = [torch.randn(2, 3, 8).half() for _ in range(3)], torch.randn(4, 3), torch.randn(4)
    far = [far_apart(layer) for layer in hidden]
    assert torch.equal(ops.layer_mix(far, weight, bias, impl=impl), ops.layer_mix(hidden, weight, bias, impl=impl))
