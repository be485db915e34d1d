"""Modules that have moved: the old import path gives what the new one has, and a warning names that."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "layalign.analysis": "layalign.experiments.analysis",
    "layalign.attention": "layalign.modeling.attention_interface",
    "layalign.baselines": "layalign.training.baselines",
    "layalign.compat": "layalign.published.classes",
    "layalign.config": "layalign.modeling.configuration",
    "layalign.convert": "layalign.published.convert",
    "layalign.encoder": "layalign.modeling.encoders",
    "layalign.errors": "layalign.utils.errors",
    "layalign.harness": "layalign.evaluation.lm_eval",
    "layalign.model": "layalign.modeling.model",
    "layalign.packing": "layalign.modeling.packing",
    "layalign.swap": "layalign.published.swap",
    "layalign.tokenization": "layalign.modeling.tokenization",
}


class _OldPaths(MetaPathFinder, Loader):
    """Finds what no other finder has found: it is asked last."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} has moved, import {new}", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


def keep_old_paths() -> None:
    """Let the old paths be imported."""
    if not any(type(finder) is _OldPaths for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
