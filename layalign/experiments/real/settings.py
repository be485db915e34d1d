"""Settings of the experiment on real models, read from YAML; every error names the key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from layalign.data.languages import find_language
from layalign.training.baselines import baseline
from layalign.training.precision import native_bf16
from layalign.utils.errors import ArgumentError, finite_number, one_of, refuse, whole_number
from layalign.utils.moved import with_old_names
from layalign.utils.yaml_files import read_file, read_text

DTYPES = ("auto", "float32", "bfloat16")
# What training depends on besides its text; and what the test depends on in addition.
_OF_TRAINING = ("steps", "batch", "max_length", "eval_steps", "llm_bos_token_id", "learning_rates", "choice_steps")
_OF_THE_TEST = ("max_new_tokens", "right_one_of", "written_per_language")


@dataclass(frozen=True)
class RealSystem:
    """One system to compare: a baseline, possibly with changes.

    Attributes:
        name: name of its folder and on the command line.
        baseline: one of :data:`layalign.training.baselines.BASELINES`.
        label: name in tables; the baseline's by default.
        settings: further keys of ``TrainConfig``, such as adapter_size.
        reads_text: whether the LLM reads the sentence as text in its prompt, without the encoder.
        shots: number of examples of the same language before the sentence, for an LLM that is not trained.
        seeds: seeds; by default the experiment's.
        steps_factor: factor for the steps of the stage.
        learning_rates: learning rates to choose from; by default the stage's.
        dtype: dtype; by default the experiment's.
        after: in the task stage, the system of the translation stage to start from; None starts without it.
    """

    name: str
    baseline: str
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    reads_text: bool = False
    shots: int = 0
    seeds: list[int] | None = None
    steps_factor: float = 1.0
    learning_rates: list[float] | None = None
    dtype: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.replace("-", "").isalnum():
            refuse("systems", "names of letters, digits and -", self.name)
        if not isinstance(self.settings, Mapping):
            refuse(f"systems.{self.name}.settings", "a mapping of keys to values", self.settings)
        whole_number(f"systems.{self.name}.shots", self.shots, least=0)
        if not 0 < finite_number(f"systems.{self.name}.steps_factor", self.steps_factor) <= 100:
            refuse(f"systems.{self.name}.steps_factor", "a number above 0, up to 100", self.steps_factor)
        if self.learning_rates is not None:
            _rates(f"systems.{self.name}.learning_rates", self.learning_rates)
        if self.dtype is not None:
            one_of(f"systems.{self.name}.dtype", self.dtype, DTYPES)
        object.__setattr__(self, "label", self.label or baseline(self.baseline).label)

    @property
    def trains(self) -> bool:
        """Whether the system is trained; false for the LLM alone."""
        return bool(baseline(self.baseline).stages)

    @property
    def model_settings(self) -> dict[str, Any]:
        """Keys of ``TrainConfig`` that define the system."""
        return {**baseline(self.baseline).settings, **self.settings}


@dataclass(frozen=True)
class TaskSettings:
    """The task stage: XNLI, English only in training.

    Attributes:
        systems: the systems to compare.
        train: number of English training examples, from the start of the file.
        dev: number of English examples after those, for choosing the learning rate.
        test_per_language: test examples per language, from the start of its file.
        steps, batch, eval_steps, learning_rates, choice_steps: as in the translation stage.
        max_length: maximum length of source and prompt in tokens, in training.
        seeds: seeds, out of those of the translation stage.
    """

    systems: list[RealSystem]
    train: int = 480
    dev: int = 60
    test_per_language: int = 60
    steps: int = 120
    batch: int = 8
    max_length: int = 160
    eval_steps: int = 20
    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3])
    choice_steps: int = 20
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        for name in ("train", "dev", "test_per_language", "steps", "batch", "max_length", "eval_steps", "choice_steps"):
            whole_number(f"task.{name}", getattr(self, name), least=1)
        _rates("task.learning_rates", self.learning_rates)
        if self.choice_steps > self.steps:
            refuse("task.choice_steps", f"at most the {self.steps} steps", self.choice_steps)
        _seeds("task.seeds", self.seeds)
        _systems("task.systems", self.systems)


@dataclass(frozen=True)
class RealSettings:
    """All settings of the experiment.

    Attributes:
        weights: folder with ``encoder`` and ``llm`` (``layalign weights``).
        data: folder with ``tatoeba/XXX.tsv`` and optionally ``ntrex/XXX.tsv``, lines of sentence, tab, English.
        tested: codes of the tested languages (names of the files).
        unseen: tested languages that are not in the training text.
        test_per_language, dev_per_language: sentences per language. Their English is not in the training text of any
            language. Dev has the tested languages that are seen.
        english_words: minimum and maximum number of English words of a dev or test sentence.
        other_domain_per_language, other_domain_words: the same for the test sentences of ``ntrex``.
        steps, batch: steps and batch size of training.
        max_length: maximum length of source and target in tokens, in training.
        eval_steps: steps between two dev losses.
        llm_bos_token_id: first token of the LLM's input; false is none, null the one that the LLM's tokenizer adds.
        dtype: dtype of frozen weights and arithmetic; "auto" is bfloat16 if the processor computes in it. A resumed run
            keeps its dtype, which its files record.
        learning_rates: learning rates to choose from for each system, by dev loss after `choice_steps` with the first
            seed.
        written_per_language: number of test sentences per language, from the first, that are translated for chrF and
            compared in groups.
        max_new_tokens: maximum length of a translation in tokens.
        right_one_of: size of a group in which the right sentence has to be found.
        seeds: seeds of the trained parts and of the order of the batches. The data are the same for all.
        ablated: systems to ablate and analyze after training, with the first seed.
        systems: the systems to compare; the others are tested against the first.
        task: settings of the task stage; None for none.
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
    steps: int = 800
    batch: int = 8
    max_length: int = 48
    eval_steps: int = 100
    llm_bos_token_id: int | bool | None = None
    dtype: str = "auto"
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    choice_steps: int = 100
    written_per_language: int = 50
    max_new_tokens: int = 24
    right_one_of: int = 5
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    ablated: list[str] = field(default_factory=list)
    task: TaskSettings | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "max_length", "eval_steps", "choice_steps", "max_new_tokens"):
            whole_number(name, getattr(self, name), least=1)
        for name in ("test_per_language", "dev_per_language", "written_per_language"):
            whole_number(name, getattr(self, name), least=1)
        whole_number("right_one_of", self.right_one_of, least=2)
        whole_number("other_domain_per_language", self.other_domain_per_language, least=0)
        one_of("dtype", self.dtype, DTYPES)
        if self.llm_bos_token_id is not None and self.llm_bos_token_id is not False:
            whole_number("llm_bos_token_id", self.llm_bos_token_id, least=0)
        for name in ("english_words", "other_domain_words"):
            words = getattr(self, name)
            if not isinstance(words, list) or len(words) != 2 or not all(isinstance(n, int) for n in words):
                refuse(name, "two whole numbers, the minimum and the maximum", words)
        _codes("tested", self.tested)
        _codes("unseen", self.unseen)
        if strange := [code for code in self.unseen if code not in self.tested]:
            refuse("unseen", "some of the tested languages", strange[0])
        _rates("learning_rates", self.learning_rates)
        if self.choice_steps > self.steps:
            refuse("choice_steps", f"at most the {self.steps} steps", self.choice_steps)
        _seeds("seeds", self.seeds)
        _systems("systems", self.systems)
        names = [system.name for system in self.systems]
        if not isinstance(self.ablated, list) or not all(name in names for name in self.ablated):
            refuse("ablated", "some of the systems", self.ablated)
        for system in self.systems:
            if not system.trains and system.name in self.ablated:
                refuse("ablated", "systems that train", system.name)
        for system in self.task.systems if self.task is not None else ():
            if system.after is not None and system.after not in names:
                refuse(f"task.systems.{system.name}.after", "one of the systems", system.after)

    def dtype_of(self, system: RealSystem) -> str:
        """The dtype of a system's new runs on this machine: "float32" or "bfloat16"."""
        asked = system.dtype or self.dtype
        if asked != "auto":
            return asked
        return "bfloat16" if native_bf16(use_cpu=not torch.cuda.is_available())[0] else "float32"

    def system(self, name: str) -> RealSystem:
        """The system with this name; raises ArgumentError if there is none."""
        for system in self.systems:
            if system.name == name:
                return system
        raise ArgumentError(f"only: expected some of {', '.join(s.name for s in self.systems)}, got {name!r}")

    def seeds_of(self, system: RealSystem, stage: str = "translation") -> list[int]:
        """The seeds of a system's runs."""
        if system.seeds is not None:
            return system.seeds
        return self.task.seeds if stage == "task" and self.task is not None else self.seeds

    def runs(
        self, only: Sequence[str] | None = None, seeds: Sequence[int] | None = None, stage: str | None = None
    ) -> list[tuple[str, str, int]]:
        """(stage, system, seed) of every run, ordered by seed, so that the first finished runs can be compared.

        Raises:
            ArgumentError: a system, a seed or a stage is not in the settings.
        """
        of_stages = {"translation": self.systems, "task": self.task.systems if self.task is not None else []}
        if stage is not None:
            one_of("stage", stage, of_stages)
            of_stages = {stage: of_stages[stage]}
        every = [
            (name, place, system, seed)
            for name, systems in of_stages.items()
            for place, system in enumerate(systems)
            for seed in self.seeds_of(system, name)
        ]
        names = list(dict.fromkeys(system.name for _, _, system, _ in every))
        if missing := [name for name in only or () if name not in names]:
            raise ArgumentError(f"only: expected some of {', '.join(names)}, got {missing[0]!r}")
        known = sorted({seed for *_, seed in every})
        if strange := [seed for seed in seeds or () if seed not in known]:
            raise ArgumentError(f"seeds: expected some of {known}, got {strange[0]}")
        chosen = [each for each in every if (not only or each[2].name in only) and (not seeds or each[3] in seeds)]
        order = list(of_stages)
        chosen.sort(key=lambda each: (order.index(each[0]), each[3], each[1]))
        return [(name, system.name, seed) for name, _, system, seed in chosen]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return asdict(self)

    def fingerprint(self, system: RealSystem, data: str) -> str:
        """A hash of everything that the training of `system` depends on; `data` is the fingerprint of the text."""
        return self._mark(_OF_TRAINING, system, data)

    def test_fingerprint(self, system: RealSystem, data: str) -> str:
        """A hash of everything that the test of a trained `system` depends on, besides its weights."""
        return self._mark((*_OF_TRAINING, *_OF_THE_TEST), system, data)

    def _mark(self, keys: Sequence[str], system: RealSystem, data: str) -> str:
        values: dict[str, Any] = {key: getattr(self, key) for key in keys}
        of_system = {"stages": baseline(system.baseline).stages, **asdict(system)}
        of_system["all"] = with_old_names(system.model_settings)
        values["system"] = {key: value for key, value in of_system.items() if key not in ("label", "seeds", "after")}
        for key in ("learning_rates", "dtype"):
            if values["system"][key] is None:
                del values["system"][key]  # keeps the hashes of runs from before these keys existed
        return hashlib.sha256(json.dumps([values, data], sort_keys=True).encode()).hexdigest()[:16]


