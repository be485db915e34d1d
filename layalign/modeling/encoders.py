"""Loading the frozen parts, and reading all layers of any multilingual encoder."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
)

from layalign.modeling import gguf_files
from layalign.modeling.claims import names_kernels, require_files, require_modest, without_kernels
from layalign.modeling.configuration import CONFIG_FILE
from layalign.modeling.names import gguf_parts, given, is_path, with_gguf
from layalign.modeling.pickling import leave_out_recorders, make_recordable
from layalign.nn.inspection import trains
from layalign.utils.errors import ArgumentError, CheckpointError
from layalign.utils.quiet import without_reports
from layalign.utils.reading import read_json

logger = logging.getLogger("layalign")


def encoder_part(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder stack of an encoder-decoder, any other model as it is.

    In T5/mT5/UMT5 and M2M100/NLLB the stack is a model of its own. XLM-R, BERT, ModernBERT and decoder-only models are
    encoders themselves (what ``get_encoder`` returns for them, if anything, lacks the embeddings).
    """
    found = model.get_encoder()
    return found if isinstance(found, PreTrainedModel) else model


def load_encoder(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """The encoder of a checkpoint. Of a T5-like one only the encoder's weights are read.

    Raises:
        CheckpointError: the name can only be a path, and there is no such folder (`layalign.modeling.names.given`); or
            the checkpoint lacks weights of the encoder.
        ArgumentError: the name is that of a GGUF file.
    """
    name_or_path = given("encoder", name_or_path)
    if gguf_parts(name_or_path)[1] is not None or "gguf_file" in kwargs:
        raise ArgumentError("encoder: expected a folder or hub name, got a GGUF file, which is read for the LLM alone")
    kwargs.setdefault("trust_remote_code", False)  # transformers would ask on the terminal
    _look_at(name_or_path, kwargs)
    config = kwargs.get("config") or AutoConfig.from_pretrained(name_or_path, **_of_hub(kwargs))
    t5_like = config.model_type in ("t5", "mt5", "umt5")
    auto = AutoModelForTextEncoding if t5_like else AutoModel
    return encoder_part(_loaded("encoder", auto, name_or_path, kwargs))


def load_llm(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """The causal language model of a checkpoint or of a GGUF file; a name is taken as by :func:`load_encoder`.

    Args:
        name_or_path: folder, hub name or GGUF file (:mod:`layalign.modeling.names`).
        **kwargs: as transformers' ``from_pretrained``; ``gguf_file`` names a file in the folder or hub repository.

    Raises:
        CheckpointError: there is no such folder or file, it is damaged, or it lacks weights of the LLM.
        ArgumentError: a GGUF file is named, and the package ``gguf`` is not installed.
    """
    if (file := kwargs.pop("gguf_file", None)) is not None:
        name_or_path = with_gguf(str(name_or_path), str(file))
    name_or_path = given("llm", name_or_path)
    kwargs.setdefault("trust_remote_code", False)
    if gguf_parts(name_or_path)[1] is not None:
        return _load_gguf(name_or_path, kwargs)
    _look_at(name_or_path, kwargs)
    return _loaded("llm", AutoModelForCausalLM, name_or_path, kwargs)


def _load_gguf(name: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A GGUF file's model with dequantised weights; its name is that of the file."""
    gguf_files.require_package("llm")
    path = gguf_path(name, **_of_hub(kwargs))
    gguf_files.read_head(path)  # raises for a damaged file, before transformers reads it
    kwargs = {**gguf_files.arguments(path.name), **kwargs}
    with gguf_files.without_kernels():
        model = _loaded("llm", AutoModelForCausalLM, str(path.parent), kwargs)
    model.config.name_or_path = name
    return model


def gguf_path(name: str, **hub: Any) -> Path:
    """The GGUF file of a settled name (:mod:`layalign.modeling.names`), fetched from the hub if it is not cached."""
    if is_path(name):
        return Path(name)
    from huggingface_hub import hf_hub_download

    place, file = gguf_parts(name)
    assert file is not None
    known = {key: hub[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in hub}
    return Path(hf_hub_download(place, file, **known))


def _loaded(part: str, auto: Any, name: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a model. Every weight of the part that is used must come from its files.

    transformers logs a page about missing and unexpected weights. Here a weight that is missing in the used part is an
    error, because a frozen part with random weights is useless. Other modules (a head, a pooler, the decoder of an
    encoder-decoder) are ignored.

    Raises:
        CheckpointError: a weight of the used part is missing.
    """
    kwargs.pop("output_loading_info", None)
    with without_reports():
        model, info = auto.from_pretrained(name, output_loading_info=True, **kwargs)
    used = encoder_part(model) if part == "encoder" else model
    inside = {id(tensor) for tensor in (*used.parameters(), *used.buffers())}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    missing = sorted(
        key
        for key in info["missing_keys"]
        if (key not in tensors or id(tensors[key]) in inside) and "pooler" not in key.split(".")
    )
    if missing:
        raise CheckpointError(f"{part}: {name} lacks weights of its {type(model).__name__}: {_some(missing)}")
    if foreign := sorted(key for key in info["unexpected_keys"] if _of_own_module(model, key)):
        logger.warning(
            "%s: %s has weights that its %s has no place for: %s; is its configuration that of another model?",
            part, name, type(model).__name__, _some(foreign),
        )  # fmt: skip
    return model


def _of_own_module(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight's name begins with a module that the model has, though not this weight in it."""
    key = key.removeprefix(f"{model.base_model_prefix}.")
    first = key.split(".")[0]
    return "." in key and any(first in dict(each.named_children()) for each in (model, model.base_model))


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return first + (f" and {len(rest)} more" if rest else "")


def _look_at(name_or_path: str, kwargs: dict[str, Any]) -> None:
    """Check a part's files and configuration before its weights are loaded.

    ``kwargs`` get a configuration if the folder's own would run code.

    Raises:
        CheckpointError, ArgumentError: the folder's files, or the numbers in the configuration, are impossible.
    """
    require_files(Path(name_or_path))
    hub = _of_hub(kwargs)
    adapter = Path(name_or_path) / "adapter_config.json"
    if adapter.is_file() and not (Path(name_or_path) / CONFIG_FILE).exists():  # an adapter, which names its LLM
        base = read_json(adapter)
        name_or_path = str(base.get("base_model_name_or_path")) if isinstance(base, dict) else name_or_path
        require_files(Path(name_or_path))
    try:
        written = PretrainedConfig.get_config_dict(name_or_path, **hub)[0]
    except OSError:  # an adapter on the hub, or nothing: loading says so
        written = {}
    require_modest("", written)
    if names_kernels(written) and kwargs.get("config") is None:
        without_kernels(f"{name_or_path}: {CONFIG_FILE}: ", written)  # logs what is left out
        config = AutoConfig.from_pretrained(name_or_path, **hub)
        config._attn_implementation = kwargs.pop("attn_implementation", None)
        kwargs["config"] = config


def _of_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    return {key: kwargs[key] for key in names if key in kwargs}


def encoder_from_config(config: Any) -> PreTrainedModel:
    """An encoder with fresh weights, built from the configuration of the whole model it belongs to."""
    return encoder_part(AutoModel.from_config(config, trust_remote_code=False))


# Attributes with the rates of dropout that transformers' encoders apply without `nn.Dropout`.
_RATES = ("dropout", "attention_dropout", "activation_dropout", "dropout_prob", "dropout_rate")


def dropout_rates(encoder: nn.Module) -> dict[tuple[str, str], float]:
    """Every rate of dropout in an encoder, by (module, attribute)."""
    rates: dict[tuple[str, str], float] = {}
    for name, module in encoder.named_modules():
        for attribute in ("p",) if isinstance(module, nn.Dropout) else _RATES:
            value = getattr(module, attribute, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                rates[name, attribute] = value
    return rates


def set_dropout_rates(encoder: nn.Module, rates: Mapping[tuple[str, str], float]) -> None:
    """Put rates, as :func:`dropout_rates` gives them, into an encoder."""
    for (name, attribute), rate in rates.items():
        setattr(encoder.get_submodule(name), attribute, rate)


def record_layers(encoder: PreTrainedModel) -> None:
    """Let transformers install its recorders of hidden states now: it cannot in a first call that is compiled."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # other releases record in another way, or need no recorders
        return
    make_recordable(encoder)
    maybe_install_capturing_hooks(encoder)
    leave_out_recorders(encoder)


def encode(
    encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Run the encoder.

    Args:
        encoder: any transformers encoder, or decoder-only model used as one.
        input_ids, attention_mask: (B, S) int64, padding on either side.
        layers: E indices into ``hidden_states``, or none.

    Returns:
        E hidden states (B, S, D_e) and the last hidden state (B, S, D_e).

    Raises:
        ArgumentError: the encoder has no such layer, or returns no hidden states.
    """
    extra = {"use_cache": False} if "use_cache" in inspect.signature(encoder.forward).parameters else {}
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains(encoder)):
        output = encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True, **extra
        )
    hidden = output.hidden_states
    if hidden is None or max(layers, default=0) >= len(hidden):
        count = 0 if hidden is None else len(hidden)
        raise ArgumentError(f"encoder_layers: expected indices below {count}, the encoder's layers, got {list(layers)}")
    dtype = encoder.dtype  # half-precision T5 keeps some weights in fp32, and its layers' outputs differ in dtype
    return [hidden[layer].to(dtype) for layer in layers], output.last_hidden_state.to(dtype)
