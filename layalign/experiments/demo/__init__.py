"""`layalign demo`: pretrained models, a LayAlign checkpoint that ships with the package, and our own sentences."""

from layalign.experiments.demo.run import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]
