"""Saving and loading: trained weights alone, with the names of the frozen parts, or everything."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from layalign import encoder as encoders
from layalign.config import LayAlignConfig
from layalign.errors import CheckpointError

logger = logging.getLogger("layalign")

WEIGHTS = "model.safetensors"
DIGEST = "sha256"  # in the metadata of the weights
OWN_PARTS = ("mapping.", "encoder_aligner.", "cross_attention.")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def trained_names(model: nn.Module) -> set[str]:
    """Names of the weights that training changes: adapter, aligner, gates, and whatever else requires gradients."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return names | {name for name in model.state_dict() if name.startswith(OWN_PARTS)}


def _unnamed(config: LayAlignConfig) -> list[str]:
    """The frozen parts that no name leads back to."""
    return [part for part in ("encoder", "llm") if not getattr(config, f"{part}_name_or_path")]


def saved_names(model: Any) -> set[str]:
    """Names of the weights that :func:`save` writes by default."""
    return set(model.state_dict()) if _unnamed(model.config) else trained_names(model)


def save(
    model: Any,
    save_all: Callable[..., None],
    directory: Any,
    save_frozen: bool,
    state_dict: dict[str, Tensor] | None,
    arguments: dict[str, Any],
) -> None:
    """Write ``model`` to ``directory``; see ``LayAlignForCausalLM.save_pretrained``."""
    config: LayAlignConfig = model.config
    unnamed = _unnamed(config)
    if unnamed and not save_frozen:
        logger.warning("saving the frozen parts too: the %s has no name to load it from again", " and ".join(unnamed))
        save_frozen = True
    config.frozen_saved = save_frozen
    if save_frozen:
        floating = {_part(n): p.dtype for n, p in reversed(list(model.named_parameters())) if p.is_floating_point()}
        config.part_dtypes = {part: str(dtype).removeprefix("torch.") for part, dtype in floating.items()}
        save_all(directory, state_dict=state_dict, **arguments)
        return
    if not arguments.get("is_main_process", True):
        return
    names = trained_names(model)
    weights = {name: tensor for name, tensor in (state_dict or model.state_dict()).items() if name in names}
    missing = sorted(names - set(weights))
    if missing:
        raise CheckpointError(f"state_dict: expected every trained weight, {missing[0]} is missing")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    unfinished = folder / f"{WEIGHTS}.unfinished"
    save_file(contiguous, unfinished, metadata={"format": "pt", DIGEST: digest(contiguous)})
    unfinished.replace(folder / WEIGHTS)  # never a half-written checkpoint under the final name


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, in hexadecimal."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; those that `save` wrote are compared with their SHA-256.

    Raises:
        CheckpointError: the file cannot be read, or its content is not what was written.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            written = (opened.metadata() or {}).get(DIGEST)
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}".splitlines()[0]) from error
    if written is not None and digest(weights) != written:
        raise CheckpointError(f"{file}: damaged: its content is not what was written (SHA-256)")
    return weights


def load(
    cls: Any,
    load_all: Callable[..., Any],
    name_or_path: str,
    positional: tuple[Any, ...],
    arguments: dict[str, Any],
) -> Any:
    """Read what :func:`save` wrote; see ``LayAlignForCausalLM.from_pretrained``."""
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    config = arguments.pop("config", None) or _read_config(name_or_path, hub)
    parts = {key: arguments.pop(key, None) for key in ("encoder", "llm", "encoder_kwargs", "llm_kwargs")}
    if config.frozen_saved and parts["encoder"] is None and parts["llm"] is None:
        if "attn_implementation" in arguments:
            assert config.llm_config is not None
            config.llm_config._attn_implementation = arguments.pop("attn_implementation")
        return _load_whole(load_all, name_or_path, positional, config, arguments)

    common = {key: arguments.pop(key) for key in ("dtype", "device_map", "local_files_only") if key in arguments}
    common.setdefault("dtype", "auto")
    attention = {key: arguments.pop(key) for key in ("attn_implementation",) if key in arguments}
    encoder, llm = parts["encoder"], parts["llm"]
    if encoder is None:
        encoder = encoders.load_encoder(
            str(config.encoder_name_or_path), **{**common, **(parts["encoder_kwargs"] or {})}
        )
    if llm is None:
        llm = encoders.load_llm(str(config.llm_name_or_path), **{**common, **attention, **(parts["llm_kwargs"] or {})})
    model = cls(config, encoder=encoders.encoder_part(encoder), llm=llm)
    weights = _read_weights(name_or_path, hub)
    _put_weights(model, weights, None if common["dtype"] == "auto" else common["dtype"])
    return model.eval()


