"""How many bad inputs the tests tried, by kind; conftest.py prints the sums, also those of xdist's workers."""

from __future__ import annotations

import os
from collections import Counter

# LAYALIGN_FUZZ=10 tries ten times as many.
SCALE = float(os.environ.get("LAYALIGN_FUZZ", "1"))
TRIED: Counter[str] = Counter()


def tried(kind: str, count: int = 1) -> None:
    """Count bad inputs whose outcome was checked."""
    TRIED[kind] += count


def times(count: int) -> int:
    """How often to try, `count` in CI."""
    return max(1, int(count * SCALE))
