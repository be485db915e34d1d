"""The whole demo, tiny: pre-training, both stages of both trained systems, evaluation of all three, report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from layalign.experiments.made_up import run_demo
from layalign.experiments.made_up.pipeline import SYSTEMS, result_table, table_rows
from layalign.experiments.made_up.pretraining import corrupt, demo_weights, encoder_pairs, garble, llm_documents
from layalign.experiments.made_up.problems import LANGUAGES, LOW_RESOURCE
from layalign.experiments.made_up.vocabulary import prompt_pieces

pytestmark = pytest.mark.slow  # its fixtures train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, seed=1, fast=True, progress=False)


def test_every_file_is_there(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    for name in ("results.json", "report.html", "report.md", "losses.png", "gates.png", "mix.png"):
        assert (folder / name).stat().st_size > 500, name
    for system in SYSTEMS:
        assert len(list((folder / "evaluation" / system / "predictions").glob("*.json"))) == len(LANGUAGES)
    for system in ("adapter", "layalign"):
        assert (folder / system / "task" / "model.safetensors").is_file()


def test_results_and_table_have_every_language_and_system(run: tuple[Path, dict[str, Any]]) -> None:
    folder, found = run
    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert stored["scores"] == found["scores"] and stored["seed"] == 1
    for system in SYSTEMS:
        assert list(found["scores"][system]) == list(LANGUAGES)
        for score in found["scores"][system].values():
            assert score["count"] == 4 and score["accuracy"] == pytest.approx(100 * score["correct"] / 4)
    table = result_table(found)
    assert len(table.columns) == 1 + len(SYSTEMS)
    assert table.row_count == len(table_rows(found)) == len(LANGUAGES) + 4
    rows = {row[0]: row[1:] for row in table_rows(found)}
    for place, system in enumerate(SYSTEMS):
        mean = sum(found["scores"][system][name]["accuracy"] for name in LANGUAGES) / len(LANGUAGES)
        assert rows["average: all"][place] == f"{mean:.1f}"


def test_losses_fall_and_the_gates_open(run: tuple[Path, dict[str, Any]]) -> None:
    folder, found = run
    for name in ("LLM", "encoder"):
        values = [loss for _, loss in found["losses"][name]]
        assert sum(values[-5:]) < 0.8 * sum(values[:5]), name
    for system in ("layalign", "adapter"):  # on the same examples; the batches of so few steps differ by more
        summary = json.loads((folder / system / "translation" / "training.json").read_text(encoding="utf-8"))
        assert summary["loss_after"] < summary["loss_before"], system
    assert any(gate != 0 for gate in found["gates"])


def test_shapes_of_gates_and_mix(run: tuple[Path, dict[str, Any]]) -> None:
    _, found = run
    settings = found["settings"]
    assert len(found["gates"]) == settings["llm_layers"]
    assert len(found["mix_weights"]) == 2 * settings["llm_layers"]
    assert all(len(row) == settings["encoder_layers"] for row in found["mix_weights"])
    assert found["encoder_layers"] == list(range(settings["encoder_layers"]))


def test_the_adapter_alone_has_no_aligner(run: tuple[Path, dict[str, Any]]) -> None:
    from layalign import LayAlignForCausalLM

    folder, _ = run
    alone = LayAlignForCausalLM.from_pretrained(folder / "adapter" / "task")
    assert alone.encoder_aligner is None and len(alone.cross_attention) == 0
    whole = LayAlignForCausalLM.from_pretrained(folder / "layalign" / "task")
    assert whole.encoder_aligner is not None
    frozen = alone.llm.get_input_embeddings().weight, whole.llm.get_input_embeddings().weight
    assert torch.equal(*frozen)


def test_the_report_is_one_file_and_tells_the_numbers(run: tuple[Path, dict[str, Any]]) -> None:
    folder, found = run
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name, *cells in table_rows(found):
        assert all(f">{cell}<" in page for cell in cells)
        assert "| " + name.replace("*", "\\*") + " | " + " | ".join(cells) + " |" in text
    for picture in re.findall(r"\]\((\w+\.png)\)", text):
        assert (folder / picture).is_file()
    assert "Held out of the task stage: English, Russian, Haitian Creole." in text


def test_the_saved_models_load_as_any_other(run: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    folder, _ = run
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "llm"), AutoTokenizer.from_pretrained(folder / "llm")
    assert llm.get_input_embeddings().num_embeddings == len(tokenizer)
    for number in range(100):
        assert len(tokenizer(str(number), add_special_tokens=False)["input_ids"]) == 1
    for text in ("Anna has 5 eggs.", "У Анны 5 яиц.", "安娜有5个鸡蛋。", "আন্নার কাছে 5টি ডিম আছে।", *prompt_pieces()):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    encoder = AutoTokenizer.from_pretrained(folder / "encoder")
    assert encoder("Anna ana mayai 5.")["input_ids"][-1] == encoder.eos_token_id
    assert AutoModelForSeq2SeqLM.from_pretrained(folder / "encoder").config.vocab_size == len(encoder)


def test_no_test_problem_is_in_any_training_text(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    tested = {
        line.split("\t")[0]
        for file in (folder / "data" / "mgsm").glob("*.tsv")
        for line in file.read_text("utf-8").splitlines()
    }
    assert len(tested) > 3 * len(LANGUAGES)
    trained = {json.loads(line)["query"] for line in (folder / "data/math/train.jsonl").read_text("utf-8").splitlines()}
    for line in (folder / "data/translation/train.jsonl").read_text("utf-8").splitlines():
        trained |= {json.loads(line)["source"], json.loads(line)["target"]}
    trained |= {text for pair in encoder_pairs(2000, 1, demo_weights(0.25), short=False) for text in pair}
    assert trained and not trained & tested


def test_documents_of_the_llm(run: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run[0] / "llm")
    before, after = prompt_pieces()
    kinds = set()
    for ids in llm_documents(tokenizer, 200, seed=0):
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        text = tokenizer.decode(ids[1:-1])
        if before in text:
            stated, asked, answer = text.partition(before)[0], *text.partition(before)[2].split(after)
            assert " = " in answer and answer.isascii() and stated.isascii()
            if stated:
                assert [n for n in asked.split() if n.isdigit()] == [n for n in stated.split() if n.isdigit()]
            else:
                assert asked.isascii()
            kinds.add(("asked", bool(stated), asked.isascii()))
        else:
            assert text.isascii()
            lines = text.split("\n")
            assert len(lines) == 1 or lines[0] == lines[1]
            kinds.add(("plain", len(lines) == 1, True))
    assert len(kinds) == 5


def test_garbled_text_keeps_numbers_and_nothing_else() -> None:
    import random

    for seed in range(20):
        text = garble("Anna has 5 eggs. Anna buys 12 more. How many?", random.Random(seed))
        assert [word for word in text.split() if word.isdigit()] == ["5", "12"]
        assert not any(character.isascii() and character.isalpha() for character in text)


def test_low_resource_languages_are_read_less_often() -> None:
    from layalign.experiments.made_up.problems import table

    names = {str(table("Swahili")["names"]["Peter"])}, {str(table("French")["names"]["Peter"])}
    sources = [source for source, _ in encoder_pairs(6000, 0, demo_weights(0.2), short=True)]
    swahili, french = (sum(any(name in text for name in group) for text in sources) for group in names)
    assert 0 < swahili < 0.5 * french
    assert "Swahili" in LOW_RESOURCE


def test_span_corruption_loses_nothing() -> None:
    import random

    tokens, sentinels = list(range(100, 160)), [1, 2, 3, 4]
    source, target = corrupt(tokens, sentinels, 0, random.Random(4))
    assert source[-1] == target[-1] == 0 and set(source) & set(sentinels)
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            spans[token] = []
            current = token
        else:
            spans[current].append(token)
    restored = [part for token in source[:-1] for part in spans.get(token, [token])]
    assert restored == tokens