def _load_whole(
    load_all: Callable[..., Any],
    name_or_path: str,
    positional: tuple[Any, ...],
    config: LayAlignConfig,
    arguments: dict[str, Any],
) -> Any:
    """transformers' own loading, and what it does not restore: a dtype for each part, and which weights train."""
    dtypes = {part: getattr(torch, name) for part, name in (config.part_dtypes or {}).items()}
    asked = arguments.pop("dtype", "auto")
    if asked == "auto" and dtypes:
        asked = functools.reduce(torch.promote_types, dtypes.values())  # the widest, so that nothing is rounded
    else:
        dtypes = {}
    model = load_all(name_or_path, *positional, config=config, dtype=asked, **arguments)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(_part(name), parameter.dtype))
        fixed = config.gate is not None and name.endswith("adaption_gate")
        parameter.requires_grad_((name.startswith(OWN_PARTS) and not fixed) or ".lora_" in name)
    return model


def _part(name: str) -> str:
    return "own" if name.startswith(OWN_PARTS) else name.split(".")[0]


def _read_config(name_or_path: str, hub: dict[str, Any]) -> LayAlignConfig:
    try:
        found, _ = LayAlignConfig.get_config_dict(name_or_path, **hub)
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{name_or_path}: no readable LayAlign checkpoint: {error}".splitlines()[0]) from error
    if found.get("model_type") != LayAlignConfig.model_type:
        raise CheckpointError(f"{name_or_path}: expected a layalign checkpoint, got {found.get('model_type')!r}")
    return LayAlignConfig.from_dict(found)


def _read_weights(name_or_path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    try:
        file = str(cached_file(name_or_path, WEIGHTS, **hub))
    except OSError as error:
        raise CheckpointError(f"{name_or_path}: cannot read {WEIGHTS}: {error}".splitlines()[0]) from error
    return read_weights(file)


def _put_weights(model: nn.Module, weights: dict[str, Tensor], dtype: Any) -> None:
    """Put the stored weights in, in their stored dtype unless one is asked for; each must fit, none may be missing."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    places = dict(model.named_parameters())
    expected = {name for name in model.state_dict() if name.startswith(OWN_PARTS)}
    missing, foreign = sorted(expected - set(weights)), sorted(set(weights) - set(places))
    if missing or foreign:
        problem = f"{missing[0]} is missing" if missing else f"the model has no {foreign[0]}"
        raise CheckpointError(f"{WEIGHTS}: does not fit the model: {problem}")
    for name, tensor in weights.items():
        place = places[name]
        if place.shape != tensor.shape:
            shapes = f"expected {tuple(place.shape)}, got {tuple(tensor.shape)}"
            raise CheckpointError(f"{WEIGHTS}: {name}: {shapes}")
        device = _home(model, name, place)
        # A copy: the tensor is a view of the mapped file, and saving to the same folder would pull it from under us.
        place.data = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)


def _home(model: Any, name: str, place: Tensor) -> torch.device:
    """Own parts live with the LLM's embeddings, everything else stays where it is."""
    return model.get_input_embeddings().weight.device if name.startswith(OWN_PARTS) else place.device


def inject_lora(llm: PreTrainedModel, settings: Any) -> dict[str, Any]:
    """Add a LoRA adapter to ``llm`` and return its settings as plain data."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise CheckpointError("lora: expected the package peft (pip install 'layalign[lora]')") from error
    lora = settings if isinstance(settings, LoraConfig) else LoraConfig(**_plain(settings))
    llm.add_adapter(lora)
    return _plain(lora.to_dict())


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON data, without what peft fills in by itself."""
    derived = ("peft_type", "auto_mapping", "peft_version")
    text = json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    plain: dict[str, Any] = json.loads(text)
    return {key: value for key, value in plain.items() if key not in derived and value is not None}
