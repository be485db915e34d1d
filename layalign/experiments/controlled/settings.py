"""Settings of the controlled experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from layalign.experiments.made_up.pretraining import Budget
from layalign.experiments.made_up.problems import ALL_LANGUAGES
from layalign.experiments.settings import Comparison, Run, System, digest, limited, made, presets, read
from layalign.training.baselines import baseline
from layalign.utils.errors import ArgumentError, refuse, whole_number

LEVELS = ("high", "medium", "low")
MAX_SHARE = 1e6
_WHOLE = (
    "llm_size", "llm_layers", "encoder_size", "encoder_layers", "encoder_vocabulary", "questions", "max_new_tokens",
)  # fmt: skip
_PRESETS = presets(resources.files("layalign.experiments.controlled") / "presets")


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings(Comparison):
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

    PARTS: ClassVar = {**Comparison.PARTS, **dict.fromkeys(("llm", "encoder", "translation", "task"), Budget)}

    languages: dict[str, list[str]]
    encoder_share: dict[str, float]
    unseen: list[str]
    llm: Budget
    encoder: Budget
    translation: Budget
    task: Budget
    llm_size: int = 128
    llm_layers: int = 3
    encoder_size: int = 128
    encoder_layers: int = 4
    encoder_vocabulary: int = 2000
    questions: int = 96
    split: str = "test"
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_languages(self)
        for name in _WHOLE:
            whole_number(name, getattr(self, name), least=1)
        if self.split not in ("test", "dev"):
            refuse("split", "test or dev", self.split)
        for name in ("llm", "encoder", "translation", "task"):
            if not isinstance(getattr(self, name), Budget):
                refuse(name, "its steps, batch and learning_rate", getattr(self, name))

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

    def runs(self, only: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[Run]:
        """Every run in order of execution: the pre-training of each seed, then system by system.

        Raises:
            ArgumentError: a system or seed is not in the settings.
        """
        names = [None, *(system.name for system in self.systems)]
        return limited([Run("", name, seed) for name in names for seed in sorted(self.seeds)], only, seeds)

    def fingerprint(self, system: System | None = None) -> str:
        """A hash of everything that a run of `system` depends on; without a system, that the pre-training does."""
        values = self.to_dict()
        for key in ("systems", "seeds"):
            values.pop(key)
        if system is None:
            for key in ("translation", "task", "questions", "split", "max_new_tokens", "unseen"):
                values.pop(key)
        else:
            # The label does not affect the run.
            of_system = {"stages": baseline(system.baseline).stages, **asdict(system)}
            values["system"] = {key: value for key, value in of_system.items() if key != "label"}
        return digest(values)


def preset_names() -> list[str]:
    """The experiments that ship with the package."""
    return list(_PRESETS)


def load_settings(source: str | Path = "controlled", changes: Mapping[str, Any] | None = None) -> ExperimentSettings:
    """Load settings from a YAML file or a preset; `changes` override top-level keys.

    Raises:
        ArgumentError: there is no such file or preset, or a key is unknown, missing or wrong; the text names it.
    """
    return settings_from(read(source, _PRESETS, changes))


def settings_from(values: Any) -> ExperimentSettings:
    """Settings from a mapping; see :func:`load_settings`."""
    return made(ExperimentSettings, values)


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
