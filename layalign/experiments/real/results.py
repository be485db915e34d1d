"""Results of the finished runs: each measure by group of languages, with intervals, and against the first system.

Intervals are percentile bootstraps. A resample draws sentences in every language and, if a system has several, seeds.
All systems and seeds have the same sentences, and a resample draws the same ones for all of them. So the difference of
two systems is paired, over sentences and over the seeds that both have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layalign.evaluation.levels import resource_level
from layalign.evaluation.translation import score_of
from layalign.experiments.engine import RESULT, collect, read_done, read_if_there, run_folder
from layalign.experiments.real.ablation import ABLATION
from layalign.experiments.real.data import language_name
from layalign.experiments.real.looks import LOOKS
from layalign.experiments.real.runs import CHOICE, TRAINED, named
from layalign.experiments.real.schedule import DATA
from layalign.experiments.real.settings import RealSettings
from layalign.experiments.real.task import SUFFIX
from layalign.experiments.settings import digest
from layalign.utils.errors import ArgumentError
from layalign.utils.files import write_whole
from layalign.utils.reading import read_json

RESAMPLES, TAILS = 1000, (0.025, 0.975)
DOMAINS = ("tatoeba", "ntrex")
_OF_TRAINING = ("dtype", "learning_rate", "losses", "dev_losses", "trained_parameters", "versions")


def groups_of(settings: RealSettings, codes: Sequence[str]) -> dict[str, list[str]]:
    """The languages of each group: all, by resource level, seen and unseen. Empty groups are omitted."""
    unseen = {language_name(code) for code in settings.unseen}
    found: dict[str, list[str]] = {"all": list(codes)}
    for level in ("high", "medium", "low"):
        found[level] = [code for code in codes if resource_level(language_name(code)) == level]
    found["unseen"] = [code for code in codes if language_name(code) in unseen]
    found["seen"] = [code for code in codes if language_name(code) not in unseen]
    return {name: group for name, group in found.items() if group}


class _Scores:
    """The measures of one run in one language: for each, its value followed by that of every resample."""

    def __init__(self, values: Mapping[str, Any], draws: Any) -> None:
        # draws (R, n): how often each sentence is drawn. A first row with every sentence once gives the value itself.
        weights = np.vstack([np.ones_like(draws[:1]), draws])

        def sums(of: Any) -> Any:  # some measures exist only for the first sentences
            return weights[:, : len(of)] @ np.asarray(of, dtype=np.float64)

        self.found = {}
        if "nats" in values:
            self.found["nats"] = sums(values["nats"]) / sums(values["tokens"])
        if "nats_other" in values:
            self.found["nats_other"] = sums(values["nats_other"]) / sums(values["tokens"][: len(values["nats_other"])])
        if "right" in values:
            self.found["right"] = 100 * sums(values["right"]) / sums(np.ones(len(values["right"])))
        if "chrf" in values:
            self.found["chrf"] = np.array([score_of("chrf", row) for row in sums(values["chrf"])])


def _counts(values: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of a language's test sentences: (measured closely, others)."""
    close = len(values.get("right", ()))
    return close, len(values.get("nats", values.get("right"))) - close


def _draws(runs: Mapping[str, Mapping[int, Any]], domain: str) -> dict[str, Any]:
    """How often each resample draws each of the n sentences, (R, n) by language.

    Sentences that were measured closely, and the others, are resampled separately.
    """
    counts: dict[str, tuple[int, int]] = {}
    for of_system in runs.values():
        for run in of_system.values():
            for code, values in run[domain].items():
                if counts.setdefault(code, _counts(values)) != _counts(values):
                    raise ArgumentError(f"output: runs have different numbers of test sentences of {code}")
    generator = np.random.default_rng(0)

    def drawn(n: int) -> Any:
        return generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)

    if domain == "xnli":  # every language has the same sentences, so they are drawn together
        if len(set(counts.values())) != 1:
            raise ArgumentError(f"output: expected as many test sentences in every language, got {counts}")
        return dict.fromkeys(sorted(counts), drawn(sum(next(iter(counts.values())))))
    return {code: np.hstack([drawn(n) for n in of_language if n]) for code, of_language in sorted(counts.items())}


def _seed_weights(seeds: Sequence[int], generator: np.random.Generator) -> Any:
    """Weights of the seeds, (1 + R, seeds), with rows that sum to 1: equal ones, then one row per resample."""
    n = len(seeds)
    return np.vstack([np.full(n, 1 / n), generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n])


def _cell(values: Any) -> dict[str, float]:
    low, high = np.quantile(values[1:], TAILS)
    return {"mean": float(values[0]), "low": float(low), "high": float(high)}


