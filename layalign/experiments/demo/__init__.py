"""`layalign demo`: real pretrained models, a LayAlign checkpoint that ships with the package, sentences of our own."""

from __future__ import annotations

from typing import Any

__all__ = ["DemoOptions", "run_demo"]


def __getattr__(name: str) -> Any:
    """Import the demo only when it is asked for: its sentences need no transformers."""
    if name in __all__:
        from layalign.experiments.demo import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
