"""Saving and loading: trained weights alone, with the names of the frozen parts, or everything."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from layalign import encoder as encoders
from layalign._plain import brought, device_of
from layalign.config import LayAlignConfig, hidden_size, number_of_layers
from layalign.errors import ArgumentError, BackendError, CheckpointError, first_line, refuse, shown
from layalign.ops._checks import FLOAT_DTYPES
from layalign.parts import own_parts

logger = logging.getLogger("layalign")

WEIGHTS, CONFIG = "model.safetensors", "config.json"
DIGEST = "sha256"  # in the metadata of the weights
OWN_PARTS = ("mapping.", "encoder_aligner.", "cross_attention.")
QUANTISERS = ("bitsandbytes", "optimum", "torchao", "hqq")  # packages whose modules hold packed weights
PLACES = ("device_map", "max_memory", "offload_folder", "offload_buffers")  # of a frozen part's weights
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

    # What does not fit is found before the frozen parts are loaded, and before memory is taken for its sizes.
    weights = _read_weights(name_or_path, hub)
    _check_own(config, weights, name_or_path)
    names = ("dtype", "local_files_only", "trust_remote_code", *PLACES)
    common = {key: arguments.pop(key) for key in names if key in arguments}
    common.setdefault("dtype", "auto")
    wanted = _dtype(common["dtype"])
    attention = {key: arguments.pop(key) for key in ("attn_implementation",) if key in arguments}
    encoder, llm = parts["encoder"], parts["llm"]
    if encoder is None:
        with reading(name_or_path, f"the encoder {config.encoder_name_or_path!r} cannot be loaded"):
            name = _part_name(config, "encoder")
            encoder = encoders.load_encoder(name, **{**common, **(parts["encoder_kwargs"] or {})})
    if llm is None:
        with reading(name_or_path, f"the LLM {config.llm_name_or_path!r} cannot be loaded"):
            name = _part_name(config, "llm")
            llm = encoders.load_llm(name, **{**common, **attention, **(parts["llm_kwargs"] or {})})
    encoder = encoders.encoder_part(encoder)
    for part, found in (("encoder", encoder), ("llm", llm)):
        _check_part(part, getattr(config, f"{part}_config"), found.config, name_or_path)
    with reading(name_or_path, CONFIG):
        model = cls(config, encoder=encoder, llm=llm)
    _put_weights(model, weights, wanted)
    return model.eval()


@contextmanager
def reading(name_or_path: str, what: str) -> Iterator[None]:
    """What goes wrong with a checkpoint's files, whoever notices it and however, as an error that names them."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, BackendError):
        raise
    except Exception as error:
        raise CheckpointError(f"{name_or_path}: {what}: {first_line(error)}") from error


