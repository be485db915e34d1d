"""The controlled experiment: every baseline and ablation on the same generated problems, over several seeds."""

from layalign.experiments.controlled.settings import ExperimentSettings, System, load_settings, preset_names

__all__ = ["ExperimentSettings", "System", "load_settings", "preset_names"]
