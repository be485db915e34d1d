"""torch.export of aligner, adapter and gated cross-attention: saved, loaded, run at other sizes, the same numbers."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import batch, tiny_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from layalign import Adapter, EncoderAligner, GatedCrossAttention
from layalign.ops import backends

ROOT = Path(__file__).parents[2]
BATCH, SOURCE = Dim("batch", min=1, max=512), Dim("source", min=1, max=8192)
IMPLS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(not backends.capability("cpp", "cpu")[0], reason="no _C")),
]
SIZES = [(3, 7), (1, 5), (9, 300), (2, 1)]
CONFIG = dict(encoder_hidden_dim=24, language_hidden_dim=32, num_encoder_layers=4, num_language_layers=3)


def round_trip(program: ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def own_operations(program: ExportedProgram) -> set[str]:
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return {name for name in names if name.startswith("layalign.")}


def aligner(structure: str = "Linear", impl: str = "torch", mix: str = "layer-wise") -> EncoderAligner:
    torch.manual_seed(0)
    return EncoderAligner(SimpleNamespace(**CONFIG, structure=structure, mix=mix), impl=impl).eval()


def layers(rows: int, length: int) -> list[Tensor]:
    return [torch.randn(rows, length, 24) for _ in range(4)]


def flat(pairs: Any) -> Tensor:
    return torch.stack([state for pair in pairs for state in pair])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("structure", "mix"), [("Linear", "layer-wise"), ("MLP", "layer-wise"), ("Linear", "shared")], ids=str
)
def test_the_aligner_with_any_batch_and_source_length(structure: str, mix: str, impl: str) -> None:
    module = aligner(structure, impl, mix)
    shapes = ([{0: BATCH, 1: SOURCE}] * 4,)
    program = torch.export.export(module, (layers(3, 7),), dynamic_shapes=shapes)
    assert own_operations(program) == (set() if impl == "torch" else {"layalign.layer_projection.default"})
    loaded = round_trip(program)
    for size in SIZES:
        hidden = layers(*size)
        torch.testing.assert_close(flat(loaded(hidden)), flat(module(hidden)), rtol=1e-6, atol=1e-6)


def test_auto_exports_plain_torch_and_the_program_trains() -> None:
    """Whoever loads the program may have another machine, and no layalign; sizes choose no kernel either."""
    module = aligner(impl="auto")
    program = torch.export.export(module, (layers(3, 7),), dynamic_shapes=([{0: BATCH, 1: SOURCE}] * 4,))
    assert own_operations(program) == set()
    loaded, hidden = program.module(), layers(2, 9)
    flat(loaded(hidden)).square().sum().backward()
    flat(module(hidden)).square().sum().backward()
    found = {name: parameter.grad for name, parameter in loaded.named_parameters()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-5)


class KeysAndValues(nn.Module):
    """What a server computes once per question: every LLM layer's keys and values, and the soft tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, encoder_input_ids: Tensor, encoder_attention_mask: Tensor) -> Any:
        soft, source = self.model.encode_source(encoder_input_ids, encoder_attention_mask)
        return soft, list(source.keys), list(source.values)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("encoder", ["xlm-roberta", "mt5", "m2m_100"])
def test_encoder_adapter_aligner_and_the_llms_maps_in_one_program(encoder: str) -> None:
    model = tiny_model(encoder, "qwen2")
    module = KeysAndValues(model)
    ids = torch.randint(4, 60, (3, 7))
    shape = {0: BATCH, 1: Dim("source", min=2, max=60)}
    program = torch.export.export(module, (ids, torch.ones_like(ids)), dynamic_shapes=(shape, shape), strict=False)
    loaded = round_trip(program)
    inputs = batch((9, 4), (0, 0), (1, 1), model=model)
    ids, mask = inputs["encoder_input_ids"], inputs["encoder_attention_mask"]
    (soft, keys, values), (_, source) = loaded(ids, mask), model.encode_source(ids, mask)
    real = mask.bool()  # eager calls leave padding out
    torch.testing.assert_close(soft[real], model.encode_source(ids, mask)[0][real], rtol=1e-5, atol=1e-5)
    for found, expected in zip([*keys, *values], [*source.keys, *source.values], strict=True):
        torch.testing.assert_close(found.mT.mT * real[:, None, :, None], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_adapter() -> None:
    module = Adapter(24, 32)
    program = torch.export.export(module, (torch.randn(3, 7, 24),), dynamic_shapes=({0: BATCH, 1: SOURCE},))
    loaded = round_trip(program)
    for size in SIZES:
        states = torch.randn(*size, 24)
        torch.testing.assert_close(loaded(states), module(states))
    assert torch.equal(loaded.end_boundary, module.end_boundary)


def attention_inputs(rows: int, length: int, source: int) -> tuple[Tensor, ...]:
    mask = torch.rand(rows, source) > 0.3
    mask[:, 0] = True
    states = [torch.randn(rows, 2, source, 8) for _ in range(2)]
    return torch.randn(rows, 4, length, 8), *states, torch.randn(rows, length, 4, 8), mask


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1, 5, 20])
def test_gated_cross_attention_of_a_decoding_step_and_of_more(length: int, impl: str) -> None:
    module = GatedCrossAttention(impl=impl)
    module.adaption_gate.fill_(0.7)
    shapes = ({0: BATCH}, {0: BATCH, 2: SOURCE}, {0: BATCH, 2: SOURCE}, {0: BATCH}, {0: BATCH, 1: SOURCE})
    program = torch.export.export(module, attention_inputs(3, length, 7), dynamic_shapes=shapes)
    kernel = (
        "layalign.gated_cross_attention_decode.default" if length <= 16 else "layalign.gated_cross_attention.default"
    )
    assert own_operations(program) == (set() if impl == "torch" else {kernel})
    loaded = round_trip(program)
    for rows, source in SIZES:
        inputs = attention_inputs(rows, length, source)
        torch.testing.assert_close(loaded(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)


LOAD = """
import sys, torch
{first}
program = torch.export.load(sys.argv[1]).module()
hidden = [torch.arange(2 * 5 * 24).reshape(2, 5, 24) / 100 for _ in range(4)]
print(float(sum(state.sum() for pair in program(hidden) for state in pair)), "layalign" in sys.modules)
"""


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_process_that_loads_a_program_must_import(impl: str, tmp_path: Path) -> None:
    module = aligner(impl=impl)
    program = torch.export.export(module, (layers(3, 7),), dynamic_shapes=([{0: BATCH, 1: SOURCE}] * 4,))
    torch.export.save(program, tmp_path / "aligner.pt2")
    first = "" if impl == "torch" else "import layalign.ops"
    command = [sys.executable, "-c", LOAD.format(first=first), str(tmp_path / "aligner.pt2")]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert printed.returncode == 0, printed.stderr
    total, imported = printed.stdout.split()
    hidden = [torch.arange(2 * 5 * 24).reshape(2, 5, 24) / 100 for _ in range(4)]
    assert float(total) == pytest.approx(float(flat(module(hidden)).sum()), rel=1e-4)
    assert imported == str(impl != "torch")
