"""Saving: the trained weights, names and fingerprints of the frozen parts, and parts that no name can load again."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from layalign.modeling import encoders, fingerprint, names
from layalign.modeling.claims import require_header
from layalign.modeling.configuration import LayAlignConfig
from layalign.modeling.fingerprint import Found, is_quantised
from layalign.modeling.lora import adapter_names, base_name, inject_lora, recorded_lora, twin
from layalign.modeling.names import PARTS
from layalign.nn.sharding import reason_whole_is_not_here
from layalign.utils.errors import ArgumentError, BackendError, CheckpointError, first_line, one_of, refuse
from layalign.utils.files import usual_mode, write_whole, written_aside
from layalign.utils.limits import MAX_TENSORS
from layalign.utils.reading import require_regular

__all__ = ["inject_lora", "is_quantised"]

logger = logging.getLogger("layalign")

WEIGHTS, CONFIG = "model.safetensors", "config.json"
DIGEST = "sha256"  # in the metadata of the weights
OWN_PARTS = ("mapping.", "encoder_aligner.", "cross_attention.")
# transformers' arguments that have no effect with these values; any other value is refused.
_NEUTRAL = {
    "safe_serialization": (True, None), "save_peft_format": (True, None), "save_original_format": (True, None),
    "distributed_checkpoint": (False, None), "save_function": (torch.save, None),
}  # fmt: skip
_OF_PUSHING = ("repo_id", "commit_message", "commit_description", "private", "token", "create_pr", "revision")
_verdicts: dict[Any, tuple[str | None, str | None]] = {}  # results of comparing parts with files
_said: set[str] = set()


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of adapter, aligner and gates. The state of all parts would make bitsandbytes repack a 4-bit LLM."""
    state: dict[str, Tensor] = {}
    for name, part in model.named_children():
        if f"{name}." in OWN_PARTS:
            state.update(part.state_dict(prefix=f"{name}."))
    return state


def trained_names(model: nn.Module) -> set[str]:
    """Names of the weights that training changes: adapter, aligner, gates, and whatever else requires gradients."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad} | set(own_state(model))


def weights_name(variant: str | None) -> str:
    """The name of the weights' file, also of a variant, as in transformers."""
    if variant is None:
        return WEIGHTS
    if not isinstance(variant, str) or not re.fullmatch(r"\w[\w-]*", variant):
        refuse("variant", "a word such as fp16, or None", variant)
    return f"model.{variant}.safetensors"


# What the frozen parts are


def look(model: Any) -> dict[str, Found]:
    """Both frozen parts as they are in memory, compared with what their names give, if that is on this machine.

    Fingerprints are computed in every call: weights may change without a trace (``.data``). A comparison with files is
    reused while the files and the fingerprints are the same. For a sharded part, the result is that from before
    sharding.
    """
    found = {}
    for part in PARTS:
        module = getattr(model, part)
        if any(reason_whole_is_not_here(parameter) for parameter in module.parameters()):
            before = model.__dict__.get("_looked", {}).get(part)
            found[part] = before or Found(unread="it is sharded", unchecked="it is sharded")
            continue
        found[part] = _compared(names.settle(model, part), part, module, fingerprint.examine(module))
    model.__dict__["_looked"] = found
    return found


def _compared(name: str | None, part: str, module: Any, found: Found) -> Found:
    """``found``, and how the part differs from what its name gives; the hub is not asked."""
    if not name:
        return found
    files = fingerprint.weight_files(name)
    if names.gguf_parts(name)[1] is not None:
        settings = files[0] if files else None
    else:
        settings = Path(name) / CONFIG if os.path.isabs(name) else names.cached_file(name, CONFIG)
    if not files and os.path.isabs(name) and any(Path(name).glob(f"*{names.GGUF}")):
        return replace(found, differs="its folder has GGUF files and no other weights, and none of them is named")
    if not files or settings is None or not settings.is_file():
        return replace(found, unchecked=f"the files of {name} are not on this machine")
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in (*files, settings)]
    key = (part, *state, *found.entries.items(), json.dumps(module.config.to_dict(), default=str, sort_keys=True))
    if key not in _verdicts:
        if len(_verdicts) >= 8:
            _verdicts.pop(next(iter(_verdicts)))
        compare = _against_gguf if files[0].suffix == names.GGUF else _against_files
        try:
            problems = compare(part, module, settings, files)
            _verdicts[key] = (fingerprint.summary(problems), None) if problems else (None, None)
        except Exception as error:  # a damaged file, a model that needs its own code, a release that cannot read it
            _verdicts[key] = None, f"its files cannot be read: {first_line(error)}"
    differs, unchecked = _verdicts[key]
    return replace(found, differs=differs, unchecked=unchecked)


