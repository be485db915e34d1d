"""The LLM's own attention in bf16 on a CPU: in float32 where it is trained through, as the LLM has it otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import batch, tiny_model

from layalign.modeling import attention_interface

SEEN: list[torch.dtype] = []


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny one in bf16, whose attention notes the dtypes that it computes in."""
    sdpa = attention_interface.sdpa_attention_forward

    def noted(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        if module in of_the_llm:
            SEEN.append(query.dtype)
        return sdpa(module, query, key, value, mask, **kwargs)

    SEEN.clear()
    made = tiny_model()
    made.encoder.bfloat16()
    made.llm.bfloat16()
    of_the_llm = set(made.llm.modules())
    monkeypatch.setattr(attention_interface, "sdpa_attention_forward", noted)
    monkeypatch.setitem(attention_interface.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", noted)
    return made


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 parts"])
def test_training_attends_in_float32(model: Any, autocast: bool) -> None:
    if not autocast:
        model.bfloat16()
    inputs = batch(model=model, sources=(6, 2, 3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**inputs).loss
    loss.backward()
    assert SEEN and set(SEEN) == {torch.float32}
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)
    SEEN.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        other = model(**inputs).loss
    assert set(SEEN) == {torch.bfloat16}
    torch.testing.assert_close(loss.detach().float(), other.float(), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", [None, torch.bool, torch.bfloat16])
def test_what_it_computes_is_the_attention(kind: torch.dtype | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    module = torch.nn.Module()  # without a mask, attention is causal
    mask = None
    if kind is not None:
        seen = torch.ones(2, 1, 5, 5).tril().bool()
        mask = seen if kind is torch.bool else torch.zeros(2, 1, 5, 5, dtype=kind).masked_fill(~seen, -1e9)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention_interface._in_float32(module, query, key, value, mask, scaling=0.3)
    wide = [each.detach().double().requires_grad_() for each in (query, key, value)]
    scores = wide[0] @ wide[1].mT * 0.3
    scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    expected = (scores.softmax(-1) @ wide[2]).transpose(1, 2)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
    given = torch.randn_like(out)
    out.backward(given)
    expected.backward(given.double())
    for one, other in zip((query, key, value), wide, strict=True):
        largest = float(other.grad.abs().max())
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=2**-7, atol=2**-7 * largest)
