"""Experiments with real models and real text."""
