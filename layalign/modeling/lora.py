"""Adapters that peft has put into a frozen part: which weights are theirs, and whether they can be loaded again."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layalign.utils.errors import ArgumentError, CheckpointError, first_line, shown
from layalign.utils.limits import MAX_RANK
from layalign.utils.quiet import importing_peft

_INNER = ("base_layer", "original_module")  # what peft's layers call the module that they wrap


def _wrappers(part: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, name of what it wraps) of peft's layers."""
    for name, module in part.named_modules():
        for inner in _INNER:
            if isinstance(module._modules.get(inner), nn.Module):
                yield name, module, inner


def adapter_names(part: nn.Module) -> set[str]:
    """Names of the parameters that adapters have added to a part."""
    found = set()
    for name, module, inner in _wrappers(part):
        start = f"{name}." if name else ""
        found |= {start + each for each, _ in module.named_parameters() if not each.startswith(f"{inner}.")}
    return found


def base_name(name: str) -> str:
    """A weight's name in the part without adapters."""
    return ".".join(piece for piece in name.split(".") if piece not in _INNER)


def announce(part: str, model: nn.Module) -> str | None:
    """The warning about a part that comes with adapters, which are frozen with it; None if it has none."""
    if not adapter_names(model):
        return None
    what = f"the {part} comes with an adapter ({', '.join(getattr(model, 'peft_config', {})) or 'peft'}): it is frozen"
    if part == "llm":
        return f"{what} with the LLM and saved with the checkpoint; requires_grad_(True) on its weights trains it"
    return f"{what} with the encoder, and cannot be saved in a checkpoint unless it is merged into the weights"


