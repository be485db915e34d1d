"""Where a frozen part is: a folder of this machine, or a name on the hub. Never both, and never by chance.

A name that a user types is a folder where one stands there, seen from the working directory, as in transformers. What a
checkpoint stores is settled: the absolute path of a folder, or the name of a hub repository.
"""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from layalign.errors import CheckpointError, shown

if TYPE_CHECKING:
    from layalign.config import LayAlignConfig

PARTS = ("encoder", "llm")  # the frozen ones
UNFINISHED = ".unfinished"  # a training checkpoint is written in here, and moved up when it is whole
# What another framework or tool reads.
_FOREIGN = ["*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite", "onnx/*", "openvino/*", "original/*"]


def is_path(name: str) -> bool:
    """Whether a name can only be a path: no repository of the hub is called so."""
    marked = name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name
    return marked or name.count("/") > 1 or bool(PureWindowsPath(name).drive)


def absolute(name: str) -> str:
    """A path without `~` and without the working directory."""
    return os.path.abspath(os.path.expanduser(name))


def given(what: str, name: str | Path) -> str:
    """A name as a user typed it: the absolute path of the folder that stands there, else the hub name as it is.

    Raises:
        CheckpointError: it is a path, and there is no such folder. The hub is not asked.
    """
    name = str(name)
    if not name.strip():
        raise CheckpointError(f"{what}: expected a folder or hub name, got {shown(name)}")
    if os.path.isdir(absolute(name)):
        return absolute(name)
    if is_path(name):
        raise CheckpointError(f"{what}: no such folder: {_shown(absolute(name))}")
    return name


def settled(name: str) -> str:
    """A part's name as a checkpoint stores it: an absolute path or a hub name.

    A folder of the working directory counts, unless the hub's cache has a repository of this name.
    """
    if is_path(name) or (os.path.isdir(name) and cached_file(name, "config.json") is None):
        return absolute(name)
    return name


def keep(model: Any) -> None:
    """The names in a model's configuration are settled, and stay so until somebody gives others."""
    model.__dict__["_settled_names"] = {part: getattr(model.config, f"{part}_name_or_path") for part in PARTS}


def settle(model: Any, part: str) -> str | None:
    """The settled name of a model's part, in its configuration too."""
    name: str | None = getattr(model.config, f"{part}_name_or_path")
    known = model.__dict__.setdefault("_settled_names", {})
    if name and known.get(part) != name:
        known[part] = name = settled(name)
        setattr(model.config, f"{part}_name_or_path", name)
    return name


def beside(name: str, folder: Path) -> str | None:
    """The way from a checkpoint's folder to a part's folder; None for a hub name, or for another drive."""
    home = Path(absolute(str(folder)))
    if home.parent.name == UNFINISHED:
        home = home.parent.parent / home.name
    try:
        return os.path.relpath(name, home).replace(os.sep, "/") if os.path.isabs(name) else None
    except ValueError:
        return None


def located(config: LayAlignConfig, part: str, checkpoint: str | Path | None = None) -> str:
    """Where the named part of a configuration is now, for ``from_pretrained``.

    Args:
        config: of a model, or as it stands in a checkpoint.
        part: "encoder" or "llm".
        checkpoint: the checkpoint's folder, for parts that were moved together with it.

    Raises:
        CheckpointError: no name is known, or its folder does not exist any more. The hub is not asked for a folder.
    """
    name = getattr(config, f"{part}_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"expected {part}_name_or_path, or the {part} itself as an argument, got {shown(name)}")
    if config.frozen_folders is None:  # an old checkpoint: the name as it was typed
        return given(f"{part}_name_or_path", name)
    if not is_path(name):
        return _from_hub(name) if os.path.isdir(name) else name
    way = config.frozen_folders.get(part)
    moved = absolute(str(Path(checkpoint) / way)) if checkpoint is not None and way else name
    for folder in (name, moved):
        if os.path.isdir(folder):
            return folder
    tried = _shown(name) + ("" if moved == name else f", nor {_shown(moved)}")
    raise CheckpointError(f"{part}_name_or_path: no such folder: {tried}")


def _from_hub(name: str) -> str:
    """The repository's files in the hub's cache: transformers would read the folder of this name that stands here."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, ignore_patterns=_FOREIGN))


def _shown(path: str) -> str:
    return repr(path[:500])


def cached_file(name: str, file: str) -> Path | None:
    """A file of a hub repository, where the cache has it; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found: Any = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