def _against_files(part: str, module: Any, settings: Path, files: list[Path]) -> list[str]:
    """How a part differs from what a folder gives."""
    problems, unfound = fingerprint.differences_from_files(module, files)
    wanted = AutoConfig.from_pretrained(settings.parent, trust_remote_code=False)
    if wanted.model_type == module.config.model_type:
        problems = fingerprint.settings_that_differ(wanted, module.config) + problems
    if unfound and not problems:  # loading may convert weights, not only rename them: load again and compare
        load = encoders.load_encoder if part == "encoder" else encoders.load_llm
        again = load(str(settings.parent), dtype=module.dtype, local_files_only=True)
        here = fingerprint.examine(module).entries
        entries = {name: here[name] for name in unfound}
        problems = fingerprint.differences(entries, encoders.encoder_part(again), same_version=True)
    return problems


def _against_gguf(part: str, llm: Any, file: Path, files: list[Path]) -> list[str]:
    """How an LLM differs from a GGUF file, which is loaded again."""
    again = encoders.load_llm(str(file), dtype=llm.dtype)
    problems = fingerprint.settings_that_differ(again.config, llm.config)
    return problems + fingerprint.differences(fingerprint.examine(llm).entries, again, same_version=True)


def _parts_to_write(model: Any, found: Mapping[str, Found], save_frozen: bool, changed_frozen: str) -> list[str]:
    """The frozen parts that are written into the checkpoint; logs why.

    Raises:
        CheckpointError: ``changed_frozen`` is "refuse", and a part is not what its name gives.
    """
    config: LayAlignConfig = model.config
    unnamed = [part for part in PARTS if not getattr(config, f"{part}_name_or_path")]
    if unnamed and not save_frozen:
        logger.warning("saving the %s too: there is no name to load from again", " and ".join(unnamed))
    parts = []
    for part in PARTS:
        name, differs = getattr(config, f"{part}_name_or_path"), found[part].differs
        unknown = found[part].unchecked or found[part].unread
        if save_frozen or part in unnamed:
            parts.append(part)
        elif differs is not None:
            what = f"the {part} is not what its name {name} gives: {differs}"
            if changed_frozen == "refuse":
                raise CheckpointError(f"changed_frozen: {what}")
            logger.warning("%s; so it is written with the checkpoint", what)
            parts.append(part)
        elif unknown is not None and part in config.saved_parts:
            parts.append(part)  # it came from a checkpoint that held it
        elif unknown is not None and (said := f"{part} {name} {unknown}") not in _said:
            _said.add(said)
            logger.warning(
                "the %s is saved by its name, %s, and it cannot be checked that all of it is what that name gives: %s; "
                "loading compares what could be read", part, name, unknown,
            )  # fmt: skip
    return parts


def _check_writable(model: Any, parts: Sequence[str]) -> None:
    """Check that what is written of a part fits its class and configuration: otherwise it would not load.

    Raises:
        CheckpointError: it does not, or the part is quantised.
    """
    quantised = [part for part in parts if is_quantised(getattr(model, part))]
    if quantised:
        raise CheckpointError(
            f"save_frozen: the {' and '.join(quantised)} is quantised; save the trained weights alone, with its "
            f"name in config.{quantised[0]}_name_or_path, and quantise it again when you load them"
        )
    for part in PARTS:
        module = getattr(model, part)
        written = {
            name: tensor.shape
            for _, (name, *_), tensor in fingerprint.frozen_tensors(module, every=True)
            if part in parts or tensor.requires_grad
        }
        if not written or any(reason_whole_is_not_here(parameter) for parameter in module.parameters()):
            continue  # a sharded part was checked before
        fitting = {name: tensor.shape for _, (name, *_), tensor in fingerprint.frozen_tensors(twin(module), every=True)}
        other = [name for name, shape in written.items() if fitting.get(name) != shape]
        other += [name for name in fitting if part in parts and name not in written]
        if other:
            raise CheckpointError(
                f"{part}: cannot be written so that it loads again: {other[0]} is not as its class and configuration "
                f"({type(module).__name__}) have it"
            )


