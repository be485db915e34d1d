"""Soft tokens beside the text of an LLM that multiplies its embeddings by a number.

The convention is one for every version of transformers: soft tokens and the boundary enter the first layer of a Gemma
as the adapter made them; the LLM's sqrt(D_l) is for its text alone. Up to transformers 5.3 the decoders of
:data:`~layalign.modeling.decoders.SCALED_IN_DECODER` multiply whatever embeddings they are given, from 5.4 on their
embedding module does it. Where a decoder multiplies in every version (Granite's ``embedding_multiplier``), it does so
with soft tokens too.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from layalign.modeling.decoders import SCALED_IN_DECODER
from layalign.utils.versions import minor_version

MOVED = (5, 4)  # the version that moved the factor
IN_DECODER = minor_version(metadata.version("transformers")) < MOVED


def scaled_as_text(text_config: Any, version: str | None) -> bool:
    """Whether a checkpoint that does not say so was made with soft tokens scaled like text.

    Args:
        text_config: configuration of the LLM's decoder.
        version: of the transformers that wrote the checkpoint; None for a new model.
    """
    if text_config.model_type not in SCALED_IN_DECODER or not isinstance(version, str):
        return False
    return minor_version(version) < MOVED


def in_slots(rows: Tensor, text_config: Any, scaled: bool) -> Tensor:
    """Soft tokens (..., D_l) as the installed transformers' decoder is to be given them.

    Args:
        text_config: configuration of the LLM's decoder.
        scaled: whether they enter the first layer multiplied as the LLM's text is, or as they are.
    """
    if scaled == IN_DECODER or text_config.model_type not in SCALED_IN_DECODER:
        return rows
    factor = torch.tensor(text_config.hidden_size**0.5, dtype=rows.dtype)  # rounded as the decoder rounds it
    return rows / factor if IN_DECODER else rows * factor
