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
from layalign.errors import ArgumentError, CheckpointError

logger = logging.getLogger("layalign")

WEIGHTS = "model.safetensors"
DIGEST = "sha256"  # in the metadata of the weights
OWN_PARTS = ("mapping.", "encoder_aligner.", "cross_attention.")
QUANTISERS = ("bitsandbytes", "optimum", "torchao", "hqq")  # packages whose modules hold packed weights
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of adapter, aligner and gates. Asking a whole model would make bitsandbytes repack its 4-bit LLM."""
    found: dict[str, Tensor] = {}
    for name, part in model.named_children():
        if f"{name}." in OWN_PARTS:
            found.update(part.state_dict(prefix=f"{name}."))
    return found


def trained_names(model: nn.Module) -> set[str]:
    """Names of the weights that training changes: adapter, aligner, gates, and whatever else requires gradients."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad} | set(own_state(model))


def is_quantised(part: nn.Module) -> bool:
    """Whether a frozen part holds packed weights, by transformers or by a quantiser's own modules."""
    if getattr(part, "is_quantized", False) or getattr(part, "hf_quantizer", None) is not None:
        return True
    return any(type(module).__module__.split(".")[0] in QUANTISERS for module in part.modules())


def _dtypes(model: nn.Module) -> dict[str, str]:
    """The dtype of each part, and of every weight that has another than its part (T5 keeps some of its in fp32)."""
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        if found.setdefault(_part(name), dtype) != dtype:
            found[name] = dtype
    return found


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
    unnamed = [part for part in ("encoder", "llm") if not getattr(config, f"{part}_name_or_path")]
    if unnamed and not save_frozen:
        logger.warning("saving the frozen parts too: the %s has no name to load it from again", " and ".join(unnamed))
        save_frozen = True
    config.frozen_saved = save_frozen
    if save_frozen:
        quantised = [part for part in ("encoder", "llm") if is_quantised(getattr(model, part))]
        if quantised:
            raise CheckpointError(
                f"save_frozen: the {' and '.join(quantised)} is quantised; save the trained weights alone, with its "
                f"name in config.{quantised[0]}_name_or_path, and quantise it again when you load them"
            )
        config.part_dtypes = _dtypes(model)
        save_all(directory, state_dict=state_dict, **arguments)
        return
    if not arguments.get("is_main_process", True):
        return
    names = trained_names(model)
    state = state_dict or {**dict(model.named_parameters()), **own_state(model)}
    weights = {name: tensor for name, tensor in state.items() if name in names}
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
    if "quantization_config" in arguments:
        raise ArgumentError("quantization_config: expected it in llm_kwargs or encoder_kwargs, as it is for one part")
    if "torch_dtype" in arguments:  # the name of transformers 4
        arguments.setdefault("dtype", arguments.pop("torch_dtype"))
    if config.frozen_saved and parts["encoder"] is None and parts["llm"] is None:
        if "attn_implementation" in arguments:
            assert config.llm_config is not None
            config.llm_config._attn_implementation = arguments.pop("attn_implementation")
        asked = {part: _only_dtype(part, parts[f"{part}_kwargs"]) for part in ("encoder", "llm")}
        return _load_whole(load_all, name_or_path, positional, config, arguments, asked)

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
    dtype = _dtype(common["dtype"])
    _put_weights(model, weights, None if dtype == "auto" else dtype)
    return model.eval()


def _only_dtype(part: str, arguments: dict[str, Any] | None) -> Any:
    """The dtype in a part's arguments; a checkpoint that holds the parts takes no others."""
    others = sorted(set(arguments or {}) - {"dtype"})
    if others:
        raise ArgumentError(
            f"{part}_kwargs: expected only dtype, for the checkpoint holds the frozen parts itself, got {others[0]}"
        )
    return (arguments or {}).get("dtype")


def _load_whole(
    load_all: Callable[..., Any],
    name_or_path: str,
    positional: tuple[Any, ...],
    config: LayAlignConfig,
    arguments: dict[str, Any],
    of_parts: dict[str, Any],
) -> Any:
    """transformers' own loading, and what it does not restore: the dtypes of the parts, and which weights train."""
    saved = {name: _dtype(dtype) for name, dtype in (config.part_dtypes or {}).items()}
    asked = _dtype(arguments.pop("dtype", "auto"))
    wide = functools.reduce(torch.promote_types, saved.values()) if saved else asked  # so that nothing is rounded twice
    for part in (config.encoder_config, config.llm_config):
        assert part is not None
        part.dtype = None if wide == "auto" else wide
    model = load_all(name_or_path, *positional, config=config, dtype=wide, **arguments)
    for name, parameter in model.named_parameters():
        part = _part(name)
        want = _dtype(of_parts.get(part) or asked)
        if want == "auto":
            want = saved.get(name) or saved.get(part) or parameter.dtype
        parameter.data = parameter.data.to(want)
        fixed = config.gate is not None and name.endswith("adaption_gate")
        parameter.requires_grad_((name.startswith(OWN_PARTS) and not fixed) or ".lora_" in name)
    for name in ("encoder", "llm"):
        getattr(model, name).config.dtype = getattr(model, name).dtype
    return model


def _dtype(dtype: Any) -> Any:
    """A dtype or "auto", from that, None or a name."""
    if dtype is None:
        return "auto"
    return getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype


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
    places = dict(model.named_parameters())
    expected = set(own_state(model))
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
