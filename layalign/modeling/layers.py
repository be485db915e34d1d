"""Names for sets of the encoder's layers, for configurations written before the number of layers is known."""

from __future__ import annotations

from layalign.utils.errors import ArgumentError

LAYER_NAMES = ("all", "first-third", "middle-third", "last-third", "last")


def named_layers(name: str | None, count: int) -> list[int]:
    """Indices into the encoder's hidden states.

    Args:
        name: None: all but the last, as published. "first-third", "middle-third", "last-third": a third of these.
            "all": the last too. "last": the last alone.
        count: number of hidden states, the embedding output included.

    Raises:
        ArgumentError: the name is none of :data:`LAYER_NAMES`, or there are too few layers for a third.

    Source: LayAlign, the first, middle and last 8 of mT5-xl's 24 (tables 7 and 11).
    """
    published = list(range(count - 1))
    if name is None:
        return published
    if name == "all":
        return list(range(count))
    if name == "last":
        return [count - 1]
    thirds = ("first-third", "middle-third", "last-third")
    if name not in thirds:
        raise ArgumentError(f"encoder_layers: expected indices or one of {', '.join(LAYER_NAMES)}, got {name!r}")
    if len(published) < len(thirds):
        raise ArgumentError(
            f"encoder_layers: expected at least {len(thirds)} layers for {name!r}, got {len(published)}"
        )
    bounds = [round(len(published) * part / len(thirds)) for part in range(len(thirds) + 1)]
    part = thirds.index(name)
    return published[bounds[part] : bounds[part + 1]]
