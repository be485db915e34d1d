"""What the page shows of the checkpoint's inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layalign.analysis import fusion, retrieval_accuracy
from layalign.analysis.measure import attention
from layalign.analysis.reading import Reader
from layalign.analysis.result import AttentionMap
from layalign.config import number_of_layers
from layalign.data import Example
from layalign.encoder import encode
from layalign.experiments.demo.models import Joined
from layalign.tokenization import encode_texts
from layalign.training.gates import read_gates

_LONGEST_ANSWER = 20
_MAPS = 4  # attention maps that are shown


def inside(
    joined: Joined, checkpoint: Path, parallel: Mapping[str, Sequence[Example]], shown: Example
) -> dict[str, Any]:
    """Gates, mix, retrieval by encoder layer, and the attention of one answer to its source, as JSON values.

    Args:
        joined: the model.
        checkpoint: its folder, for the gates over training.
        parallel: sentences by language, row i of each a translation of the same English.
        shown: the sentence whose answer's attention is shown.
    """
    mix = fusion.mix_weights(joined.model)
    reader = Reader(joined.model, joined.encoder_tokenizer, joined.llm_tokenizer)
    gates = fusion.gate_values(joined.model)
    return {
        "encoder_layers": list(joined.model.config.encoder_layers),
        "language_layers": list(joined.model.config.language_layers),
        "gates": gates,
        "gate_history": read_gates(checkpoint),
        "mix": None if mix is None else {"keys": _rounded(mix[0]), "values": _rounded(mix[1])},
        "retrieval": retrieval_by_layer(joined, parallel),
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


@torch.no_grad()
def retrieval_by_layer(joined: Joined, parallel: Mapping[str, Sequence[Example]]) -> dict[str, list[float]]:
    """By language the accuracy (0..1) of finding each sentence's English by its encoder states, for every layer.

    A sentence's vector is the mean of its tokens' states, without the language's own mean.
    """
    encoder = joined.model.encoder
    layers = range(number_of_layers(encoder.config) + 1)
    english = next(iter(parallel.values()))
    wanted = _means(joined, [example.target for example in english], layers)
    found = {}
    for language, examples in parallel.items():
        states = _means(joined, [example.source for example in examples], layers)
        pairs = ((states[:, layer], wanted[:, layer]) for layer in layers)
        found[language] = [retrieval_accuracy(x - x.mean(0), y - y.mean(0)) for x, y in pairs]
    return found


def _means(joined: Joined, texts: Sequence[str], layers: Sequence[int]) -> Tensor:
    """(N, layers, D): each text's mean state of each layer."""
    rows = [text.ids for text in encode_texts(joined.encoder_tokenizer, list(texts), special=True)]
    width, pad = max(map(len, rows)), joined.encoder_tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    states, _ = encode(joined.model.encoder, ids, mask, list(layers))
    inside = mask[:, None, :, None]
    return (torch.stack(states, dim=1).float() * inside).sum(dim=2) / inside.sum(dim=2)
