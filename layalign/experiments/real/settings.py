"""Settings of the experiment on real models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch

from layalign.data.languages import find_language
from layalign.experiments.settings import (
    Comparison,
    Run,
    System,
    check_seeds,
    digest,
    limited,
    made,
    presets,
    read,
)
from layalign.training.baselines import baseline
from layalign.training.precision import native_bf16
from layalign.utils.errors import finite_number, one_of, refuse, whole_number
from layalign.utils.moved import with_old_names
from layalign.utils.yaml_files import read_file

DTYPES = ("auto", "float32", "bfloat16")
_PRESETS = presets(resources.files("layalign.experiments.real"))
# What training depends on besides its text; and what the test depends on in addition.
_OF_TRAINING = ("steps", "batch", "max_length", "eval_steps", "llm_bos_token_id", "learning_rates", "choice_steps")
_OF_THE_TEST = ("max_new_tokens", "right_one_of", "written_per_language")


@dataclass(frozen=True)
class RealSystem(System):
    """One system to compare.

    Attributes:
        reads_text: whether the LLM reads the sentence as text in its prompt, without the encoder.
        shots: number of examples of the same language before the sentence, for an LLM that is not trained.
        seeds: seeds; by default the experiment's.
        learning_rates: learning rates to choose from; by default the stage's.
        dtype: dtype; by default the experiment's.
        after: in the task stage, the system of the translation stage to start from; None starts without it.
    """

    reads_text: bool = False
    shots: int = 0
    seeds: list[int] | None = None
    learning_rates: list[float] | None = None
    dtype: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"systems.{self.name}"
        whole_number(f"{where}.shots", self.shots, least=0)
        if self.learning_rates is not None:
            _rates(f"{where}.learning_rates", self.learning_rates)
        if self.dtype is not None:
            one_of(f"{where}.dtype", self.dtype, DTYPES)
        if self.seeds is not None:
            check_seeds(f"{where}.seeds", self.seeds)

    @property
    def trains(self) -> bool:
        """Whether the system is trained; false for the LLM alone."""
        return bool(baseline(self.baseline).stages)


@dataclass(frozen=True, kw_only=True)
class StageSettings(Comparison):
    """Settings of a training stage.

    Attributes:
        systems: the systems to compare; the others are tested against the first.
        seeds: seeds of the trained parts and of the order of the batches. The data are the same for all.
        steps, batch: steps and batch size of training.
        max_length: maximum length of source, prompt and target in tokens, in training.
        eval_steps: steps between two dev losses.
        learning_rates: learning rates to choose from for each system, by dev loss after `choice_steps` with the first
            seed.
    """

    PARTS: ClassVar[Mapping[str, type]] = {"systems": RealSystem}

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 800
    batch: int = 8
    max_length: int = 48
    eval_steps: int = 100
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    choice_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "max_length", "eval_steps", "choice_steps"):
            whole_number(name, getattr(self, name), least=1)
        _rates("learning_rates", self.learning_rates)
        if self.choice_steps > self.steps:
            refuse("choice_steps", f"at most the {self.steps} steps", self.choice_steps)

    def seeds_of(self, system: Any) -> list[int]:
        """The seeds of a system's runs."""
        return system.seeds or self.seeds

    def rates_of(self, system: RealSystem) -> list[float]:
        """The learning rates that a system chooses from."""
        return system.learning_rates or self.learning_rates


@dataclass(frozen=True, kw_only=True)
class TaskSettings(StageSettings):
    """The task stage: XNLI, English only in training.

    Attributes:
        train: number of English training examples, from the start of the file.
        dev: number of English examples after those, for choosing the learning rate.
        test_per_language: test examples per language, from the start of its file.
    """

    train: int = 480
    dev: int = 60
    test_per_language: int = 60
    steps: int = 120
    max_length: int = 160
    eval_steps: int = 20
    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3])
    choice_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "dev", "test_per_language"):
            whole_number(name, getattr(self, name), least=1)


@dataclass(frozen=True, kw_only=True)
class RealSettings(StageSettings):
    """All settings of the experiment; those of the base class are of the translation stage.

    Attributes:
        weights: folder with ``encoder`` and ``llm`` (``layalign weights``).
        data: folder with ``tatoeba/XXX.tsv`` and optionally ``ntrex/XXX.tsv``, lines of sentence, tab, English.
        tested: codes of the tested languages (names of the files).
        unseen: tested languages that are not in the training text.
        test_per_language, dev_per_language: sentences per language. Their English is not in the training text of any
            language. Dev has the tested languages that are seen.
        english_words: minimum and maximum number of English words of a dev or test sentence.
        other_domain_per_language, other_domain_words: the same for the test sentences of ``ntrex``.
        llm_bos_token_id: first token of the LLM's input; false is none, null the one that the LLM's tokenizer adds.
        dtype: dtype of frozen weights and arithmetic; "auto" is bfloat16 if the processor computes in it. A resumed run
            keeps its dtype, which its files record.
        written_per_language: number of test sentences per language, from the first, that are translated for chrF and
            compared in groups.
        max_new_tokens: maximum length of a translation in tokens.
        right_one_of: size of a group in which the right sentence has to be found.
        ablated: systems to ablate and analyze after training, with the first seed.
        task: settings of the task stage; None for none.
    """

    PARTS: ClassVar[Mapping[str, type]] = {**StageSettings.PARTS, "task": TaskSettings}

    tested: list[str]
    weights: str = "weights"
    data: str = "data"
    unseen: list[str] = field(default_factory=list)
    test_per_language: int = 100
    dev_per_language: int = 6
    english_words: list[int] = field(default_factory=lambda: [3, 14])
    other_domain_per_language: int = 30
    other_domain_words: list[int] = field(default_factory=lambda: [6, 20])
    llm_bos_token_id: int | bool | None = None
    dtype: str = "auto"
    written_per_language: int = 50
    max_new_tokens: int = 24
    right_one_of: int = 5
    ablated: list[str] = field(default_factory=list)
    task: TaskSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "test_per_language", "dev_per_language", "written_per_language"):
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

    def runs(
        self, only: Sequence[str] | None = None, seeds: Sequence[int] | None = None, stage: str | None = None
    ) -> list[Run]:
        """Every run, ordered by stage and seed, so that the first finished runs can be compared.

        Raises:
            ArgumentError: a system, a seed or a stage is not in the settings.
        """
        stages: dict[str, StageSettings | None] = {"translation": self, "task": self.task}
        if stage is not None:
            one_of("stage", stage, stages)
            stages = {stage: stages[stage]}
        every = []
        for name, of in stages.items():
            runs = [Run(name, system.name, seed) for system in of.systems for seed in of.seeds_of(system)] if of else []
            every += sorted(runs, key=lambda run: run.seed)
        return limited(every, only, seeds)

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
        return digest([values, data])


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
    return made(RealSettings, read(source, _PRESETS, changes))


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
