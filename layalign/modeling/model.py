"""The model: a frozen encoder, a frozen LLM, and between them adapter, aligner and gates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from layalign.modeling import attention_interface, checkpoint, decoders, encoders, loading, lora, names
from layalign.modeling.cache import SourceKeyValues, get_source, set_source
from layalign.modeling.configuration import LayAlignConfig, require_dropout
from layalign.modeling.cross_attention import OnePass, bridge, one_pass
from layalign.modeling.embedding_scale import in_slots
from layalign.modeling.generation import SourceGenerationMixin, cache_for_compiled
from layalign.modeling.key_values import KeyValueProjector
from layalign.modeling.last_layer import LastLayer
from layalign.modeling.llm_inputs import build_inputs, real_positions
from layalign.modeling.llm_pass import LLMPartMixin, labelled_rows, run_llm
from layalign.modeling.padding import real_tokens
from layalign.modeling.parts import build_trainable_modules, gate_devices
from layalign.modeling.pickling import leave_out_recorders, make_recordable
from layalign.modeling.validation import require_ids, require_index, require_labels, require_mask
from layalign.nn import Adapter, GatedCrossAttention
from layalign.nn.adapter import SoftmaxFusion, TokenSoftmaxFusion
from layalign.nn.inspection import device_of
from layalign.nn.rows import Rows
from layalign.nn.sharding import engine_of
from layalign.utils.errors import ArgumentError, refuse, shown
from layalign.utils.moved import old_name
from layalign.utils.versions import CACHE_NAMES, cache_name, cache_of, one_cache, require_no_unknown_cache

logger = logging.getLogger("layalign")


class LayAlignForCausalLM(LLMPartMixin, PreTrainedModel, SourceGenerationMixin):
    """LayAlign with any encoder and decoder of transformers.

    Build it with :meth:`from_encoder_and_llm` or :meth:`from_pretrained`. Encoder and LLM are frozen; ``mapping``
    (the adapter), ``encoder_aligner`` and the gates in ``cross_attention`` train.

    Source: LayAlign, figure 1 and its method section; the parameter names are those of the published code.
    """

    config_class = LayAlignConfig
    base_model_prefix = "llm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar[list[str]] = [*CACHE_NAMES, "source_states"]

    def __init__(
        self, config: LayAlignConfig, encoder: PreTrainedModel | None = None, llm: PreTrainedModel | None = None
    ) -> None:
        if not isinstance(config, LayAlignConfig):
            raise ArgumentError(f"config: expected a LayAlignConfig, got {type(config).__name__}")
        super().__init__(config)
        if config.encoder_config is None or config.llm_config is None:
            raise ArgumentError("config: expected encoder_config and llm_config; see LayAlignConfig")
        # A configuration may name code to run (auto_map). No code is run from here.
        self.llm = AutoModelForCausalLM.from_config(config.llm_config, trust_remote_code=False) if llm is None else llm
        self.encoder = encoders.encoder_from_config(config.encoder_config) if encoder is None else encoder
        for part in (self.llm, self.encoder):
            if llm is not None or encoder is not None:
                for module in part.modules():
                    module._is_hf_initialized = True  # type: ignore[assignment]  # post_init must not touch their weights
        # By name, because resizing the vocabulary replaces parameters.
        self._trainable_before = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        for name in ("encoder", "llm"):
            if (said := lora.announce(name, getattr(self, name))) is not None:
                logger.warning("%s", said)
        self.freeze()
        encoders.record_layers(self.encoder)
        self._own_dropout_rates = encoders.dropout_rates(self.encoder)
        self.set_encoder_dropout(config.encoder_dropout)
        if config.lora is not None:
            self.add_lora(config.lora)

        assert config.encoder_layers is not None and config.language_layers is not None
        self.mapping, self.encoder_aligner, self.cross_attention = build_trainable_modules(config)
        # A tuple, so that the LLM's modules do not appear a second time among this module's children.
        self.attach_report = attention_interface.attach(self.llm, config.language_layers)
        attentions = decoders.attention_modules(self.llm)
        self._attentions = tuple(attentions[layer][1] for layer in config.language_layers)
        self._source_reaches_layers = False
        self.key_values = KeyValueProjector(config.fold_projections)
        self.last_layer = LastLayer(self.llm, config.prune_last_layer)
        self._llm_cache_name = cache_name(self.llm.forward)
        self.generation_config = self.llm.generation_config
        self._can_compile_fullgraph = getattr(self.llm, "_can_compile_fullgraph", False)
        self.loss_type = "ForCausalLM"  # Trainer counts the labels by it; set for subclasses of other names too
        self.post_init()

    def _get_name(self) -> str:
        """The name of a known causal LM: transformers' Trainer, when it smooths labels, shifts them for these only."""
        return "LlamaForCausalLM"

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    @classmethod
    def from_encoder_and_llm(
        cls,
        encoder: PreTrainedModel | str,
        llm: PreTrainedModel | str,
        *,
        encoder_kwargs: dict[str, Any] | None = None,
        llm_kwargs: dict[str, Any] | None = None,
        **config: Any,
    ) -> LayAlignForCausalLM:
        """Join an encoder and an LLM with a fresh adapter, aligner and zero gates.

        Args:
            encoder: a transformers model (an encoder-decoder gives its encoder), or its name or path.
            llm: a causal LM, or its name or path.
            encoder_kwargs, llm_kwargs: for ``from_pretrained`` of a part given by name (dtype, device_map, ...).
            **config: fields of :class:`LayAlignConfig`: encoder_layers, language_layers, structure, ...

        Returns:
            The model, with adapter and aligner on the device of the LLM's input embeddings, each gate on its layer's.

        Raises:
            ArgumentError: a layer does not exist, or the LLM does not go through the attention interface.
        """
        if isinstance(encoder, str):
            with checkpoint.reading("encoder", f"{shown(encoder, 200)} cannot be loaded"):
                encoder = encoders.load_encoder(encoder, **(encoder_kwargs or {}))
        if isinstance(llm, str):
            with checkpoint.reading("llm", f"{shown(llm, 200)} cannot be loaded"):
                llm = encoders.load_llm(llm, **(llm_kwargs or {}))
        for name, part in (("encoder", encoder), ("llm", llm)):
            if not isinstance(part, PreTrainedModel):
                hint = "; pass its get_base_model()" if hasattr(part, "get_base_model") else ""
                raise ArgumentError(
                    f"{name}: expected a transformers model or its name, got {type(part).__name__}{hint}"
                )
        if llm.get_output_embeddings() is None:
            raise ArgumentError(f"llm: expected a causal language model, got {type(llm).__name__}")
        encoder = encoders.encoder_part(encoder)
        for key, part in (("encoder_name_or_path", encoder), ("llm_name_or_path", llm)):
            name = part.config.name_or_path
            if key not in config:  # a local folder comes first, as in transformers
                config[key] = names.of_part(name)
            elif isinstance(config[key], str):
                config[key] = names.settled(config[key])
        config.setdefault("frozen_folders", {})  # the names are settled
        full = LayAlignConfig(encoder_config=encoder.config, llm_config=llm.config, **config)
        model = cls(full, encoder=encoder, llm=llm)
        names.keep(model)
        device = device_of(llm.get_input_embeddings())
        for part in (model.mapping, model.encoder_aligner):
            if part is not None:
                part.to(device=device)
        for gated, place in zip(model.cross_attention, gate_devices(model.source_attentions, device), strict=True):
            gated.to(device=place)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint that :meth:`save_pretrained` wrote. Frozen parts that it does not hold are loaded by name.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            encoder, llm: frozen parts already in memory, used instead of loading them by name.
            encoder_kwargs, llm_kwargs: further arguments for loading a frozen part by name.
            **kwargs: as transformers' ``from_pretrained`` (dtype, device_map, attn_implementation, revision, ...).
                ``trust_remote_code`` is for the frozen parts; without it no code from a checkpoint runs. Fields of
                :class:`LayAlignConfig` replace those of the checkpoint.
            changed_frozen: what to do if a frozen part is not the one that the checkpoint was saved with: "refuse" or
                "warn".

        Raises:
            ArgumentError: an argument is not known, or cannot be honoured.
            CheckpointError: the checkpoint is not one of ours, is damaged, or does not fit the model; or a frozen part
                differs from the one that it was saved with. The text names what differs.
        """
        if not isinstance(pretrained_model_name_or_path, str | Path):
            refuse("pretrained_model_name_or_path", "a folder or hub name", pretrained_model_name_or_path)
        return loading.load(cls, str(pretrained_model_name_or_path), args, kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        *,
        save_frozen: bool = False,
        changed_frozen: str = "write",
        state_dict: dict[str, Tensor] | None = None,
        **kw: Any,
    ) -> None:
        """Write the checkpoint.

        Args:
            save_directory: folder, made if needed.
            save_frozen: also write encoder and LLM. By default only trained weights are written, with names and
                fingerprints of the frozen parts. A part that has no name is written in any case, with a warning.
            changed_frozen: what to do if a frozen part is not what its name gives: "write" it with the checkpoint and
                warn, or "refuse".
            state_dict: weights to write instead of the model's own (distributed engines gather them).
            **kw: as transformers' ``save_pretrained``: is_main_process, max_shard_size, variant, push_to_hub, repo_id,
                commit_message, commit_description, private, token, create_pr, revision.

        Raises:
            ArgumentError: an argument is not known, or cannot be honoured.
            CheckpointError: the model could not be loaded again from what would be written (adapters added by hand, a
                quantised part that is not what its name gives).
        """
        checkpoint.save(self, save_directory, save_frozen, state_dict, changed_frozen, kw)

    def __reduce_ex__(self, protocol: Any) -> Any:
        leave_out_recorders(self)  # the LLM has some since a call that asked for its hidden states
        return super().__reduce_ex__(protocol)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        make_recordable(self)
        encoders.record_layers(self.encoder)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's. With ``strict=False``, frozen weights are not missing from a state of trained ones alone."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        trained = checkpoint.trained_names(self)
        if set(state_dict) <= trained:
            result.missing_keys[:] = [name for name in result.missing_keys if name in trained]
        return result

    # What trains

    def freeze(self) -> None:
        """Freeze encoder and LLM, as published."""
        self.llm.requires_grad_(False)
        self.encoder.requires_grad_(False)

    def add_lora(self, settings: Any) -> None:
        """Put LoRA on the LLM through peft; it trains and is saved with the rest.

        Args:
            settings: a peft ``LoraConfig`` or a dict of its fields.
        """
        self.config.lora = checkpoint.inject_lora(self.llm, settings)

    @property
    def source_attentions(self) -> tuple[nn.Module, ...]:
        """The self-attention modules of the language layers, whose key and value maps the source goes through."""
        return self._attentions

    def set_encoder_dropout(self, value: bool | float) -> None:
        """Change the encoder's dropout in training mode: ``encoder_dropout`` of :class:`LayAlignConfig`.

        Raises:
            ArgumentError: the value is neither true nor false nor a rate, or the encoder has no dropout to change.
        """
        require_dropout(value)
        own = self._own_dropout_rates
        if not isinstance(value, bool) and not own:
            name = type(self.encoder).__name__
            raise ArgumentError(f"encoder_dropout: expected true or false, for {name} has no dropout, got {value}")
        encoders.set_dropout_rates(self.encoder, own if isinstance(value, bool) else dict.fromkeys(own, float(value)))
        before, self.config.encoder_dropout = self.config.encoder_dropout, value
        if value is False:
            self.encoder.eval()
        elif before is False:
            self.encoder.train(self.training)

    def train(self, mode: bool = True) -> LayAlignForCausalLM:
        """As torch's. With ``encoder_dropout=False`` the encoder stays in eval mode."""
        super().train(mode)
        if self.config.encoder_dropout is False:
            self.encoder.eval()
        return self

    def saved_names(self) -> set[str]:
        """Names of the weights that :meth:`save_pretrained` writes."""
        return checkpoint.saved_names(self)

    def unload(self) -> PreTrainedModel:
        """Return the LLM as it was before: detached, with the same parameters trainable."""
        attention_interface.detach(self.llm)
        for name, parameter in self.named_parameters():
            if name.replace(".base_layer.", ".") in self._trainable_before:  # LoRA adds a level to the names
                parameter.requires_grad_(True)
        return self.llm

    pack = old_name("pack", "build_inputs")
    unwrap = old_name("unwrap", "unload")
    folding = old_name("folding", "key_values")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As published: torch's own defaults, a zero boundary, zero gates (unless they are fixed elsewhere).
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, Adapter):
            nn.init.zeros_(module.end_boundary)
        elif isinstance(module, (nn.LayerNorm, SoftmaxFusion, TokenSoftmaxFusion)):
            module.reset_parameters()
        elif isinstance(module, GatedCrossAttention):
            nn.init.constant_(module.adaption_gate, module.start)

    # The input

    def build_inputs(
        self,
        encoder_attention_mask: Tensor,
        prompts: Sequence[Sequence[int]] | None = None,
        targets: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, Tensor]:
        """The LLM's input for a batch of sources, on the mask's device.

        Args and returns: see :func:`layalign.modeling.llm_inputs.build_inputs`.
        """
        return build_inputs(
            encoder_attention_mask.sum(dim=1).tolist(),
            prompts,
            targets,
            bos_token_id=self.config.llm_bos_token_id,
            source_token_id=self.config.source_token_id,
            slots=self.config.use_adapter,
            device=encoder_attention_mask.device,
        )

    def encode_source(
        self, encoder_input_ids: Tensor, encoder_attention_mask: Tensor
    ) -> tuple[Tensor | None, SourceKeyValues]:
        """Everything the LLM needs of the source, computed once per sequence.

        Args:
            encoder_input_ids, encoder_attention_mask: (B, S) int64.

        Returns:
            The adapter's soft tokens (B, S, D_l), or None without an adapter; and the source's keys and values for all
            language layers. If padding is masked and there is enough of it, it is not computed, and holds zeros.
        """
        real = self._real_tokens(encoder_attention_mask)
        soft, source = self._encode(encoder_input_ids, encoder_attention_mask, real)
        return soft if soft is None or real is None else real.spread(soft), source

    def _real_tokens(self, encoder_attention_mask: Tensor, index: Tensor | None = None) -> Rows | None:
        """The source tokens to compute; None for all. ``index``: see :func:`layalign.modeling.padding.real_tokens`."""
        if not self.config.mask_encoder_padding or (self.mapping is None and self.encoder_aligner is None):
            return None
        return real_tokens(encoder_attention_mask, index)

    def _encode(
        self, encoder_input_ids: Tensor, encoder_attention_mask: Tensor, real: Rows | None
    ) -> tuple[Tensor | None, SourceKeyValues]:
        """As :meth:`encode_source`; the soft tokens are those of ``real`` alone, (1, N, D_l), if it is given."""
        if self.mapping is None and self.encoder_aligner is None:
            return None, SourceKeyValues((), (), (), None, real=encoder_attention_mask)
        if not torch.compiler.is_compiling():
            self._follow_attentions()
        aligned = self.config.encoder_layers if self.encoder_aligner is not None else []
        fused = self.config.fused_layers
        layers = list(dict.fromkeys([*aligned, *fused]))
        hidden, last = encoders.encode(self.encoder, encoder_input_ids, encoder_attention_mask, layers)
        dtype = cast(Tensor, self.get_input_embeddings().weight).dtype
        mask = encoder_attention_mask.bool() if self.config.mask_encoder_padding else None
        by_layer = dict(zip(layers, hidden, strict=True))
        soft = None
        if self.mapping is not None:
            own_dtype = self.mapping.mlp.linear1.weight.dtype
            read = [by_layer[layer] for layer in fused] if fused else [last]
            inputs = [(states if real is None else real.select(states)).to(own_dtype) for states in read]
            soft = self.mapping(inputs if fused else inputs[0]).to(dtype)
        keys, values = self._source_states([by_layer[layer] for layer in aligned], dtype, real)
        unmasked = encoder_attention_mask if mask is None else None
        return soft, SourceKeyValues(
            tuple(self.config.language_layers), tuple(keys), tuple(values), mask, real=unmasked
        )

    def _follow_attentions(self) -> None:
        """Use the attention modules that the LLM has now: its layers may have been replaced."""
        names = dict(self.attach_report.attached)
        now = [attention_interface.submodule(self.llm, names[layer]) for layer in self.config.language_layers or ()]
        attentions = tuple(old if new is None else new for new, old in zip(now, self._attentions, strict=True))
        if attentions != self._attentions:
            for layer, module in zip(self.config.language_layers or (), attentions, strict=True):
                if not attention_interface.carries_source(module):
                    raise ArgumentError(
                        f"llm: expected the attention of layer {layer} to take the source; it was replaced by one of "
                        "another model: replace layers before LayAlign is built, or by copies of the LLM's own"
                    )
            self._attentions, self._source_reaches_layers = attentions, False

    def _source_states(
        self, hidden: Sequence[Tensor], dtype: torch.dtype, real: Rows | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values (B, G, S, d) of every language layer; zeros where ``real`` has no token."""
        if self.encoder_aligner is None:
            return [], []
        engine = None if torch.compiler.is_compiling() else engine_of(self)
        return self.key_values(self.encoder_aligner, self._attentions, hidden, dtype, engine, real)

    def _begin(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        encoder_input_ids: Tensor,
        encoder_attention_mask: Tensor | None,
        encoder_token_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, SourceKeyValues]:
        """(input_ids, attention_mask, inputs_embeds, source) of a new sequence; without input ids they are built.

        Whatever the host waits for comes before the encoder.
        """
        require_ids("encoder_input_ids", encoder_input_ids, self.encoder.get_input_embeddings())
        if encoder_attention_mask is None:
            encoder_attention_mask = torch.ones_like(encoder_input_ids)
        require_mask("encoder_attention_mask", encoder_attention_mask)
        if encoder_input_ids.dim() != 2 or encoder_attention_mask.shape != encoder_input_ids.shape:
            shapes = f"{tuple(encoder_input_ids.shape)} and {tuple(encoder_attention_mask.shape)}"
            raise ArgumentError(f"encoder_input_ids, encoder_attention_mask: expected one shape (B, S), got {shapes}")
        if input_ids is None:
            inputs = self.build_inputs(encoder_attention_mask)
            input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        require_ids("input_ids", input_ids, self.get_input_embeddings())
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        require_mask("attention_mask", attention_mask)
        if input_ids.dim() != 2 or len(input_ids) != len(encoder_input_ids) or attention_mask.shape != input_ids.shape:
            shapes = f"{tuple(input_ids.shape)}, {tuple(attention_mask.shape)}, {tuple(encoder_input_ids.shape)}"
            raise ArgumentError(
                f"input_ids, attention_mask: expected (B, T) with the B of encoder_input_ids (B, S), got {shapes}"
            )
        index = encoder_token_index
        if index is not None:
            require_index("encoder_token_index", index, encoder_attention_mask)
        real, layout = self._real_tokens(encoder_attention_mask, index), None
        if self.mapping is not None:
            layout = self._tokens(input_ids, attention_mask).layout(encoder_attention_mask, wait=index is None)
        soft, source = self._encode(encoder_input_ids, encoder_attention_mask, real)
        embeds = self.get_input_embeddings()(input_ids)
        if soft is None or self.mapping is None or layout is None:
            return input_ids, attention_mask, embeds, source
        boundary, config = self.mapping.get_embed().to(soft.dtype), self.config
        soft, boundary = (in_slots(r, config.get_text_config(), config.scaled_soft_tokens) for r in (soft, boundary))
        embeds = layout.embed(embeds, soft, boundary, encoder_attention_mask, real)
        return input_ids, attention_mask, embeds, source

    @staticmethod
    def _require_begun(cache: Any) -> None:
        """Check that a cache holds the beginning of the sequence: there, ids alone lack the soft tokens."""
        if cache is None or not cache.get_seq_length():
            raise ArgumentError(
                "encoder_input_ids: expected (B, S) token ids where a sequence begins, or inputs_embeds: the slots of "
                "input_ids hold no soft tokens"
            )

    # Running

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_input_ids: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        source_states: SourceKeyValues | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: Any = None,
        skip_logits: bool | None = None,
        encoder_token_index: Tensor | None = None,
        loss_index: Tensor | None = None,  # transformers' Trainer takes any argument with "label" in it for labels
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass of the LLM.

        Args:
            input_ids, attention_mask: (B, T) int64, of :meth:`build_inputs`. Without them no text follows the source.
            encoder_input_ids, encoder_attention_mask: (B, S) int64. Needed once per sequence; afterwards
                ``past_key_values`` carries the source.
            labels: (B, T) int64, -100 where nothing is predicted.
            past_key_values, cache: a transformers cache, under either name (``cache`` since transformers 5.24).
            inputs_embeds, source_states: (B, T, D_l) and the source, if they are computed already (by ``generate``).
            logits_to_keep: as in transformers; 0 keeps all.
            num_items_in_batch: divisor of the loss instead of the number of labels (gradient accumulation).
            skip_logits: with ``labels`` and without ``logits_to_keep``, whether logits are computed only where a label
                is, and are not returned. None: yes in training mode, wherever gradients are recorded, and with
                ``fused_loss="always"``; otherwise all logits are returned, as ``compute_metrics`` of transformers'
                Trainer needs them.
            encoder_token_index: (N,) int64, where ``encoder_attention_mask`` is 1, as positions in the flattened mask,
                ascending. The collator gives it and ``loss_index``; with both the host never waits for a GPU.
            loss_index: (M,) int64, the positions in the flattened (B, T) that predict a label: the next one in
                ``labels`` is not -100.
            **kwargs: passed to the LLM.

        Returns:
            loss, logits (B, T, vocabulary), past_key_values (cache), hidden_states, attentions.

        Raises:
            ArgumentError: shapes do not fit, the input is not laid out as :meth:`build_inputs` does, or there is no
                source.
        """
        if self._attentions and not attention_interface.carries_source(self._attentions[0]):
            attention_interface.follow(self.llm)
            self._source_reaches_layers = False  # a detached LLM does not take the source
        if getattr(self, "_is_replica", False):  # DataParallel has cut the positions into pieces
            encoder_token_index = loss_index = None
        labelled = None
        if labels is not None:
            require_labels(labels, self.llm.config.get_text_config(decoder=True).vocab_size)
            if logits_to_keep is None:
                labelled = labelled_rows(labels, loss_index)
        source = source_states
        cache = one_cache(past_key_values, cache)
        if encoder_input_ids is not None:
            input_ids, attention_mask, inputs_embeds, source = self._begin(
                input_ids, attention_mask, encoder_input_ids, encoder_attention_mask, encoder_token_index
            )
        elif source is None:
            source = get_source(cache)
        if source is None:
            require_no_unknown_cache(kwargs)
            raise ArgumentError("encoder_input_ids: expected (B, S) token ids, or a cache that carries a source")
        if not torch.compiler.is_compiling():
            if source.layers != tuple(self.config.language_layers or ()):
                layers = list(self.config.language_layers or ())
                raise ArgumentError(f"source_states: expected a source of layers {layers}, got {list(source.layers)}")
            source = source.for_gradients() if torch.is_grad_enabled() else source
        if inputs_embeds is None:
            if input_ids is None:
                raise ArgumentError("input_ids: expected (B, T) token ids, got None")
            if input_ids.shape[1] > 1 and self.mapping is not None and not torch.compiler.is_compiling():
                self._require_begun(cache)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if labels is not None and not torch.compiler.is_compiling() and labels.shape != inputs_embeds.shape[:2]:
            shapes = tuple(inputs_embeds.shape[:2]), tuple(labels.shape)
            raise ArgumentError(f"labels: expected the shape {shapes[0]} of input_ids, got {shapes[1]}")
        if position_ids is None and attention_mask is not None and self.config.mask_encoder_padding:
            position_ids = real_positions(attention_mask)[:, -inputs_embeds.shape[1] :]
        use_cache = use_cache if labels is None else bool(use_cache)
        if cache is None:
            cache = cache_for_compiled(self.llm, use_cache)
        if cache is not None:
            set_source(cache, source)
        if attention_interface.is_reentrant(self.llm) and torch.is_grad_enabled():
            inputs_embeds, source = bridge(inputs_embeds, source)
        # In compiled code the check costs nothing at run time; a guard on the flag would compile again when it changes.
        compiling = torch.compiler.is_compiling()
        seen: set[int] | None = set() if compiling or not self._source_reaches_layers else None
        gated = cast(tuple[GatedCrossAttention, ...], tuple(self.cross_attention or ()))
        with nullcontext(OnePass(source, gated, seen)) if compiling else one_pass(source, gated, seen) as this_pass:
            inputs = dict(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                layalign_source=this_pass,
                **{self._llm_cache_name: cache},
                **kwargs,
            )
            output = run_llm(self, inputs, labels, logits_to_keep, skip_logits, num_items_in_batch, labelled)
        if seen is not None:
            attention_interface.require_attended(self.llm, this_pass)
            self._source_reaches_layers = True
        if (filled := cache_of(output)) is not None:
            set_source(filled, source)
        return output


AutoConfig.register(LayAlignConfig.model_type, LayAlignConfig)
AutoModelForCausalLM.register(LayAlignConfig, LayAlignForCausalLM)
