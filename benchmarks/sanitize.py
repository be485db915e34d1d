"""Run every kernel of every usable backend once on small, odd shapes, for compute-sanitizer on a GPU.

    compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Results are also compared with the reference, so the program fails if a kernel is wrong.
"""

from __future__ import annotations

import torch

from layalign import ops, reference
from layalign.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Normally distributed numbers on the device, with gradients."""
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare loosely (fp16); the tests have exact error budgets."""
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not error <= 1e-2:
        raise SystemExit(f"{name}: wrong, error {error:.1e} of the largest value")
    print(f"{name}: ok", flush=True)


def layers(impl: str) -> None:
    """Layer mix and projection, forward and backward."""
    for count, slots, batch, length, width, outputs in ((5, 6, 2, 7, 40, 24), (33, 4, 1, 13, 72, 136)):
        hidden = [draw(batch, length, width) for _ in range(count)]
        w1, b1, w2, b2 = draw(slots, count), draw(slots), draw(outputs, width), draw(outputs)
        per_slot = draw(slots, outputs, width)
        for weight in (w2, per_slot):
            arguments = (hidden, w1, b1, weight, b2)
            found, expected = ops.layer_projection(*arguments, impl=impl), reference.layer_projection(*arguments)
            check(f"{impl}: layer_projection {tuple(weight.shape)}", found, expected)
            found.float().sum().backward()
        check(f"{impl}: layer_mix", ops.layer_mix(hidden, w1, b1, impl=impl), reference.layer_mix(hidden, w1, b1))
        ops.layer_mix(hidden, w1, b1, impl=impl).float().sum().backward()


def attention(impl: str) -> None:
    """Gated cross-attention and its decode kernel, forward and backward."""
    for batch, heads, groups, length, source, size in (
        (2, 4, 2, 33, 17, 40),
        (1, 8, 8, 5, 97, 64),
        (3, 4, 1, 1, 130, 128),
    ):
        query, key, value = draw(batch, heads, length, size), *(draw(batch, groups, source, size) for _ in range(2))
        gate, residual = draw(1), draw(batch, length, heads, size)
        mask = torch.rand(batch, source, device=DEVICE) > 0.3
        mask[0] = False
        arguments = (query, key, value, gate, residual)
        expected = reference.gated_cross_attention(*arguments, key_mask=mask)
        found = ops.gated_cross_attention(*arguments, key_mask=mask, impl=impl)
        check(f"{impl}: gated_cross_attention T={length}", found, expected)
        found.float().sum().backward()
        with torch.no_grad():  # short queries without gradients go to the decode kernel
            found = ops.gated_cross_attention(*arguments, key_mask=mask, impl=impl)
        check(f"{impl}: gated_cross_attention T={length}, no gradient", found, expected)


def main() -> None:
    """Run every usable backend except plain torch."""
    usable = [name for name in backends.names() if name != "torch" and backends.capability(name, DEVICE)[0]]
    for impl in usable:
        torch.manual_seed(0)
        layers(impl)
        attention(impl)
    if not usable:
        raise SystemExit("no backend to check: " + "; ".join(status.reason for status in backends.report(DEVICE)))


if __name__ == "__main__":
    main()
