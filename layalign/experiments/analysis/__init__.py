"""Analysis of what a LayAlign model has learned, in plots and numbers. Importing this loads no heavy package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layalign.experiments.analysis.pairs import read_pairs
    from layalign.experiments.analysis.result import AnalysisResult
    from layalign.experiments.analysis.run import analyze
    from layalign.experiments.analysis.similarity import centred_cosine, linear_cka, retrieval_accuracy

_LAZY = {
    "AnalysisResult": "result",
    "analyze": "run",
    "centred_cosine": "similarity",
    "linear_cka": "similarity",
    "read_pairs": "pairs",
    "retrieval_accuracy": "similarity",
}

__all__ = ["AnalysisResult", "analyze", "centred_cosine", "linear_cka", "read_pairs", "retrieval_accuracy"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'layalign.experiments.analysis' has no attribute {name!r}")
    return getattr(importlib.import_module(f"layalign.experiments.analysis.{_LAZY[name]}"), name)