def _names_to_write(model: Any, parts: Iterable[str]) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, of all weights that are written."""
    written = {name: name for name in trained_names(model) | {f"llm.{name}" for name in adapter_names(model.llm)}}
    for part in parts:
        for name, (first, *_), _ in fingerprint.frozen_tensors(getattr(model, part), every=True):
            written[f"{part}.{name}"] = f"{part}.{first}"
    return written


def prepare(model: Any) -> None:
    """Examine the frozen parts of a model that is about to be sharded, while their weights can be read."""
    parts = _parts_to_write(model, look(model), False, "write")
    _check_writable(model, parts)
    model.config.lora = recorded_lora(model.encoder, model.llm)


def saved_names(model: Any) -> set[str]:
    """Names of the weights that :func:`save` writes by default."""
    found = look(model)
    parts = [p for p in PARTS if not getattr(model.config, f"{p}_name_or_path") or found[p].differs]
    return set(_names_to_write(model, parts))


def _dtypes(model: nn.Module) -> dict[str, str]:
    """The dtype of each part, and of every weight whose dtype is not its part's (T5 keeps some weights in fp32)."""
    dtypes: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        if dtypes.setdefault(part_of(name), dtype) != dtype:
            dtypes[base_name(name)] = dtype
    return dtypes


def part_of(name: str) -> str:
    """The part that a weight belongs to: "own", "encoder" or "llm"."""
    return "own" if name.startswith(OWN_PARTS) else name.split(".")[0]


# Saving


def save(
    model: Any,
    directory: Any,
    save_frozen: bool,
    state_dict: Mapping[str, Tensor] | None,
    changed_frozen: str,
    arguments: dict[str, Any],
) -> None:
    """Write ``model`` to ``directory``; see ``LayAlignForCausalLM.save_pretrained``."""
    one_of("changed_frozen", changed_frozen, ("write", "refuse"))
    settings, pushing = _understood(arguments, directory)
    if not settings["is_main_process"]:
        return
    if pushing:  # first, as in transformers: nothing is written if it cannot be pushed
        pushing["repo_id"] = _make_repository(pushing)
    folder, config = Path(names.absolute(str(directory))), model.config
    found = look(model)
    parts = _parts_to_write(model, found, save_frozen, changed_frozen)
    _check_writable(model, parts)
    if not any(reason_whole_is_not_here(parameter) for parameter in model.llm.parameters()):
        config.lora = recorded_lora(model.encoder, model.llm)
    weights = _weights(model, _names_to_write(model, parts), state_dict)
    config.frozen_saved = {0: False, 2: True}.get(len(parts), parts)
    config.part_dtypes = _dtypes(model) if parts else None
    folder.mkdir(parents=True, exist_ok=True)
    before = model._get_files_timestamps(folder) if pushing else {}
    _write_config(model, folder, found)
    if model.generation_config is not None:
        with written_aside(folder) as aside:
            model.generation_config.save_pretrained(aside)
    _write_weights(folder, weights, settings["variant"], settings["max_shard_size"])
    if pushing:
        model._upload_modified_files(folder, files_timestamps=before, **pushing)


def _understood(arguments: dict[str, Any], directory: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of the files, settings of pushing them) from transformers' arguments; other arguments raise."""
    rest = dict(arguments)
    settings = {
        "is_main_process": bool(rest.pop("is_main_process", True)),
        "variant": rest.pop("variant", None),
        "max_shard_size": rest.pop("max_shard_size", "50GB"),
    }
    weights_name(settings["variant"])
    if (size := settings["max_shard_size"]) is None:
        size = settings["max_shard_size"] = "50GB"
    if isinstance(size, bool) or not (
        (isinstance(size, int) and size > 0) or (isinstance(size, str) and re.fullmatch(r"[1-9]\d*[KMGT]B", size))
    ):
        refuse("max_shard_size", "a number of bytes or a text such as 5GB", size)
    push = rest.pop("push_to_hub", False)
    if not isinstance(push, bool):
        refuse("push_to_hub", "true or false", push)
    pushing = {key: rest.pop(key) for key in _OF_PUSHING if key in rest}
    asked = [key for key, value in pushing.items() if value not in (None, False)]
    if asked and not push:
        raise ArgumentError(f"{asked[0]}: expected push_to_hub=True with it")
    require_neutral("save_pretrained", rest, _NEUTRAL, "", ", as weights are always written in full and as safetensors")
    return settings, {"repo_id": Path(directory).name, **pushing} if push else {}


