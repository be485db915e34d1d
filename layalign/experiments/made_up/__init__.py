"""The demo: a whole LayAlign experiment, small enough for two CPU cores, on data from our own templates."""

from __future__ import annotations

from typing import Any

__all__ = ["run_demo"]


def __getattr__(name: str) -> Any:
    """Import the pipeline only when it is asked for: the problems need neither transformers nor matplotlib."""
    if name == "run_demo":
        from layalign.experiments.made_up.pipeline import run_demo

        return run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
