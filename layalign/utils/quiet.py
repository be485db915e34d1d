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


@contextmanager
def without_reports() -> Iterator[None]:
    """Around loading: no page about weights that the files have too many or too few; one of wrong shapes stays."""

    def is_report(text: str) -> bool:
        return " LOAD REPORT" in text and not any(word in text for word in ("MISMATCH", "CONVERSION"))

    with without("transformers.modeling_utils", is_report):
        yield


def quiet_transformers() -> None:
    """Leave out transformers' loading reports and bars; warnings of ours still show."""
    from rich.console import Console
    from rich.logging import RichHandler
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    ours = logging.getLogger("layalign")
    if not ours.handlers:
        ours.addHandler(RichHandler(console=Console(stderr=True), show_time=False, show_path=False))
