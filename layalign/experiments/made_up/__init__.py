"""`layalign demo --made-up`: a complete LayAlign experiment, small enough for two CPU cores, on generated data."""

from __future__ import annotations

from typing import Any

__all__ = ["run_demo"]


def __getattr__(name: str) -> Any:
    """Import the pipeline lazily, since the problems need neither transformers nor matplotlib."""
    if name == "run_demo":
        from layalign.experiments.made_up.pipeline import run_demo

        return run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
