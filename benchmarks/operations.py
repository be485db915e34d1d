"""The operations of ``layalign.ops`` as calls, with their baselines, bytes and floating-point operations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layalign import ops, reference
from layalign.ops import backends

REFERENCE, SDPA, FLEX = "reference.py", "SDPA and gate", "FlexAttention and gate"
VARLEN, GEMM = "varlen FlashAttention and gate", "one product of as many FLOP"
PER_SLOT = "layer_projection, one weight a slot"  # the folded form
CHUNK = 2**28  # elements of a result that reference.py computes at once


@dataclass
class Operation:
    """One operation on one set of arguments.

    Attributes:
        call: runs it with the named backend.
        plain: runs reference.py for a slice of the sequences, on other leaves, in their dtype.
        dim: the dimension of the result that counts sequences.
        baselines: other implementations, by name, including reference.py.
        leaves: tensors to compute gradients for.
        product: one matrix product of as many FLOP as the operation's own, or for both passes three; None without.
        moved, flop: minimum of bytes and operations: (forward, forward and backward).
        auto: returns the backend that ``impl="auto"`` takes, depending on whether gradients are enabled.
    """

    name: str
    call: Callable[[str], Tensor]
    plain: Callable[..., Tensor]
    dim: int
    baselines: dict[str, Callable[[], Tensor]]
    leaves: list[Tensor]
    moved: tuple[float, float]
    flop: tuple[float, float]
    auto: Callable[[], str]
    labels: dict[str, Any] = field(default_factory=dict)
    residual: Tensor | None = None
    mask: Tensor | None = None
    product: Callable[[bool], Callable[[], Any]] | None = None

    def in_chunks(self, leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        """[result, *gradients] of reference.py on ``leaves``, a few sequences at a time.

        At the paper's largest shape all of them would take more memory in float32 than a GPU has.
        """
        batch = grad.shape[self.dim]
        step = max(1, CHUNK * batch // max(1, grad.numel()))
        results, sums = [], None
        for rows in (slice(first, first + step) for first in range(0, batch, step)):
            part = self.plain(rows, *leaves)
            grads = torch.autograd.grad(part, leaves, grad[(slice(None),) * self.dim + (rows,)].to(part.dtype))
            results.append(part.detach())
            sums = (
                grads if sums is None else [one.float() + other.float() for one, other in zip(sums, grads, strict=True)]
            )
        assert sums is not None
        return [torch.cat(results, self.dim) if len(results) > 1 else results[0], *sums]

    def passes(self, impl: str, backward: bool) -> dict[str, Callable[[], Any]]:
        """Ours first, then the baselines: only forward, or with the gradients of all leaves."""
        calls = {impl: lambda: self.call(impl), **self.baselines}
        if not backward:
            return {name: torch.no_grad()(call) for name, call in calls.items()}
        with torch.no_grad():
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
    """``layer_mix`` or ``layer_projection`` of (B, S) with sizes (E, 2L, D_e, D_l); the encoder's states are frozen.

    :data:`PER_SLOT` has 2L weights (D_l, D_e) instead of one.
    """
    per_slot, name = (sizes[1:2], "layer_projection") if name == PER_SLOT else ((), name)
    count, slots, width, out = sizes
    torch.manual_seed(0)
    hidden = [_grid(batch, length, width, step=1 / 4, device=device, dtype=dtype) for _ in range(count)]
    weights = [
        _grid(slots, count, step=1 / 16, device=device, dtype=dtype, scale=count**-0.5).requires_grad_(),
        _grid(slots, step=1 / 64, shift=1 / 128, device=device, dtype=dtype).requires_grad_(),
        _random(*per_slot, out, width, device=device, dtype=dtype, scale=width**-0.5),
        _random(*per_slot, out, device=device, dtype=dtype),
    ][: 2 if name == "layer_mix" else 4]
    n = batch * length
    states, mixes = n * width * count, 2 * n * slots * width * count
    # The backward reads the states and the gradient; the gradient of the mix's weights costs as much as a mix.
    moved, flop = [states + n * slots * width] * 2, [mixes, mixes]
    labels: dict[str, Any] = dict(batch=batch, source=length, layers=count, slots=slots, width=width, out=out)
    if name == "layer_projection":
        products, result = 2 * n * slots * width * out, n * slots * out
        matrix = weights[2].numel()
        moved = [states + matrix + result, states + 2 * matrix + result]  # the weight and its gradient
        flop = [mixes + products, mixes + 2 * products]  # the gradients of x and of the weight
        with torch.no_grad():
            mixed = ops.layer_mix(hidden, *weights[:2])
        labels["zeros of the relu"] = round(float((mixed == 0).sum()) / mixed.numel(), 3)  # kernels may skip them
        labels["weights"] = slots if per_slot else 1

    def plain(rows: slice, *leaves: Tensor) -> Tensor:
        found: Tensor = getattr(reference, name)([layer[rows].to(leaves[0].dtype) for layer in hidden], *leaves)
        return found

    def product(backward: bool) -> Callable[[], Any]:
        """Of the mixed states and the weight; with 2L weights, of one slot's states and all of them side by side."""
        with torch.no_grad():
            x = ops.layer_mix(hidden, *weights[:2]).flatten(0, 2)[: n if per_slot else None].contiguous()
            w = weights[2].detach().flatten(0, -2)
            y = torch.randn(len(x), len(w), device=device, dtype=dtype) if backward else None

        def run() -> Any:
            return x @ w.T if y is None else (x @ w.T, y @ w, y.T @ x)

        return run

    return Operation(
        name,
        lambda impl: getattr(ops, name)(hidden, *weights, impl=impl),
        plain,
        1,
        {REFERENCE: lambda: getattr(reference, name)(hidden, *weights)},
        list(weights),
        moved=_sums(hidden[0].element_size(), moved),
        flop=_sums(1, flop),
        auto=lambda: backends.choose(name, device, hidden, *weights),
        labels=labels,
        product=None if name == "layer_mix" else product,
    )


