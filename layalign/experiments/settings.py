"""What the settings of both experiments have in common. They are read from YAML, and every error names the key."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from layalign.training.baselines import baseline
from layalign.utils.errors import ArgumentError, finite_number, refuse, shown
from layalign.utils.yaml_files import read_file, read_text

if TYPE_CHECKING:
    from importlib.abc import Traversable

_NAME = re.compile(r"[^\W_][\w.-]*")


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
        where = f"systems.{self.name}"
        if not 0 < finite_number(f"{where}.steps_factor", self.steps_factor) <= 100:
            refuse(f"{where}.steps_factor", "a number above 0, up to 100", self.steps_factor)
        if not isinstance(self.settings, Mapping) or not all(isinstance(key, str) for key in self.settings):
            refuse(f"{where}.settings", "a mapping of keys to values", self.settings)
        for key in ("baseline", "label"):
            if not isinstance(getattr(self, key), str):
                refuse(f"{where}.{key}", "text", getattr(self, key))
        object.__setattr__(self, "label", self.label or baseline(self.baseline).label)

    @property
    def model_settings(self) -> dict[str, Any]:
        """Keys of ``TrainConfig`` that define the system."""
        return {**baseline(self.baseline).settings, **self.settings}

    def steps(self, budget: Any) -> int:
        """Number of steps in a stage with these settings."""
        return max(1, round(budget.steps * self.steps_factor))


class Run(NamedTuple):
    """A run of an experiment: a system (None: the pre-training of a seed) in one stage, or in all of them."""

    stage: str
    system: str | None
    seed: int

    @property
    def name(self) -> str:
        """Name in tables and on the terminal."""
        return f"{self.stage}{', ' if self.stage else ''}{self.system or 'pre-training'}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Systems to compare, each with several seeds. `PARTS` has the classes of the keys that are mappings themselves."""

    PARTS: ClassVar[Mapping[str, type]] = {"systems": System}

    systems: list[Any]
    seeds: list[int]

    def __post_init__(self) -> None:
        check_seeds("seeds", self.seeds)
        if not isinstance(self.systems, list) or not all(
            isinstance(each, self.PARTS["systems"]) for each in self.systems
        ):
            refuse("systems", "a list of systems", self.systems)
        names = [system.name for system in self.systems]
        if not names or len(set(names)) != len(names):
            raise ArgumentError(f"systems: expected at least one, with different names, got {names}")

    def system(self, name: str | None) -> Any:
        """The system with this name; raises ArgumentError if there is none."""
        for system in self.systems:
            if system.name == name:
                return system
        raise ArgumentError(f"only: expected some of {', '.join(s.name for s in self.systems)}, got {name!r}")

    def seeds_of(self, system: Any) -> list[int]:
        """The seeds of a system's runs."""
        return self.seeds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return asdict(self)


def limited(runs: Sequence[Run], only: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Run]:
    """The runs of these systems and seeds, with the pre-training of the seeds.

    Raises:
        ArgumentError: no run has one of them.
    """
    known: dict[str, list[Any]] = {
        "only": list(dict.fromkeys(run.system for run in runs if run.system)),
        "seeds": sorted({run.seed for run in runs}),
    }
    for name, asked in (("only", only), ("seeds", seeds)):
        if missing := [each for each in asked or () if each not in known[name]]:
            raise ArgumentError(f"{name}: expected some of {', '.join(map(str, known[name]))}, got {missing[0]!r}")
    return [run for run in runs if (not only or run.system in (None, *only)) and (not seeds or run.seed in seeds)]


def check_seeds(name: str, seeds: Any) -> None:
    """Check a list of seeds."""
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) != len(seeds):
        refuse(name, "different whole numbers from 0, below 2**32", seeds)


def digest(values: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def presets(folder: Traversable) -> dict[str, Traversable]:
    """The YAML files of a folder of the package, by their names."""
    files: Iterable[Traversable] = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}


def read(source: Any, known: Mapping[str, Traversable], changes: Mapping[str, Any] | None = None) -> Any:
    """The values of a YAML file, or of one of the known presets; `changes` override top-level keys.

    Raises:
        ArgumentError: there is no such file or preset, or it is not YAML.
    """
    if not isinstance(source, str | Path):
        refuse("config", "a .yaml file or the name of a preset", source)
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ArgumentError(f"config: no such file: {path}")
        values = read_file(path)
    elif str(source) in known:
        values = read_text(known[str(source)].read_text(encoding="utf-8"), f"config: {source}")
    else:
        refuse("config", f"a .yaml file or one of {', '.join(known)}", source)
    return {**values, **(changes or {})} if isinstance(values, Mapping) else values


def made(kind: type, values: Any, where: str = "") -> Any:
    """Settings of a class from a mapping, with those of its `PARTS`.

    Raises:
        ArgumentError: a key is unknown, missing or wrong; the text names it, after `where`.
    """
    if not isinstance(values, Mapping):
        refuse(where or "config", "a mapping of keys to values", values)
    before, defaults = where and f"{where}.", {entry.name: entry.default for entry in fields(kind)}
    for key in values:
        if key not in defaults:
            whole = f"{before}{key if isinstance(key, str) else shown(key)}"
            raise ArgumentError(f"{whole[:80]}: no such key, expected some of {', '.join(defaults)}")
    known = dict(values)
    for key, part in getattr(kind, "PARTS", {}).items():
        value = known.get(key)
        if issubclass(part, System):
            if not isinstance(value, list):
                refuse(f"{before}{key}", "a list of systems", value)
            known[key] = [made(part, entry, f"{before}{key}") for entry in value]
        elif key in known and value is not defaults[key]:
            known[key] = made(part, value, f"{before}{key}")
    try:
        return kind(**known)
    except ArgumentError as error:  # a system's own errors name it
        raise ArgumentError(str(error) if issubclass(kind, System) else f"{before}{error}") from None
    except TypeError as error:  # a key is missing
        raise ArgumentError(f"{where or 'config'}: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None
