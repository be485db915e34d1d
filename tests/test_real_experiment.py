"""The experiment on real models, with tiny ones in their place: splits, a run cut short, results, report, command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_training import save_parts

pytest.importorskip("sacrebleu")
pytest.importorskip("matplotlib")

from layalign.cli import main
from layalign.data import Example
from layalign.errors import ArgumentError
from layalign.evaluation.translation import translation_scores
from layalign.experiments.real import load_settings, runs
from layalign.experiments.real.data import as_text, normalised, read_data
from layalign.experiments.real.measures import _groups
from layalign.experiments.real.report import TABLES, written_into
from layalign.experiments.real.results import summarise, write_results
from layalign.experiments.real.schedule import run_all
from layalign.experiments.real.settings import RealSettings, is_real

WORDS = ["sun", "rain", "stone", "river", "bird", "tree", "house", "road", "hand", "eye"]
SYSTEMS: list[dict[str, Any]] = [
    {"name": "layalign-all", "baseline": "all-layers"},
    {"name": "mindmerger-soft", "baseline": "mindmerger-soft", "seeds": [0]},
    {"name": "lora", "baseline": "lora", "reads_text": True, "seeds": [0]},
    {"name": "llm", "baseline": "llm", "reads_text": True, "shots": 2, "seeds": [0]},
]
SMALL: dict[str, Any] = {
    "tested": ["deu", "swh"], "unseen": ["swh"], "test_per_language": 7, "dev_per_language": 3, "steps": 4, "batch": 4,
    "choice_steps": 2, "eval_steps": 2, "learning_rates": [1e-4, 1e-2], "right_one_of": 3, "written_per_language": 4,
    "max_new_tokens": 4, "seeds": [0, 1], "other_domain_per_language": 5, "other_domain_words": [3, 9],
    "systems": SYSTEMS,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of a tiny pair and text of three languages."""
    root = tmp_path_factory.mktemp("world")
    parts = save_parts(root / "parts")
    (root / "weights").mkdir()
    for name in ("encoder", "llm"):
        shutil.copytree(getattr(parts, name), root / "weights" / name)
    for folder, languages, count in (("tatoeba", ("deu", "swh", "fra"), 40), ("ntrex", ("deu", "yor"), 6)):
        (root / "data" / folder).mkdir(parents=True)
        for place, language in enumerate(languages):
            lines = []
            for i in range(count):
                english = f"The {WORDS[i % 10]} and a {WORDS[(i // 10 + place) % 10]} {folder}."
                lines.append(f"{english[::-1].lower()}\t{english}")
            (root / "data" / folder / f"{language}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def settings_of(world: Path, **changes: Any) -> RealSettings:
    return load_settings("real", {**SMALL, "weights": str(world / "weights"), "data": str(world / "data"), **changes})


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RealSettings, Path]:
    """All runs, in this process."""
    settings, folder = settings_of(world), tmp_path_factory.mktemp("out")
    data = read_data(settings)
    (folder / "data.json").write_text(data.to_json())
    for system, seed in settings.runs():
        runs.test_run(settings, settings.system(system), data, folder, seed)
    return settings, folder


# Settings and text


