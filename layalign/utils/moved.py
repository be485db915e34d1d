"""Modules that have moved and names that have changed: the old one gives what the new one has, a warning names that."""

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


def new_path(name: str) -> str | None:
    """Where a module stands now, or one inside a package that has moved; None where neither has."""
    package, _, rest = name.removeprefix("layalign.").partition(".")
    new = MOVED.get(f"layalign.{package}")
    return new and (f"{new}.{rest}" if rest else new)


class _OldPaths(MetaPathFinder, Loader):
    """Asked first: a package's own finder would load what is inside it once more, under the old name."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.startswith("layalign.") and new_path(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        new = new_path(module.__name__)
        assert new is not None
        warnings.warn(f"{module.__name__} has moved, import {new}", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


def keep_old_paths() -> None:
    """Let the old paths be imported."""
    if not any(type(finder) is _OldPaths for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldPaths())


def renamed(module: str, name: str, names: dict[str, str]) -> Any:
    """For the ``__getattr__`` of a module: what an old name stands for, by `names`, old to new."""
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is now {module}.{names[name]}", FutureWarning, stacklevel=3)
    return getattr(sys.modules[module], names[name])
