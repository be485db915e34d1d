"""The published data flow (benchmarks/published.py) over tiny random parts, with gates far from zero."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import VOCABULARY, tiny_encoder, tiny_llm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import published

from layalign import ops
from layalign.ops.cached_launch import CachedDecode

ENCODER_LAYERS = [0, 2, 3]


def settings(structure: str = "Linear", layers: tuple[int, ...] = (0, 1, 2)) -> SimpleNamespace:
    aligner = SimpleNamespace(
        encoder_hidden_dim=24,
        language_hidden_dim=32,
        num_transformer_submodules=1,
        num_attention_heads=4,
        num_encoder_layers=len(ENCODER_LAYERS),
        num_language_layers=len(layers),
        encoder_layers=ENCODER_LAYERS,
        language_layers=list(layers),
        projector_type="weighted_linear",
        structure=structure,
    )
    return SimpleNamespace(encoder_aligner_config=aligner, max_gen_len=6, llm_bos_token_id=1, llm_pad_token_id=0)


def published_model(
    llm: str = "llama",
    structure: str = "Linear",
    layers: tuple[int, ...] = (0, 1, 2),
    attention: str = "sdpa",
    **changes,
) -> published.PublishedLayAlign:
    parts = tiny_encoder().get_encoder(), tiny_llm(llm, attention=attention, eos_token_id=None, **changes)
    parts[1].generation_config.eos_token_id = None
    torch.manual_seed(2)
    model = published.PublishedLayAlign(settings(structure, layers), *parts)
    with torch.no_grad():
        for index, gate in enumerate(gates(model)):
            gate.fill_(0.7 - 0.5 * index)
        model.mapping.end_boundary.normal_()
    return model.eval()


def gates(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("adaption_gate")]


def wrappers(model: torch.nn.Module) -> list[published.AdaptedAttention]:
    return [module for module in model.modules() if isinstance(module, published.AdaptedAttention)]


def data(seed: int = 3, labels: bool = True) -> dict[str, torch.Tensor]:
    """Right-padded sources, right-padded prompts, left-padded labels."""
    generator = torch.Generator().manual_seed(seed)

    def block(lengths: tuple[int, ...], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(lengths)
        ids = torch.randint(4, VOCABULARY, (len(lengths), width), generator=generator)
        mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
        return ids, mask.flip(1) if left else mask

    source, prompt, target = block((6, 3, 5)), block((2, 4, 1)), block((3, 1, 4), left=True)
    batch = dict(zip(("input_ids_mt", "attention_mask_mt"), source, strict=True))
    batch |= dict(zip(("input_ids_prompt", "mask_prompt"), prompt, strict=True))
    return batch | (dict(zip(("labels", "mask_label"), target, strict=True)) if labels else {})


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    assert first.keys() == second.keys()
    for name in first:
        error = (first[name] - second[name]).norm() / first[name].norm().clamp(min=1e-6)
        assert error <= bound, f"{name}: {error:.1e}"


def own_classes(model: torch.nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.fixture(name="calls")
def calls_of_operations(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each operation was called, in full or as a repetition that the kernels take at once."""
    counted = {"layer_projection": 0, "gated_cross_attention": 0}

    def count(name: str):
        original = getattr(ops, name)

        def counting(*args, **kwargs):
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, counting)

    short = CachedDecode.__call__

    def counting_short(*args):
        found = short(*args)
        counted["gated_cross_attention"] += found is not None
        return found

    for name in counted:
        count(name)
    monkeypatch.setattr(CachedDecode, "__call__", counting_short)
    return counted