def inject_lora(llm: PreTrainedModel, settings: Any, drawn: bool = True) -> dict[str, Any]:
    """Add a LoRA adapter to ``llm`` and return its settings as plain data.

    Args:
        llm: changed in place.
        settings: a peft ``LoraConfig`` or its fields.
        drawn: False for an adapter whose weights are loaded afterwards: some initialisations change the LLM.

    Raises:
        ArgumentError: the settings are not those of a LoraConfig, or the LLM has an adapter already.
        CheckpointError: peft is not installed.
    """
    try:
        with importing_peft():
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise CheckpointError("lora: expected the package peft (pip install 'layalign[lora]')") from error
    try:
        lora = settings if isinstance(settings, LoraConfig) else LoraConfig(**_modest(_plain(settings)))
        if adapter_names(llm):
            raise ValueError("the LLM has an adapter already")
        initial = lora.init_lora_weights
        if not drawn:
            lora.init_lora_weights = True
        # Like llm.add_adapter, which in transformers 5.24 needs a peft that the package index does not have.
        inject_adapter_in_model(lora, llm)
        llm._hf_peft_config_loaded = True
        lora.init_lora_weights = initial
    except (TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(f"lora: expected the fields of a peft LoraConfig: {first_line(error)}") from error
    if lora.inference_mode:
        for name, parameter in llm.named_parameters():
            if name in adapter_names(llm):
                parameter.requires_grad_(False)
    return _plain(lora.to_dict())


def recorded_lora(encoder: nn.Module, llm: Any) -> dict[str, Any] | None:
    """The settings from which the LLM's adapter can be made again; None where it has none.

    Raises:
        CheckpointError: there are adapters that a checkpoint cannot hold; the text names them and says what to do.
    """
    if adapter_names(encoder):
        raise CheckpointError(
            "encoder: expected no adapter in it, a checkpoint has no place for one; merge it into the weights "
            "(peft's merge_and_unload) or remove it (encoder.delete_adapter), then save"
        )
    names = adapter_names(llm)
    if not names:
        return None
    known = dict(getattr(llm, "peft_config", None) or {})
    expected = "llm: expected at most one LoRA adapter, called 'default' (model.add_lora)"
    if list(known) != ["default"] or str(getattr(known["default"], "peft_type", "")).rpartition(".")[2] != "LORA":
        kinds = {name: str(getattr(each, "peft_type", each)).rpartition(".")[2] for name, each in known.items()}
        raise CheckpointError(f"{expected}, got {shown(kinds, 200)}; remove the others (llm.delete_adapter), then save")
    for name, module, _ in _wrappers(llm):
        merged, disabled = getattr(module, "merged", False), getattr(module, "disable_adapters", False)
        if merged or disabled or "default" not in getattr(module, "active_adapters", ["default"]):
            state = "is merged into the weights (unmerge_adapter)" if merged else "is switched off (enable_adapters)"
            raise CheckpointError(f"{expected} and active, but in {name} it {state}: loading would switch it on")
    settings = _plain({**known["default"].to_dict(), "inference_mode": False})
    places = dict(llm.named_parameters())
    if not any(places[name].requires_grad for name in names):
        settings["inference_mode"] = True  # it is frozen, and loading freezes it again
    again = twin(llm)
    inject_lora(again, settings, drawn=False)
    made = {name: parameter.shape for name, parameter in again.named_parameters() if name in adapter_names(again)}
    other = sorted(name for name in made.keys() | names if name not in places or made.get(name) != places[name].shape)
    if other:
        raise CheckpointError(
            f"{expected}; {shown(other[0], 200)} is not what its settings give: the adapter was changed by hand"
        )
    modules = dict(again.named_modules())
    for name, module, _ in _wrappers(llm):
        scaling = getattr(module, "scaling", {}), getattr(modules[name], "scaling", {})
        if scaling[0] != scaling[1]:
            raise CheckpointError(f"{expected}; {name} scales by {scaling[0]}, its settings give {scaling[1]}")
    return settings


def twin(part: PreTrainedModel) -> Any:
    """A part of the same class and configuration on the meta device, which takes no memory."""
    config = copy.deepcopy(part.config)
    config._attn_implementation = "eager"  # this library's own function may not be registered
    with torch.device("meta"):
        found = type(part)(config)
    found.tie_weights()  # transformers 5.0 ties nothing on this device
    return found


def _modest(settings: dict[str, Any]) -> dict[str, Any]:
    """Check that settings, which may come from a checkpoint, make an adapter and do nothing else."""
    for name in ("megatron_config", "megatron_core", "layer_replication"):  # import a module; add any number of layers
        if name in settings and not (name == "megatron_core" and settings[name] == "megatron.core"):
            raise ValueError(f"{name} is not supported, got {shown(settings[name])}")
    patterns = settings.get("rank_pattern")
    names = [
        settings.get("target_modules"),
        settings.get("exclude_modules"),
        *(patterns or ()),
        *(settings.get("alpha_pattern") or ()),
    ]
    for name in names:  # matching a pattern with nested repetitions may never end
        if isinstance(name, str) and re.search(r"[*+}]\)+[*+{]", name):
            raise ValueError(f"expected a pattern that ends in finite time, got {shown(name)}")
    for rank in (settings.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())):
        if isinstance(rank, int | float) and rank > MAX_RANK:
            raise ValueError(f"r: expected at most {MAX_RANK}, got {shown(rank)}")
    return settings


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON data, without what peft fills in by itself, such as the path of the LLM."""
    derived = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path")
    text = json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    plain: dict[str, Any] = json.loads(text)
    return {key: value for key, value in plain.items() if key not in derived and value is not None}


def merged(llm: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name without adapters, weight) of an LLM with its adapter merged into its weights, for another engine.

    Raises:
        CheckpointError: an adapter cannot be merged.
    """
    if adapter_names(llm):
        with importing_peft():
            from peft.tuners.tuners_utils import BaseTunerLayer
            from peft.utils import AuxiliaryTrainingWrapper
        for name, module in list(llm.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                raise CheckpointError(f"lora: {name} was trained as a whole (modules_to_save), which cannot be merged")
            if isinstance(module, BaseTunerLayer):
                module.merge(safe_merge=True)
    foreign = adapter_names(llm)
    for name, tensor in llm.state_dict().items():
        if name not in foreign:
            yield base_name(name), tensor
