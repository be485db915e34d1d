"""docs/architecture.md names files that are there, and tells a decode step in at most eight of them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def files(text: str) -> list[str]:
    return re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text)


def test_every_file_it_names_is_there() -> None:
    named = files(PAGE)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / "layalign" / name).exists() and not (ROOT / name).exists()] == []


def test_a_decode_step_is_told_in_few_files_each_once() -> None:
    step = PAGE.partition("## A decode step")[2].partition("\n## ")[0]
    named = files(step)
    assert 1 < len(named) <= 8 and len(set(named)) == len(named)