def _part_name(config: LayAlignConfig, part: str) -> str:
    name = getattr(config, f"{part}_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"expected {part}_name_or_path, or the {part} itself as an argument, got {shown(name)}")
    return name


def _dtype(value: Any) -> torch.dtype | None:
    """A dtype or its name; None for "auto"."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        refuse("dtype", "a floating dtype, its name, or 'auto'", value)
    return found


def _check_own(config: LayAlignConfig, weights: dict[str, Tensor], name_or_path: str) -> None:
    """The stored weights against the sizes in the configuration, without memory for either."""
    with reading(name_or_path, CONFIG), torch.device("meta"):
        parts = zip(("mapping", "encoder_aligner", "cross_attention"), own_parts(config), strict=True)
        own = {f"{part}.{name}": p for part, module in parts if module for name, p in module.named_parameters()}
    missing = sorted(set(own) - set(weights))
    foreign = sorted(name for name in weights if name.startswith(OWN_PARTS) and name not in own)
    if missing or foreign:
        problem = f"{missing[0]} is missing" if missing else f"the model has no {shown(foreign[0], 100)}"
        raise CheckpointError(f"{name_or_path}: {WEIGHTS}: does not fit the model: {problem}")
    for name, tensor in weights.items():
        if name in own and own[name].shape != tensor.shape:
            shapes = f"expected {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
            raise CheckpointError(f"{name_or_path}: {WEIGHTS}: {name}: {shapes}")
        _require_sound(f"{name_or_path}: {WEIGHTS}: {shown(name, 100)}", tensor)


def _require_sound(where: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{where}: expected floating numbers, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{where}: expected finite numbers, got NaN or infinity")


def _check_part(part: str, wanted: Any, found: Any, name_or_path: str) -> None:
    """A frozen part must have the sizes that the trained weights were made for."""
    for what, size in (("hidden size", hidden_size), ("number of layers", number_of_layers)):
        one, two = (size(config.get_text_config() if part == "llm" else config) for config in (wanted, found))
        if one != two:
            raise CheckpointError(f"{name_or_path}: {CONFIG}: {part}_config: {what} {one}, but the {part} has {two}")


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
    with reading(name_or_path, f"{CONFIG}: part_dtypes"):
        saved = {name: _dtype(dtype) or torch.float32 for name, dtype in (config.part_dtypes or {}).items()}
    _check_shards(name_or_path)
    arguments.pop("trust_remote_code", None)
    asked = arguments.pop("dtype", "auto")
    # The widest, so that nothing is rounded twice.
    wide = functools.reduce(torch.promote_types, saved.values()) if saved else _dtype(asked)
    for config_of_part in (config.encoder_config, config.llm_config):
        assert config_of_part is not None
        config_of_part.dtype = wide
    wants_info = arguments.pop("output_loading_info", False)
    with reading(name_or_path, "the weights cannot be loaded"):
        model, info = load_all(
            name_or_path, *positional, config=config, dtype=wide or "auto", output_loading_info=True, **arguments
        )
    # transformers only warns, and draws what is missing at random.
    for problem, names in (("is missing", info["missing_keys"]), ("is foreign", info["unexpected_keys"])):
        if names:
            raise CheckpointError(f"{name_or_path}: {WEIGHTS}: does not fit the model: {min(names)} {problem}")
    for name, parameter in model.named_parameters():
        part = _part(name)
        if part == "own":
            module, _, own = name.rpartition(".")
            with brought(owner := model.get_submodule(module)):  # device_map may have left it on the disk
                _require_sound(f"{name_or_path}: {WEIGHTS}: {name}", owner._parameters[own])
            parameter = owner._parameters[own]  # another one, if it was
        of_part = of_parts.get(part)
        want = _dtype(asked if of_part is None else of_part) or saved.get(name) or saved.get(part) or parameter.dtype
        parameter.data = parameter.data.to(want)
        fixed = config.gate is not None and name.endswith("adaption_gate")
        parameter.requires_grad_((part == "own" and not fixed) or ".lora_" in name)
    for part in ("encoder", "llm"):
        getattr(model, part).config.dtype = getattr(model, part).dtype
    return (model, info) if wants_info else model


def _check_shards(name_or_path: str) -> None:
    """An index of shards names files of its own folder."""
    for index in Path(name_or_path).glob("*.index.json") if Path(name_or_path).is_dir() else ():
        with reading(name_or_path, index.name):
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            outside = [file for file in files if not _is_name(file)]
            if outside:
                raise CheckpointError(f"expected names of files in this folder, got {shown(outside[0])}")


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file


def _part(name: str) -> str:
    return "own" if name.startswith(OWN_PARTS) else name.split(".")[0]


def _read_config(name_or_path: str, hub: dict[str, Any]) -> LayAlignConfig:
    with reading(name_or_path, "no readable LayAlign checkpoint"):
        found, _ = LayAlignConfig.get_config_dict(name_or_path, **hub)
        kind = found.get("model_type")
    if kind != LayAlignConfig.model_type:
        raise CheckpointError(f"{name_or_path}: expected a layalign checkpoint, got {shown(kind)}")
    with reading(name_or_path, CONFIG):
        config = LayAlignConfig.from_dict(found)
        if config.encoder_config is None or config.llm_config is None:
            raise CheckpointError("expected encoder_config and llm_config")
    return config


def _read_weights(name_or_path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    with reading(name_or_path, f"cannot read {WEIGHTS}"):
        return read_weights(str(cached_file(name_or_path, WEIGHTS, **hub)))


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
    return device_of(model.get_input_embeddings()) if name.startswith(OWN_PARTS) else place.device


def inject_lora(llm: PreTrainedModel, settings: Any) -> dict[str, Any]:
    """Add a LoRA adapter to ``llm`` and return its settings as plain data."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise CheckpointError("lora: expected the package peft (pip install 'layalign[lora]')") from error
    try:
        lora = settings if isinstance(settings, LoraConfig) else LoraConfig(**_plain(settings))
        if getattr(llm, "_hf_peft_config_loaded", False):
            raise ValueError("the LLM has an adapter already")
        # As llm.add_adapter, which in transformers 5.24 asks for a peft that its index does not have.
        inject_adapter_in_model(lora, llm)
        llm._hf_peft_config_loaded = True
    except (TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(f"lora: expected the fields of a peft LoraConfig: {first_line(error)}") from error
    return _plain(lora.to_dict())


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON data, without what peft fills in by itself."""
    derived = ("peft_type", "auto_mapping", "peft_version")
    text = json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    plain: dict[str, Any] = json.loads(text)
    return {key: value for key, value in plain.items() if key not in derived and value is not None}
