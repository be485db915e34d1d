"""Loading the frozen parts, and reading all layers of any multilingual encoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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

from layalign._claims import names_kernels, require_files, require_modest, without_kernels
from layalign._pickling import leave_out_recorders, make_recordable
from layalign._plain import trains
from layalign._quiet import loading_encoder
from layalign._reading import read_json
from layalign.config import CONFIG_FILE
from layalign.errors import ArgumentError
from layalign.names import given


def encoder_part(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder stack of an encoder-decoder, any other model as it is.

    T5/mT5/UMT5 and M2M100/NLLB keep a stack that is a model of its own; XLM-R, BERT, ModernBERT and decoder-only models
    are encoders themselves (what ``get_encoder`` finds there, if anything, lacks the embeddings).
    """
    found = model.get_encoder()
    return found if isinstance(found, PreTrainedModel) else model


def load_encoder(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """The encoder of a checkpoint; of a T5-like one only the encoder's weights are read.

    Raises:
        CheckpointError: the name can only be a path, and there is no such folder (:func:`layalign.names.given`).
    """
    name_or_path = given("encoder", name_or_path)
    kwargs.setdefault("trust_remote_code", False)  # transformers would ask on the terminal
    _look_at(name_or_path, kwargs)
    config = kwargs.get("config") or AutoConfig.from_pretrained(name_or_path, **_of_hub(kwargs))
    t5_like = config.model_type in ("t5", "mt5", "umt5")
    auto = AutoModelForTextEncoding if t5_like else AutoModel
    with loading_encoder() if t5_like else nullcontext():
        return encoder_part(auto.from_pretrained(name_or_path, **kwargs))


def load_llm(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """The causal language model of a checkpoint; a name is taken as by :func:`load_encoder`."""
    name_or_path = given("llm", name_or_path)
    kwargs.setdefault("trust_remote_code", False)
    _look_at(name_or_path, kwargs)
    return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)


def _look_at(name_or_path: str, kwargs: dict[str, Any]) -> None:
    """Look at a part's configuration before its weights; ``kwargs`` get it where the folder's own would run code.

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
        without_kernels(f"{name_or_path}: {CONFIG_FILE}: ", written)  # says what is left out
        config = AutoConfig.from_pretrained(name_or_path, **hub)
        config._attn_implementation = kwargs.pop("attn_implementation", None)
        kwargs["config"] = config


def _of_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    return {key: kwargs[key] for key in names if key in kwargs}


def encoder_from_config(config: Any) -> PreTrainedModel:
    """An encoder with fresh weights, built from the configuration of the whole model it belongs to."""
    return encoder_part(AutoModel.from_config(config, trust_remote_code=False))


# What encoders of transformers call a rate of dropout that they apply by themselves, beside `nn.Dropout`.
_RATES = ("dropout", "attention_dropout", "activation_dropout", "dropout_prob", "dropout_rate")


def dropout_rates(encoder: nn.Module) -> dict[tuple[str, str], float]:
    """Every rate of dropout in an encoder, by (module, attribute)."""
    found: dict[tuple[str, str], float] = {}
    for name, module in encoder.named_modules():
        for attribute in ("p",) if isinstance(module, nn.Dropout) else _RATES:
            value = getattr(module, attribute, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[name, attribute] = value
    return found


def set_dropout_rates(encoder: nn.Module, rates: Mapping[tuple[str, str], float]) -> None:
    """Put rates, as :func:`dropout_rates` gives them, into an encoder."""
    for (name, attribute), rate in rates.items():
        setattr(encoder.get_submodule(name), attribute, rate)


def record_layers(encoder: PreTrainedModel) -> None:
    """Let transformers put its recorders of hidden states in place now: in a first call that is compiled it cannot."""
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
