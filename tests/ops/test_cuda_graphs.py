"""Every GPU kernel can be captured into a CUDA graph: no synchronisation, nothing read back."""

from __future__ import annotations

import pytest
import torch

from layalign import ops, reference
from layalign.ops import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]
BACKENDS = [name for name in ("triton", "cuda") if backends.capability(name, "cuda")[0]]


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("length", [1, 40])
def test_attention_is_captured_and_replayed_on_new_inputs(impl: str, length: int) -> None:
    query = torch.randn(2, 8, length, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(2, 2, 700, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate, mask = torch.tensor([0.7], device="cuda"), torch.rand(2, 700, device="cuda") > 0.3
    call = lambda: ops.gated_cross_attention(query, key, value, gate, key_mask=mask, impl=impl)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        call()  # compiles, and asks the device what it needs to know
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call()
    for seed in range(3):
        torch.manual_seed(seed)
        query.normal_(), key.normal_(), value.normal_()
        gate.fill_(seed - 1)
        graph.replay()
        expected = reference.gated_cross_attention(query, key, value, gate, key_mask=mask)
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_training_step_of_the_mix_is_captured(impl: str) -> None:
    hidden = [torch.randn(2, 64, 256, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    weight = torch.randn(8, 6, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(8, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> tuple[torch.Tensor, ...]:
        out = ops.layer_mix(hidden, weight, bias, impl=impl)
        return torch.autograd.grad(out.float().sum(), (weight, bias))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    hidden[0].normal_()
    graph.replay()
    for replayed, again in zip(found, step(), strict=True):
        assert torch.equal(replayed, again)
