"""benchmarks/estimate.py and scale.py: counts against models on the meta device, tables against the pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

from layalign import LayAlignForCausalLM

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reproduce.md"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import scale

        return scale
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def estimate() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import estimate

        return estimate
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def model() -> LayAlignForCausalLM:
    """mT5-xl's encoder and Llama-2-7B at full size, without memory."""
    with torch.device("meta"):
        encoder = MT5EncoderModel(
            MT5Config(vocab_size=250112, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32)
        )
        llm = LlamaForCausalLM(
            LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                        num_attention_heads=32)
        )  # fmt: skip
        return LayAlignForCausalLM.from_encoder_and_llm(encoder, llm, encoder_layers=list(range(24)))


def count(module: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def test_parameters_are_those_of_the_models(estimate: ModuleType, model: LayAlignForCausalLM) -> None:
    size = estimate.parameters()
    assert size["encoder"] == count(model.encoder)
    assert size["LLM"] == count(model.llm)
    assert size["adapter (of these)"] == count(model.mapping)
    assert size["trained"] == count(model, trained=True)
    assert round(size["trained"] / 1e6, 2) == 33.57  # the paper's table 10


@pytest.mark.slow
def test_operations_of_the_llm_are_those_torch_counts(estimate: ModuleType, model: LayAlignForCausalLM) -> None:
    tokens, llm = 64, model.llm
    embeddings = torch.zeros(1, tokens, 4096, device="meta", requires_grad=True)
    rotation = (torch.zeros(1, tokens, 128, device="meta"),) * 2
    with FlopCounterMode(display=False) as counter:
        hidden = embeddings
        for layer in llm.model.layers:
            hidden = layer(hidden, position_embeddings=rotation, attention_mask=None)
        logits = llm.lm_head(hidden)
    forward = counter.get_total_flops()
    with counter:
        logits.sum().backward()
    both = forward + counter.get_total_flops()
    lengths = (0, tokens - 2, 0)
    ours = [estimate.flops(lengths, backward=b, logits=tokens)["LLM"] for b in (False, True)]
    # torch counts the upper half of causal attention too, 0.5 % here.
    assert ours == [pytest.approx(forward, rel=0.01), pytest.approx(both, rel=0.01)]


def test_units_are_those_of_the_models(scale: ModuleType, model: LayAlignForCausalLM) -> None:
    units = scale.published_units()
    assert units == scale.units_of(model)
    assert units.all == count(model)
    # One GPU sends nothing; two send half of what is moved, for an all-reduce as much as there is.
    assert set(scale.step_bytes(units, 1, 2).values()) == {0}
    assert scale.step_bytes(units, 2, 1)["DDP"] == 4 * units.trained
    frozen, trained = units.gathered_bytes(dict.fromkeys(units.gathered(), 2)) - 2 * units.root, 4 * units.root
    assert scale.step_bytes(units, 2, 3)["FSDP2"] == 3 * (frozen + trained + 4 * units.trained) / 2


def test_scale_page_has_the_tables_that_the_script_prints(scale: ModuleType, tmp_path: Path) -> None:
    page = ROOT / "docs/scale.md"
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- scale: ") == len(scale.TABLES) == 4
    copied = tmp_path / page.name
    copied.write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "benchmarks/scale.py", str(copied)], cwd=ROOT, check=True)
    assert copied.read_text(encoding="utf-8") == text, "run `python benchmarks/scale.py docs/scale.md`"


def test_page_has_the_tables_that_the_script_prints(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- estimated: ") == 3
    copied = tmp_path / PAGE.name
    copied.write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "benchmarks/estimate.py", str(copied)], cwd=ROOT, check=True)
    assert copied.read_text(encoding="utf-8") == text, "run `python benchmarks/estimate.py docs/reproduce.md`"
