"""Cached launches of decoding, for calls with other tensors of the same kind.

``layalign/ops/cached_launch.py`` decides which calls are of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from layalign_kernels.common import ceil_div, dot_precision
from layalign_kernels.gated_cross_attention_decode import decode_launches
from layalign_kernels.launch import ALIGNMENT, CachedLaunch, can_cache_launches


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def cached_decode(
    inputs: Sequence[torch.Tensor | None], scale: float | None, out: torch.Tensor
) -> Callable[[int, int, int, int], bool] | None:
    """The decoding kernel for query, key, value, gate, residual and mask. The caller keeps key, value and mask alive.

    Returns:
        A function of the addresses of query, gate, residual and result, which returns whether it launched; None where
        Triton must launch.
    """
    query, key, value, gate, residual, mask = inputs
    assert query is not None and key is not None and value is not None and gate is not None
    if not can_cache_launches():
        return None
    launches = decode_launches(query, key, value, gate, residual, mask, scale, out)
    with torch.cuda.device_of(query):
        kept = [one for launch in launches if (one := CachedLaunch.of(launch)) is not None]
    if len(kept) < len(launches):
        return None
    at_key, at_value, at_mask = map(_address, (key, value, mask))
    part, device, dtype = launches[0].arguments["p_part"], query.device, query.dtype
    # The log-sum-exp lies after the parts, aligned as in memory of its own: else the launch would never fit.
    whole = ALIGNMENT // 4  # numbers
    numbers = 0 if part is None else ceil_div(part.numel(), whole) * whole
    both = 0 if part is None else numbers + part.shape[0] * part.shape[1]
    precision = dot_precision(dtype)

    def run(at_query: int, at_gate: int, at_residual: int, at_out: int) -> bool:
        at_part = at_lse = None
        if both:
            scratch = torch.empty(both, dtype=torch.float32, device=device)
            at_part = scratch.data_ptr()
            at_lse = at_part + 4 * numbers
        own = at_query, at_key, at_value, at_gate, at_residual, at_mask, at_out, at_part, at_lse
        calls = [own, (at_part, at_lse, at_gate, at_residual, at_out)] if both else [own]
        pairs = list(zip(kept, calls, strict=True))
        if dot_precision(dtype) != precision or not all(one.fits(at) for one, at in pairs):
            return False
        for one, at in pairs:
            one(at)
        return True

    return run
