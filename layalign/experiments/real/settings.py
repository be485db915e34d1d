"""What the experiment on real models does, read from YAML and checked so that every error names the key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from layalign._yaml import read_file, read_text
from layalign.baselines import baseline
from layalign.data.languages import find_language
from layalign.errors import ArgumentError, finite_number, one_of, refuse, whole_number

# What training depends on beside its text; and the test, beside that.
_OF_TRAINING = ("steps", "batch", "max_length", "eval_steps", "dtype", "learning_rates", "choice_steps")
_OF_THE_TEST = ("max_new_tokens", "right_one_of", "written_per_language")


@dataclass(frozen=True)
class RealSystem:
    """One row of the tables: a baseline, perhaps with changes.

    Attributes:
        name: of its folder.
        baseline: one of :data:`layalign.baselines.BASELINES`.
        label: for tables; the baseline's by default.
        settings: further keys of ``TrainConfig``, such as adapter_size.
        reads_text: the LLM reads the sentence as text, after its language's name, and the encoder is not used.
        shots: examples of the same language before the sentence, for an LLM that is not trained.
        seeds: instead of the experiment's.
    """

    name: str
    baseline: str
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    reads_text: bool = False
    shots: int = 0
    seeds: list[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.replace("-", "").isalnum():
            refuse("systems", "names of letters, digits and -", self.name)
        if not isinstance(self.settings, Mapping):
            refuse(f"systems.{self.name}.settings", "a mapping of keys to values", self.settings)
        whole_number(f"systems.{self.name}.shots", self.shots, least=0)
        object.__setattr__(self, "label", self.label or baseline(self.baseline).label)

    @property
    def trains(self) -> bool:
        """False for the LLM alone."""
        return bool(baseline(self.baseline).stages)

    @property
    def model_settings(self) -> dict[str, Any]:
        """Keys of ``TrainConfig`` that make the system."""
        return {**baseline(self.baseline).settings, **self.settings}


@dataclass(frozen=True)
class RealSettings:
    """All of the experiment.

    Attributes:
        weights: folder with ``encoder`` and ``llm`` (``layalign weights``).
        data: folder with ``tatoeba/XXX.tsv`` and perhaps ``ntrex/XXX.tsv``, lines of sentence, tab, English.
        tested: names of the files that are tested.
        unseen: those of them that are in no training text.
        test_per_language, dev_per_language: sentences per language, whose English is in no training text, in any
            language. Dev has the tested languages that are seen.
        english_words: least and most English words of a dev or test sentence.
        other_domain_per_language, other_domain_words: the same for the test sentences of ``ntrex``.
        steps, batch: of training.
        max_length: of source and target in tokens, in training.
        eval_steps: steps between two dev losses.
        dtype: of all weights and of all arithmetic.
        learning_rates: to choose from for each system, by dev loss after `choice_steps` with the first seed.
        written_per_language: test sentences of a language that the model answers, for chrF.
        max_new_tokens: longest answer.
        right_one_of: sentences of a group in which the right one is to be found.
        seeds: of the parts that train and of the order of the batches. The data are the same for all.
        systems: what is compared. The first is what the others are tested against.
    """

    systems: list[RealSystem]
    tested: list[str]
    weights: str = "weights"
    data: str = "data"
    unseen: list[str] = field(default_factory=list)
    test_per_language: int = 100
    dev_per_language: int = 6
    english_words: list[int] = field(default_factory=lambda: [3, 14])
    other_domain_per_language: int = 30
    other_domain_words: list[int] = field(default_factory=lambda: [6, 20])
    steps: int = 400
    batch: int = 32
    max_length: int = 48
    eval_steps: int = 25
    dtype: str = "float32"
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    choice_steps: int = 75
    written_per_language: int = 50
    max_new_tokens: int = 24
    right_one_of: int = 5
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "max_length", "eval_steps", "choice_steps", "max_new_tokens"):
            whole_number(name, getattr(self, name), least=1)
        for name in ("test_per_language", "dev_per_language", "written_per_language"):
            whole_number(name, getattr(self, name), least=1)
        whole_number("right_one_of", self.right_one_of, least=2)
        whole_number("other_domain_per_language", self.other_domain_per_language, least=0)
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("english_words", "other_domain_words"):
            words = getattr(self, name)
            if not isinstance(words, list) or len(words) != 2 or not all(isinstance(n, int) for n in words):
                refuse(name, "two whole numbers, the least and the most", words)
        _codes("tested", self.tested)
        _codes("unseen", self.unseen)
        if strange := [code for code in self.unseen if code not in self.tested]:
            refuse("unseen", "some of the tested languages", strange[0])
        if not isinstance(self.learning_rates, list) or not self.learning_rates:
            refuse("learning_rates", "a list of numbers", self.learning_rates)
        for rate in self.learning_rates:
            if not 0 < finite_number("learning_rates", rate) < 1:
                refuse("learning_rates", "numbers above 0 and below 1", rate)
        if self.choice_steps > self.steps:
            refuse("choice_steps", f"at most the {self.steps} steps", self.choice_steps)
        _seeds("seeds", self.seeds)
        if not isinstance(self.systems, list) or not all(isinstance(system, RealSystem) for system in self.systems):
            refuse("systems", "a list of systems", self.systems)
        names = [system.name for system in self.systems]
        if not names or len(set(names)) != len(names):
            raise ArgumentError(f"systems: expected at least one, with different names, got {names}")
        for system in self.systems:
            if system.seeds is not None:
                _seeds(f"systems.{system.name}.seeds", system.seeds)

    def system(self, name: str) -> RealSystem:
        """The system of a name; raises ArgumentError where there is none."""
        for system in self.systems:
            if system.name == name:
                return system
        raise ArgumentError(f"only: expected some of {', '.join(s.name for s in self.systems)}, got {name!r}")

    def seeds_of(self, system: RealSystem) -> list[int]:
        """The seeds of a system's runs."""
        return self.seeds if system.seeds is None else system.seeds

    def runs(self, only: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[tuple[str, int]]:
        """(system, seed) of every run, seed by seed, so that what is finished first can be compared.

        Raises:
            ArgumentError: a system or a seed is not in the settings.
        """
        chosen = [self.system(name) for name in only] if only else self.systems
        known = {seed for system in self.systems for seed in self.seeds_of(system)}
        for seed in seeds or ():
            if seed not in known:
                raise ArgumentError(f"seeds: expected some of {sorted(known)}, got {seed}")
        order = {system.name: place for place, system in enumerate(self.systems)}
        found = [(s.name, seed) for s in chosen for seed in self.seeds_of(s) if not seeds or seed in seeds]
        return sorted(found, key=lambda run: (run[1], order[run[0]]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML."""
        return asdict(self)

    def fingerprint(self, system: RealSystem, data: str) -> str:
        """Changes with everything that the training of `system` depends on; `data` is that of the text."""
        return self._mark(_OF_TRAINING, system, data)

    def test_fingerprint(self, system: RealSystem, data: str) -> str:
        """Changes with everything that the test of a trained `system` depends on beside its weights."""
        return self._mark((*_OF_TRAINING, *_OF_THE_TEST), system, data)

    def _mark(self, keys: Sequence[str], system: RealSystem, data: str) -> str:
        values: dict[str, Any] = {key: getattr(self, key) for key in keys}
        of_system = {"stages": baseline(system.baseline).stages, **asdict(system), "all": system.model_settings}
        values["system"] = {key: value for key, value in of_system.items() if key not in ("label", "seeds")}
        return hashlib.sha256(json.dumps([values, data], sort_keys=True).encode()).hexdigest()[:16]


def is_real(source: str | Path) -> bool:
    """Whether a preset, or a file by its keys, is of this experiment and not of the controlled one."""
    path = Path(source)
    if str(source) == "real" or path.suffix not in (".yaml", ".yml") or not path.is_file():
        return str(source) == "real"
    values = read_file(path)
    return isinstance(values, Mapping) and "tested" in values


def load_settings(source: str | Path = "real", changes: Mapping[str, Any] | None = None) -> RealSettings:
    """Settings from a YAML file, or the preset ``real``; `changes` replace top keys.

    Raises:
        ArgumentError: no such file, or a key is unknown, missing or wrong; the text names it.
    """
    if str(source) == "real":
        text = (resources.files("layalign.experiments.real") / "real.yaml").read_text(encoding="utf-8")
        values = read_text(text, "config: real")
    else:
        path = Path(source)
        if not path.is_file():
            raise ArgumentError(f"config: no such file: {path}")
        values = read_file(path)
    if not isinstance(values, Mapping):
        refuse("config", "a mapping of keys to values", values)
    values = {**values, **(changes or {})}
    systems = values.get("systems")
    if not isinstance(systems, list):
        refuse("systems", "a list of systems", systems)
    return _made(RealSettings, {**values, "systems": [_made(RealSystem, entry, "systems.") for entry in systems]}, "")


def _made(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        refuse(where.rstrip("."), "a mapping of keys to values", values)
    names = [entry.name for entry in fields(kind)]
    for key in values:
        if key not in names:
            raise ArgumentError(f"{where}{key}: no such key, expected some of {', '.join(names)}")
    try:
        return kind(**values)
    except TypeError as error:  # a key is missing
        raise ArgumentError(f"{where or 'config'}: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None


def _codes(name: str, codes: Any) -> None:
    if not isinstance(codes, list) or len(set(map(str, codes))) != len(codes):
        refuse(name, "a list of different names of files", codes)
    for code in codes:
        if not isinstance(code, str) or find_language(code) is None:
            refuse(name, "codes of languages that layalign.data.languages knows", code)


def _seeds(name: str, seeds: Any) -> None:
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) != len(seeds):
        refuse(name, "different whole numbers from 0, below 2**32", seeds)
