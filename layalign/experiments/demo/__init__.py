"""`layalign demo`: pretrained models, a LayAlign checkpoint that ships with the package, and our own sentences."""

from __future__ import annotations

from typing import Any

__all__ = ["DemoOptions", "run_demo"]


def __getattr__(name: str) -> Any:
    """Import the demo lazily, since `sentences` needs no transformers."""
    if name in __all__:
        from layalign.experiments.demo import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
