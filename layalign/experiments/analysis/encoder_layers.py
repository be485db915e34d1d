"""What each layer of an encoder is like: how well it puts translations side by side, how far it tells words apart."""

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
    """By language the accuracy (0..1) of finding each sentence's English among the language's, for every encoder layer.

    A sentence's vector is the mean of its tokens' states, less the mean of all vectors of its language.

    Args:
        encoder: in eval mode, of N layers.
        tokenizer: its tokenizer.
        data: examples by language, whose targets are the English.

    Returns:
        Lists of N + 1 numbers; the first is of the embeddings.
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
    """By language how alike the tokens of one source are, for every encoder layer.

    It is the mean cosine of two different tokens of a sentence, less the mean state of all tokens of the language, over
    all such pairs: 0 where a sentence leaves no trace in its tokens, 1 where they say nothing but their sentence.

    Args:
        encoder, tokenizer, data: as for `encoder_retrieval`.

    Returns:
        Lists of N + 1 numbers; the first is of the embeddings.
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
    """(texts, N + 1, D): each text's mean state of every layer."""
    states, mask = _states(encoder, tokenizer, texts)
    inside = mask[:, None, :, None]
    return ((states * inside).sum(dim=2) / inside.sum(dim=2)).cpu()


def _states(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Each text's states of every layer, (texts, N + 1, S, D) float32, and the mask (texts, S)."""
    rows = [text.ids for text in encode_texts(tokenizer, list(texts), special=True)]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id
    device = device_of(encoder.get_input_embeddings())
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    states, _ = encode(encoder, ids, mask, list(range(number_of_layers(encoder.config) + 1)))
    return torch.stack(states, dim=1).float(), mask
