"""Loading what `layalign.modeling.checkpoint` wrote. All files and frozen parts are compared with what was saved."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, __version__
from transformers.utils import cached_file

from layalign.modeling import encoders, fingerprint, names
from layalign.modeling.checkpoint import (
    CONFIG,
    WEIGHTS,
    own_state,
    part_of,
    read_weights,
    reading,
    require_neutral,
    weights_name,
)
from layalign.modeling.claims import require_files
from layalign.modeling.configuration import LayAlignConfig, hidden_size, number_of_layers
from layalign.modeling.lora import adapter_names, base_name, inject_lora
from layalign.modeling.names import PARTS
from layalign.modeling.parts import build_trainable_modules, gate_devices
from layalign.nn.inspection import device_of
from layalign.ops.checks import FLOAT_DTYPES
from layalign.utils.errors import ArgumentError, CheckpointError, one_of, refuse, shown
from layalign.utils.moved import RENAMED, with_new_names
from layalign.utils.quiet import quiet_transformers
from layalign.utils.reading import confined, read_json

logger = logging.getLogger("layalign")

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "proxies")
# Arguments that the frozen parts get too.
_OF_PARTS = (
    "dtype", "device_map", "max_memory", "offload_folder", "offload_buffers", "local_files_only", "token", "cache_dir",
    "proxies", "trust_remote_code",
)  # fmt: skip
_OF_FILES = (*HUB_ARGUMENTS, "dtype", "trust_remote_code")  # not for a part whose weights are in memory
# transformers' arguments that have no effect with one of these values; any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_safetensors": (None, True), "weights_only": (None, True), "ignore_mismatched_sizes": (None, False),
    "low_cpu_mem_usage": (None, True, False), "code_revision": (None,), "state_dict": (None,), "key_mapping": (None,),
    "from_tf": (None, False), "from_flax": (None, False), "use_kernels": (None, False), "tp_plan": (None,),
}  # fmt: skip
_FROM_AUTO = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs")  # AutoModel adds them by itself
_ADAPTERS = (".lora_", ".modules_to_save.", ".token_adapter.")  # in the names of what LoRA adds


def load(cls: Any, name_or_path: str, positional: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
    """Read a checkpoint; see ``LayAlignForCausalLM.from_pretrained``."""
    if positional:
        raise ArgumentError(f"from_pretrained: expected keyword arguments after the name, got {shown(positional)}")
    with reading(name_or_path, "no readable LayAlign checkpoint"):
        place = names.given("pretrained_model_name_or_path", name_or_path)
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    require_files(Path(place) / (hub.get("subfolder") or ""))
    config = _config(place, hub, arguments)
    parts = {key: arguments.pop(key, None) for key in (*PARTS, "encoder_kwargs", "llm_kwargs")}
    changed_frozen = arguments.pop("changed_frozen", "refuse")
    one_of("changed_frozen", changed_frozen, ("refuse", "warn"))
    variant, wants_info = arguments.pop("variant", None), arguments.pop("output_loading_info", False)
    common, attention = _for_parts(arguments, hub)

    # Before the frozen parts are loaded, and before memory of these sizes is allocated.
    weights = read_all(place, hub, variant)
    _check_own(config, weights, place)
    wanted = _dtype(common["dtype"])
    frozen: dict[str, Any] = {}
    for part in PARTS:
        arguments = {**common, **(attention if part == "llm" else {})}
        asked = parts[f"{part}_kwargs"] or {}
        frozen[part] = _frozen_part(part, parts[part], asked, arguments, config, weights, place, hub, changed_frozen)
        common = _with_memory_left(common, frozen[part])
    config.frozen_fingerprints = None
    lora, config.lora = config.lora, None
    with reading(place, CONFIG):
        model = cls(config, **frozen)
        if lora is not None:
            inject_lora(model.llm, lora, drawn=False)
            config.lora = lora
    if config.frozen_folders is not None:  # the names of an old checkpoint are as they were typed
        names.keep(model)
    _put_weights(model, weights, wanted)
    _put_generation_config(model, place, hub)
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model.eval(), info) if wants_info else model.eval()


def load_all_but_llm(
    name_or_path: str, revision: str | None = None
) -> tuple[LayAlignConfig, PreTrainedModel, dict[str, Tensor]]:
    """What another engine that has an LLM of its own needs of a checkpoint, checked as by :func:`load`.

    Args:
        name_or_path: folder or hub name.
        revision: branch, tag or commit on the hub.

    Returns:
        The configuration, in which ``llm_name_or_path`` says where the LLM is; the encoder, on the CPU, in its stored
        dtype; and the stored weights of everything else, by name: those of adapter, aligner and gates, of LoRA, and of
        the LLM where the checkpoint holds it.

    Raises:
        CheckpointError: see :func:`load`.
    """
    with reading(name_or_path, "no readable LayAlign checkpoint"):
        place = names.given("name_or_path", name_or_path)
    require_files(Path(place))
    hub = {} if revision is None else {"revision": revision}
    config = _config(place, hub, {})
    weights = read_all(place, hub)
    _check_own(config, weights, place)
    encoder = _frozen_part("encoder", None, {}, {"dtype": "auto"}, config, weights, place, hub)
    if "llm" not in config.saved_parts:
        config.llm_name_or_path = _place_of("llm", config, place, hub)
    return config, encoder, weights


def _place_of(part: str, config: LayAlignConfig, place: str, hub: dict[str, Any]) -> str:
    """The folder, GGUF file or hub name of a frozen part that the checkpoint does not hold."""
    folder = Path(place) / (hub.get("subfolder") or "") if Path(place).is_absolute() else None
    return names.located(config, part, folder)


def _frozen_part(
    part: str,
    module: Any,
    asked: dict[str, Any],
    arguments: dict[str, Any],
    config: LayAlignConfig,
    weights: dict[str, Tensor],
    place: str,
    hub: dict[str, Any],
    changed_frozen: str = "refuse",
) -> PreTrainedModel:
    """A frozen part: ``module`` if it is given, else what the checkpoint holds, else what its name gives.

    One that the checkpoint does not hold is compared with what it was saved with.
    """
    if module is None and part in config.saved_parts:
        return _held_part(part, config, weights, place, arguments, asked)
    if module is None:
        what = f"the {part if part == 'encoder' else 'LLM'} {getattr(config, f'{part}_name_or_path')!r}"
        with reading(place, f"{what} cannot be loaded"):
            name = _place_of(part, config, place, hub)
            typed = getattr(config, f"{part}_name_or_path")
            if Path(name).is_absolute() and (config.frozen_folders is None or names.is_path(typed)):
                setattr(config, f"{part}_name_or_path", name)
            load_part = encoders.load_encoder if part == "encoder" else encoders.load_llm
            module = load_part(name, **{**_of_part(part, arguments), **asked})
    if not isinstance(module, PreTrainedModel):
        refuse(part, "a transformers model", module)
    module = encoders.encoder_part(module) if part == "encoder" else module
    _check_part(part, getattr(config, f"{part}_config"), module.config, place)
    if part in (stored := config.frozen_fingerprints or {}):
        _check_content(part, config, stored[part], module, place, changed_frozen)
    return module


# Arguments


def _config(place: str, hub: dict[str, Any], arguments: dict[str, Any]) -> LayAlignConfig:
    """The checkpoint's configuration. As in transformers, arguments replace its fields."""
    given = arguments.pop("config", None)
    if given is not None and not isinstance(given, LayAlignConfig):
        refuse("config", "a LayAlignConfig", given)
    known = {*inspect.signature(LayAlignConfig.__init__).parameters, *RENAMED} - {"self", "kwargs"}
    fields = with_new_names({key: arguments.pop(key) for key in known if key in arguments})
    if given is not None and not fields:
        return copy.deepcopy(given)
    with reading(place, "no readable LayAlign checkpoint"):
        values = given.to_dict() if given is not None else LayAlignConfig.get_config_dict(place, **hub)[0]
        kind = values.get("model_type")
    if kind != LayAlignConfig.model_type:
        raise CheckpointError(f"{place}: expected a layalign checkpoint, got {shown(kind)}")
    with reading(place, CONFIG):
        config = LayAlignConfig.from_dict(values)
        if config.encoder_config is None or config.llm_config is None:
            raise CheckpointError("expected encoder_config and llm_config")
    return LayAlignConfig.from_dict({**with_new_names(values, warn=False), **fields}) if fields else config


