"""Where a frozen part is: a folder of this machine, or a name on the hub. Never both, and never by chance.

A name that a user types is a folder if the working directory has one of this name, as in transformers. A checkpoint
stores settled names: the absolute path of a folder, or the name of a hub repository.

An LLM may also be a GGUF file: the path of one, `FOLDER/FILE.gguf`, or one of a hub repository, `OWNER/NAME:FILE.gguf`.
"""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from layalign.utils.errors import ArgumentError, CheckpointError, shown

if TYPE_CHECKING:
    from layalign.modeling.configuration import LayAlignConfig

PARTS = ("encoder", "llm")  # the frozen ones
GGUF = ".gguf"  # ends the names of such files
UNFINISHED = ".unfinished"  # a training checkpoint is written in this folder, and moved up once it is complete
# Files for other frameworks and tools.
_FOREIGN = ["*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite", "onnx/*", "openvino/*", "original/*"]


def gguf_parts(name: str) -> tuple[str, str | None]:
    """(folder or hub name, GGUF file in it); the file is None if the name is not that of a GGUF file."""
    if not name.endswith(GGUF) or os.path.isdir(name):
        return name, None
    place, colon, file = name.partition(":")
    if colon and file and place.count("/") == 1 and not is_path(place):
        return place, file
    return os.path.dirname(name) or ".", os.path.basename(name)


def with_gguf(name: str, file: str) -> str:
    """The name of a GGUF file, from the folder or hub name that it is in and its name there.

    Raises:
        ArgumentError: ``name`` already names a file, or ``file`` is not a GGUF file inside the folder.
    """
    path = PureWindowsPath(file)
    if not file.endswith(GGUF) or path.is_absolute() or path.drive or ".." in path.parts or file.startswith("/"):
        raise ArgumentError(f"gguf_file: expected the name of a {GGUF} file in {shown(name)}, got {shown(file)}")
    if name.endswith(GGUF):
        raise ArgumentError(f"gguf_file: expected a folder or hub name with it, got {shown(name)}")
    if is_path(name) or os.path.isdir(name) or "/" not in name:
        return f"{name.rstrip('/')}/{file}"
    return f"{name}:{file}"


def is_path(name: str) -> bool:
    """Whether a name can only be a path: no hub repository, and no file of one, can have it."""
    place, file = gguf_parts(name)
    if file is not None:
        return name != f"{place}:{file}"
    marked = name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name
    return marked or name.count("/") > 1 or bool(PureWindowsPath(name).drive)


def absolute(name: str) -> str:
    """The absolute path, with `~` expanded."""
    return os.path.abspath(os.path.expanduser(name))


def given(what: str, name: str | Path) -> str:
    """Resolve a name that a user typed: the absolute path if there is such a folder or GGUF file, else the hub name.

    Args:
        what: begins the error's text.
        name: the name as it was typed.

    Raises:
        CheckpointError: it can only be a path, and nothing is there. The hub is not asked.
    """
    name = str(name)
    if not name.strip():
        raise CheckpointError(f"{what}: expected a folder or hub name, got {shown(name)}")
    if _exists(absolute(name)):
        return absolute(name)
    if is_path(name):
        raise CheckpointError(f"{what}: no such {_kind(name)}: {_shown(absolute(name))}")
    return name


def _exists(path: str) -> bool:
    return os.path.isdir(path) or (path.endswith(GGUF) and os.path.isfile(path))


def _kind(name: str) -> str:
    return "file" if name.endswith(GGUF) else "folder"


def of_part(name: str) -> str | None:
    """The settled name of a part that transformers loaded by ``name``: a local folder or file comes first, as there."""
    return absolute(name) if name and _exists(name) else name or None


def settled(name: str) -> str:
    """A part's name as a checkpoint stores it: an absolute path or a hub name.

    A folder of the working directory counts, unless the hub's cache has a repository of this name.
    """
    if is_path(name) or (os.path.isdir(name) and cached_file(name, "config.json") is None):
        return absolute(name)
    return name


def keep(model: Any) -> None:
    """Record that the names in a model's configuration are settled; they stay so until they are changed."""
    model.__dict__["_settled_names"] = {part: getattr(model.config, f"{part}_name_or_path") for part in PARTS}


def settle(model: Any, part: str) -> str | None:
    """The settled name of a model's part; its configuration gets it too."""
    name: str | None = getattr(model.config, f"{part}_name_or_path")
    known = model.__dict__.setdefault("_settled_names", {})
    if name and known.get(part) != name:
        known[part] = name = settled(name)
        setattr(model.config, f"{part}_name_or_path", name)
    return name


def relative_path(name: str, folder: Path) -> str | None:
    """The relative path from a checkpoint's folder to a part's folder; None for a hub name, or on another drive."""
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
        config: of a model, or as a checkpoint stores it.
        part: "encoder" or "llm".
        checkpoint: the checkpoint's folder, for parts that were moved together with it.

    Raises:
        CheckpointError: no name is known, or its folder no longer exists. The hub is not asked for a folder.
    """
    name = getattr(config, f"{part}_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"expected {part}_name_or_path, or the {part} itself as an argument, got {shown(name)}")
    if config.frozen_folders is None:  # an old checkpoint: the name as it was typed
        return given(f"{part}_name_or_path", name)
    if not is_path(name):
        return _from_hub(name) if os.path.isdir(gguf_parts(name)[0]) else name
    relative = config.frozen_folders.get(part)
    moved = absolute(str(Path(checkpoint) / relative)) if checkpoint is not None and relative else name
    for folder in (name, moved):
        if _exists(folder):
            return folder
    tried = _shown(name) + ("" if moved == name else f", nor {_shown(moved)}")
    raise CheckpointError(f"{part}_name_or_path: no such {_kind(name)}: {tried}")


def _from_hub(name: str) -> str:
    """The repository's files in the hub's cache: by name, transformers would read the local folder of this name."""
    from huggingface_hub import hf_hub_download, snapshot_download

    place, file = gguf_parts(name)
    if file is not None:
        return str(hf_hub_download(place, file))
    return str(snapshot_download(name, ignore_patterns=_FOREIGN))


def _shown(path: str) -> str:
    return repr(path[:500])


def cached_file(name: str, file: str) -> Path | None:
    """A file of a hub repository, if the cache has it; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found: Any = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
