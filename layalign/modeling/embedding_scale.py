"""Soft tokens for an LLM that multiplies the embeddings of its text by a constant.

The convention is the same for every version of transformers: soft tokens and the boundary enter the first layer of a
Gemma as the adapter made them. The LLM's factor sqrt(D_l) is for its text alone. Up to transformers 5.3 the decoders of
:data:`~layalign.modeling.decoders.SCALED_IN_DECODER` multiply all embeddings that they get. From 5.4 on their embedding
module multiplies instead. A decoder that multiplies in every version (Granite's ``embedding_multiplier``) multiplies
soft tokens too.
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
    """Whether a checkpoint that does not record it was trained with soft tokens scaled like text.

    Args:
        text_config: configuration of the LLM's decoder.
        version: of the transformers that wrote the checkpoint; None for a new model.
    """
    if text_config.model_type not in SCALED_IN_DECODER or not isinstance(version, str):
        return False
    return minor_version(version) < MOVED


def in_slots(rows: Tensor, text_config: Any, scaled: bool, in_decoder: bool | None = None) -> Tensor:
    """Soft tokens (..., D_l) in the form that a decoder needs.

    Args:
        text_config: configuration of the LLM's decoder.
        scaled: whether they enter the first layer multiplied as the LLM's text is, or as they are.
        in_decoder: whether the decoder multiplies all embeddings that it gets; None: transformers' does or not.
    """
    in_decoder = IN_DECODER if in_decoder is None else in_decoder
    if scaled == in_decoder or text_config.model_type not in SCALED_IN_DECODER:
        return rows
    factor = torch.tensor(text_config.hidden_size**0.5, dtype=rows.dtype)  # rounded as the decoder rounds it
    return rows / factor if in_decoder else rows * factor
