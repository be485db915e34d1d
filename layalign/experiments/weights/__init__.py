"""The real pair of models: multilingual-e5-small and SmolLM2-135M-Instruct as plain transformers folders."""

from layalign.experiments.weights.fetch import check_weights, fetch_weights

__all__ = ["check_weights", "fetch_weights"]
