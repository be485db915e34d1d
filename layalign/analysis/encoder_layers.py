"""How well each layer of an encoder puts translations side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layalign._plain import device_of
from layalign.analysis.measure import Data
from layalign.analysis.similarity import retrieval_accuracy
from layalign.config import number_of_layers
from layalign.encoder import encode
from layalign.tokenization import encode_texts


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


def _means(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(texts, N + 1, D): each text's mean state of every layer."""
    rows = [text.ids for text in encode_texts(tokenizer, list(texts), special=True)]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    ids, mask = (tensor.to(device_of(encoder.get_input_embeddings())) for tensor in (ids, mask))
    states, _ = encode(encoder, ids, mask, list(range(number_of_layers(encoder.config) + 1)))
    inside = mask[:, None, :, None]
    return ((torch.stack(states, dim=1).float() * inside).sum(dim=2) / inside.sum(dim=2)).cpu()
