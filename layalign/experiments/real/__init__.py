"""LayAlign and its baselines on real models and real text: `layalign experiment --preset real`."""

from layalign.experiments.real.settings import RealSettings, RealSystem, load_settings

__all__ = ["RealSettings", "RealSystem", "load_settings"]