def _for_parts(arguments: dict[str, Any], hub: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments for both frozen parts, arguments for the LLM alone); unknown and unsupported ones raise."""
    if "quantization_config" in arguments:
        raise ArgumentError("quantization_config: expected it in llm_kwargs or encoder_kwargs, as it is for one part")
    rest = {key: value for key, value in arguments.items() if key in _OF_PARTS or key not in (*hub, *_FROM_AUTO)}
    if "torch_dtype" in rest:  # the name of transformers 4
        rest.setdefault("dtype", rest.pop("torch_dtype"))
    common = {key: rest.pop(key) for key in _OF_PARTS if key in rest}
    common.setdefault("dtype", "auto")
    attention = {key: rest.pop(key) for key in ("attn_implementation",) if key in rest}
    hint = "; those of one frozen part go into llm_kwargs or encoder_kwargs"
    require_neutral("from_pretrained", rest, _NEUTRAL, hint, "")
    return common, attention


def _of_part(part: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one part. A device map for both parts is split."""
    places = arguments.get("device_map")
    if not isinstance(places, dict) or not any(str(key).split(".")[0] in PARTS for key in places):
        return arguments
    own = {key[len(part) + 1 :]: place for key, place in places.items() if key.split(".")[0] == part}
    return {**arguments, "device_map": own or places.get("")}


