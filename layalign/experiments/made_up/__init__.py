"""`layalign demo --made-up`: a complete LayAlign experiment, small enough for two CPU cores, on generated data."""

from layalign.experiments.made_up.pipeline import run_demo

__all__ = ["run_demo"]
