"""Experiments with real pretrained models."""
