"""Settings of an experiment, read from YAML; every error names the key."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from layalign.experiments.made_up.pretraining import Budget
from layalign.experiments.made_up.problems import ALL_LANGUAGES
from layalign.training.baselines import baseline
from layalign.utils.errors import ArgumentError, refuse, shown
from layalign.utils.moved import with_old_names
from layalign.utils.yaml_files import read_file, read_text

LEVELS = ("high", "medium", "low")
MAX_SHARE = 1e6
_NAME = re.compile(r"[^\W_][\w.-]*")
_WHOLE = (
    "llm_size", "llm_layers", "encoder_size", "encoder_layers", "encoder_vocabulary", "questions", "max_new_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Steps(Budget):
    """The budget of a pre-training or a stage, with checks."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            _whole(name, getattr(self, name))
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
            refuse("learning_rate", "a number above 0 and below 1", rate)


@dataclass(frozen=True)
class System:
    """One system to compare: a baseline, possibly with changes.

    Attributes:
        name: name of its folder and on the command line.
        baseline: one of :data:`layalign.training.baselines.BASELINES`.
        settings: further keys of ``TrainConfig``, such as adapter_size.
        steps_factor: factor for the steps of each stage, to train as long as another system.
        label: name in tables; the baseline's by default.
    """

    name: str
    baseline: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps_factor: float = 1.0
    label: str = ""

    def __post_init__(self) -> None:
        # It becomes the name of a folder: "." and ".." are not allowed.
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            refuse("systems", "names of letters, digits and - _ ., with a letter or digit first", self.name)
        factor, where = self.steps_factor, f"systems.{self.name}"
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 100:
            refuse(f"{where}.steps_factor", "0 to 100", factor)
        if not isinstance(self.settings, Mapping) or not all(isinstance(key, str) for key in self.settings):
            refuse(f"{where}.settings", "a mapping of keys to values", self.settings)
        for key in ("baseline", "label"):
            if not isinstance(getattr(self, key), str):
                refuse(f"{where}.{key}", "text", getattr(self, key))
        object.__setattr__(self, "label", self.label or baseline(self.baseline).label)


