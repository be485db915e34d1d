"""Tables that the code writes into documentation pages, between two marks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def replaced(page: str, begin: str, end: str, table: str) -> str:
    """``page`` with the text between the marks ``begin`` and ``end`` replaced by ``table``."""
    before, rest = page.split(begin, 1)
    return before + begin + "\n" + table + end + rest.split(end, 1)[1]


def print_or_write(begin: str, end: str, markdown: Callable[[], str]) -> None:
    """Print a table, or write it between its marks into a page: ``--write PAGE``."""
    if len(sys.argv) == 3 and sys.argv[1] == "--write":
        page = Path(sys.argv[2])
        page.write_text(replaced(page.read_text(encoding="utf-8"), begin, end, markdown()), encoding="utf-8")
    else:
        print(markdown(), end="")
