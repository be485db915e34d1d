"""Two-stage training: translation, then the task. Importing this loads neither torch nor transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from layalign.training.config import TrainConfig
from layalign.training.loading import load_train_config
from layalign.utils.quiet import importing_peft

if TYPE_CHECKING:
    from layalign.training.run import (
        TrainSummary,
        build_model,
        read_dev_examples,
        read_examples,
        train,
        training_arguments,
    )
    from layalign.training.runs import is_main_process

__all__ = [
    "TrainConfig",
    "TrainSummary",
    "build_model",
    "is_main_process",
    "load_train_config",
    "read_dev_examples",
    "read_examples",
    "train",
    "training_arguments",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'layalign.training' has no attribute {name!r}")
    module = "runs" if name == "is_main_process" else "run"
    with importing_peft():  # transformers' Trainer imports peft
        return getattr(importlib.import_module(f"layalign.training.{module}"), name)