@dataclass(frozen=True)
class ExperimentSettings:
    """All settings of an experiment.

    Attributes:
        languages: languages by resource level: high, medium and low.
        encoder_share: relative frequency of a language in the encoder's pre-training, by level.
        unseen: languages that neither stage of LayAlign trains on. English is not in either stage.
        llm_size, llm_layers, encoder_size, encoder_layers, encoder_vocabulary: sizes of the two models.
        llm, encoder: budgets of their pre-training.
        translation, task: budgets of the two stages, the same for every system (but see `System.steps_factor`).
        questions: test questions per language.
        split: "test", or "dev" for choosing settings.
        max_new_tokens: maximum length of an answer in tokens.
        seeds: each seed has its own data, LLM, encoder and training.
        systems: the systems to compare; the others are tested against the first.
    """

    languages: dict[str, list[str]]
    encoder_share: dict[str, float]
    unseen: list[str]
    llm: Steps
    encoder: Steps
    translation: Steps
    task: Steps
    systems: list[System]
    seeds: list[int]
    llm_size: int = 128
    llm_layers: int = 3
    encoder_size: int = 128
    encoder_layers: int = 4
    encoder_vocabulary: int = 2000
    questions: int = 96
    split: str = "test"
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        _check_languages(self)
        for name in _WHOLE:
            _whole(name, getattr(self, name))
        if self.split not in ("test", "dev"):
            refuse("split", "test or dev", self.split)
        whole = isinstance(self.seeds, list) and all(_is_whole(seed, 0) and seed < 2**32 for seed in self.seeds)
        if not whole or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            refuse("seeds", "different whole numbers from 0, below 2**32", self.seeds)
        for name, kind in (("llm", Steps), ("encoder", Steps), ("translation", Steps), ("task", Steps)):
            if not isinstance(getattr(self, name), kind):
                refuse(name, "its steps, batch and learning_rate", getattr(self, name))
        if not isinstance(self.systems, list) or not all(isinstance(system, System) for system in self.systems):
            refuse("systems", "a list of systems", self.systems)
        names = [system.name for system in self.systems]
        if not names or len(set(names)) != len(names):
            raise ArgumentError(f"systems: expected at least one, with different names, got {names}")

    @property
    def all_languages(self) -> list[str]:
        """All languages, English first, then by level."""
        named = [language for level in LEVELS for language in self.languages.get(level, [])]
        return ["English", *(language for language in named if language != "English")]

    @property
    def trained_languages(self) -> list[str]:
        """The languages of both stages."""
        return [language for language in self.all_languages if language not in ("English", *self.unseen)]

    def level(self, language: str) -> str:
        """The resource level of a language."""
        return next(level for level, names in self.languages.items() if language in names)

    def weights(self) -> dict[str, float]:
        """How often the encoder reads each language, relative to the others."""
        return {language: self.encoder_share[self.level(language)] for language in self.all_languages}

    def system(self, name: str) -> System:
        """The system with this name; raises ArgumentError if there is none."""
        for system in self.systems:
            if system.name == name:
                return system
        raise ArgumentError(f"only: expected some of {', '.join(s.name for s in self.systems)}, got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return asdict(self)

    def fingerprint(self, system: System | None = None) -> str:
        """A hash of everything that a run of `system` depends on; without a system, that the pre-training does."""
        values = self.to_dict()
        for key in ("systems", "seeds"):
            values.pop(key)
        if system is None:
            for key in ("translation", "task", "questions", "split", "max_new_tokens", "unseen"):
                values.pop(key)
        else:
            # The label does not affect the run; the settings behind the baseline's name do.
            chosen = baseline(system.baseline)
            of_system = {"settings": with_old_names(chosen.settings), "stages": chosen.stages, **asdict(system)}
            values["system"] = {key: value for key, value in of_system.items() if key != "label"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def preset_names() -> list[str]:
    """The experiments that ship with the package."""
    folder = resources.files("layalign.experiments.controlled") / "presets"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_settings(source: str | Path = "controlled") -> ExperimentSettings:
    """Load settings from a YAML file or a preset.

    Raises:
        ArgumentError: there is no such file or preset, or a key is unknown, missing or wrong; the text names it.
    """
    if not isinstance(source, str | Path):
        refuse("config", "a .yaml file or the name of a preset", source)
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ArgumentError(f"config: no such file: {path}")
        return settings_from(read_file(path))
    if str(source) in preset_names():
        text = (resources.files("layalign.experiments.controlled") / "presets" / f"{source}.yaml").read_text(
            encoding="utf-8"
        )
        return settings_from(read_text(text, f"config: {source}"))
    refuse("config", f"a .yaml file or one of {', '.join(preset_names())}", source)


def settings_from(values: Any) -> ExperimentSettings:
    """Settings from a mapping; see :func:`load_settings`."""
    known = _keys(ExperimentSettings, values, "")
    for key in ("llm", "encoder", "translation", "task"):
        known[key] = _made(Steps, known.get(key), key)
    systems = known.get("systems")
    if not isinstance(systems, list):
        refuse("systems", "a list", systems)
    known["systems"] = [_made(System, entry, "systems") for entry in systems]
    return _made(ExperimentSettings, known, "")


def _made(kind: Any, values: Any, where: str) -> Any:
    known = _keys(kind, values, where)
    try:
        return kind(**known)
    except ArgumentError as error:
        raise ArgumentError(f"{where}.{error}" if where and kind is Steps else str(error)) from None
    except TypeError as error:
        raise ArgumentError(f"{where or 'config'}: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None


def _keys(kind: Any, values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        refuse(where or "config", "a mapping of keys to values", values)
    names = [entry.name for entry in fields(kind)]
    for key in values:
        if key not in names:
            whole = f"{where + '.' if where else ''}{key if isinstance(key, str) else shown(key)}"
            raise ArgumentError(f"{whole[:80]}: no such key, expected some of {', '.join(names)}")
    return dict(values)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**40


def _whole(name: str, value: Any) -> None:
    if not _is_whole(value, 1):
        refuse(name, "a whole number from 1", value)


def _check_languages(settings: ExperimentSettings) -> None:
    levels = settings.languages
    lists = isinstance(levels, dict) and all(isinstance(names, list) for names in levels.values())
    if not lists or not set(levels) <= set(LEVELS):
        refuse("languages", f"lists under {', '.join(LEVELS)}", levels)
    if not isinstance(settings.encoder_share, dict):
        refuse("encoder_share", f"numbers under {', '.join(LEVELS)}", settings.encoder_share)
    if not isinstance(settings.unseen, list):
        refuse("unseen", "a list of languages", settings.unseen)
    named = [language for names in settings.languages.values() for language in names]
    for language in named:
        if not isinstance(language, str) or language not in ALL_LANGUAGES:
            refuse("languages", f"some of {', '.join(ALL_LANGUAGES)}", language)
    if len(set(named)) != len(named) or "English" not in named:
        raise ArgumentError("languages: expected English, and every language once")
    for level in settings.languages:
        share = settings.encoder_share.get(level)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= MAX_SHARE:
            refuse(f"encoder_share.{level}", f"a number above 0, up to {MAX_SHARE:g}", share)
    foreign = [language for language in settings.unseen if language not in named or language == "English"]
    if foreign:
        refuse("unseen", "some of the languages, and not English", foreign[0])
    if not settings.trained_languages:
        raise ArgumentError("unseen: expected to leave a language to train on")
