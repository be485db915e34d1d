"""The README's Python examples and the guide's first run as printed, with tiny models for the named ones."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers_text import byte_tokenizer
from published_tiny import data as published_data
from published_tiny import published_model
from tiny import tiny_encoder, tiny_llm

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


BLOCKS = [*blocks("README.md"), blocks("docs/guide.md")[0]]


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_example(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("encoder", "llm"):
        byte_tokenizer().save_pretrained(tmp_path / part)
    size = len(byte_tokenizer())
    tiny_encoder(vocab_size=size).save_pretrained(tmp_path / "encoder")
    tiny_llm(vocab_size=size).save_pretrained(tmp_path / "llm")
    code = BLOCKS[index].replace("google/mt5-xl", "encoder").replace("meta-math/MetaMath-7B-V1.0", "llm")
    code = code.replace("list(range(24))", "list(range(4))")
    names: dict[str, object] = {}
    if "my_project" in code:  # the user's copy of the published code, and the user's data
        project = ModuleType("my_project")
        project.LayAlign = lambda config: published_model()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "my_project", project)
        names.update(config=None, loader=[published_data()] * 2)
    exec(compile(code, "README.md", "exec"), names)
    assert "LayAlign" in names or "LayAlignForCausalLM" in names
    if "loss" in names:
        assert names["loss"].item() > 0
    if "new" in names:
        assert names["new"].shape[0] == 2
