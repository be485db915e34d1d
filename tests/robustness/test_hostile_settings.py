"""Mutated configurations and run folders: read, or an error of ours on one line; nothing in them runs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_inputs import times, tried
from mutate import mutated

from layalign import ArgumentError, DataError, LayAlignError
from layalign.data import Example
from layalign.evaluation import compare_runs, evaluate
from layalign.evaluation.store import OutputStore, prediction_path
from layalign.experiments.bench import results as bench
from layalign.experiments.controlled import load_settings
from layalign.experiments.controlled.settings import ExperimentSettings, settings_from
from layalign.training.config import TrainConfig
from layalign.training.loading import configured_stages, load_train_config

PRESETS = Path(__file__).resolve().parents[2] / "layalign"
TRAINING = (PRESETS / "training" / "presets" / "math.yaml").read_bytes()
EXPERIMENT = (PRESETS / "experiments" / "controlled" / "presets" / "smoke.yaml").read_bytes()
VALUES: list[Any] = [
    None, "", "x", "\ud800", "a\x00b", b"x", True, 0, -1, 2**31, 2**64, 10**400, 1.5, -0.0, 1e308, float("nan"),
    float("inf"),
    1j, [], [None], [[]], [1, "a"], ["x"] * 3, {}, {"a": 1}, {1: 2}, {"r": "x"}, object(), Path("x"), (1, 2), {1, 2},
]  # fmt: skip
# Alone, each of these broke a reader of YAML that only expects YAMLError, or ran what it holds.
WICKED = [
    "a: !!python/object/apply:os.system ['touch RAN']", "!!python/object/new:subprocess.Popen [['touch', 'RAN']]",
    "a: !!python/name:os.system", "a: !!python/module:os", "a: 2001-13-45", "a: 2001-01-01T99:99:99Z", "a: 0b",
    "a: 0o_",
    "a: 0x_", "a: !!int x", "a: !!float x", "a: !!bool x", "a: !!timestamp x", "a: !!binary '&'", "a: !!omap 1",
    "a: !!set [1]",
    "a: " + "9" * 5000, "a: " + "[" * 900, "a: " + "{a: " * 900, "? {a: b}\n: c", "a: &x [*x]", "&x {a: *x}",
    "a: *nobody",
    "\x00", "\ufffe", "a: \x07", "%YAML 9.9\n---\na: 1", "- 1", "5", "text", "--- 1\n--- 2", "<<: 5", "a: !<tag:x> 1",
    "a: 1e400",
    "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12))]),
    "a: " + "x" * 2**18,
    "data: [" + ", ".join(["x"] * 11_000) + "]",
]  # fmt: skip


def one_line(error: LayAlignError, longest: int = 2000) -> None:
    assert "\n" not in str(error) and 5 < len(str(error)) < longest, str(error)[:3000]


def settled(read: Callable[[], Any], kind: type) -> bool:
    """Whether it was read; otherwise an error of ours says why."""
    try:
        found, error = read(), None
    except (ArgumentError, DataError) as caught:
        found, error = None, caught
    if error is not None:
        one_line(error)
        return False
    assert isinstance(found, kind)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "experiment"])
def test_mutated_yaml_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, draw = tmp_path / "config.yaml", random.Random(f"yaml {kind}")
    whole, read, made = {
        "training": (
            TRAINING,
            lambda: load_train_config(path, stage=draw.choice(["translation", "task"])),
            TrainConfig,
        ),
        "experiment": (EXPERIMENT, lambda: load_settings(path), ExperimentSettings),
    }[kind]
    lines, good, count = whole.split(b"\n"), 0, times(350)
    for _ in range(count):
        place = draw.randrange(len(lines))
        changed = [*lines[:place], mutated(lines[place], draw, lines, large=False), *lines[place + 1 :]]
        path.write_bytes(b"\n".join(changed))
        good += settled(read, made)
        if kind == "training":
            settled(lambda: configured_stages(path), list)
    for text in WICKED:
        path.write_text(text, encoding="utf-8")
        assert not settled(read, made), text[:80]
        if kind == "training":
            settled(lambda: configured_stages(path), list)
    for raw in (b"\xff\xfea: 1", b"a: \xc3", b"a: \xed\xa0\x80"):
        path.write_bytes(raw)
        assert not settled(read, made)
    tried("YAML files", count + len(WICKED) + 3)
    assert not (tmp_path / "RAN").exists() and count / 20 < good < count


@pytest.mark.slow
def test_every_key_of_a_training_configuration_with_every_wrong_value() -> None:
    keys = list(TrainConfig.__dataclass_fields__)
    for key in [*keys, "stages", "lora.r", "nobody"]:
        for value in VALUES:
            values = {"lora": {"r": value}} if key == "lora.r" else {key: value}
            try:
                config, error = load_train_config(values), None
            except ArgumentError as caught:
                config, error = None, caught
            if error is not None:
                one_line(error)
                assert str(error).startswith((key.split(".")[0], "baseline", "keep_best")), error
            elif key != "data":  # which is checked where it is read
                yaml.safe_load(yaml.safe_dump(config.to_dict()))
            tried("values of settings")
    for number in (2**53 + 1, 12345678901234567):
        assert load_train_config({"max_steps": number}).max_steps == number  # not rounded through a float


def test_every_key_of_an_experiment_with_every_wrong_value() -> None:
    good = yaml.safe_load(EXPERIMENT)
    places = [(key,) for key in good] + [
        ("llm", "steps"),
        ("task", "learning_rate"),
        ("languages", "low"),
        ("systems", 0),
    ]
    places += [("systems", 0, key) for key in ("name", "baseline", "settings", "steps_factor", "label")] + [
        ("encoder_share", "low")
    ]
    for place in places:
        for value in VALUES:
            values = json.loads(json.dumps(good))
            inner = values
            for step in place[:-1]:
                inner = inner[step]
            inner[place[-1]] = value
            settled(lambda: settings_from(values), ExperimentSettings)  # noqa: B023
            tried("values of settings")
    for name in ("..", ".", "../x", "a/b", "-o", "", ".hidden"):
        values = json.loads(json.dumps(good))
        values["systems"][0]["name"] = name
        with pytest.raises(ArgumentError, match="systems: expected names"):
            settings_from(values)
        tried("values of settings")
    with pytest.raises(ArgumentError, match=r"encoder_share.low: expected a number above 0"):
        settings_from({**good, "encoder_share": {**good["encoder_share"], "low": float("nan")}})


def test_wrong_assignments_are_named() -> None:
    draw = random.Random("set")
    for _ in range(times(800)):
        text = mutated(
            b"learning_rate=0.1", draw, [b"lora.r=4", b"languages=[sw, de]", b"data={path: x}", b"stage=task"]
        )
        item = text.decode("utf-8", errors="replace")
        settled(lambda: load_train_config({}, overrides=[item]), TrainConfig)  # noqa: B023
        tried("values of settings")
    for item in WICKED:
        settled(lambda: load_train_config({}, overrides=[f"seed={item}"]), TrainConfig)  # noqa: B023
        tried("values of settings")


# The folder of an evaluation


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    examples = [Example(f"q{i}", str(i), language, "p", str(i)) for language in ("Swahili", "German") for i in range(5)]
    evaluate(lambda batch: [example.target for example in batch], None, None, "mgsm", examples, folder, model_name="x")
    return folder


@pytest.mark.slow
def test_mutated_run_folders(run_folder: Path, tmp_path: Path) -> None:
    """Comparing them, and going on with them, ends in a result or an error; nothing outside the folder is written."""
    draw, names, outcomes = random.Random("run"), ["settings.json", "scores.json"], [0, 0]
    names += [f"predictions/{language}.{kind}" for language in ("Swahili", "German") for kind in ("json", "jsonl")]
    examples = [Example(f"q{i}", str(i), "Swahili", "p", str(i)) for i in range(5)]
    there = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    settings = json.loads((run_folder / "settings.json").read_text())["settings"]
    for _ in range(times(120)):
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(run_folder, work)
        path = work / draw.choice(names)
        path.write_bytes(mutated(path.read_bytes(), draw))
        outcomes[settled(lambda: compare_runs(run_folder, work).to_dict(), dict)] += 1  # noqa: B023
        for resume in (True, False):
            settled(lambda: OutputStore(work, settings, resume).begin("Swahili", examples), dict)  # noqa: B023
        tried("run folders", 3)
    assert min(outcomes) > sum(outcomes) / 10
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == there
    assert {path.name for path in tmp_path.iterdir()} == {"work"}


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "9" * 5000,
        "",
        "null",
        "[]",
        '{"languages": {}}',
        '{"settings": 5, "languages": {}}',
        '{"settings": {}, "languages": {"\\ud800": 1, "../../x": {}}}',
        '{"settings": [], "languages": []}',
    ],
)
def test_settings_that_layalign_did_not_write(content: str, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises((ArgumentError, DataError)) as stopped:
        compare_runs(run_folder, tmp_path)
    one_line(stopped.value)
    with pytest.raises((ArgumentError, DataError)) as stopped:
        OutputStore(tmp_path, {"task": "mgsm"}, resume=True)
    one_line(stopped.value)
    tried("run folders", 2)


def test_names_of_languages_become_names_of_files_inside_the_folder(tmp_path: Path) -> None:
    names = [
        "../../etc/passwd",
        "..",
        "a/b",
        "a:b",
        "a\x00b",
        "a" * 5000,
        "a" * 5001,
        "\ud800",
        "/",
        "Q'eqchi'",
        "K'iche'",
        "ß" * 200,
    ]
    paths = [prediction_path(tmp_path, name, ".json") for name in names]
    assert len(set(paths)) == len(paths) and paths[9].name == "Q'eqchi'.json"
    for path in paths:
        assert path.resolve().parent == tmp_path / "predictions"
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    tried("run folders", len(names))


def test_an_id_with_half_a_surrogate_pair_and_a_file_with_a_name_that_is_no_text(tmp_path: Path) -> None:
    """Found at the end of an evaluation, either would cost all its answers."""
    examples = [Example("q", "1", "Swahili", "p", "\ud800")]
    result = evaluate(lambda batch: ["1\ud800"], None, None, "mgsm", examples, tmp_path, model_name="\udcff")
    assert result.scores["Swahili"].accuracy == 100
    again = json.loads((tmp_path / "predictions" / "Swahili.json").read_text())
    assert again[0]["id"] == "\ud800"
    tried("run folders")


@pytest.mark.slow
def test_mutated_benchmark_results(tmp_path: Path) -> None:
    row = {"id": "a", "group": "g", "name": "n", "unit": "s", "labels": {}, "median": 1.0, "q1": 0.9, "q3": 1.1}
    row["against"] = {"bare": {"median": 1.0, "ratio": 1.0, "ratio q1": 0.9, "ratio q3": 1.1, "rounds": 5}}
    row["target"] = {"baseline": "bare", "must": 1.1, "aim": 1.0}
    facts = {"device": {"type": "cpu", "name": "x"}, "commit": "abc"}
    good = json.dumps(
        {"format": 1, "facts": facts, "shapes": "cpu", "dtype": "float32", "rows": [row, {**row, "id": "b"}]}
    ).encode()
    path, other, draw = tmp_path / "one.json", tmp_path / "two.json", random.Random("bench")
    other.write_bytes(good)
    for _ in range(times(400)):
        path.write_bytes(mutated(good, draw))
        settled(lambda: bench.compare(bench.load(path), bench.load(other), 1.1), list)
        tried("benchmark results")
    assert len(bench.compare(bench.load(other), bench.load(other), 1.1)) == 2
