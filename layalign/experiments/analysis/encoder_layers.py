"""Properties of each encoder layer: how well it aligns translations, and how similar the tokens of a sentence are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layalign.experiments.analysis.measure import Data
from layalign.experiments.analysis.similarity import retrieval_accuracy
from layalign.modeling.configuration import number_of_layers
from layalign.modeling.encoders import encode
from layalign.modeling.tokenization import encode_texts
from layalign.nn.inspection import device_of


@torch.no_grad()
def encoder_retrieval(encoder: Any, tokenizer: Any, data: Data) -> dict[str, list[float]]:
    """Accuracy (0..1) of retrieving each sentence's English translation, by language and encoder layer.

    The vector of a sentence is the mean of its tokens' states minus the mean vector of its language.

    Args:
        encoder: an encoder of N layers, in eval mode.
        tokenizer: its tokenizer.
        data: examples by language; their targets are English.

    Returns:
        A list of N + 1 numbers per language; the first one is for the embeddings.
    """
    known: dict[tuple[str, ...], Tensor] = {}

    def means(texts: Sequence[str]) -> Tensor:
        key = tuple(texts)
        if key not in known:  # languages often share their English
            known[key] = _means(encoder, tokenizer, texts)
        return known[key]

    found = {}
    for language, examples in data.items():
        x, y = (means([getattr(e, side) for e in examples]) for side in ("source", "target"))
        x, y = x - x.mean(0), y - y.mean(0)
        found[language] = [retrieval_accuracy(x[:, layer], y[:, layer]) for layer in range(x.shape[1])]
    return found


@torch.no_grad()
def token_likeness(encoder: Any, tokenizer: Any, data: Data) -> dict[str, list[float]]:
    """How similar the tokens of one source are, by language and encoder layer.

    It is the mean cosine over all pairs of different tokens of a sentence, after subtracting the mean state of all
    tokens of the language. It is 0 if the tokens carry nothing of their sentence, and 1 if they carry nothing else.

    Args:
        encoder, tokenizer, data: as for `encoder_retrieval`.

    Returns:
        A list of N + 1 numbers per language; the first one is for the embeddings.
    """
    found: dict[str, list[float]] = {}
    for language, examples in data.items():
        states, mask = _states(encoder, tokenizer, [example.source for example in examples])
        inside = mask.bool()
        owner = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[inside]
        pairs = (owner[:, None] == owner).fill_diagonal_(False)
        found[language] = []
        for layer in states.unbind(1):
            tokens = F.normalize(layer[inside] - layer[inside].mean(0), dim=-1)
            found[language].append(float((tokens @ tokens.T)[pairs].mean()))
    return found


def _means(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Mean state of each text in every layer, (texts, N + 1, D)."""
    states, mask = _states(encoder, tokenizer, texts)
    inside = mask[:, None, :, None]
    return ((states * inside).sum(dim=2) / inside.sum(dim=2)).cpu()


def _states(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States of each text in every layer, (texts, N + 1, S, D) float32, and the mask (texts, S)."""
    rows = [text.ids for text in encode_texts(tokenizer, list(texts), special=True)]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id
    device = device_of(encoder.get_input_embeddings())
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    states, _ = encode(encoder, ids, mask, list(range(number_of_layers(encoder.config) + 1)))
    return torch.stack(states, dim=1).float(), mask
