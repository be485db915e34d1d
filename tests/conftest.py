"""Before anything imports Triton or the hub's client: what they read from the environment. The count of bad inputs."""

from __future__ import annotations

import gc
import os
from collections import Counter
from typing import Any

import bad_inputs
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU its kernels run in the interpreter
# No test needs the hub, and none must hang on what is there. Without a network each look-up waits a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """transformers' Trainer collects garbage often, each time among all that was imported: seconds a run."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist sends its counts with its last message."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["bad_inputs"] = dict(bad_inputs.TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    bad_inputs.TRIED.update(Counter(getattr(node, "workeroutput", {}).get("bad_inputs", {})))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if bad_inputs.TRIED:
        terminalreporter.section("bad inputs tried")
        for kind, count in sorted(bad_inputs.TRIED.items()):
            terminalreporter.line(f"{count:>9,}  {kind}")
        terminalreporter.line(f"{sum(bad_inputs.TRIED.values()):>9,}  in all")
