"""Names for the encoder's layers, where their number is not known yet."""

from __future__ import annotations

from layalign.errors import ArgumentError

LAYER_NAMES = ("all", "first", "middle", "last")


def named_layers(name: str | None, count: int) -> list[int]:
    """Indices into ``count`` hidden states, the embedding output first: None is all but the last."""
    if name is None:
        return list(range(count - 1))
    if name not in LAYER_NAMES:
        raise ArgumentError(f"encoder_layers: expected indices or one of {', '.join(LAYER_NAMES)}, got {name!r}")
    return list(range(count)) if name == "all" else [{"first": 1, "middle": count // 2, "last": count - 1}[name]]
