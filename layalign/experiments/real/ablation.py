"""How much worse a trained run gets when a part of it is removed, without training again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layalign.data import Example
from layalign.evaluation.likelihood import target_log_probs
from layalign.experiments.real.data import RealData
from layalign.experiments.real.measures import BATCH, collators
from layalign.experiments.real.runs import (
    after_training,
    load_run,
    read_by,
    tokenizers_of,
)
from layalign.experiments.real.settings import RealSettings, RealSystem
from layalign.modeling.configuration import number_of_layers
from layalign.modeling.layers import named_layers

ABLATION = "ablation.json"
PER_LANGUAGE = 5
SETS = {
    "first third": "first-third",
    "middle third": "middle-third",
    "last third": "last-third",
    "last": "last",
    "all but the last": None,
}


def ablate_run(settings: RealSettings, system: RealSystem, data: RealData, folder: Path, seed: int) -> dict[str, Any]:
    """Nats per token of the complete model, and without each of its parts.

    Parts are removed as follows.

    - An encoder layer, or a set of them: its weights in the aligner's mix are 0, for keys and values of all LLM layers.
      Only sets that leave at least one layer are tried.
    - An LLM layer: its gate is 0. "no gates": all gates are 0.
    - Soft tokens: the adapter returns zeros.

    Returns:
        Nats per token of the references, over all tokens of the first sentences of every test language: under "whole",
        "no gates" and "no soft tokens", by name under "layer sets", and by number under "encoder layers" and "LLM
        layers". Parts that the system does not have are omitted. Also the gates under "gates", and the mean absolute
        weights of the mix, for keys and for values, under "encoder layer weights".
    """

    def ablated(checkpoint: Path) -> dict[str, Any]:
        model = load_run(checkpoint)
        collator, _ = collators(model, tokenizers_of(settings), "task" if system.reads_text else "translation")
        pairs = [pair for group in data.test.values() for pair in group[:PER_LANGUAGE]]
        return ablate(model, collator, read_by(system, pairs))

    return after_training(settings, system, data, folder, seed, ABLATION, "ablation", ablated)


@torch.no_grad()
def ablate(model: Any, collator: Any, pairs: Sequence[Example]) -> dict[str, Any]:
    """See :func:`ablate_run`."""

    def nats() -> float:
        values = target_log_probs(model, collator, pairs, BATCH)
        return round(-sum(value for value, _ in values) / sum(count for _, count in values), 5)

    found: dict[str, Any] = {"whole": nats()}
    if model.mapping is not None:
        last = model.mapping.mlp.linear2
        with _zero([last.weight, last.bias]):
            found["no soft tokens"] = nats()
    if model.encoder_aligner is not None:
        gates = [module.adaption_gate for module in model.cross_attention]
        with _zero(gates):
            found["no gates"] = nats()
        mix = model.encoder_aligner.projector.fc1.weight  # (2L, E)
        found["layer sets"], found["encoder layers"], found["LLM layers"] = {}, {}, {}
        count = number_of_layers(model.config.encoder_config) + 1
        for name, of_set in SETS.items():
            away = [place for place, e in enumerate(model.config.encoder_layers) if e in named_layers(of_set, count)]
            if 0 < len(away) < len(model.config.encoder_layers):
                with _zero([mix[:, place] for place in away]):
                    found["layer sets"][name] = nats()
        for place, layer in enumerate(model.config.encoder_layers):
            with _zero([mix[:, place]]):
                found["encoder layers"][str(layer)] = nats()
        for gate, layer in zip(gates, model.config.language_layers, strict=True):
            with _zero([gate]):
                found["LLM layers"][str(layer)] = nats()
        found["gates"] = [round(gate.item(), 5) for gate in gates]
        found["encoder layer weights"] = {
            name: [round(value, 5) for value in mix[start::2].abs().mean(0).tolist()]
            for start, name in enumerate(("keys", "values"))
        }
    return found


@contextmanager
def _zero(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Set tensors, or views of them, to 0 within the block."""
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    try:
        yield
    finally:
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
