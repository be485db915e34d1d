"""The gated term inside any Hugging Face decoder, through transformers' attention interface.

For every base attention function ("sdpa", "eager", ...) a variant "layalign_<base>" is registered. It runs the base
function and adds the layer's gated cross-attention before the output projection. The query it gets is the one that
self-attention uses, so no code here knows an architecture. The source arrives as the keyword ``layalign_source`` of the
LLM's ``forward``; it is not stored on the LLM.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from layalign.modeling.cross_attention import OnePass
from layalign.modeling.decoders import attention_modules, known_maps
from layalign.nn.inspection import parts
from layalign.utils.errors import ArgumentError, refuse, whole_number
from layalign.utils.versions import importing

with importing():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "layalign_"


@dataclass
class AttachReport:
    """What :func:`attach` or :func:`detach` did.

    Attributes:
        implementation: the attention function the model now uses.
        attached: (layer index, module name) of every attention module that takes part.
        skipped: (module name, reason) of every attention module that does not.
    """

    implementation: str
    attached: list[tuple[int, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def _base_function(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' function ``name``; "eager" is each architecture's own."""
    if (known := ALL_ATTENTION_FUNCTIONS.get(name)) is not None:
        return known
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    name = type(module).__name__
    raise ArgumentError(f"llm: {name} has no eager_attention_forward; load the LLM with sdpa attention")


class _View:
    """An object with one attribute changed; everything else is the object's own."""

    def __init__(self, viewed: Any, name: str, value: Any) -> None:
        self.__dict__.update({"_viewed": viewed, name: value})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)


def _as_seen_by(base_name: str, module: nn.Module) -> Any:
    """The module as a base function expects it: the flash ones look up their kernel by the config's attention name."""
    if "flash" not in base_name:
        return module
    return _View(module, "config", _View(module.config, "_attn_implementation", base_name))


def _variant(base_name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def layalign_attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layalign_source: OnePass | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        base = _base_function(base_name, module)
        if base is sdpa_attention_forward and _slow_in_bf16(query):
            base = _in_float32
        out, weights = base(_as_seen_by(base_name, module), query, key, value, attention_mask, **kwargs)
        if layalign_source is not None:
            new = base in (sdpa_attention_forward, _in_float32)  # its result has no other holder
            out = layalign_source.attend(int(module.layer_idx), query, out, kwargs.get("scaling"), overwrite=new)
        return out, weights

    return layalign_attention


def _slow_in_bf16(query: Tensor) -> bool:
    """Whether attention trains in bf16 on a CPU: torch's takes 2 to 4 times as long there as in float32."""
    return query.dtype is torch.bfloat16 and query.device.type == "cpu" and query.requires_grad


def _in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if attention_mask is not None and attention_mask.dtype is not torch.bool:
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        states = (each.float() for each in (query, key, value))
        out, weights = sdpa_attention_forward(module, *states, attention_mask, **kwargs)
    return out.to(query.dtype), weights


def register(base_name: str) -> str:
    """Register the variant of attention function ``base_name`` with its mask and return the variant's name."""
    name = PREFIX + base_name
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _variant(base_name))
        if base_name in ALL_MASK_ATTENTION_FUNCTIONS:  # else transformers would pass no mask
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base_name])
    return name


class _Registration:
    """Part of an attached LLM: a process that unpickles the LLM registers the attention function too."""

    def __init__(self, base_name: str) -> None:
        self.base_name, self.name = base_name, register(base_name)

    def __reduce__(self) -> Any:
        return _Registration, (self.base_name,)


def submodule(llm: nn.Module, name: str) -> Any:
    """The module ``name``, faster than ``get_submodule``; None if a wrapper is in between."""
    found: Any = llm
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _swap_config(llm: PreTrainedModel, implementation: str) -> None:
    """Give this instance its own copy of the config: other models may share the object."""
    copies: dict[int, Any] = {}
    for module in llm.modules():
        config = getattr(module, "config", None)
        if config is None or not hasattr(config, "_attn_implementation_internal"):
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.deepcopy(config)
            copies[id(config)]._attn_implementation_internal = implementation
        module.__dict__.setdefault("_layalign_config", config)
        module.config = copies[id(config)]


def own_configs(llm: nn.Module) -> list[Any]:
    """The config objects that :func:`detach` gives back to the modules of an attached LLM."""
    found = (module.__dict__.get("_layalign_config") for module in llm.modules())
    return list({id(config): config for config in found if config is not None}.values())


def carries_source(attention: Any) -> bool:
    """Whether an attached LLM's attention module still uses the function that takes the source."""
    return str(attention.config._attn_implementation_internal).startswith(PREFIX)