def require_neutral(
    method: str, arguments: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], hint: str, reason: str
) -> None:
    """Check that transformers' other arguments have values without effect.

    Raises:
        ArgumentError: one has another value (the text ends with ``reason``), or is unknown (with ``hint``).
    """
    for key, value in arguments.items():
        if key not in neutral:
            raise ArgumentError(f"{key}: {method} has no such argument{hint}")
        if not any(value is each or value == each for each in neutral[key]):
            refuse(key, f"{' or '.join(map(repr, neutral[key]))}{reason}", value)


def _make_repository(pushing: dict[str, Any]) -> str:
    """The full name of the repository, which is created if needed."""
    from huggingface_hub import HfApi

    private = pushing.pop("private", None)
    created = HfApi().create_repo(pushing["repo_id"], private=private, token=pushing.get("token"), exist_ok=True)
    return str(created.repo_id)


def _weights(model: Any, wanted: Mapping[str, str], state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors to write, under the checkpoint's names."""
    here: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers()), **own_state(model)}
    state = here if state_dict is None else state_dict
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise CheckpointError(f"state_dict: expected every weight that is written, {missing[0]} is missing")
    weights = {}
    for name, written in wanted.items():
        tensor = state[name]
        if tensor.device.type == "meta":
            offloaded = fingerprint.readable(model, name, tensor)
            if not isinstance(offloaded, Tensor):
                raise CheckpointError(f"{name}: cannot be saved: {offloaded}")
            tensor = offloaded
        weights[written] = tensor.detach().contiguous()
    return weights


def _write_config(model: Any, folder: Path, found: Mapping[str, Found]) -> None:
    """Write the current configuration, with the fingerprints and folders that loading uses."""
    config = model.config
    written = copy.deepcopy(config)
    written.encoder_config, written.llm_config = copy.deepcopy(model.encoder.config), copy.deepcopy(model.llm.config)
    written.architectures = [type(model).__name__.removeprefix("FSDP")]
    written.frozen_fingerprints = {part: found[part].entries for part in PARTS}
    paths = {part: names.relative_path(names.settle(model, part) or "", folder) for part in PARTS}
    written.frozen_folders = {part: path for part, path in paths.items() if path is not None}
    with written_aside(folder) as aside:
        written.save_pretrained(aside)


def _write_weights(folder: Path, weights: dict[str, Tensor], variant: str | None, max_shard_size: int | str) -> None:
    """Write one file, or several and an index. Each gets its name once it is complete, and the usual permissions."""
    from huggingface_hub import split_torch_state_dict_into_shards

    name = weights_name(variant)
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern=name.replace(".safetensors", "{suffix}.safetensors"), max_shard_size=max_shard_size
    )
    mode = usual_mode(folder)
    for file, tensors in split.filename_to_tensors.items():
        content = {each: weights[each] for each in tensors}
        unfinished = folder / f"{file}.unfinished"
        try:
            save_file(content, unfinished, metadata={"format": "pt", DIGEST: digest(content)})
            unfinished.chmod(mode)
            unfinished.replace(folder / file)  # never a half-written file under the final name
        finally:
            unfinished.unlink(missing_ok=True)  # it may be what fills the disk
    index = folder / f"{name}.index.json"
    if split.is_sharded:
        listed = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_whole(index, json.dumps(listed, indent=2, sort_keys=True) + "\n")
    stale = re.compile(re.escape(name).replace(r"\.safetensors", r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"))
    keep = {*split.filename_to_tensors, *([index.name] if split.is_sharded else ())}
    for path in folder.iterdir():
        if stale.fullmatch(path.name) and path.name not in keep and path.is_file():
            path.unlink()


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, in hexadecimal."""
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# Reading files


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Those that `save` wrote are compared with their SHA-256.

    Raises:
        CheckpointError: the file cannot be read, or its content is not what was written.
    """
    try:
        require_regular(Path(file), str(file))
        require_header(file)
        with safe_open(file, framework="pt") as opened:
            if (count := len(opened.keys())) > MAX_TENSORS:
                raise CheckpointError(f"{file}: expected at most {MAX_TENSORS} tensors, got {count}")
            written = (opened.metadata() or {}).get(DIGEST)
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}".splitlines()[0]) from error
    if written is not None and digest(weights) != written:
        raise CheckpointError(f"{file}: damaged: its content is not what was written (SHA-256)")
    return weights


@contextmanager
def reading(name_or_path: str, what: str) -> Iterator[None]:
    """Within the block, any error about a checkpoint's files becomes a CheckpointError that names the checkpoint."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, BackendError):
        raise
    except Exception as error:
        raise CheckpointError(f"{name_or_path}: {what}: {first_line(error)}") from error
