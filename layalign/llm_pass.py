"""The LLM inside the model: one pass of it, and what the model hands on to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from layalign import liger
from layalign.loss import label_loss, with_loss
from layalign.packing import IGNORE_INDEX
from layalign.rows import Rows

if TYPE_CHECKING:
    from layalign.model import LayAlignForCausalLM


def run_llm(
    model: LayAlignForCausalLM,
    inputs: dict[str, Any],
    labels: Tensor | None,
    keep: int | Tensor | None,
    divisor: Tensor | int | None,
) -> CausalLMOutputWithPast:
    """One pass of the model's LLM: logits, and the last layer, only where they are wanted.

    Args:
        inputs: the LLM's keyword arguments.
        labels: (B, T) int64, -100 where nothing is predicted, or None.
        keep: transformers' ``logits_to_keep``; None with labels for a loss without logits.
        divisor: of the summed loss; None for the number of labels.
    """
    shape, device = inputs["inputs_embeds"].shape[:2], inputs["inputs_embeds"].device
    if labels is None:
        rows = Rows.last(shape, keep, device) if isinstance(keep, int) and 0 < keep < shape[1] else None
        with model.last_layer.only(rows, inputs):
            return model.llm(**inputs, logits_to_keep=0 if keep is None else keep, return_dict=True)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # position t predicts label t + 1
    if keep is None and not torch.compiler.is_compiling():
        rows = Rows(targets != IGNORE_INDEX)
        with model.last_layer.only(rows, inputs):
            return liger.labelled_output(model.llm, inputs, targets, rows, divisor, model.config.liger)
    if model.config.liger == "always":
        liger.chosen("always", model.llm, keep)  # raises: there are logits to return, or the call is compiled
    output = model.llm(**inputs, logits_to_keep=keep or 0, return_dict=True)
    if isinstance(keep, Tensor):
        targets = targets[:, keep]
    elif keep:
        targets = targets[:, -keep:]
    return with_loss(output, label_loss(output.logits, targets, divisor), output.logits)


class LLMPartMixin:
    """Methods of a transformers model that are the LLM's."""

    llm: Any
    encoder: Any

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Checkpoint the LLM's layers (the frozen encoder keeps no activations)."""
        new = getattr(self.llm, "activation_checkpointing_enable", None)  # its name in later transformers
        (new or self.llm.gradient_checkpointing_enable)(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the LLM's activations again."""
        new = getattr(self.llm, "activation_checkpointing_disable", None)
        (new or self.llm.gradient_checkpointing_disable)()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """The later name of :meth:`gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    activation_checkpointing_disable = gradient_checkpointing_disable

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.llm.get_output_embeddings()

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The frozen multilingual encoder."""
        return self.encoder
