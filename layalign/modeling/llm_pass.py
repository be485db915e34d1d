"""The LLM inside the model: one pass of it, and the methods that the model delegates to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from layalign.modeling import liger, vocabulary
from layalign.modeling.llm_inputs import IGNORE_INDEX
from layalign.modeling.loss import label_loss, with_loss
from layalign.modeling.validation import require_index
from layalign.nn.rows import Rows
from layalign.utils.errors import ArgumentError, first_line, refuse

if TYPE_CHECKING:
    from layalign.modeling.model import LayAlignForCausalLM


def predicted(labels: Tensor) -> Tensor:
    """The label that each position predicts, (B, T): position t predicts label t + 1."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def labelled_rows(labels: Tensor, index: Tensor | None) -> Rows | None:
    """The positions that predict a label; None in compiled code, which computes all.

    Args:
        labels: (B, T) int64, -100 where nothing is predicted.
        index: (M,) int64, these positions, if the caller knows them. Otherwise the host waits for the device once.
    """
    if torch.compiler.is_compiling():
        return None
    wanted = predicted(labels) != IGNORE_INDEX
    if index is None:
        return Rows(wanted)
    require_index("loss_index", index, wanted)
    return Rows.at(wanted.shape, index)


def run_llm(
    model: LayAlignForCausalLM,
    inputs: dict[str, Any],
    labels: Tensor | None,
    keep: int | Tensor | None,
    skip: bool | None,
    divisor: Tensor | int | None,
    labelled: Rows | None = None,
) -> CausalLMOutputWithPast:
    """One pass of the model's LLM. Logits, and the last layer, are computed only where they are needed.

    Args:
        inputs: the LLM's keyword arguments.
        labels: (B, T) int64, -100 where nothing is predicted, or None.
        keep: transformers' ``logits_to_keep``. None: ``skip`` decides.
        skip: with labels, whether logits are computed only where a label is, and not returned. None: yes in training
            mode, where gradients are recorded, and with ``fused_loss="always"``.
        divisor: of the summed loss; None for the number of labels.
        labelled: the positions that predict a label; None if all logits are wanted.
    """
    shape, device = inputs["inputs_embeds"].shape[:2], inputs["inputs_embeds"].device
    if labels is None:
        rows = Rows.last(shape, keep, device) if isinstance(keep, int) and 0 < keep < shape[1] else None
        with model.last_layer.only(rows, inputs):
            return model.llm(**inputs, logits_to_keep=0 if keep is None else keep, return_dict=True)
    targets, rows = predicted(labels), labelled
    if rows is not None:
        if skip is None:
            skip = model.training or torch.is_grad_enabled() or model.config.fused_loss == "always"
        if skip:
            with model.last_layer.only(rows, inputs):
                bodies = model.last_layer.bodies
                return liger.labelled_output(model.llm, inputs, targets, rows, divisor, model.config.fused_loss, bodies)
    if model.config.fused_loss == "always":
        # Raises: there are logits to return, or the call is compiled.
        liger.chosen("always", model.llm, keep if rows is None else 0)
    output = model.llm(**inputs, logits_to_keep=keep or 0, return_dict=True)
    logits = output.logits
    if rows is not None:  # fewer to copy to fp32
        logits, targets = rows.select(logits), targets.flatten().index_select(0, rows.index)
    elif isinstance(keep, Tensor):
        targets = targets[:, keep]
    elif keep:
        targets = targets[:, -keep:]
    return with_loss(output, label_loss(logits, targets, divisor), output.logits)


def _put_embeddings(old: Any, new: Any, put: Callable[[Any], None]) -> None:
    weight = getattr(new, "weight", None)
    if not isinstance(new, nn.Module) or weight is None or weight.shape[-1] != old.weight.shape[-1]:
        what = f"a {type(new).__name__}" if weight is None else f"a weight {tuple(weight.shape)}"
        raise ArgumentError(f"embeddings: expected a module with a weight (V, {old.weight.shape[-1]}), got {what}")
    new.requires_grad_(old.weight.requires_grad)
    put(new)


def _attention_config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation_internal") else None


def _of_llm(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.llm, name)(*args, **kwargs)

    method.__name__, method.__doc__ = name, f"The LLM's ``{name}``: adapters are in the LLM alone."
    return method


