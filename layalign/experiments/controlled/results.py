"""Results of the finished runs: means over seeds, intervals, and paired tests against the first system."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from layalign.evaluation.intervals import holm
from layalign.experiments.controlled.runs import PREPARED, seed_folder
from layalign.experiments.controlled.settings import LEVELS, ExperimentSettings
from layalign.experiments.engine import RESULT, collect, read_done
from layalign.utils.errors import ArgumentError
from layalign.utils.files import write_whole

CONFIDENCE = 0.95
# Groups of languages over which accuracies are averaged: name and description.
GROUPS = {
    "all": "every language",
    "high": "high-resource",
    "medium": "medium-resource",
    "low": "low-resource",
    "trained": "languages of both stages",
    "unseen": "languages of neither stage, without English",
    "English": "English",
}


def members(settings: ExperimentSettings, group: str) -> list[str]:
    """The languages of a group of :data:`GROUPS`."""
    if group in LEVELS:
        return [name for name in settings.all_languages if settings.level(name) == group]
    named = {
        "all": settings.all_languages,
        "trained": settings.trained_languages,
        "unseen": list(settings.unseen),
        "English": ["English"],
    }
    return named[group]


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of its 95% interval, by Student's t over seeds; the half is None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    error = stats.sem(values)
    return mean, float(error * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, float | None]:
    """Mean of values - others over seeds, half of its 95% interval, p-value of the paired t-test (two-sided)."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean, half = mean_interval(differences)
    p: float | None = None
    if len(differences) > 1:
        if max(differences) == min(differences):  # the statistic is 0 / 0 or infinite
            p = 1.0 if mean == 0 else 0.0
        else:
            p = float(stats.ttest_rel(values, others).pvalue)
    return {"difference": mean, "half": half, "p": p}


def corrected(values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for multiple tests by Holm's method, in the given order; None stays None."""
    known = iter(holm([p for p in values if p is not None]))
    return [None if p is None else next(known) for p in values]


def _accuracy(run: dict[str, Any], languages: Sequence[str]) -> float:
    """Mean of the languages' accuracies, in percent."""
    return math.fsum(100 * run["scores"][n]["correct"] / run["scores"][n]["count"] for n in languages) / len(languages)


def _system(settings: ExperimentSettings, name: str, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    seeds = sorted(runs)
    languages = {}
    for language in settings.all_languages:
        mean, half = mean_interval([_accuracy(runs[seed], [language]) for seed in seeds])
        languages[language] = {"mean": mean, "half": half}
    groups = {}
    for group in GROUPS:
        names = members(settings, group)
        if names:
            values = [_accuracy(runs[seed], names) for seed in seeds]
            mean, half = mean_interval(values)
            groups[group] = {"mean": mean, "half": half, "by_seed": dict(zip(map(str, seeds), values, strict=True))}
    return {
        "label": settings.system(name).label,
        "baseline": settings.system(name).baseline,
        "seeds": seeds,
        "groups": groups,
        "languages": languages,
        "trained_parameters": sorted({run["trained_parameters"] for run in runs.values()}),
        "train_seconds": mean_interval([run["train_seconds"] for run in runs.values()])[0],
        "train_steps": {stage: found["steps"] for stage, found in runs[seeds[0]]["stages"].items()},
        "loss_after": {
            stage: mean_interval([run["stages"][stage]["loss_after"] for run in runs.values()])[0]
            for stage in runs[seeds[0]]["stages"]
        },
        "gates": {str(seed): runs[seed]["gates"] for seed in seeds},
        "versions": [runs[seed]["versions"] for seed in seeds],
    }


def _tests(systems: dict[str, Any], first: str) -> None:
    """Add the comparison with the first system to the groups of the others; corrected over the systems of a group."""
    others = [name for name in systems if name != first]
    for group in systems[first]["groups"] if first in systems else ():
        tests = []
        for name in others:
            mine, theirs = (systems[s]["groups"][group]["by_seed"] for s in (name, first))
            shared = [seed for seed in mine if seed in theirs]
            tests.append(paired([mine[s] for s in shared], [theirs[s] for s in shared]) if shared else None)
        known = corrected([None if test is None else test["p"] for test in tests])
        for name, test, p in zip(others, tests, known, strict=True):
            if test is not None:
                systems[name]["groups"][group][f"against {first}"] = {**test, "p_holm": p}


def summarise(settings: ExperimentSettings, folder: Path) -> dict[str, Any]:
    """Everything that the report needs, as JSON values; raises ArgumentError if there is no finished run."""
    runs = collect(settings, folder, lambda place, system: read_done(place / RESULT, settings.fingerprint(system)))
    if not runs:
        raise ArgumentError(f"output: no finished run in {folder}")
    systems = {name: _system(settings, name, of_system) for name, of_system in runs.items()}
    _tests(systems, settings.systems[0].name)
    prepared = {}
    for seed in settings.seeds:
        done = read_done(seed_folder(folder, seed) / PREPARED, settings.fingerprint())
        if done is not None:
            prepared[str(seed)] = {"seconds": done["seconds"], "losses": {k: v[-1] for k, v in done["losses"].items()}}
    return {
        "settings": settings.to_dict(),
        "groups": {group: members(settings, group) for group in GROUPS},
        "systems": systems,
        "pretraining": prepared,
        "missing": [run.name for run in settings.runs() if run.system and run.seed not in runs.get(run.system, {})],
    }


def write_results(settings: ExperimentSettings, folder: Path) -> dict[str, Any]:
    """Write `results.json` into the experiment's folder, from the finished runs."""
    found = summarise(settings, folder)
    write_whole(folder / "results.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found
