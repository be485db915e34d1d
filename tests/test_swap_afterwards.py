"""What happens to swapped modules afterwards: other processes, other parts, wrapped forwards, and their restoring."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published_tiny import assert_same, data, loss_and_gradients, published_model, wrappers

import layalign

RUN_A_PICKLE = """
import sys, torch
model, embeds, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pickle_runs_in_another_process(attention: str, tmp_path: Path) -> None:
    llm = published_model(attention=attention).model_llm
    embeds = torch.randn(3, 4, 32)
    llm.set_states([(torch.randn(3, 5, 32), torch.randn(3, 5, 32)) for _ in range(3)])
    expected = llm(inputs_embeds=embeds).logits.detach()
    layalign.accelerate(llm)
    torch.save((llm, embeds, expected), tmp_path / "llm.pt")
    path = [*map(str, (Path(layalign.__file__).parents[1], Path(__file__).parent)), *sys.path]
    code = f"import sys; sys.path[:0] = {path!r}; import published_tiny" + RUN_A_PICKLE
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "llm.pt"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_an_attention_put_in_later_runs_as_published_and_keeps_its_config() -> None:
    model, twin = published_model(), published_model()
    layalign.accelerate(model)
    for one in (model, twin):
        wrapper = wrappers(one)[0]
        wrapper.model = copy.deepcopy(wrapper.model)
        wrapper.model.config = one.model_llm.model.config
        with torch.no_grad():
            wrapper.model.q_proj.weight.mul_(2)
    expected = loss_and_gradients(twin, data())
    assert_same(expected, loss_and_gradients(model, data()))
    config = model.model_llm.model.config
    assert config._attn_implementation == "sdpa"
    layalign.restore(model)
    assert wrappers(model)[0].model.config is config
    assert_same(expected, loss_and_gradients(model, data()))