def attention(
    batch: int, length: int, source: int, heads: int, groups: int, size: int, device: str, dtype: torch.dtype,
    padded: bool = True,
) -> Operation:  # fmt: skip
    """``gated_cross_attention`` with a residual and, if ``padded``, a padding mask that differs from row to row."""
    torch.manual_seed(0)
    query = _random(batch, length, heads, size, device=device, dtype=dtype).detach().transpose(1, 2).requires_grad_()
    key, value = (_random(batch, groups, source, size, device=device, dtype=dtype) for _ in range(2))
    residual = _random(batch, length, heads, size, device=device, dtype=dtype).detach()
    gate = torch.tensor([0.3], device=device, dtype=dtype, requires_grad=True)
    mask = added = None
    if padded:
        mask = torch.arange(source, device=device) < lengths_of(batch, source, device)[:, None]
        added = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)[
            :, None, None
        ]  # SDPA converts others

    def sdpa() -> Tensor:
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=added, enable_gqa=groups != heads)
        return torch.addcmul(residual, gate, found.transpose(1, 2))

    def plain(rows: slice, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        own = query[rows], key[rows], value[rows], gate, residual[rows].to(query.dtype)
        return reference.gated_cross_attention(*own, key_mask=None if mask is None else mask[rows])

    def call(impl: str) -> Tensor:
        return ops.gated_cross_attention(query, key, value, gate, residual, key_mask=mask, impl=impl)

    queries, states = batch * heads * length * size, batch * groups * source * size
    product = 2 * queries * source
    return Operation(
        "gated_cross_attention",
        call,
        plain,
        0,
        {REFERENCE: lambda: plain(slice(None), query, key, value, gate), SDPA: sdpa},
        [query, key, value, gate],
        # Backward: reads query, result's gradient, keys and values; writes gradients of query, keys and values.
        moved=_sums(query.element_size(), [3 * queries + 2 * states, 3 * queries + 4 * states]),
        flop=_sums(1, [2 * product, 4 * product]),
        auto=lambda: backends.choose("gated_cross_attention", device, query, key, value, gate, residual, key_mask=mask),
        labels=dict(batch=batch, queries=length, source=source, heads=heads, groups=groups, size=size, padded=padded),
        residual=residual,
        mask=mask,
    )


def lengths_of(batch: int, source: int, device: Any) -> Tensor:
    """[B] real tokens of the sources of a padded batch."""
    return source - torch.arange(batch, device=device) % max(source // 4, 1)


def sdpa_backends(operation: Operation) -> dict[str, Callable[[], Tensor]]:
    """torch's attention by each of its backends; whether one serves is seen when it is called."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return operation.baselines[SDPA]()

        return run

    names = dict(flash="FLASH_ATTENTION", efficient="EFFICIENT_ATTENTION", cuDNN="CUDNN_ATTENTION", math="MATH")
    return {f"SDPA {name} and gate": by(getattr(SDPBackend, kind)) for name, kind in names.items()}


def varlen(operation: Operation) -> Callable[[], Tensor]:
    """torch's FlashAttention over the real tokens of all sequences in a row, which it selects first.

    Raises:
        ImportError: this torch has none.
    """
    from torch.nn.attention.varlen import varlen_attn

    query, key, value, gate = operation.leaves
    batch, groups, source, _ = key.shape
    length = query.shape[2]
    mask = operation.mask
    lengths = torch.full((batch,), source, device=key.device) if mask is None else mask.sum(1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rows = torch.arange(batch + 1, device=key.device, dtype=torch.int32) * length
    real = None if mask is None else mask.flatten().nonzero().flatten()
    # torch 2.11 groups heads without being told.
    told = groups != query.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters
    grouped = dict(enable_gqa=True) if told else {}
    longest, residual = int(lengths.max()), operation.residual
    assert residual is not None

    def tokens(states: Tensor) -> Tensor:
        found = states.transpose(1, 2).flatten(0, 1)
        return found if real is None else found.index_select(0, real)

    def run() -> Tensor:
        q = query.transpose(1, 2).flatten(0, 1)
        found = varlen_attn(q, tokens(key), tokens(value), rows, ends, length, longest, **grouped)
        return torch.addcmul(residual, gate, found.view(residual.shape))

    return run


def flex(operation: Operation) -> Callable[[], Tensor]:
    """Compiled FlexAttention with the same padding mask, then gate and addition, on a GPU; its first call compiles."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value, gate = operation.leaves
    batch, source = key.shape[0], key.shape[2]
    padded = operation.mask is not None
    lengths = lengths_of(batch, source, key.device) if padded else torch.full((batch,), source, device=key.device)

    def real(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k < lengths[b]

    blocks = create_block_mask(real, batch, None, query.shape[2], source, device=str(key.device))
    torch._dynamo.reset()  # after eight shapes it would stay uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    assert operation.residual is not None
    residual = operation.residual
    grouped = key.shape[1] != query.shape[1]

    def run() -> Tensor:
        return residual + gate * compiled(query, key, value, block_mask=blocks, enable_gqa=grouped).transpose(1, 2)

    return run
