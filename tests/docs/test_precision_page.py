"""The examples of docs/precision.md run as printed, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import batch, tiny_model
from torch._dynamo.utils import counters

from layalign.modeling.cache import get_source

PAGE = (Path(__file__).parents[2] / "docs" / "precision.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_examples_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(language_layers=[0])
    inputs = batch(model=model)
    source = {name: inputs.pop(f"encoder_{name}") for name in ("input_ids", "attention_mask")}
    names: dict[str, Any] = {"model": model, "batch": inputs, "source": SimpleNamespace(**source)}
    losses = []
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        model.zero_grad()
        exec(
            compile(code.replace("fullgraph=True)", 'fullgraph=True, backend="eager")'), "precision.md", "exec"), names
        )
        if "loss" in code:
            losses.append(names["loss"].item())
            assert model.encoder_aligner.projector.fc2.weight.grad.dtype == torch.float32
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, rel=1e-2)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert get_source(names["output"].past_key_values) is not None
    assert torch.export.load(tmp_path / "aligner.pt2").module()(names["hidden"])[0][0].shape == (2, 7, 32)
    torch._dynamo.reset()
