"""The controlled experiment: settings, statistics, and a run of it that is cut short and gone on with."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("matplotlib")

from layalign.cli import main
from layalign.experiments import engine
from layalign.experiments.controlled import load_settings, preset_names, schedule
from layalign.experiments.controlled.report import TABLES, accuracy_rows, picture, written_into
from layalign.experiments.controlled.report import test_rows as difference_rows
from layalign.experiments.controlled.results import corrected, mean_interval, members, paired, summarise
from layalign.experiments.controlled.runs import PREPARED, seed_folder
from layalign.experiments.controlled.schedule import run_all
from layalign.experiments.controlled.settings import ExperimentSettings, settings_from
from layalign.experiments.engine import RESULT, run_folder
from layalign.experiments.settings import Run
from layalign.training.baselines import BASELINES
from layalign.utils.errors import ArgumentError, StoppedError

ROOT = Path(__file__).parents[2]


def smoke(**changes: Any) -> dict[str, Any]:
    text = (resources.files("layalign.experiments.controlled") / "presets" / "smoke.yaml").read_text(encoding="utf-8")
    return {**yaml.safe_load(text), **changes}


def two_systems(**changes: Any) -> ExperimentSettings:
    systems = [{"name": name, "baseline": name} for name in ("layalign", "mindmerger-soft")]
    return settings_from(smoke(systems=systems, seeds=[0], **changes))


# Settings


def test_presets_hold_every_baseline_and_three_levels() -> None:
    assert preset_names() == ["controlled", "larger", "smoke"]
    for name in preset_names():
        settings = load_settings(name)
        later = {name for name in BASELINES if "fused" in name or name == "mindmerger-matched"}  # than its results
        expected = set(BASELINES) - (later if name == "controlled" else set())
        assert {system.baseline for system in settings.systems} == expected
        assert settings.systems[0].name == "layalign"
        assert all(members(settings, level) for level in ("high", "medium", "low", "unseen", "trained"))
    controlled = load_settings("controlled")
    assert len(controlled.all_languages) >= 10 and len(controlled.seeds) == 5 and controlled.split == "test"
    assert {controlled.level(name) for name in controlled.unseen} == {"high", "medium", "low"}
    assert not set(controlled.unseen) & set(controlled.trained_languages)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"languages": {"high": ["English", "Klingon"]}}, "languages: expected some of English, .* got 'Klingon'"),
        ({"languages": {"huge": ["English"]}}, "languages: expected lists under high, medium, low"),
        ({"encoder_share": {"high": 1.0}}, "encoder_share.medium: expected a number above 0"),
        ({"unseen": ["English"]}, "unseen: expected some of the languages, and not English"),
        ({"unseen": ["Spanish", "Turkish", "Swahili"]}, "unseen: expected to leave a language"),
        ({"llm": {"steps": 0, "batch": 1, "learning_rate": 0.1}}, "llm.steps: expected a whole number from 1"),
        ({"task": {"steps": 1, "batch": 1}}, "task: missing .* 'learning_rate'"),
        ({"task": {"steps": 1, "batch": 1, "learning_rate": 2}}, "task.learning_rate: expected a number above 0"),
        ({"translation": [1, 2]}, "translation: expected a mapping"),
        ({"seeds": [0, 0]}, "seeds: expected different whole numbers"),
        ({"questions": 2.5}, "questions: expected a whole number"),
        ({"split": "train"}, "split: expected test or dev"),
        ({"sistems": []}, "sistems: no such key"),
        ({"systems": []}, "systems: expected at least one"),
        ({"systems": "all"}, "systems: expected a list"),
        ({"systems": [{"name": "../x", "baseline": "llm"}]}, "systems: expected names of letters"),
        ({"systems": [{"name": "x", "baseline": "y"}]}, "baseline: expected one of llm"),
        ({"systems": [{"name": "x", "baseline": "llm", "steps_factor": 0}]}, "systems.x.steps_factor: expected"),
    ],
)
def test_wrong_settings(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        settings_from(smoke(**change))


def test_settings_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="config: expected a .yaml file or one of controlled"):
        load_settings("none")
    with pytest.raises(ArgumentError, match="config: no such file"):
        load_settings(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ArgumentError, match="is not YAML"):
        load_settings(tmp_path / "bad.yaml")


def test_a_run_is_known_by_what_it_depends_on() -> None:
    before = two_systems()
    more = settings_from(smoke(seeds=[0]))
    assert more.fingerprint() == before.fingerprint()
    assert more.fingerprint(more.system("layalign")) == before.fingerprint(before.system("layalign"))
    relabelled = deepcopy(smoke(seeds=[0]))
    relabelled["systems"][0]["label"] = "ours"
    changed = settings_from(relabelled)
    assert changed.fingerprint(changed.systems[0]) == before.fingerprint(before.systems[0])
    relabelled["systems"][0]["steps_factor"] = 2.0
    changed = settings_from(relabelled)
    assert changed.fingerprint(changed.systems[0]) != before.fingerprint(before.systems[0])
    fewer = two_systems(questions=3)
    assert fewer.fingerprint() == before.fingerprint()
    assert fewer.fingerprint(fewer.systems[0]) != before.fingerprint(before.systems[0])


def test_order_and_choice_of_runs() -> None:
    settings = settings_from(smoke())
    order = [(run.system, run.seed) for run in settings.runs(["llm", "layalign"])]
    assert order == [(None, 0), (None, 1), ("layalign", 0), ("layalign", 1), ("llm", 0), ("llm", 1)]
    with pytest.raises(ArgumentError, match="only: expected some of layalign"):
        settings.runs(["bert"])
    with pytest.raises(ArgumentError, match="seeds: expected some of"):
        settings.runs(seeds=[7])


# Statistics


def test_mean_and_interval() -> None:
    mean, half = mean_interval([50.0, 52.0, 54.0, 56.0, 58.0])
    assert mean == pytest.approx(54.0)
    assert half == pytest.approx(2.776445 * (10**0.5) / 5**0.5, rel=1e-6)  # t(0.975, 4) * s / sqrt(n)
    assert mean_interval([3.0]) == (3.0, None)


def test_paired_difference() -> None:
    found = paired([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])  # differences 2, 3, 1: t = 2 / (1 / sqrt 3)
    assert found["difference"] == pytest.approx(2.0)
    assert found["p"] == pytest.approx(0.0741799, rel=1e-5)
    assert found["half"] == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert paired([1.0, 2.0], [1.0, 2.0])["p"] == 1.0 and paired([2.0, 3.0], [1.0, 2.0])["p"] == 0.0
    assert paired([2.0], [1.0]) == {"difference": 1.0, "half": None, "p": None}


def test_holm() -> None:
    assert corrected([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert corrected([0.5, 0.9]) == [1.0, 1.0] and corrected([None]) == [None]


def _write_run(settings: ExperimentSettings, folder: Path, name: str, seed: int, correct: dict[str, int]) -> None:
    place = run_folder(folder, name, seed)
    place.mkdir(parents=True)
    content = {
        "fingerprint": settings.fingerprint(settings.system(name)),
        "scores": {language: {"correct": n, "count": 4} for language, n in correct.items()},
        "stages": {"task": {"steps": 3, "loss_after": 0.5}},
        "trained_parameters": 10, "train_seconds": 2.0, "gates": [0.1], "versions": {},
    }  # fmt: skip
    (place / RESULT).write_text(json.dumps(content), encoding="utf-8")


def test_summary_of_runs(tmp_path: Path) -> None:
    settings = settings_from(smoke())
    numbers = {("layalign", 0): 4, ("layalign", 1): 3, ("llm", 0): 2, ("llm", 1): 2}
    for (name, seed), n in numbers.items():
        correct = {"English": 4, "Spanish": n, "Turkish": 0, "Swahili": n}
        _write_run(settings, tmp_path, name, seed, correct)
    found = summarise(settings, tmp_path)
    layalign, llm = found["systems"]["layalign"]["groups"], found["systems"]["llm"]["groups"]
    assert layalign["all"]["by_seed"] == {"0": 75.0, "1": 62.5} and layalign["all"]["mean"] == 68.75
    assert layalign["high"]["mean"] == 93.75 and layalign["low"]["mean"] == 87.5 and layalign["unseen"]["mean"] == 0
    assert layalign["trained"]["mean"] == 87.5 and layalign["English"]["mean"] == 100
    assert llm["low"]["against layalign"]["difference"] == -37.5
    assert llm["unseen"]["against layalign"]["p"] == 1.0
    assert "mlp, seed 1" in found["missing"] and len(found["missing"]) == 2 * (len(settings.systems) - 2)
    rows = accuracy_rows(found)
    assert rows[1][:3] == ["LayAlign", "2", "68.8 ± 79.4"] and len(rows) == 3
    assert difference_rows(found)[1][0] == "LLM alone" and "-37.5" in difference_rows(found)[1][3]
    page = written_into("a\n<!-- experiment: accuracy -->\nold\n<!-- end -->\nb", found)
    assert "68.8 ± 79.4" in page and "old" not in page and page.startswith("a\n") and page.endswith("\nb")
    assert picture(found).startswith(b"\x89PNG")


def test_the_tables_in_the_documentation_are_the_committed_results() -> None:
    found = json.loads((ROOT / "benchmarks/results/experiment/results.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/experiment.md").read_text(encoding="utf-8")
    assert written_into(page, found) == page, "run `make docs`"
    assert all(f"<!-- experiment: {name} -->" in page for name in TABLES)
    settings = load_settings("controlled")
    assert settings_from(found["settings"]).to_dict() == settings.to_dict()
    for name, system in found["systems"].items():  # the means that the tables show, from the runs' own numbers
        values = list(system["groups"]["all"]["by_seed"].values())
        assert system["groups"]["all"]["mean"] == pytest.approx(sum(values) / len(values)), name
        assert system["label"] in page and all(version["commit"] for version in system["versions"])


# The whole thing


@pytest.mark.slow
def test_an_experiment_goes_on_where_it_stopped(tmp_path: Path) -> None:
    settings = two_systems()
    told: list[str] = []
    assert run_all(settings, tmp_path, only=["layalign"], tell=lambda run, *_: told.append(run.name)) == []
    assert told == ["pre-training, seed 0", "layalign, seed 0"]
    first = json.loads((run_folder(tmp_path, "layalign", 0) / RESULT).read_text(encoding="utf-8"))
    assert list(first["scores"]) == settings.all_languages
    assert all(score["count"] == settings.questions for score in first["scores"].values())
    assert first["trained_parameters"] > 0 and len(first["gates"]) == settings.llm_layers and any(first["gates"])
    stamp = (seed_folder(tmp_path, 0) / PREPARED).stat().st_mtime_ns
    told.clear()
    (run_folder(tmp_path, "layalign", 0) / RESULT).unlink()  # as if it had been cut off just before its end
    assert run_all(settings, tmp_path, tell=lambda run, *_: told.append(run.name)) == []
    assert told == ["layalign, seed 0", "mindmerger-soft, seed 0"]
    assert (seed_folder(tmp_path, 0) / PREPARED).stat().st_mtime_ns == stamp
    again = json.loads((run_folder(tmp_path, "layalign", 0) / RESULT).read_text(encoding="utf-8"))
    for key in ("scores", "gates", "trained_parameters"):
        assert again[key] == first[key], key
    losses = [[stage["losses"] for stage in run["stages"].values()] for run in (first, again)]
    assert losses[0] == losses[1]
    other = json.loads((run_folder(tmp_path, "mindmerger-soft", 0) / RESULT).read_text(encoding="utf-8"))
    assert other["gates"] == [] and other["trained_parameters"] < first["trained_parameters"]
    with pytest.raises(ArgumentError, match="output: .* was made with other settings"):
        run_all(two_systems(max_new_tokens=5), tmp_path)
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert events == ["start", "done", "start", "done"] + ["start", "done"] * 2


def test_sigterm_to_a_run_ends_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def stopped(settings: ExperimentSettings, folder: Path, run: Run) -> None:
        begun.append(run.name)
        raise StoppedError("stopped by SIGTERM after step 1")

    monkeypatch.setattr(schedule, "_work", stopped)
    monkeypatch.setattr(engine, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    with pytest.raises(StoppedError, match="after step 1"):
        run_all(two_systems(), tmp_path)
    assert begun == ["pre-training, seed 0"]


def test_a_run_is_not_begun_where_its_pretraining_failed(tmp_path: Path) -> None:
    runs = [Run("", None, 0), Run("", None, 1), Run("", "llm", 0), Run("", "llm", 1)]
    begun: list[Run] = []

    def work(run: Run) -> None:
        begun.append(run)
        if run == runs[0]:
            raise ValueError(f"no {tmp_path}/x")

    told: list[tuple[Any, ...]] = []
    failed = engine.run_all(runs, work, tmp_path, 1, lambda *each: told.append(each), schedule._needs, here=True)
    assert failed == [runs[0], runs[2]] and begun == [runs[0], runs[1], runs[3]]
    assert [run for run, *_ in told] == begun and told[0][2] == f"ValueError: no {tmp_path}/x"
    entry = json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8"))
    assert entry["problem"] == "ValueError: no x" and (entry["system"], entry["seed"]) == (None, 0)


@pytest.mark.slow
def test_a_run_that_fails_is_logged_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    systems = [
        {"name": "broken", "baseline": "layalign", "settings": {"language_layers": [99]}},
        {"name": "llm", "baseline": "llm"},
    ]
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(smoke(systems=systems, seeds=[0])), encoding="utf-8")
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["experiment", "--config", str(tmp_path / "e.yaml"), "--output", str(output), "--jobs", "2"])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert "broken, seed 0: failed: ArgumentError: language_layers: expected indices in 0..1" in shown.out
    assert "1 runs failed (broken, seed 0" in shown.err
    found = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert list(found["systems"]) == ["llm"] and found["missing"] == ["broken, seed 0"]
    for name in ("report.html", "report.md", "accuracy.png"):
        assert (output / name).stat().st_size > 500
    assert "http" not in (output / "report.html").read_text(encoding="utf-8").replace("http://www.w3.org", "")


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["experiment", "--report", "--output", str(tmp_path)])
    assert "output: no finished run" in capsys.readouterr().err
