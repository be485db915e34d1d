"""LayAlign: a frozen multilingual encoder and a frozen LLM, joined by an adapter and a layer-wise aligner.

Importing this package is cheap: torch and transformers are loaded by the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from layalign.utils.errors import ArgumentError, BackendError, CheckpointError, DataError, LayAlignError
from layalign.utils.moved import keep_old_paths, renamed
from layalign.utils.versions import importing

if TYPE_CHECKING:
    from layalign.modeling.attention_interface import attach, detach
    from layalign.modeling.configuration import LayAlignConfig
    from layalign.modeling.llm_inputs import build_inputs
    from layalign.modeling.model import LayAlignForCausalLM
    from layalign.nn import Adapter, EncoderAligner, GatedCrossAttention
    from layalign.published.swap import restore_modules, swap_modules

__version__ = "0.1.0"

keep_old_paths()

_LAZY = {
    "Adapter": "layalign.nn",
    "EncoderAligner": "layalign.nn",
    "GatedCrossAttention": "layalign.nn",
    "LayAlignConfig": "layalign.modeling.configuration",
    "LayAlignForCausalLM": "layalign.modeling.model",
    "attach": "layalign.modeling.attention_interface",
    "detach": "layalign.modeling.attention_interface",
    "build_inputs": "layalign.modeling.llm_inputs",
    "restore_modules": "layalign.published.swap",
    "swap_modules": "layalign.published.swap",
}

__all__ = [
    "Adapter",
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "DataError",
    "EncoderAligner",
    "GatedCrossAttention",
    "LayAlignConfig",
    "LayAlignError",
    "LayAlignForCausalLM",
    "__version__",
    "attach",
    "build_inputs",
    "detach",
    "restore_modules",
    "swap_modules",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        return renamed(
            __name__, name, {"accelerate": "swap_modules", "pack": "build_inputs", "restore": "restore_modules"}
        )
    with importing():
        value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
