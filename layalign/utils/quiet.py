"""Filters for misleading log lines of other libraries that layalign, not its user, causes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def without(logger: str, drops: Callable[[str], bool]) -> Iterator[None]:
    """Within the block, drop a logger's lines for which ``drops`` is true."""
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
    """For imports that load peft, as transformers' Trainer does: drop bitsandbytes' line about a missing CPU kernel."""
    with without("bitsandbytes.backends.cpu.ops", lambda text: text.startswith("Failed to load CPU gemm_4bit")):
        yield


@contextmanager
def without_reports() -> Iterator[None]:
    """For loading: drop transformers' report of missing and unexpected weights, but not one of mismatched shapes."""

    def is_report(text: str) -> bool:
        return " LOAD REPORT" in text and not any(word in text for word in ("MISMATCH", "CONVERSION"))

    with without("transformers.modeling_utils", is_report):
        yield


def quiet_transformers() -> None:
    """Silence transformers' loading reports and progress bars; layalign's own warnings still show."""
    from rich.console import Console
    from rich.logging import RichHandler
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    ours = logging.getLogger("layalign")
    if not ours.handlers:
        ours.addHandler(RichHandler(console=Console(stderr=True), show_time=False, show_path=False))
