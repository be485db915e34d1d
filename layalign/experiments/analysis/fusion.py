"""Measurements of the aligner and the gates: mix weights, contribution norms, and attention to the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from layalign import reference

Seen = Callable[[int, Any, dict[str, Any]], None]


def mix_weights(model: Any) -> tuple[Tensor, Tensor] | None:
    """Weights of the layer mix for keys and for values, each (L, E) float32 on the CPU; None without an aligner.

    A shared mix is repeated for each language layer. Columns are in the order of ``config.encoder_layers``.
    """
    if model.encoder_aligner is None:
        return None
    weight = model.encoder_aligner.projector.fc1.weight.detach().float().cpu()
    weight = weight.repeat(2 * len(model.config.language_layers) // len(weight), 1)
    return weight[0::2], weight[1::2]


@contextmanager
def watched(model: Any, seen: Seen) -> Iterator[None]:
    """Call ``seen(slot, module, arguments)`` whenever a language layer attends to the source.

    ``arguments``: query (B, H, T, d), key and value (B, G, S, d), residual (B, T, H, d), key_mask (B, S) or None,
    scale.
    """
    handles = []
    for slot, module in enumerate(model.cross_attention):

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, slot: int = slot) -> None:
            seen(slot, module, {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs})

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def contribution_norms(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """||gate * softmax(q k') v|| / ||self-attention output|| before the output projection, all heads together.

    Args:
        batch: arguments of the model's forward, B rows with T positions.

    Returns:
        (L, B, T) float32 on the CPU (float64 for a float64 model), in the order of ``config.language_layers``. Values
        at padding positions are meaningless.
    """
    ratios: dict[int, Tensor] = {}

    def seen(slot: int, module: Any, arguments: dict[str, Any]) -> None:
        # Without a residual the module returns the term alone; a difference would round. `forward` skips the hooks.
        added = module.forward(**{**arguments, "residual": None})
        ratios[slot] = (_norm(added) / _norm(arguments["residual"]).clamp(min=torch.finfo(torch.float32).tiny)).cpu()

    with watched(model, seen):
        model(**batch, use_cache=False, logits_to_keep=1)
    return torch.stack([ratios[slot] for slot in range(len(model.cross_attention))])


def _norm(states: Tensor) -> Tensor:
    """(B, T, H, d) -> (B, T)."""
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(states.flatten(2), dim=-1, dtype=wide)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """softmax(q k' * scale + mask), mean over heads.

    The weight of source token s is the output of attention for values that are 1 at s and 0 elsewhere, so the reference
    operation can compute it.

    Args:
        query, key: (B, H, T, d) and (B, G, S, d).
        mask: (B, S) bool, true where a source token may be attended to; None for all.
        scale: scale of the scores; None is 1 / sqrt(d).

    Returns:
        (B, T, S) float32 (float64 for float64).
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    length, size = key.shape[2], key.shape[3]
    found = []
    for start in range(0, length, size):
        columns = torch.eye(length, device=key.device, dtype=wide)[:, start : start + size]
        value = torch.nn.functional.pad(columns, (0, size - columns.shape[1])).expand(*key.shape[:2], -1, -1)
        out = reference.gated_cross_attention(query, key, value, key.new_ones(()), key_mask=mask, scale=scale)
        found.append(out.mean(dim=2)[..., : columns.shape[1]])
    return torch.cat(found, dim=-1)


@torch.no_grad()
def attention_maps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Attention of every LLM position to every source token, mean over heads.

    Args:
        batch: arguments of the model's forward: B rows, T positions, S source tokens.

    Returns:
        (L, B, T, S) on the CPU, in the order of ``config.language_layers``. Rows sum to 1 over the real source tokens;
        padding gets 0 (unless ``config.mask_encoder_padding`` is false).
    """
    maps: dict[int, Tensor] = {}

    def seen(slot: int, module: Any, arguments: dict[str, Any]) -> None:
        weights = attention_weights(arguments["query"], arguments["key"], arguments["key_mask"], arguments["scale"])
        maps[slot] = weights.cpu()

    with watched(model, seen):
        model(**batch, use_cache=False, logits_to_keep=1)
    return torch.stack([maps[slot] for slot in range(len(model.cross_attention))])
