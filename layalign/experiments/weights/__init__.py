"""`layalign weights`: multilingual-e5-small and SmolLM2-135M-Instruct as transformers folders."""

from layalign.experiments.weights.fetch import check_weights, fetch_weights

__all__ = ["check_weights", "fetch_weights"]