def test_the_preset_is_whole() -> None:
    settings = load_settings("real")
    assert len(settings.tested) == 21 and len(settings.unseen) >= 3 and len(settings.seeds) >= 3
    assert [len(settings.seeds_of(settings.system(name))) for name in ("layalign-all", "last-layer")] == [5, 5]
    assert settings.runs(seeds=[0])[:2] == [("layalign-all", 0), ("last-layer", 0)]
    assert is_real("real") and not is_real("controlled")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"tested": ["deu", "klingon"]}, "tested: expected codes of languages"),
        ({"unseen": ["fra"]}, "unseen: expected some of the tested languages"),
        ({"choice_steps": 9}, "choice_steps: expected at most the 4 steps"),
        ({"learning_rates": [2.0]}, "learning_rates: expected numbers above 0 and below 1"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16"),
        ({"right_one_of": 1}, "right_one_of"),
        ({"seeds": [0, 0]}, "seeds: expected different whole numbers"),
        ({"systems": [{"name": "a/b", "baseline": "llm"}]}, "systems: expected names of letters"),
        ({"systems": [{"name": "a", "baseline": "none"}]}, "baseline: expected one of"),
        ({"systems": [{"name": "a", "baseline": "llm", "x": 1}]}, "systems.x: no such key"),
        ({"english_words": [3]}, "english_words: expected two whole numbers"),
        ({"steps": 0}, "steps"),
        ({"more": 1}, "more: no such key"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        load_settings("real", {**SMALL, **change})


def test_no_english_of_dev_and_test_is_trained_on(world: Path) -> None:
    settings = settings_of(world)
    data = read_data(settings)
    held_out = {normalised(pair.target) for pairs in (data.dev, *data.test.values()) for pair in pairs}
    trained = {normalised(pair.target) for pair in data.train}
    assert len(held_out) == 7 + 3 + 7 and not held_out & trained
    assert {pair.language for pair in data.train} == {"German", "French"}
    assert {pair.language for pair in data.dev} == {"German"}
    assert data.facts["left_out_of_training"] == 80 - len(data.train) > 0  # of French too: it has the same English
    assert not {normalised(shot.target) for shot in data.shots["swh"]} & held_out
    assert [len(group) for group in data.other_domain.values()] == [5, 5]
    assert "sun" not in data.to_json()


def test_too_little_text_is_refused(world: Path) -> None:
    with pytest.raises(ArgumentError, match="data: expected 43 sentences of deu to test on, found 40"):
        read_data(settings_of(world, test_per_language=40))
    with pytest.raises(ArgumentError, match=r"data: expected .*jpn\.tsv, there is no such file"):
        read_data(settings_of(world, tested=["deu", "jpn"], unseen=[]))


def test_sentences_as_text() -> None:
    pair, shot = Example("Hallo du", "Hello you", "German"), Example("Ja", "Yes", "German")
    assert as_text([pair])[0].prompt == "Hallo du\nEnglish:"
    assert [len(group) for group in _groups([pair] * 7, 3)] == [3, 4]
    assert [len(group) for group in _groups([shot] * 2, 3)] == [2]


# Runs


def test_a_run_leaves_what_it_did(done: tuple[RealSettings, Path]) -> None:
    _, folder = done
    choice = json.loads((folder / "runs/layalign-all/choice.json").read_text())
    tried = {float(rate): found["dev_loss"] for rate, found in choice["tried"].items()}
    assert choice["chosen"] == min(tried, key=tried.__getitem__)
    trained = [json.loads((folder / f"runs/layalign-all/seed-{seed}/trained.json").read_text()) for seed in (0, 1)]
    assert [found["steps"] for found in trained] == [4, 4]
    # The chosen run of the first seed went on: its first losses are those of the choice.
    chosen = choice["tried"][f"{choice['chosen']:g}"]
    assert trained[0]["dev_losses"][:2] == chosen["dev_losses"] and len(chosen["dev_losses"]) == 2
    assert trained[0]["dev_losses"] != trained[1]["dev_losses"]
    result = json.loads((folder / "runs/layalign-all/seed-0/result.json").read_text())
    assert set(result["tatoeba"]) == {"deu", "swh"} and set(result["ntrex"]) == {"deu", "yor"}
    german = result["tatoeba"]["deu"]
    assert [len(german[key]) for key in ("nats", "nats_other", "tokens", "right", "written")] == [7, 7, 7, 7, 4]
    assert not (folder / "runs/llm/seed-0/trained.json").exists()


def test_all_systems_learn_from_the_same_batches(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layalign.training.trainer import LengthBucketSampler

    orders: list[list[int]] = []
    plain = LengthBucketSampler.__iter__

    def recorded(self: LengthBucketSampler) -> Any:
        orders.append(list(plain(self)))
        return iter(orders[-1])

    monkeypatch.setattr(LengthBucketSampler, "__iter__", recorded)
    settings = settings_of(world, learning_rates=[1e-3])
    data = read_data(settings)
    for name in ("layalign-all", "mindmerger-soft", "lora"):
        runs.train_run(settings, settings.system(name), data, tmp_path, 0)
    assert len(orders) >= 3 and all(order == orders[0] for order in orders)


def test_a_run_that_was_cut_off_goes_on(world: Path, tmp_path: Path, done: tuple[RealSettings, Path]) -> None:
    settings, folder = done
    data, system = read_data(settings), settings.system("mindmerger-soft")
    plain = runs._PauseAt.on_step_end

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt
        plain(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs._PauseAt, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            runs.train_run(settings, system, data, tmp_path, 0)
    again = runs.train_run(settings, system, data, tmp_path, 0)
    whole = json.loads((folder / "runs/mindmerger-soft/seed-0/trained.json").read_text())
    assert again["dev_loss"] == whole["dev_loss"]
    assert runs.train_run(settings, system, data, tmp_path, 0) == again


def test_runs_of_other_settings_are_refused(world: Path, done: tuple[RealSettings, Path]) -> None:
    _, folder = done
    with pytest.raises(ArgumentError, match="was made with other settings"):
        summarise(settings_of(world, max_new_tokens=5), folder)
    run = settings_of(world, batch=2)
    with pytest.raises(ArgumentError, match="was made with other settings"):
        runs.train_run(run, run.system("layalign-all"), read_data(run), folder, 0)


# Results


def test_results_are_means_of_languages_and_seeds(done: tuple[RealSettings, Path]) -> None:
    settings, folder = done
    found = write_results(settings, folder)
    raw = [json.loads((folder / f"runs/layalign-all/seed-{seed}/result.json").read_text()) for seed in (0, 1)]

    def nats(run: dict[str, Any], codes: list[str]) -> float:
        return float(np.mean([sum(run["tatoeba"][c]["nats"]) / sum(run["tatoeba"][c]["tokens"]) for c in codes]))

    cells = found["systems"]["layalign-all"]["tatoeba"]
    for group, codes in (("all", ["deu", "swh"]), ("unseen", ["swh"]), ("seen", ["deu"])):
        expected = [nats(run, codes) for run in raw]
        assert cells[group]["nats"]["mean"] == pytest.approx(np.mean(expected))
        assert list(cells[group]["nats"]["by_seed"].values()) == pytest.approx(expected)
        assert cells[group]["nats"]["low"] < cells[group]["nats"]["mean"] < cells[group]["nats"]["high"]
    german = raw[0]["tatoeba"]["deu"]
    references = [pair.target for pair in read_data(settings).test["deu"][:4]]
    chrf = translation_scores(german["written"], references, ("chrf",))["chrf"]
    one = found["systems"]["layalign-all"]["tatoeba"]["languages"]["deu"]["chrf"]["by_seed"]["0"]
    assert one == pytest.approx(chrf)
    other = found["systems"]["mindmerger-soft"]["tatoeba"]["all"]["nats"]
    first_on_seed_0 = cells["all"]["nats"]["by_seed"]["0"]
    assert other["difference"]["mean"] == pytest.approx(other["mean"] - first_on_seed_0)
    # The same sentences are drawn for both: their difference is surer than either of them.
    assert other["difference"]["high"] - other["difference"]["low"] < other["high"] - other["low"]
    assert found["missing"] == []
    assert found["systems"]["llm"]["ntrex"]["languages"].keys() == {"deu"}  # no examples of Yoruba to show


def test_report_and_page(done: tuple[RealSettings, Path]) -> None:
    settings, folder = done
    found = write_results(settings, folder)
    marks = "".join(f"<!-- evidence: {name} -->\n<!-- end of {name} -->\n" for name in ("state", *TABLES))
    page = written_into(marks, found)
    for system in settings.systems:
        assert page.count(f"| {system.label} |") >= 3
    assert "5 runs are done." in page and "Swahili (unseen)" in page


def command(*words: str) -> Any:
    with pytest.raises(SystemExit) as end:
        main(["experiment", *words])
    return end.value.code


def test_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "learning_rates": [1e-3], "seeds": [0]}))
    where = ["--weights", str(world / "weights"), "--data", str(world / "data"), "--output", str(tmp_path / "out")]
    assert command("--config", str(file), *where, "--only", "mindmerger-soft") == 0
    out = capsys.readouterr().out
    assert "mindmerger-soft, seed 0: done" in out and "MindMerger-Soft" in out
    assert (tmp_path / "out" / "report.md").is_file() and (tmp_path / "out" / "curves.png").is_file()
    assert command("--config", str(file), *where, "--report") == 0
    assert command("--data", str(world)) == 2
    assert "data: expected none with controlled" in capsys.readouterr().err


def test_a_run_that_fails_is_told(world: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, str | None]] = []
    settings = settings_of(world, weights=str(tmp_path / "none"))
    failed = run_all(settings, tmp_path, only=["mindmerger-soft", "lora"], tell=lambda *each: told.append(each))
    assert failed == [("mindmerger-soft", 0), ("lora", 0)]
    assert [each[:2] for each in told] == failed and all("none" in str(each[2]) for each in told)