def _with_memory_left(arguments: dict[str, Any], part: nn.Module) -> dict[str, Any]:
    """The arguments of the next part, with what ``part`` leaves of ``max_memory``, which is for both parts."""
    memory, places = arguments.get("max_memory"), getattr(part, "hf_device_map", None) or {}
    if not isinstance(memory, dict):
        return arguments
    from accelerate.utils import convert_file_size_to_int

    left = {device: convert_file_size_to_int(size) for device, size in memory.items()}
    for name, parameter in part.named_parameters():
        here = parameter.device.type if parameter.device.index is None else parameter.device.index
        device = next((places[key] for key in places if key == "" or f"{name}.".startswith(f"{key}.")), here)
        if device in left:
            left[device] = max(left[device] - parameter.numel() * parameter.element_size(), 0)
    return {**arguments, "max_memory": left}


def _dtype(value: Any) -> torch.dtype | None:
    """A dtype or its name; None for "auto"."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        refuse("dtype", "a floating dtype, its name, or 'auto'", value)
    return found


# Files


def read_all(place: str, hub: Mapping[str, Any] | None = None, variant: str | None = None) -> dict[str, Tensor]:
    """All weights of a checkpoint, of one file or of several, each compared with its SHA-256.

    Raises:
        CheckpointError: a file is not there, cannot be read, or is not what was written.
    """
    name, hub = weights_name(variant), hub or {}
    if Path(place).is_absolute() and not Path(place).is_dir():  # the hub would be asked for it
        raise CheckpointError(f"{Path(place) / name}: cannot be read: there is no such folder")
    optional = {"_raise_exceptions_for_missing_entries": False}
    with reading(place, f"cannot read {name}"):
        single = cached_file(place, name, **optional, **hub)
        if single is not None:
            return read_weights(str(single))
        index = cached_file(place, f"{name}.index.json", **optional, **hub)
        if index is None:
            raise CheckpointError(f"there is no such file, and no {name}.index.json")
    with reading(place, Path(index).name):
        found: dict[str, Tensor] = {}
        for file in sorted(set(read_json(Path(index))["weight_map"].values()), key=str):
            confined(Path(index).parent, file, "weight_map")
            found.update(read_weights(str(cached_file(place, file, **hub))))
    return found


def _put_generation_config(model: Any, place: str, hub: dict[str, Any]) -> None:
    """Load the saved generation configuration; without the file the LLM's own stays."""
    with reading(place, "generation_config.json"):
        file = cached_file(place, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub)
        if file is not None:
            model.generation_config = GenerationConfig.from_pretrained(Path(file).parent)


