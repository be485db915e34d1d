"""Old names: of modules, functions and settings. They still work, and a warning gives the new name."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from layalign.utils.errors import ArgumentError

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
    "layalign.packing": "layalign.modeling.llm_inputs",
    "layalign.swap": "layalign.published.swap",
    "layalign.tokenization": "layalign.modeling.tokenization",
}
RENAMED = {  # keys of a LayAlignConfig, and of a TrainConfig
    "adapter": "use_adapter",
    "fold": "fold_projections",
    "gate": "fixed_gate",
    "last_layer": "prune_last_layer",
    "liger": "fused_loss",
    "prompt": "use_prompt",
}


def new_path(name: str) -> str | None:
    """The new path of a module that has moved, alone or with its package; None if it has not."""
    package, _, rest = name.removeprefix("layalign.").partition(".")
    new = MOVED.get(f"layalign.{package}")
    return new and (f"{new}.{rest}" if rest else new)


class _OldPaths(MetaPathFinder, Loader):
    """It is asked first: else a moved package's own finder would load its modules again, under the old name."""

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


def old_name(old: str, new: str) -> Any:
    """The method or attribute ``new`` under its old name; each use warns."""

    def get(self: Any) -> Any:
        warnings.warn(f"{old}: it is now called {new}", FutureWarning, stacklevel=2)
        return getattr(self, new)

    return property(get, doc=f"The old name of ``{new}``.")


def new_value(old: str, value: Any) -> Any:
    """A setting's value under the setting's new name."""
    return "never" if old == "last_layer" and value == "whole" else value


def warn_of_setting(old: str) -> str:
    """The new name of a setting; warns that the old one was used."""
    warnings.warn(f"{old}: the setting is now called {RENAMED[old]}", FutureWarning, stacklevel=3)
    return RENAMED[old]


def with_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their first names, for hashes: the hashes of earlier results stay valid."""
    first = {new: old for old, new in RENAMED.items()}
    return {first.get(key, key): value for key, value in values.items()}


def with_new_names(values: Mapping[Any, Any], warn: bool = True) -> dict[Any, Any]:
    """Settings with old names replaced by the new ones.

    Raises:
        ArgumentError: a setting has both of its names.
    """
    for old in RENAMED.keys() & values.keys():
        if RENAMED[old] in values:
            raise ArgumentError(f"{old}: expected {RENAMED[old]} alone, which is its new name; got both")
    now = {}
    for key, value in values.items():
        if key in RENAMED:
            value = new_value(key, value)
            key = warn_of_setting(key) if warn else RENAMED[key]
        now[key] = value
    return now


def renamed(module: str, name: str, names: dict[str, str]) -> Any:
    """For the ``__getattr__`` of a module: what an old name stands for, by `names`, old to new."""
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is now {module}.{names[name]}", FutureWarning, stacklevel=3)
    return getattr(sys.modules[module], names[name])
