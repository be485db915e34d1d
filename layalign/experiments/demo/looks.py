"""What the page shows of the checkpoint: gates, mix, retrieval and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layalign.data import Example
from layalign.experiments.analysis import fusion
from layalign.experiments.analysis.encoder_layers import encoder_retrieval
from layalign.experiments.analysis.measure import attention
from layalign.experiments.analysis.reading import Reader
from layalign.experiments.analysis.result import AttentionMap
from layalign.experiments.demo.models import Joined
from layalign.training.gates import gate_values, read_gates

_LONGEST_ANSWER = 20
_MAPS = 4  # attention maps that are shown


def inside(
    joined: Joined, checkpoint: Path, parallel: Mapping[str, Sequence[Example]], shown: Example
) -> dict[str, Any]:
    """Gates, mix, retrieval by encoder layer, and the attention of one answer to its source, as JSON values.

    Args:
        joined: the model.
        checkpoint: its folder, for the gates over training.
        parallel: sentences by language; row i of each language translates the same English.
        shown: the sentence to show attention for.
    """
    mix = fusion.mix_weights(joined.model)
    reader = Reader(joined.model, joined.encoder_tokenizer, joined.llm_tokenizer)
    gates = gate_values(joined.model)
    return {
        "encoder_layers": list(joined.model.config.encoder_layers),
        "language_layers": list(joined.model.config.language_layers),
        "gates": gates,
        "gate_history": read_gates(checkpoint),
        "mix": None if mix is None else {"keys": _rounded(mix[0]), "values": _rounded(mix[1])},
        "retrieval": encoder_retrieval(joined.model.encoder, joined.encoder_tokenizer, parallel),
        "attention": _maps(attention(reader, shown, _LONGEST_ANSWER), gates),
    }


def _maps(found: AttentionMap | None, gates: Sequence[float]) -> dict[str, Any] | None:
    """The maps of the layers with the largest gates, in the order of the layers."""
    if found is None:
        return None
    slots = sorted(sorted(range(len(gates)), key=lambda slot: -abs(gates[slot]))[:_MAPS])
    shown = {name: value for name, value in vars(found).items() if name != "weights"}
    return {**shown, "slots": slots, "weights": [_rounded(torch.tensor(found.weights[slot])) for slot in slots]}


def _rounded(numbers: Tensor) -> list[list[float]]:
    return [[round(number, 4) for number in row] for row in numbers.tolist()]
