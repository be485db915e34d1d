"""Configuration of a LayAlign model: the names and sizes of the frozen parts, and which layers are connected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from layalign.modeling.claims import require_modest, without_kernels
from layalign.modeling.decoders import SCALED_IN_DECODER
from layalign.modeling.embedding_scale import scaled_as_text
from layalign.modeling.key_values import CHOICES
from layalign.modeling.layers import named_layers
from layalign.modeling.names import PARTS
from layalign.modeling.parts import matching_adapter_size
from layalign.nn.adapter import FUSIONS
from layalign.nn.aligner import MIXES, STRUCTURES
from layalign.ops import backends
from layalign.utils.errors import ArgumentError, finite_number, first_line, one_of, refuse, shown, whole_number
from layalign.utils.moved import RENAMED, new_value, warn_of_setting, with_new_names
from layalign.utils.versions import CACHE_NAMES

CONFIG_FILE = "config.json"

# Fields of a causal LM's configuration that programs read (DeepSpeed's "auto" entries, servers, evaluators). Their
# values are the LLM's.
_OF_LLM = (
    "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "sliding_window", "layer_types", "rope_parameters", "use_cache",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def _as_config(name: str, value: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig | None:
    if value is None or isinstance(value, PretrainedConfig):
        return value
    if not isinstance(value, dict) or "model_type" not in value:
        raise ArgumentError(f"{name}: expected a transformers configuration or its dict with a model_type")
    require_modest(name, value)
    try:
        return AutoConfig.for_model(**value)
    except Exception as error:  # what the configurations' own checks raise
        raise ArgumentError(f"{name}: expected a model's configuration: {first_line(error)}") from error


class LayAlignConfig(PretrainedConfig):
    """Configuration of :class:`layalign.LayAlignForCausalLM`.

    Args:
        encoder_config, llm_config: configurations of the frozen parts (or their dicts).
        encoder_name_or_path, llm_name_or_path: where their weights come from when only trained weights are saved.
        encoder_layers: E indices into the encoder's ``hidden_states`` (0 is the embedding output). None: all but the
            last, as published (0..23 of mT5-xl's 25). Or a name of :data:`layalign.modeling.layers.LAYER_NAMES`.
        language_layers: L indices of LLM layers that attend. None: all. []: neither aligner nor gates (adapter alone).
        structure: "Linear" or "MLP", the projection after the layer mix.
        mix: "layer-wise": the keys and the values of every LLM layer have their own mix of the encoder's layers.
            "shared": one mix for the keys and one for the values of all LLM layers.
        use_adapter: whether soft tokens made from the encoder's hidden states come before the text, followed by the
            boundary token.
        adapter_size: width between the adapter's two linear maps. None: 2 D_e, as published. "match": the width with
            which an adapter alone has as many trained parameters as LayAlign
            (:func:`layalign.modeling.parts.matching_adapter_size`); the attribute becomes that number.
        adapter_fusion: which of the encoder's hidden states the adapter reads. None: the last ones, as published.
            "softmax": those of all layers but the embeddings, summed with one learned weight per layer.
            "token-softmax": the same with separate weights for each token (:mod:`layalign.nn.adapter`). The aligner
            reads ``encoder_layers`` in any case.
        use_prompt: whether the LLM gets the task's prompt in addition to the encoder's tokens. False: these replace it.
        fixed_gate: None: gates are learned and start at zero. A number: all gates are fixed at it.
        mask_encoder_padding: hide encoder padding from the cross-attention and number LLM positions without padding, so
            that a sample does not depend on its batch neighbours. False reproduces the published numbers.
        llm_bos_token_id: first token of the LLM's input. "own": that of the LLM's configuration, if it has one.
            None or False: no first token, for LLMs whose tokenizers add none (Qwen); the attribute becomes None.
        source_token_id: id that fills the slots of the soft tokens in ``input_ids``. None: the LLM's pad, else eos, id.
        encoder_dropout: dropout of the frozen encoder in training mode. True: the rates of the encoder's own
            configuration, as published. False: none, the encoder stays in eval mode. A number above 0 and below 1: this
            rate in place of all of the encoder's own.
        lora: settings of a peft ``LoraConfig`` put on the LLM, or None.
        frozen_saved, part_dtypes: whether the checkpoint holds the frozen parts too (or which of them), and each part's
            dtype in it.
        frozen_fingerprints: by part and weight, what the frozen parts held when the checkpoint was saved
            (:mod:`layalign.modeling.fingerprint`). None: an old checkpoint.
        frozen_folders: by part, the relative path from the checkpoint's folder to the part's folder. A part without one
            has a hub name. None: an old checkpoint, or names as they were typed.
        impl: backend of the operations, "auto" by default.
        fold_projections: whether the aligner's projection is folded into the LLM's key and value maps
            (:mod:`layalign.modeling.key_values`): "auto" where it takes less work, "always" where it can be done, or
            "never".
        fused_loss: whether Liger's fused linear cross-entropy is the loss (:mod:`layalign.modeling.liger`): "auto" in
            training on a CUDA GPU if it is installed and applicable, "always" (an error if it is not), or "never".
        prune_last_layer: whether the LLM's last layer is computed only where its logits are needed
            (:mod:`layalign.modeling.last_layer`): "auto" if possible, "always" (an error if not possible), or "never".
            Compiled calls compute all of it.
        scaled_soft_tokens: whether soft tokens are multiplied like a Gemma's text
            (:mod:`layalign.modeling.embedding_scale`). None: no, except for a checkpoint that lacks this field and was
            written with transformers before 5.4.

    Raises:
        ArgumentError: a value is out of range; the text names it.
    """

    model_type = "layalign"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [*CACHE_NAMES]

    def __init__(
        self,
        encoder_config: dict[str, Any] | PretrainedConfig | None = None,
        llm_config: dict[str, Any] | PretrainedConfig | None = None,
        encoder_name_or_path: str | None = None,
        llm_name_or_path: str | None = None,
        encoder_layers: list[int] | str | None = None,
        language_layers: list[int] | None = None,
        structure: str = "Linear",
        mix: str = "layer-wise",
        use_adapter: bool = True,
        adapter_size: int | str | None = None,
        adapter_fusion: str | None = None,
        use_prompt: bool = True,
        fixed_gate: float | None = None,
        mask_encoder_padding: bool = True,
        llm_bos_token_id: int | str | bool | None = "own",
        source_token_id: int | None = None,
        encoder_dropout: bool | float = True,
        lora: dict[str, Any] | None = None,
        frozen_saved: bool | list[str] = False,
        part_dtypes: dict[str, str] | None = None,
        frozen_fingerprints: dict[str, dict[str, str]] | None = None,
        frozen_folders: dict[str, str] | None = None,
        impl: str = "auto",
        fold_projections: str = "auto",
        fused_loss: str = "auto",
        prune_last_layer: str = "auto",
        scaled_soft_tokens: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder_config = _as_config("encoder_config", encoder_config)
        self.llm_config = _as_config("llm_config", llm_config)
        self.encoder_name_or_path = encoder_name_or_path
        self.llm_name_or_path = llm_name_or_path
        self.encoder_layers: Any = encoder_layers
        if not isinstance(encoder_layers, str | None):
            self.encoder_layers = _layers("encoder_layers", encoder_layers)
        self.language_layers = None if language_layers is None else _layers("language_layers", language_layers)
        self.structure = structure
        self.mix = mix
        self.use_adapter = use_adapter
        self.adapter_size: Any = adapter_size
        self.adapter_fusion = adapter_fusion
        self.use_prompt = use_prompt
        self.fixed_gate = fixed_gate
        self.mask_encoder_padding = mask_encoder_padding
        self.llm_bos_token_id: Any = llm_bos_token_id
        self.source_token_id = source_token_id
        self.encoder_dropout = encoder_dropout
        self.lora = lora
        self.frozen_saved = frozen_saved
        self.part_dtypes = part_dtypes
        self.frozen_fingerprints = frozen_fingerprints
        self.frozen_folders = frozen_folders
        self.impl = impl
        self.fold_projections = fold_projections
        self.fused_loss = fused_loss
        self.prune_last_layer = prune_last_layer
        self.scaled_soft_tokens: Any = scaled_soft_tokens
        written_by = kwargs.get("transformers_version")
        super().__init__(**kwargs)
        choices = {
            "structure": STRUCTURES,
            "mix": MIXES,
            **dict.fromkeys(("fold_projections", "fused_loss", "prune_last_layer"), CHOICES),
        }
        for name, allowed in choices.items():
            one_of(name, getattr(self, name), allowed)
        backends.check_impl(impl)
        self._check_types()
        self._check_variant()
        if self.encoder_config is not None:
            self._resolve_encoder(self.encoder_config)
        if self.llm_config is not None:
            self._resolve_llm(self.llm_config.get_text_config(decoder=True), written_by)
        if self.adapter_size == "match" and self.encoder_config is not None and self.llm_config is not None:
            self.adapter_size = matching_adapter_size(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', for the untrusted configuration of a checkpoint: attention functions to fetch are removed.

        Raises:
            ArgumentError: a number of layers, heads, ... is too large, or a value is out of range.
        """
        if isinstance(config_dict, dict):
            require_modest("", config_dict)
            config_dict = with_new_names(without_kernels(f"{CONFIG_FILE}: ", config_dict))
        return super().from_dict(config_dict, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RENAMED:
            name, value = warn_of_setting(name), new_value(name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in RENAMED:
            return getattr(self, warn_of_setting(name))
        # Not stored: the LLM's fields are written to config.json once, with the LLM's configuration.
        llm = self.__dict__.get("llm_config") if name in _OF_LLM else None
        if llm is None or not hasattr(text := llm.get_text_config(decoder=True), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(text, name)

    def _check_types(self) -> None:
        for name in ("encoder_name_or_path", "llm_name_or_path"):
            if not isinstance(getattr(self, name), str | None):
                refuse(name, "a folder or hub name", getattr(self, name))
        if not isinstance(self.scaled_soft_tokens, bool | None):
            refuse("scaled_soft_tokens", "true, false or None", self.scaled_soft_tokens)
        for name in ("lora", "part_dtypes"):
            if not isinstance(getattr(self, name), dict | None):
                refuse(name, "a mapping or None", getattr(self, name))
        for name in ("llm_bos_token_id", "source_token_id"):
            value = getattr(self, name)
            if value is not None and not (
                name == "llm_bos_token_id" and (value is False or (isinstance(value, str) and value == "own"))
            ):
                whole_number(name, value, least=0)
        saved = self.frozen_saved
        if not isinstance(saved, bool) and not (isinstance(saved, list) and all(part in PARTS for part in saved)):
            refuse("frozen_saved", f"true, false or a list of {' and '.join(PARTS)}", saved)
        _check_texts("frozen_folders", self.frozen_folders)
        if not isinstance(self.frozen_fingerprints, dict | None):
            refuse("frozen_fingerprints", "a mapping or None", self.frozen_fingerprints)
        for part, entries in (self.frozen_fingerprints or {}).items():
            if not isinstance(entries, dict):
                refuse(f"frozen_fingerprints.{shown(part)}", "a mapping", entries)
            _check_texts(f"frozen_fingerprints.{shown(part)}", entries)
            for name, entry in entries.items():
                if len(entry.split()) != 6:
                    refuse(f"frozen_fingerprints.{part}.{shown(name)}", "six words", entry)

    @property
    def saved_parts(self) -> tuple[str, ...]:
        """The frozen parts whose weights the checkpoint holds."""
        saved = self.frozen_saved
        return (PARTS if saved else ()) if isinstance(saved, bool) else tuple(saved)

    def _check_variant(self) -> None:
        for name in ("use_adapter", "use_prompt", "mask_encoder_padding"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "true or false", getattr(self, name))
        if not self.use_adapter and not self.use_prompt:
            raise ArgumentError("use_prompt: expected true without an adapter, as the LLM would read nothing")
        size, gate = self.adapter_size, self.fixed_gate
        if not (size is None or (isinstance(size, str) and size == "match")) and (
            isinstance(size, bool) or not isinstance(size, int) or size < 1
        ):
            refuse("adapter_size", "a positive integer, 'match' or None", size)
        if self.adapter_fusion is not None:
            one_of("adapter_fusion", self.adapter_fusion, FUSIONS)
            if not self.use_adapter:
                raise ArgumentError("adapter_fusion: expected None for a model without an adapter")
        if gate is not None:
            finite_number("fixed_gate", gate, "a finite number or None")
        require_dropout(self.encoder_dropout)

    @property
    def fused_layers(self) -> list[int]:
        """Indices of the encoder's ``hidden_states`` that the adapter fuses: all but the embeddings; or none."""
        if self.adapter_fusion is None or self.encoder_config is None:
            return []
        return list(range(1, number_of_layers(self.encoder_config) + 1))

    def aligner(self) -> SimpleNamespace:
        """The aligner's configuration in its published form."""
        assert self.encoder_config is not None
        return SimpleNamespace(
            encoder_hidden_dim=hidden_size(self.encoder_config),
            language_hidden_dim=hidden_size(self.get_text_config()),
            num_transformer_submodules=1,
            num_attention_heads=self.get_text_config().num_attention_heads,
            num_encoder_layers=len(self.encoder_layers or ()),
            num_language_layers=len(self.language_layers or ()),
            encoder_layers=self.encoder_layers,
            language_layers=self.language_layers,
            projector_type="weighted_linear",
            structure=self.structure,
            mix=self.mix,
        )

    def _resolve_encoder(self, config: PretrainedConfig) -> None:
        count = number_of_layers(config) + 1  # hidden_states: the embedding output and one per layer
        if self.encoder_layers is None or isinstance(self.encoder_layers, str):
            self.encoder_layers = named_layers(self.encoder_layers, count)
        _check_layers("encoder_layers", self.encoder_layers, count, allow_empty=False)

    def _resolve_llm(self, config: PretrainedConfig, written_by: str | None) -> None:
        if getattr(config, "hidden_size_per_layer_input", None):
            raise ArgumentError(
                f"llm_config: expected a decoder whose layers read embeddings alone; {config.model_type} looks up a "
                "vector for each layer by the token's id, and soft tokens have none"
            )
        if self.scaled_soft_tokens is None:
            self.scaled_soft_tokens = scaled_as_text(config, written_by)
        if self.scaled_soft_tokens and config.model_type not in SCALED_IN_DECODER:
            refuse("scaled_soft_tokens", f"false for an LLM that is none of {', '.join(SCALED_IN_DECODER)}", True)
        if self.language_layers is None:
            self.language_layers = list(range(number_of_layers(config)))
        _check_layers("language_layers", self.language_layers, number_of_layers(config), allow_empty=True)
        if self.llm_bos_token_id is False:
            self.llm_bos_token_id = None
        elif self.llm_bos_token_id == "own":
            self.llm_bos_token_id = _first(getattr(config, "bos_token_id", None))
        if self.source_token_id is None:
            candidates = (_first(getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
            self.source_token_id = next((token for token in candidates if token is not None and token >= 0), 0)
        if self.llm_bos_token_id is not None and not 0 <= self.llm_bos_token_id < config.vocab_size:
            raise ArgumentError(f"llm_bos_token_id: expected 0..{config.vocab_size - 1}, got {self.llm_bos_token_id}")
        if not 0 <= self.source_token_id < config.vocab_size:
            raise ArgumentError(f"source_token_id: expected 0..{config.vocab_size - 1}, got {self.source_token_id}")

    def to_dict(self) -> dict[str, Any]:
        """As transformers'. No first token is written as false: earlier versions of this library read null as "own"."""
        values = super().to_dict()
        if self.llm_bos_token_id is None and self.llm_config is not None:
            values["llm_bos_token_id"] = False
        return values

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The LLM's text configuration: generation, caches and masks follow the LLM."""
        if self.llm_config is None:
            return self
        return self.llm_config.get_text_config(decoder=True)


def number_of_layers(config: PretrainedConfig) -> int:
    """Layers of an encoder or decoder, whatever its configuration calls them."""
    for name in ("encoder_layers", "num_hidden_layers", "num_layers", "n_layer"):
        number = getattr(config, name, None)
        if isinstance(number, int):
            return number
    raise ArgumentError(f"{type(config).__name__} does not say how many layers it has")


def hidden_size(config: PretrainedConfig) -> int:
    """Hidden size of an encoder or decoder, whatever its configuration calls it."""
    for name in ("hidden_size", "d_model", "n_embd"):
        number = getattr(config, name, None)
        if isinstance(number, int):
            return number
    raise ArgumentError(f"{type(config).__name__} does not say its hidden size")


def require_dropout(value: Any) -> None:
    """Check a value of ``encoder_dropout``.

    Raises:
        ArgumentError: it is neither true nor false nor a rate.
    """
    expected = "true, false or a rate above 0 and below 1"
    if not isinstance(value, bool):
        finite_number("encoder_dropout", value, expected)
        if not 0 < value < 1:
            refuse("encoder_dropout", expected, value)


def _first(token: Any) -> int | None:
    return (token[0] if token else None) if isinstance(token, (list, tuple)) else token


def _check_texts(name: str, values: Any) -> None:
    texts = isinstance(values, dict) and all(isinstance(each, str) for pair in values.items() for each in pair)
    if values is not None and not texts:
        refuse(name, "a mapping of texts to texts, or None", values)


def _layers(name: str, layers: Any) -> list[int]:
    try:
        listed = None if isinstance(layers, str | bytes | dict) else list(layers)
    except TypeError:
        listed = None
    if listed is None:
        refuse(name, "a list of indices", layers)
    return [whole_number(name, layer) for layer in listed]


def _check_layers(name: str, layers: list[int], count: int, allow_empty: bool) -> None:
    if not layers and not allow_empty:
        raise ArgumentError(f"{name}: expected at least one layer, got none")
    bad = [layer for layer in layers if not 0 <= layer < count]
    if bad:
        raise ArgumentError(f"{name}: expected indices in 0..{count - 1}, got {shown(bad)}")
    if name == "language_layers" and len(set(layers)) != len(layers):
        raise ArgumentError(f"{name}: expected each layer once, got {layers}")
