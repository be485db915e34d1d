"""The operations of ``layalign.ops`` as calls, with their baselines, bytes and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layalign import ops, reference
from layalign.ops import backends

REFERENCE, SDPA, FLEX = "reference.py", "SDPA and gate", "FlexAttention and gate"


@dataclass
class Operation:
    """One operation on one set of arguments.

    Attributes:
        call: runs it with the named backend.
        plain: runs reference.py on other leaves, in their dtype.
        baselines: other implementations, by name, including reference.py.
        leaves: tensors to compute gradients for.
        moved, flop: minimum of bytes and operations: (forward, forward and backward).
        auto: returns the backend that ``impl="auto"`` takes, depending on whether gradients are enabled.
    """

    name: str
    call: Callable[[str], Tensor]
    plain: Callable[..., Tensor]
    baselines: dict[str, Callable[[], Tensor]]
    leaves: list[Tensor]
    moved: tuple[float, float]
    flop: tuple[float, float]
    auto: Callable[[], str]
    labels: dict[str, Any] = field(default_factory=dict)
    residual: Tensor | None = None

    def passes(self, impl: str, backward: bool) -> dict[str, Callable[[], Any]]:
        """Ours first, then the baselines: only forward, or with the gradients of all leaves."""
        calls = {impl: lambda: self.call(impl), **self.baselines}
        if not backward:
            return {name: torch.no_grad()(call) for name, call in calls.items()}
        grad = torch.randn_like(self.call(impl))

        def both(call: Callable[[], Tensor]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(call(), self.leaves, grad)

        return {name: both(call) for name, call in calls.items()}


def _random(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def _grid(*shape: int, step: float, device: str, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Random multiples of ``step``, plus ``shift``.

    With them the layer mix is exact in fp32 and never zero. Otherwise the ReLU could cut a sum near zero in one
    implementation and not in another. Both would be right, but their gradients would differ.
    """
    return ((torch.randn(*shape, device=device) * (scale / step)).round() * step + shift).to(dtype)


def _sums(unit: int, numbers: Sequence[float]) -> tuple[float, float]:
    """(forward, backward) -> (forward, forward + backward), times ``unit``."""
    return unit * numbers[0], unit * sum(numbers)


def layers(
    name: str, batch: int, length: int, sizes: tuple[int, int, int, int], device: str, dtype: torch.dtype
) -> Operation:
    """``layer_mix`` or ``layer_projection`` of (B, S) with sizes (E, 2L, D_e, D_l); the encoder's states are frozen."""
    count, slots, width, out = sizes
    torch.manual_seed(0)
    hidden = [_grid(batch, length, width, step=1 / 4, device=device, dtype=dtype) for _ in range(count)]
    weights = [
        _grid(slots, count, step=1 / 16, device=device, dtype=dtype, scale=count**-0.5).requires_grad_(),
        _grid(slots, step=1 / 64, shift=1 / 128, device=device, dtype=dtype).requires_grad_(),
        _random(out, width, device=device, dtype=dtype, scale=width**-0.5),
        _random(out, device=device, dtype=dtype),
    ][: 2 if name == "layer_mix" else 4]
    n = batch * length
    states, mixes = n * width * count, 2 * n * slots * width * count
    # The backward reads the states and the gradient; the gradient of the mix's weights costs as much as a mix.
    moved, flop = [states + n * slots * width] * 2, [mixes, mixes]
    labels: dict[str, Any] = dict(batch=batch, source=length, layers=count, slots=slots, width=width, out=out)
    if name == "layer_projection":
        products, result = 2 * n * slots * width * out, n * slots * out
        moved = [states + width * out + result, states + 2 * width * out + result]  # the weight and its gradient
        flop = [mixes + products, mixes + 2 * products]  # the gradients of x and of the weight
        zeros = (reference.layer_mix(hidden, *weights[:2]) == 0).float().mean()
        labels["zeros of the relu"] = round(float(zeros), 3)  # kernels may skip them

    def plain(*leaves: Tensor) -> Tensor:
        found: Tensor = getattr(reference, name)([layer.to(leaves[0].dtype) for layer in hidden], *leaves)
        return found

    return Operation(
        name,
        lambda impl: getattr(ops, name)(hidden, *weights, impl=impl),
        plain,
        {REFERENCE: lambda: getattr(reference, name)(hidden, *weights)},
        list(weights),
        moved=_sums(hidden[0].element_size(), moved),
        flop=_sums(1, flop),
        auto=lambda: backends.choose(name, device, hidden, *weights),
        labels=labels,
    )


def attention(
    batch: int, length: int, source: int, heads: int, groups: int, size: int, device: str, dtype: torch.dtype
) -> Operation:
    """``gated_cross_attention`` with a residual and a padding mask that differs from row to row."""
    torch.manual_seed(0)
    query = _random(batch, length, heads, size, device=device, dtype=dtype).detach().transpose(1, 2).requires_grad_()
    key, value = (_random(batch, groups, source, size, device=device, dtype=dtype) for _ in range(2))
    residual = _random(batch, length, heads, size, device=device, dtype=dtype).detach()
    gate = torch.tensor([0.3], device=device, dtype=dtype, requires_grad=True)
    rows = torch.arange(batch, device=device) % max(source // 4, 1)
    mask = torch.arange(source, device=device) < source - rows[:, None]

    added = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)[:, None, None]  # SDPA converts others

    def sdpa() -> Tensor:
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=added, enable_gqa=True)
        return torch.addcmul(residual, gate, found.transpose(1, 2))

    def plain(*leaves: Tensor) -> Tensor:
        return reference.gated_cross_attention(*leaves, residual.to(leaves[0].dtype), key_mask=mask)

    def call(impl: str) -> Tensor:
        return ops.gated_cross_attention(query, key, value, gate, residual, key_mask=mask, impl=impl)

    queries, states = batch * heads * length * size, batch * groups * source * size
    product = 2 * queries * source
    return Operation(
        "gated_cross_attention",
        call,
        plain,
        {REFERENCE: lambda: plain(query, key, value, gate), SDPA: sdpa},
        [query, key, value, gate],
        # Backward: reads query, result's gradient, keys and values; writes gradients of query, keys and values.
        moved=_sums(query.element_size(), [3 * queries + 2 * states, 3 * queries + 4 * states]),
        flop=_sums(1, [2 * product, 4 * product]),
        auto=lambda: backends.choose("gated_cross_attention", device, query, key, value, gate, residual, key_mask=mask),
        labels=dict(batch=batch, queries=length, source=source, heads=heads, groups=groups, size=size),
        residual=residual,
    )


def flex(operation: Operation) -> Callable[[], Tensor]:
    """Compiled FlexAttention with the same padding mask, then gate and addition, on a GPU.

    Raises:
        Exception: torch cannot compile it here.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value, gate = operation.leaves
    batch, source = key.shape[0], key.shape[2]
    lengths = source - torch.arange(batch, device=key.device) % max(source // 4, 1)

    def real(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k < lengths[b]

    blocks = create_block_mask(real, batch, None, query.shape[2], source, device=str(key.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    assert operation.residual is not None
    residual = operation.residual
    grouped = key.shape[1] != query.shape[1]

    def run() -> Tensor:
        return residual + gate * compiled(query, key, value, block_mask=blocks, enable_gqa=grouped).transpose(1, 2)

    run()
    return run