def summarise(settings: RealSettings, folder: Path) -> dict[str, Any]:
    """Everything that the page needs, as JSON values.

    Raises:
        ArgumentError: a run was made with other settings or other text, or there is no run.
    """
    facts = read_json(folder / DATA, where=f"output: {folder / DATA}", error=ArgumentError)
    mark = digest(facts)
    runs = collect(
        settings, folder, lambda place, system: read_done(place / RESULT, settings.test_fingerprint(system, mark))
    )
    if not runs:
        raise ArgumentError(f"output: no finished run in {folder}")
    systems: dict[str, Any] = {
        name: {"label": settings.system(name).label, "seeds": sorted(of_system)} for name, of_system in runs.items()
    }
    groups: dict[str, Any] = {}
    for domain in DOMAINS:
        groups[domain] = _add(systems, runs, domain, settings, settings.systems[0].name)
    task: dict[str, Any] = {}
    # The runs of the task stage are not compared with the settings, because that needs the text. A rerun compares them.
    of_task = settings.task and collect(
        settings.task, folder, lambda place, system: read_if_there(place / named(RESULT, SUFFIX))
    )
    if settings.task is not None and of_task:
        task = {
            name: {"label": settings.task.system(name).label, "seeds": sorted(found)} for name, found in of_task.items()
        }
        groups["xnli"] = _add(task, of_task, "xnli", settings, settings.task.systems[0].name)
    for name, entry in systems.items():
        trained = [read_if_there(run_folder(folder, name, seed) / TRAINED) for seed in entry["seeds"]]
        entry["training"] = {
            str(seed): {key: t[key] for key in _OF_TRAINING}
            for seed, t in zip(entry["seeds"], trained, strict=True)
            if t is not None
        }
        first = run_folder(folder, name, entry["seeds"][0])
        for key, file in (("ablation", ABLATION), ("looks", LOOKS)):
            if (found := read_if_there(first / file)) is not None:
                entry[key] = {part: value for part, value in found.items() if part not in ("fingerprint", "versions")}
        choice = read_if_there(folder / "runs" / name / CHOICE)
        entry["choice"] = choice and {rate: tried["dev_loss"] for rate, tried in choice["tried"].items()}
    done = {("translation", name, seed) for name, entry in systems.items() for seed in entry["seeds"]}
    done |= {("task", name, seed) for name, entry in task.items() for seed in entry["seeds"]}
    return {
        "settings": {key: value for key, value in settings.to_dict().items() if key not in ("weights", "data")},
        "data": facts,
        "groups": groups,
        "systems": systems,
        "task": task,
        "missing": [run.name for run in settings.runs() if run not in done],
    }


def _add(
    systems: dict[str, Any], runs: Mapping[str, Mapping[int, Any]], domain: str, settings: RealSettings, first: str
) -> dict[str, list[str]]:
    """Add the results of a domain to the entry of each system; returns the groups of languages."""
    draws = _draws(runs, domain)
    scores = {
        name: {
            seed: {code: _Scores(v, draws[code]).found for code, v in run[domain].items()}
            for seed, run in of_system.items()
        }
        for name, of_system in runs.items()
    }
    groups = groups_of(settings, list(draws))
    for name, of_system in scores.items():
        systems[name][domain] = _of_domain(of_system, groups, scores.get(first) if name != first else None)
    return groups


def _of_domain(
    of_system: Mapping[int, Mapping[str, Any]], groups: Mapping[str, Sequence[str]], of_first: Any
) -> dict[str, Any]:
    """Value, interval, values by seed and difference to the first system, by group and measure."""
    seeds = sorted(of_system)
    found: dict[str, Any] = {}
    languages = {code: [code] for code in of_system[seeds[0]]}
    for group, codes in {**groups, **languages}.items():
        have = [code for code in codes if code in of_system[seeds[0]]]
        if not have:
            continue
        cells: dict[str, Any] = {}
        for measure in of_system[seeds[0]][have[0]]:
            by_seed = {seed: _mean(of_system[seed], have, measure) for seed in seeds}
            weights = _seed_weights(seeds, np.random.default_rng(1))
            cells[measure] = _cell((weights * np.stack(list(by_seed.values()), axis=1)).sum(1))
            cells[measure]["by_seed"] = {str(seed): float(values[0]) for seed, values in by_seed.items()}
            shared = [seed for seed in seeds if of_first and seed in of_first]
            if shared and all(code in of_first[shared[0]] for code in have):
                pairs = [by_seed[seed] - _mean(of_first[seed], have, measure) for seed in shared]
                weights = _seed_weights(shared, np.random.default_rng(1))
                cells[measure]["difference"] = _cell((weights * np.stack(pairs, axis=1)).sum(1))
        (found if group in groups else found.setdefault("languages", {}))[group] = cells
    return found


def _mean(of_run: Mapping[str, Any], codes: Sequence[str], measure: str) -> Any:
    return np.mean([of_run[code][measure] for code in codes], axis=0)


def write_results(settings: RealSettings, folder: Path) -> dict[str, Any]:
    """Write `results.json` into the experiment's folder, from the finished runs."""
    found = summarise(settings, folder)
    write_whole(folder / "results.json", json.dumps(found, ensure_ascii=False) + "\n")
    return found
