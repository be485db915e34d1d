"""The published code's classes, with the same names and signatures, on top of this library's modules.

A published training or evaluation script needs only its import lines changed::

    from layalign.published.classes import LayAlign, LayAlignConfig

Encoder padding is attended to, as published (``mask_encoder_padding=False``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel

from layalign.modeling.encoders import load_encoder, load_llm
from layalign.modeling.finite import finite
from layalign.modeling.model import LayAlignForCausalLM
from layalign.nn import EncoderAligner, Mapping
from layalign.nn.aligner import WeightedLinearProjector
from layalign.published import names as published
from layalign.utils.errors import ArgumentError

__all__ = ["EncoderAligner", "LayAlign", "LayAlignConfig", "Mapping", "WeightedLinearProjector"]


class LayAlignConfig(LlamaConfig):
    """The published configuration.

    Args:
        mt_path, llm_path: names or folders of the encoder's model and the LLM.
        max_gen_len: new tokens to generate when called without labels.
        llm_bos_token_id, llm_pad_token_id: token ids of the LLM.
        encoder_aligner_config: any object with the published fields (a ``SimpleNamespace`` in the published scripts):
            encoder_layers, language_layers, structure, ...
        augmentation: whether this is the task stage, which has prompts.
    """

    def __init__(
        self,
        mt_path: str | None = None,
        llm_path: str | None = None,
        max_gen_len: int | None = None,
        llm_bos_token_id: int | None = None,
        llm_pad_token_id: int | None = None,
        encoder_aligner_config: Any = None,
        augmentation: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.mt_path = mt_path
        self.llm_path = llm_path
        self.max_gen_len = max_gen_len
        self.llm_bos_token_id = llm_bos_token_id
        self.llm_pad_token_id = llm_pad_token_id
        self.encoder_aligner_config = encoder_aligner_config
        self.augmentation = augmentation


class LayAlign(nn.Module):
    """The published model class: the loss with labels, the generated ids without.

    ``state_dict`` and ``load_state_dict`` use the published names. Checkpoints load in both directions.

    Args:
        config: :class:`LayAlignConfig`.
        freeze: False trains the LLM's own weights too, if ``config.augmentation`` is set.
        encoder_freeze: False trains the encoder too.
    """

    def __init__(self, config: LayAlignConfig, freeze: bool = True, encoder_freeze: bool = True) -> None:
        super().__init__()
        if not hasattr(config, "max_gen_len") or not hasattr(config, "encoder_aligner_config"):
            raise ArgumentError(f"config: expected the published LayAlignConfig, got {type(config).__name__}")
        self.config = config
        self.max_gen_len = config.max_gen_len
        self.llm_pad_token_id = config.llm_pad_token_id
        self.llm_bos_token_id = config.llm_bos_token_id
        for name in ("mt_path", "llm_path", "encoder_aligner_config"):
            if getattr(config, name, None) is None:
                raise ArgumentError(f"config.{name}: expected a value, got None")
        aligner = config.encoder_aligner_config
        self.model = LayAlignForCausalLM.from_encoder_and_llm(
            load_encoder(str(config.mt_path), dtype=torch.float32),  # the published code's transformers loads float32
            load_llm(str(config.llm_path), dtype=torch.float32),
            encoder_layers=list(aligner.encoder_layers),
            language_layers=list(aligner.language_layers),
            structure=aligner.structure,
            mask_encoder_padding=False,
            llm_bos_token_id="own" if config.llm_bos_token_id is None else config.llm_bos_token_id,
            source_token_id=config.llm_pad_token_id,
        )
        self.model.encoder.requires_grad_(not encoder_freeze)
        if config.augmentation and not freeze:
            self.model.llm.requires_grad_(True)
        self._register_state_dict_hook(_rename_saved)
        self.register_load_state_dict_pre_hook(_rename_loaded)
        self.register_load_state_dict_post_hook(_rename_missing)

    @property
    def encoder_mt(self) -> PreTrainedModel:
        """The frozen encoder."""
        return self.model.encoder

    @property
    def model_llm(self) -> PreTrainedModel:
        """The frozen LLM."""
        return self.model.llm

    @property
    def llm_embedding_layer(self) -> nn.Module:
        """The LLM's input embedding."""
        return self.model.get_input_embeddings()

    @property
    def mapping(self) -> Mapping:
        """The adapter."""
        assert self.model.mapping is not None  # the published configuration has no way to leave it out
        return self.model.mapping

    @property
    def encoder_aligner(self) -> EncoderAligner | None:
        """The layer-wise aligner."""
        return self.model.encoder_aligner

    def published_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(published name, parameter) for every parameter that trains."""
        return published.published_parameters(self.model)

    def forward(
        self,
        input_ids_mt: Tensor,
        attention_mask_mt: Tensor,
        labels: Tensor | None = None,
        mask_label: Tensor | None = None,
        input_ids_prompt: Tensor | None = None,
        mask_prompt: Tensor | None = None,
    ) -> Tensor:
        """The published forward.

        Args:
            input_ids_mt, attention_mask_mt: (B, S) int64, the encoder's.
            labels, mask_label: (B, T_l) int64, LLM tokens to predict, or None to generate.
            input_ids_prompt, mask_prompt: (B, T_p) int64, LLM tokens between the source and the labels, or None.

        Returns:
            The loss (a scalar) with labels; without, the newly generated ids (B, up to max_gen_len).

        Raises:
            NonFiniteError: without labels, a row's logits were NaN or infinite.
        """
        targets = None if labels is None else _real("mask_label", labels, mask_label)
        prompts = None if input_ids_prompt is None else _real("mask_prompt", input_ids_prompt, mask_prompt)
        packed = self.model.build_inputs(attention_mask_mt, prompts, targets)
        if labels is not None:
            return self.model(**packed, encoder_input_ids=input_ids_mt, encoder_attention_mask=attention_mask_mt).loss
        _, mask, embeds, source = self.model._begin(
            packed["input_ids"], packed["attention_mask"], input_ids_mt, attention_mask_mt
        )
        return finite(GenerationMixin.generate)(  # from embeddings alone, as published: only new ids come back
            self.model,
            inputs_embeds=embeds,
            attention_mask=mask,
            source_states=source,
            max_new_tokens=self.max_gen_len,
            pad_token_id=self.llm_pad_token_id,
            do_sample=False,
        )


def _real(name: str, ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if mask is None or mask.shape != ids.shape:
        found = None if mask is None else tuple(mask.shape)
        raise ArgumentError(f"{name}: expected a 0/1 mask of shape {tuple(ids.shape)}, got {found}")
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


def _rename_saved(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    assert isinstance(module, LayAlign)
    start = prefix + "model."
    ours = {name: state.pop(name) for name in list(state) if name.startswith(start)}
    renamed = published.to_published(module.model, {name[len(start) :]: tensor for name, tensor in ours.items()})
    state.update({prefix + name: tensor for name, tensor in renamed.items()})


def _rename_loaded(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    assert isinstance(module, LayAlign)
    ours = {theirs: name for name, theirs in published.published_names(module.model).items()}
    for key in [key for key in state if key.startswith(prefix)]:
        name, tensor = key[len(prefix) :], state.pop(key)
        if name in ours:
            state[f"{prefix}model.{ours[name]}"] = tensor
        elif name != published.EMBEDDING:
            state[key] = tensor  # unexpected, and reported under its own name


def _rename_missing(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, LayAlign)
    names = published.published_names(module.model)
    incompatible.missing_keys[:] = [names.get(key.removeprefix("model."), key) for key in incompatible.missing_keys]
