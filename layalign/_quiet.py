"""Lines of other libraries about what their user has not done: left out one by one, where this library causes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def without(logger: str, drops: Callable[[str], bool]) -> Iterator[None]:
    """Within the block, a logger's lines that ``drops`` is true for are left out."""
    source = logging.getLogger(logger)

    def passes(record: logging.LogRecord) -> bool:
        return not drops(record.getMessage())

    source.addFilter(passes)
    try:
        yield
    finally:
        source.removeFilter(passes)


@contextmanager
def importing_peft() -> Iterator[None]:
    """Around what imports peft, as transformers' Trainer: that loads bitsandbytes, which misses a kernel of its own."""
    with without("bitsandbytes.backends.cpu.ops", lambda text: text.startswith("Failed to load CPU gemm_4bit")):
        yield


def _only_decoder(text: str) -> bool:
    rows = [line.split("|")[0].strip() for line in text.splitlines() if "|" in line]
    return bool(rows[1:]) and all(row.startswith(("decoder.", "lm_head.")) for row in rows[1:])


@contextmanager
def loading_encoder() -> Iterator[None]:
    """Around loading the encoder of an encoder-decoder: that its decoder is not wanted is no surprise."""
    with without("transformers.modeling_utils", _only_decoder):
        yield
