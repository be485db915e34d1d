"""docs/architecture.md names files that are there, and tells each kind of step in at most eight of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def files(text: str) -> list[str]:
    return re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text)


def test_every_file_it_names_is_there() -> None:
    named = files(PAGE)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / "layalign" / name).exists() and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["A sequence begins", "A decode step", "A training step"])
def test_a_step_is_told_in_few_files_each_once(name: str) -> None:
    step = PAGE.partition(f"## {name}\n")[2].partition("\n## ")[0]
    named = files(step)
    assert 1 < len(named) <= 8 and len(set(named)) == len(named)