# Checks


def _check_own(config: LayAlignConfig, weights: dict[str, Tensor], place: str) -> None:
    """Compare the stored weights with the sizes in the configuration, without allocating memory.

    Raises:
        CheckpointError: a weight is missing, unknown, of another shape, or not finite.
    """
    with reading(place, CONFIG), torch.device("meta"):
        parts = zip(("mapping", "encoder_aligner", "cross_attention"), build_trainable_modules(config), strict=True)
        own = {f"{part}.{name}": p for part, module in parts if module for name, p in module.named_parameters()}
    where = f"{place}: {WEIGHTS}"
    _require_fit(where, set(own), own, {name: tensor for name, tensor in weights.items() if part_of(name) == "own"})
    for name, tensor in weights.items():
        if name in own or not name.startswith(("encoder.", "llm.")):
            if tensor.dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"{where}: {shown(name, 100)}: expected floating numbers, got {tensor.dtype}")
            if not tensor.isfinite().all():
                raise CheckpointError(f"{where}: {shown(name, 100)}: expected finite numbers, got NaN or infinity")


def _require_fit(where: str, needed: set[str], places: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Each weight must have a place of its shape, and none that is needed may be missing."""
    missing, foreign = sorted(needed - set(weights)), sorted(set(weights) - set(places))
    if missing or foreign:
        problem = f"{missing[0]} is missing" if missing else f"the model has no {shown(foreign[0], 100)}"
        raise CheckpointError(f"{where}: does not fit the model: {problem}")
    for name, tensor in weights.items():
        if places[name].shape != tensor.shape:
            shapes = f"expected {tuple(places[name].shape)}, got {tuple(tensor.shape)}"
            raise CheckpointError(f"{where}: {name}: {shapes}")


def _check_part(part: str, wanted: Any, found: Any, place: str) -> None:
    """A frozen part must have the sizes that the trained weights were made for."""
    for what, size in (("hidden size", hidden_size), ("number of layers", number_of_layers)):
        sizes = [size(config.get_text_config() if part == "llm" else config) for config in (wanted, found)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(f"{place}: {CONFIG}: {part}_config: {what} {sizes[0]}, but the {part} has {sizes[1]}")


def _check_content(
    part: str, config: Any, stored: Mapping[str, str], module: PreTrainedModel, place: str, changed_frozen: str
) -> None:
    """A frozen part must be the one that the checkpoint was saved with."""
    same_version = getattr(config, "transformers_version", None) == __version__
    with reading(place, f"{CONFIG}: frozen_fingerprints"):
        problems = fingerprint.differences(stored, module, same_version)
    settings = fingerprint.settings_that_differ(getattr(config, f"{part}_config"), module.config)
    if same_version:
        problems = settings + problems
    elif settings:
        logger.warning(
            "%s: it was written with another transformers, which reads the %s differently: %s", place, part,
            fingerprint.summary(settings),
        )  # fmt: skip
    if not problems:
        return
    name = getattr(config, f"{part}_name_or_path")
    text = (
        f"{place}: the {part} ({name}) is not the one that the checkpoint was saved with: "
        f"{fingerprint.summary(problems)}"
    )
    if changed_frozen == "refuse":
        raise CheckpointError(f"{text}; give the right one as {part}=, or changed_frozen='warn' to take this one")
    logger.warning("%s", text)


# Weights


def _held_part(
    part: str,
    config: Any,
    weights: dict[str, Tensor],
    place: str,
    arguments: dict[str, Any],
    asked: dict[str, Any],
) -> PreTrainedModel:
    """A frozen part that the checkpoint holds, in its saved dtypes. Its tensors are removed from ``weights``."""
    others = sorted(set(asked) - {"dtype"})
    if others:
        raise ArgumentError(
            f"{part}_kwargs: expected only dtype, for the checkpoint holds the {part} itself, got {others[0]}"
        )
    with reading(place, f"{CONFIG}: part_dtypes"):
        dtypes = {name: _dtype(dtype) or torch.float32 for name, dtype in (config.part_dtypes or {}).items()}
    held = [n for n in weights if part_of(n) == part and not any(each in n for each in _ADAPTERS)]
    state = {base_name(name).removeprefix(f"{part}."): weights.pop(name) for name in held}
    dtype = _dtype({**arguments, **asked}["dtype"])
    saved = [t.dtype for t in state.values() if t.is_floating_point()]
    # The widest, so that nothing is rounded twice.
    wide = functools.reduce(torch.promote_types, saved, saved[0]) if saved else torch.float32
    of_part = {key: value for key, value in _of_part(part, arguments).items() if key not in _OF_FILES}
    settings = copy.deepcopy(getattr(config, f"{part}_config"))
    with reading(place, "the weights cannot be loaded"):
        with torch.device("meta"):
            empty = (
                encoders.encoder_from_config(settings)
                if part == "encoder"
                else AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
            )
        settings = copy.deepcopy(getattr(config, f"{part}_config"))
        module, info = type(empty).from_pretrained(
            None, config=settings, state_dict=state, dtype=wide, output_loading_info=True, **of_part
        )
    # transformers only warns, and initialises missing weights at random.
    for problem, keys in (("is missing", info["missing_keys"]), ("is foreign", info["unexpected_keys"])):
        if keys:
            raise CheckpointError(f"{place}: {WEIGHTS}: does not fit the model: {part}.{min(keys)} {problem}")
    for name, parameter in module.named_parameters():
        want = dtype or dtypes.get(f"{part}.{name}") or dtypes.get(part) or parameter.dtype
        parameter.data = parameter.data.to(want)
    module.config.dtype = module.dtype
    return module  # type: ignore[no-any-return]


def _put_weights(model: Any, weights: dict[str, Tensor], dtype: Any) -> None:
    """Load the stored weights, in their stored dtype unless another is given. Each must fit, none may be missing.

    Own parts go to the device of the LLM's embeddings, gates to their layer's, everything else stays where it is.
    """
    places = dict(model.named_parameters())
    expected = set(own_state(model)) | {f"llm.{name}" for name in adapter_names(model.get_submodule("llm"))}
    _require_fit(WEIGHTS, expected, places, weights)
    home = device_of(model.get_input_embeddings())
    devices = gate_devices(model.source_attentions, home)
    gates = {f"cross_attention.{index}": device for index, device in enumerate(devices)}
    for name, tensor in weights.items():
        place = places[name]
        device = gates.get(name.rpartition(".")[0], home) if part_of(name) == "own" else place.device
        # A copy: the tensor is a view of the mapped file, which saving to the same folder would replace.
        place.data = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)


def load_model(checkpoint: str, device: str | None, dtype: str) -> tuple[Any, Any, Any]:
    """(model, encoder tokenizer, LLM tokenizer) of a checkpoint, ready to generate.

    Args:
        checkpoint: folder or hub name.
        device: None is a GPU if there is one, else the CPU.
        dtype: of the frozen parts: "auto" (as stored), "float32", "bfloat16" or "float16".

    Raises:
        ArgumentError: there is no such folder, or device or dtype cannot be used.
        CheckpointError: the checkpoint cannot be loaded.
    """
    from layalign.modeling.model import LayAlignForCausalLM
    from layalign.modeling.tokenization import load_tokenizers

    quiet_transformers()
    one_of("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    if not Path(checkpoint).expanduser().exists() and (names.is_path(checkpoint) or "/" not in checkpoint):
        raise ArgumentError(f"checkpoint: no such folder: {checkpoint}")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device: {device!r} cannot be used here: {error}") from error
    kwargs = {"dtype": dtype}
    model = LayAlignForCausalLM.from_pretrained(checkpoint, encoder_kwargs=kwargs, llm_kwargs=kwargs)
    if dtype != "auto":
        for part in (model.encoder, model.llm):  # also where the checkpoint itself holds them
            part.to(getattr(torch, dtype))
    model.to(place).eval()
    return model, *load_tokenizers(checkpoint, config=model.config)