def is_real(source: str | Path) -> bool:
    """Whether a preset, or a file judged by its keys, belongs to this experiment, not to the controlled one."""
    path = Path(source)
    if str(source) == "real" or path.suffix not in (".yaml", ".yml") or not path.is_file():
        return str(source) == "real"
    values = read_file(path)
    return isinstance(values, Mapping) and "tested" in values


def load_settings(source: str | Path = "real", changes: Mapping[str, Any] | None = None) -> RealSettings:
    """Load settings from a YAML file, or the preset ``real``; `changes` override top-level keys.

    Raises:
        ArgumentError: there is no such file, or a key is unknown, missing or wrong; the text names it.
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
    made = {**values, "systems": [_made(RealSystem, entry, "systems.") for entry in systems]}
    if (task := values.get("task")) is not None:
        if not isinstance(task, Mapping) or not isinstance(task.get("systems"), list):
            refuse("task", "a mapping with a list of systems", task)
        made["task"] = _made(
            TaskSettings,
            {**task, "systems": [_made(RealSystem, entry, "task.systems.") for entry in task["systems"]]},
            "task.",
        )
    return _made(RealSettings, made, "")


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


def _rates(name: str, rates: Any) -> None:
    if not isinstance(rates, list) or not rates:
        refuse(name, "a list of numbers", rates)
    for rate in rates:
        if not 0 < finite_number(name, rate) < 1:
            refuse(name, "numbers above 0 and below 1", rate)


def _systems(name: str, systems: Any) -> None:
    if not isinstance(systems, list) or not all(isinstance(system, RealSystem) for system in systems):
        refuse(name, "a list of systems", systems)
    names = [system.name for system in systems]
    if not names or len(set(names)) != len(names):
        raise ArgumentError(f"{name}: expected at least one, with different names, got {names}")
    for system in systems:
        if system.seeds is not None:
            _seeds(f"{name}.{system.name}.seeds", system.seeds)


def _seeds(name: str, seeds: Any) -> None:
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) != len(seeds):
        refuse(name, "different whole numbers from 0, below 2**32", seeds)
