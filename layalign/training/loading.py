"""Loading a training configuration from YAML, a preset, a baseline and `key=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from layalign.training.baselines import baseline, with_baseline
from layalign.training.config import STAGES, TEXTS, TrainConfig
from layalign.utils.errors import ArgumentError, one_of, refuse, shown
from layalign.utils.moved import RENAMED, warn_of_setting, with_new_names
from layalign.utils.yaml_files import read_file, read_text

PRESETS = Path(__file__).parent / "presets"


def load_train_config(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    stage: str | None = None,
    overrides: Sequence[str] = (),
) -> TrainConfig:
    """Build the configuration of one stage from a YAML file, a mapping or a preset, and `key=value` overrides.

    The YAML holds the keys of `TrainConfig`. Keys under `stages: {translation: ..., task: ...}` apply to one stage.
    With a baseline, the folders of a preset get the baseline's name; folders that a file, a mapping or an override
    names stay as they are.

    Args:
        source: YAML file or mapping; not together with `preset`.
        preset: name of a preset that ships with the package.
        stage: "translation" or "task". Default: the `stage` of the source, or "translation".
        overrides: `key=value` texts, the values in YAML; applied last, in order.

    Raises:
        ArgumentError: unknown key, wrong value, unreadable YAML or unknown preset; the text names which.
    """
    values = _source_values(source, preset)
    stages = _stages(values)
    values.pop("stages", None)
    chosen = stage or values.get("stage") or "translation"
    one_of("stage", chosen, STAGES)
    named = baseline_of(values, overrides)
    of_stage = stages.get(chosen) or {}
    if not isinstance(of_stage, Mapping):
        raise ArgumentError(f"stages.{chosen}: expected a mapping, got {shown(of_stage)}")
    values = {**values, **with_new_names(of_stage), "stage": chosen}
    if named is not None:
        values = with_baseline(values, named, chosen, own_folders=preset is not None)
    for item in overrides:
        _apply_override(values, item)
    _check_keys(values)
    return TrainConfig(**values)


def baseline_of(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> str | None:
    """The baseline that the overrides (the last one wins) or the settings name, or None."""
    words = [item.partition("=")[2] for item in overrides if item.partition("=")[0].strip() == "baseline"]
    name = words[-1] if words else values.get("baseline")
    return None if name in (None, "", "null", "~") else str(name)


def configured_stages(
    source: str | Path | None = None, *, preset: str | None = None, overrides: Sequence[str] = ()
) -> list[str]:
    """The stages that a file or preset configures, in training order, limited to those of its baseline.

    A file without `stages` configures the one stage that it names.
    """
    values = _source_values(source, preset)
    of_baseline = baseline_of(values, overrides)
    if of_baseline is not None and values.get("stages"):
        return [stage for stage in STAGES if stage in baseline(of_baseline).stages and stage in _stages(values)]
    stages = [stage for stage in STAGES if stage in _stages(values)]
    return stages or [values.get("stage") or STAGES[0]]


def _stages(values: Mapping[str, Any]) -> Mapping[str, Any]:
    stages = values.get("stages") or {}
    if not isinstance(stages, Mapping) or not set(stages) <= set(STAGES):
        refuse("stages", f"a mapping with the keys {' and '.join(STAGES)}", stages)
    return stages


def preset_names() -> list[str]:
    """Names of the presets that ship with the package: the paper's three set-ups."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _source_values(source: str | Path | Mapping[str, Any] | None, preset: str | None) -> dict[str, Any]:
    if source is not None and preset is not None:
        raise ArgumentError("preset: give either a preset or a configuration file, not both")
    if preset is not None:
        one_of("preset", preset, preset_names())
        return _mapping(read_file(PRESETS / f"{preset}.yaml"), f"preset {preset}")
    if isinstance(source, Mapping):
        return with_new_names(source)
    if source is not None:
        if not isinstance(source, str | Path):
            refuse("config", "a YAML file or a mapping", source)
        path = Path(source)
        if not _is_file(path):
            raise ArgumentError(f"config: no such file: {path}")
        return _mapping(read_file(path), str(path))
    return {}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long or contains a null byte
        return False


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ArgumentError(f"config: {where}: expected a mapping of keys to values, got {type(values).__name__}")
    return with_new_names(values)


def _apply_override(values: dict[str, Any], item: str) -> None:
    """Apply `key=value`, the value in YAML; `lora.r=4` sets a key of a nested mapping."""
    if not isinstance(item, str):
        refuse("set", "key=value", item)
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key.isprintable() or not key:
        refuse("set", "key=value", item)
    key = warn_of_setting(key) if key in RENAMED else key
    if key in TEXTS or (key in ("data", "dev_data") and not text.lstrip().startswith(("{", "["))):
        value = None if text in ("null", "~", "") else text  # a folder may be called 2024 or true
    else:
        try:
            value = read_text(text, "")
        except ArgumentError as error:
            raise ArgumentError(f"{key}: {shown(text)} is not a YAML value") from error
    outer, dot, inner = key.partition(".")
    if not dot:
        values[key] = value
        return
    nested = values.get(outer) or {}
    if not isinstance(nested, Mapping):
        raise ArgumentError(f"{shown(key)}: {shown(outer)} is not a mapping")
    values[outer] = {**nested, inner: value}


def _check_keys(values: Mapping[str, Any]) -> None:
    known = [entry.name for entry in fields(TrainConfig)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            name = key if isinstance(key, str) and key.isprintable() and len(key) < 80 else shown(key)
            raise ArgumentError(f"{name}: no such key in a training configuration{hint}")