class LLMPartMixin:
    """Methods of a transformers model that are the LLM's."""

    llm: Any
    encoder: Any

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Checkpoint the activations of the LLM's layers (the frozen encoder keeps none)."""
        later = getattr(self.llm, "activation_checkpointing_enable", None)  # its name in later transformers
        (later or self.llm.gradient_checkpointing_enable)(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the LLM's activations again."""
        later = getattr(self.llm, "activation_checkpointing_disable", None)
        (later or self.llm.gradient_checkpointing_disable)()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """The later name of :meth:`gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    activation_checkpointing_disable = gradient_checkpointing_disable

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's input embeddings."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's input embeddings. The new ones train only if the old ones did.

        Raises:
            ArgumentError: the module has no weight (V, D_l).
        """
        _put_embeddings(self.llm.get_input_embeddings(), value, self.llm.set_input_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's output head."""
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the LLM's output head. The new one trains only if the old one did.

        Raises:
            ArgumentError: the module has no weight (V, D_l).
        """
        _put_embeddings(self.llm.get_output_embeddings(), new_embeddings, self.llm.set_output_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resize the LLM's vocabulary. Frozen embeddings stay frozen. Arguments as in transformers.

        Raises:
            ArgumentError: the model would lose a token that it needs, or the embeddings are not plain ones (quantised,
                sharded, offloaded, LoRA-wrapped). Nothing is changed then.
        """
        return vocabulary.resize(cast("LayAlignForCausalLM", self), new_num_tokens, pad_to_multiple_of, mean_resizing)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Set the attention function of both parts, or by part: {"llm_config": "eager"}. The gated term stays.

        Raises:
            ArgumentError: a part has no such function. Nothing is changed then.
        """
        parts = {"llm_config": self.llm, "encoder_config": self.encoder}
        asked = (
            attn_implementation if isinstance(attn_implementation, dict) else dict.fromkeys(parts, attn_implementation)
        )
        if unknown := [name for name in asked if name not in parts]:
            refuse("attn_implementation", f"a name, or names by {' and '.join(parts)}", unknown[0])
        configs = [
            config for part in parts.values() for module in part.modules() if (config := _attention_config(module))
        ]
        before = [(config, config._attn_implementation_internal) for config in configs]
        try:
            for name, function in asked.items():
                parts[name].set_attn_implementation(function, *args, **kwargs)
        except (ValueError, ImportError) as error:
            for config, function in before:
                config._attn_implementation_internal = function
            raise ArgumentError(f"attn_implementation: {first_line(error)}") from error

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """As ``add_lora``: LoRA is put on the LLM, and the model's own parts keep training.

        Raises:
            ArgumentError: the name is not "default", or the LLM has an adapter already.
        """
        if adapter_name not in (None, "default"):
            refuse("adapter_name", "'default', for a checkpoint keeps one adapter", adapter_name)
        cast("LayAlignForCausalLM", self).add_lora(adapter_config)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Remove an adapter from the LLM. Without adapters, its modules are again what they were."""
        self.llm.delete_adapter(adapter_names)
        if self.llm._hf_peft_config_loaded:
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in list(self.llm.modules()):
            for name, child in module.named_children():
                if isinstance(child, BaseTunerLayer):  # peft leaves it, and its names would get into checkpoints
                    setattr(module, name, child.get_base_layer())
        cast("LayAlignForCausalLM", self).config.lora = None

    load_adapter = _of_llm("load_adapter")
    set_adapter = _of_llm("set_adapter")
    enable_adapters = _of_llm("enable_adapters")
    disable_adapters = _of_llm("disable_adapters")
    active_adapters = _of_llm("active_adapters")
    get_adapter_state_dict = _of_llm("get_adapter_state_dict")

    def dequantize(self, *args: Any, **kwargs: Any) -> Any:
        """Dequantise encoder and LLM, whichever is quantised.

        Raises:
            ArgumentError: neither is.
        """
        quantised = [part for part in (self.llm, self.encoder) if getattr(part, "hf_quantizer", None) is not None]
        if not quantised:
            raise ArgumentError("dequantize: expected a quantised LLM or encoder, this model has neither")
        for part in quantised:
            part.dequantize(*args, **kwargs)
        return self

    def set_encoder(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the trained parts belong to this encoder."""
        raise ArgumentError("encoder: expected to stay; use from_encoder_and_llm for another encoder")

    def set_decoder(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the trained parts belong to this LLM."""
        raise ArgumentError("decoder: expected to stay; use from_encoder_and_llm for another LLM")

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The frozen multilingual encoder."""
        return self.encoder