def follow(llm: nn.Module) -> None:
    """Attach again after an attached LLM has been given another attention function: its setter ignores the source."""
    for module in llm.modules():
        if "_layalign_config" in module.__dict__ and not carries_source(module):
            config: Any = module.config
            registration = _Registration(_base(config._attn_implementation_internal, config))
            config._attn_implementation_internal = registration.name
            llm.__dict__["_layalign_registration"] = registration


def _set_attn_implementation(llm: Any, *args: Any, **kwargs: Any) -> None:
    type(llm).set_attn_implementation(llm, *args, **kwargs)
    follow(llm)


def _base(implementation: str | None, config: Any) -> str:
    """The attention function that the gated term is added to."""
    # sdpa has no softcapping, which Gemma 2 needs; earlier versions of transformers use sdpa by default.
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    return "eager" if capped and implementation in (None, "sdpa") else implementation or "sdpa"


def is_attached(llm: nn.Module) -> bool:
    """Whether :func:`attach` has been called on this instance."""
    return "_layalign_config" in llm.__dict__


def attach(llm: PreTrainedModel, layers: list[int] | tuple[int, ...] | None = None) -> AttachReport:
    """Let ``llm`` add the gated term. Only this instance changes; its parameters and state-dict keys do not.

    Args:
        llm: any decoder that goes through transformers' attention interface.
        layers: the LLM layers that will attend; None for all.

    Returns:
        Which attention modules take part, and why the others do not.

    Raises:
        ArgumentError: the architecture does not go through the interface, or a layer has no attention to attach to.
    """
    given: Any = llm
    if not isinstance(given, nn.Module):
        raise ArgumentError(f"llm: expected a transformers model, got {type(llm).__name__}")
    if is_attached(llm):
        raise ArgumentError("llm: expected an LLM that is not attached yet; call detach first")
    if not getattr(llm, "_supports_attention_backend", False):
        raise ArgumentError(
            f"llm: {type(llm).__name__} does not go through transformers' attention interface, so no layer can attend"
        )
    attentions = attention_modules(llm)
    if not attentions and layers:  # an adapter alone needs no attention modules
        raise ArgumentError(f"llm: no attention of {type(llm).__name__} has {known_maps()}; see register_decoder")
    if not isinstance(layers, list | tuple | range | None):
        refuse("layers", "a list of indices, or None", layers)
    wanted = sorted(attentions) if layers is None else [whole_number("layers", layer) for layer in layers]
    missing = [layer for layer in wanted if layer not in attentions]
    if missing:
        raise ArgumentError(f"layers: expected layers among {sorted(attentions)}, got {missing}")
    base = _base(llm.config._attn_implementation, llm.config)
    registration = _Registration(base)
    report = AttachReport(implementation=registration.name)
    for layer, (name, _) in sorted(attentions.items()):
        if layer in wanted:
            report.attached.append((layer, name))
        else:
            report.skipped.append((name, "not among the language layers"))
    _swap_config(llm, report.implementation)
    llm.__dict__["_layalign_registration"] = registration
    llm.__dict__["set_attn_implementation"] = functools.partial(_set_attn_implementation, llm)
    return report


def detach(llm: PreTrainedModel) -> AttachReport:
    """Undo :func:`attach`: every module gets its own config object back.

    Returns:
        The attention function that the LLM uses again.

    Raises:
        ArgumentError: the LLM is not attached.
    """
    given: Any = llm
    if not isinstance(given, nn.Module) or not is_attached(given):
        raise ArgumentError("llm: expected an attached LLM, this one is not")
    for name in ("_layalign_registration", "set_attn_implementation"):
        llm.__dict__.pop(name, None)
    for module in llm.modules():
        if "_layalign_config" in module.__dict__:
            module.config = module.__dict__.pop("_layalign_config")
    report = AttachReport(implementation=llm.config._attn_implementation or "sdpa")
    report.skipped = [(name, "detached") for _, (name, _) in sorted(attention_modules(llm).items())]
    return report


def is_reentrant(llm: nn.Module) -> bool:
    """Whether ``llm`` uses re-entrant gradient checkpointing, which loses gradients of keyword tensors."""
    if not llm.training:
        return False
    for module in parts(llm):
        if module.__dict__.get("gradient_checkpointing"):  # where transformers switches it on
            function: Any = getattr(module, "_gradient_checkpointing_func", None)
            keywords = getattr(function, "keywords", None) or {}
            if keywords.get("use_reentrant", True) and function is not None:
                return True
    return False


def require_attended(llm: nn.Module, one: OnePass) -> None:
    """Raise if an LLM silently dropped the source: its layers do not pass keywords on to the attention function."""
    missing = [layer for layer in one.source.layers if layer not in (one.seen or ())]
    if missing:
        raise ArgumentError(
            f"llm: {type(llm).__name__} did not hand the source to its layers {missing}; "
            "its forward does not pass keyword arguments on to the attention function"
        )
