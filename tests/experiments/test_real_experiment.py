"""The experiment on real models, with tiny ones in their place: splits, a run cut short, results, report, command."""

from __future__ import annotations

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import save_parts
from transformers import AutoModel

pytest.importorskip("sacrebleu")
pytest.importorskip("matplotlib")

from layalign.cli import main
from layalign.data import Example
from layalign.data.sentences import sentence_key
from layalign.evaluation.likelihood import target_log_probs
from layalign.evaluation.translation import translation_scores
from layalign.experiments import engine
from layalign.experiments.analysis.result import AnalysisResult
from layalign.experiments.real import ablation, load_settings, looks, runs, schedule, task, text
from layalign.experiments.real.data import as_text, read_data
from layalign.experiments.real.measures import _groups
from layalign.experiments.real.report import PICTURES, TABLES, pictures, written_into
from layalign.experiments.real.results import summarise, write_results
from layalign.experiments.real.schedule import run_all
from layalign.experiments.real.settings import RealSettings, is_real
from layalign.experiments.settings import Run
from layalign.utils.errors import ArgumentError, StoppedError

WORDS = ["sun", "rain", "stone", "river", "bird", "tree", "house", "road", "hand", "eye"]
SYSTEMS: list[dict[str, Any]] = [
    {"name": "layalign-all", "baseline": "all-layers"},
    {"name": "mindmerger-soft", "baseline": "mindmerger-soft", "seeds": [0], "steps_factor": 1.5},
    {"name": "lora", "baseline": "lora", "reads_text": True, "seeds": [0]},
    {"name": "llm", "baseline": "llm", "reads_text": True, "shots": 2, "seeds": [0]},
]
TASK: dict[str, Any] = {
    "train": 12, "dev": 3, "test_per_language": 5, "steps": 4, "batch": 4, "choice_steps": 2, "eval_steps": 2,
    "learning_rates": [1e-3, 1e-2], "seeds": [0], "systems": [
        {"name": "layalign-all", "baseline": "all-layers", "after": "layalign-all"},
        {"name": "langbridge", "baseline": "langbridge", "after": "mindmerger-soft"},
        {"name": "lora", "baseline": "lora", "reads_text": True, "after": "lora"},
        {"name": "lora-alone", "baseline": "lora", "reads_text": True},
        {"name": "llm", "baseline": "llm", "reads_text": True},
    ],
}  # fmt: skip
SMALL: dict[str, Any] = {
    "tested": ["deu", "swh"], "unseen": ["swh"], "test_per_language": 7, "dev_per_language": 3, "steps": 4, "batch": 4,
    "choice_steps": 2, "eval_steps": 2, "learning_rates": [1e-4, 1e-2], "right_one_of": 3, "written_per_language": 4,
    "max_new_tokens": 4, "seeds": [0, 1], "other_domain_per_language": 5, "other_domain_words": [3, 9],
    "ablated": ["layalign-all"], "systems": SYSTEMS, "task": TASK, "dtype": "float32",
    "llm_bos_token_id": 2,
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
    for name, languages, count in (("dev", ("en",), 15), ("test", ("en", "sw", "ur"), 6)):
        (root / "data" / "xnli" / name).mkdir(parents=True)
        for language in languages:
            labels = ("entailment", "neutral", "contradiction")
            lines = [f"{language} {WORDS[i % 10]} {name}\t{WORDS[i % 7]}\t{labels[i % 3]}" for i in range(count)]
            (root / "data" / "xnli" / name / f"{language}.tsv").write_text("\n".join(lines) + "\n")
    return root


def settings_of(world: Path, **changes: Any) -> RealSettings:
    return load_settings("real", {**SMALL, "weights": str(world / "weights"), "data": str(world / "data"), **changes})


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RealSettings, Path]:
    """All runs, in this process."""
    settings, folder = settings_of(world), tmp_path_factory.mktemp("out")
    data = read_data(settings)
    (folder / "data.json").write_text(data.to_json())
    for _, system, seed in settings.runs(stage="translation"):
        runs.test_run(settings, settings.system(system), data, folder, seed)
    return settings, folder


# Settings and text


def test_the_preset_is_whole() -> None:
    settings = load_settings("real")
    assert len(settings.tested) == 21 and len(settings.unseen) >= 3 and len(settings.seeds) >= 3
    assert [len(settings.seeds_of(settings.system(name))) for name in ("layalign-all", "last-layer")] == [5, 5]
    assert settings.runs(seeds=[0])[:2] == [("translation", "layalign-all", 0), ("translation", "last-layer", 0)]
    assert settings.runs(["lora"], [1], "task") == [("task", "lora", 1)]
    for wrong, told in (({"only": ["x"]}, "only"), ({"seeds": [9]}, "seeds"), ({"stage": "x"}, "stage")):
        with pytest.raises(ArgumentError, match=f"{told}: expected"):
            settings.runs(**wrong)
    assert is_real("real") and not is_real("controlled")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"tested": ["deu", "klingon"]}, "tested: expected codes of languages"),
        ({"unseen": ["fra"]}, "unseen: expected some of the tested languages"),
        ({"choice_steps": 9}, "choice_steps: expected at most the 4 steps"),
        ({"learning_rates": [2.0]}, "learning_rates: expected numbers above 0 and below 1"),
        ({"dtype": "int8"}, "dtype: expected one of auto, float32, bfloat16"),
        ({"right_one_of": 1}, "right_one_of"),
        ({"seeds": [0, 0]}, "seeds: expected different whole numbers"),
        ({"systems": [{"name": "a/b", "baseline": "llm"}]}, "systems: expected names of letters"),
        ({"systems": [{"name": "a", "baseline": "none"}]}, "baseline: expected one of"),
        ({"systems": [{"name": "a", "baseline": "llm", "x": 1}]}, "systems.x: no such key"),
        ({"english_words": [3]}, "english_words: expected two whole numbers"),
        ({"steps": 0}, "steps"),
        (
            {"systems": [{"name": "a", "baseline": "llm", "steps_factor": 0}]},
            "systems.a.steps_factor: expected a number",
        ),
        (
            {"systems": [{**SYSTEMS[0], "learning_rates": [2]}]},
            "systems.layalign-all.learning_rates: expected numbers above 0 and below 1",
        ),
        ({"systems": [{**SYSTEMS[0], "dtype": "half"}]}, "systems.layalign-all.dtype: expected one of auto, float32"),
        ({"ablated": ["llm"]}, "ablated: expected systems that train"),
        ({"ablated": ["x"]}, "ablated: expected some of the systems"),
        ({"task": {**TASK, "steps": 1}}, "task.choice_steps: expected at most the 1 steps"),
        ({"task": {**TASK, "more": 1}}, "task.more: no such key"),
        ({"task": {"steps": 1}}, "task.systems: expected a list of systems"),
        ({"task": {"systems": [{**SYSTEMS[0], "after": "x"}]}}, "task.systems.layalign-all.after: expected one of"),
        ({"more": 1}, "more: no such key"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        load_settings("real", {**SMALL, **change})


def test_a_system_can_have_its_own_learning_rates(world: Path) -> None:
    settings = settings_of(
        world, systems=[SYSTEMS[0], {**SYSTEMS[0], "name": "slow", "learning_rates": [1e-5]}], task=None, ablated=[]
    )
    data, (usual, slow) = read_data(settings), settings.systems
    assert settings.rates_of(runs.translation(settings, usual, data).system) == [1e-4, 1e-2]
    assert settings.rates_of(runs.translation(settings, slow, data).system) == [1e-5]
    again = settings_of(
        world, systems=[SYSTEMS[0], {**SYSTEMS[0], "name": "slow", "learning_rates": [1e-6]}], task=None, ablated=[]
    )
    assert settings.fingerprint(slow, "") != again.fingerprint(again.systems[1], "")
    assert settings.fingerprint(usual, "") == again.fingerprint(usual, "")


def test_no_english_of_dev_and_test_is_trained_on(world: Path) -> None:
    settings = settings_of(world)
    data = read_data(settings)
    held_out = {sentence_key(pair.target) for pairs in (data.dev, *data.test.values()) for pair in pairs}
    trained = {sentence_key(pair.target) for pair in data.train}
    assert len(held_out) == 7 + 3 + 7 and not held_out & trained
    assert {pair.language for pair in data.train} == {"German", "French"}
    assert {pair.language for pair in data.dev} == {"German"}
    assert data.facts["left_out_of_training"] == 80 - len(data.train) > 0  # of French too: it has the same English
    assert not {sentence_key(shot.target) for shot in data.shots["swh"]} & held_out
    assert [len(group) for group in data.other_domain.values()] == [5, 5]
    assert "sun" not in data.to_json()


def test_too_little_text_is_refused(world: Path) -> None:
    with pytest.raises(ArgumentError, match="data: expected 43 sentences of deu for dev and test, got 40"):
        read_data(settings_of(world, test_per_language=40))
    with pytest.raises(ArgumentError, match=r"data: expected .*jpn\.tsv, which does not exist"):
        read_data(settings_of(world, tested=["deu", "jpn"], unseen=[]))


def test_sentences_as_text() -> None:
    pair, shot = Example("Hallo du", "Hello you", "German"), Example("Ja", "Yes", "German")
    assert as_text([pair])[0].prompt == "Hallo du\nEnglish:"
    assert [len(group) for group in _groups([pair] * 7, 3)] == [3, 4]
    assert [len(group) for group in _groups([shot] * 2, 3)] == [2]


def test_text_from_clones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, news = tmp_path / "laser" / "data" / "tatoeba" / "v1", tmp_path / "ntrex" / "NTREX-128"
    where = [str(tmp_path / "out"), "--laser", str(tmp_path / "laser"), "--ntrex", str(tmp_path / "ntrex")]
    with pytest.raises(ArgumentError, match="laser: expected a clone"):
        text.main(where)
    for place in (folder, news):
        place.mkdir(parents=True)
    for code in ("deu", "gle"):  # one that is tested, taken whole, and another
        (folder / f"tatoeba.{code}-eng.{code}").write_text("".join(f" a\u2028{i}\u00a0b\n" for i in range(130)) + "\n")
        (folder / f"tatoeba.{code}-eng.eng").write_text("".join(f"one\t{i}\n" for i in range(130)) + "no source\n")
    with pytest.raises(ArgumentError, match="ntrex: expected a clone"):
        text.main(where)
    for name in ("src.eng", *(f"ref.{code}" for code in text.NEWS)):
        (news / f"newstest2019-{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(160)))
    text.main(where)
    assert "{'tatoeba': 250, 'ntrex': 4500}" in capsys.readouterr().out
    lines = (tmp_path / "out" / "tatoeba" / "gle.tsv").read_text().split("\n")
    assert lines[3] == "a 3\u00a0b\tone 3" and len(lines) == 121
    assert (tmp_path / "out" / "ntrex" / "zul.tsv").read_text().startswith("ref.zul 0\tsrc.eng 0\n")


# Runs


@pytest.mark.slow
def test_a_run_leaves_what_it_did(done: tuple[RealSettings, Path]) -> None:
    settings, folder = done
    choice = json.loads((folder / "runs/layalign-all/choice.json").read_text())
    tried = {float(rate): found["dev_loss"] for rate, found in choice["tried"].items()}
    assert choice["chosen"] == min(tried, key=tried.__getitem__)
    trained = [json.loads((folder / f"runs/layalign-all/seed-{seed}/trained.json").read_text()) for seed in (0, 1)]
    assert [found["steps"] for found in trained] == [4, 4]
    assert json.loads((folder / "runs/mindmerger-soft/seed-0/trained.json").read_text())["steps"] == 6
    # The chosen run of the first seed went on: its first losses are those of the choice.
    chosen = choice["tried"][f"{choice['chosen']:g}"]
    assert trained[0]["dev_losses"][:2] == chosen["dev_losses"] and len(chosen["dev_losses"]) == 2
    assert trained[0]["dev_losses"] != trained[1]["dev_losses"]
    # Chosen again from runs that have gone on since, it is the same choice.
    (folder / "runs/layalign-all/choice.json").unlink()
    stage = runs.translation(settings, settings.system("layalign-all"), read_data(settings))
    assert runs.choose_rate(stage, folder) == choice
    result = json.loads((folder / "runs/layalign-all/seed-0/result.json").read_text())
    assert set(result["tatoeba"]) == {"deu", "swh"} and set(result["ntrex"]) == {"deu", "yor"}
    german = result["tatoeba"]["deu"]
    assert [len(german[key]) for key in ("nats", "tokens", "nats_other", "right", "written")] == [7, 7, 4, 4, 4]
    assert not (folder / "runs/llm/seed-0/trained.json").exists()


@pytest.mark.slow
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
        runs.train_run(runs.translation(settings, settings.system(name), data), tmp_path, 0)
    assert len(orders) >= 3 and all(order == orders[0] for order in orders)


@pytest.mark.slow
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
            runs.train_run(runs.translation(settings, system, data), tmp_path, 0)
    again = runs.train_run(runs.translation(settings, system, data), tmp_path, 0)
    whole = json.loads((folder / "runs/mindmerger-soft/seed-0/trained.json").read_text())
    assert again["dev_loss"] == whole["dev_loss"]
    assert runs.train_run(runs.translation(settings, system, data), tmp_path, 0) == again


def chosen_rate(folder: Path) -> float:
    return float(json.loads((folder / "runs/mindmerger-soft/choice.json").read_text())["chosen"])


def test_small_files_alone_are_gone_on_with(
    world: Path, tmp_path: Path, done: tuple[RealSettings, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = done
    data, system = read_data(settings), settings.system("mindmerger-soft")
    shutil.copytree(folder / "runs/mindmerger-soft", tmp_path / "runs/mindmerger-soft")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_train", None)  # nothing is trained for what is done
        again = runs.test_run(settings, system, data, tmp_path, 0)
    assert again == json.loads((folder / "runs/mindmerger-soft/seed-0/result.json").read_text())
    stage = runs.translation(settings, system, data)
    runs._train(stage, tmp_path, 0, chosen_rate(tmp_path), 4)  # of 6: as if training again had been cut off
    files = [runs.trained_folder(stage, each, 0) / "model.safetensors" for each in (tmp_path, folder)]
    again, first = map(load_file, files)
    assert files[0].is_relative_to(tmp_path) and again.keys() == first.keys()
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())


@pytest.mark.parametrize("own, first", [({}, 2), ({"llm_bos_token_id": False}, None)])
def test_a_system_has_the_first_token_of_the_settings_or_its_own(
    world: Path, tmp_path: Path, own: dict[str, Any], first: int | None
) -> None:
    settings = settings_of(world, systems=[{**SYSTEMS[0], "settings": own}], task=None)
    stage = runs.translation(settings, settings.systems[0], read_data(settings))
    runs._train(stage, tmp_path, 0, 1e-4, 2)
    checkpoint = runs.work_folder(tmp_path, "layalign-all", 0, 1e-4)
    assert runs.load_run(checkpoint).config.llm_bos_token_id == first


@pytest.mark.slow
def test_a_run_that_began_in_one_dtype_stays_in_it(
    world: Path, done: tuple[RealSettings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_processor(has_bf16: bool, **changes: Any) -> runs.Stage:
        monkeypatch.setattr("layalign.experiments.real.settings.native_bf16", lambda use_cpu: (has_bf16, "one"))
        settings = settings_of(world, dtype="auto", **changes)
        return runs.translation(settings, settings.system("layalign-all"), read_data(settings))

    one_rate = {"learning_rates": [1e-4]}
    runs._train(on_a_processor(True, **one_rate), tmp_path, 0, 1e-4, 2)
    moved = on_a_processor(False, **one_rate)
    assert [runs.train_run(moved, tmp_path, seed)["dtype"] for seed in (0, 1)] == ["bfloat16", "float32"]
    tried = json.loads((tmp_path / "runs/layalign-all/choice.json").read_text())["tried"]
    assert tried["0.0001"]["dtype"] == "bfloat16"
    # Small files of a float32 run, on a processor with bf16: trained again in float32, loaded in float32.
    shutil.copytree(done[1] / "runs/layalign-all", tmp_path / "small/runs/layalign-all")
    again = runs.trained_folder(on_a_processor(True), tmp_path / "small", 0)
    first = runs.trained_folder(on_a_processor(False), done[1], 0)
    assert runs.dtype_of(again) == "float32" and runs.load_run(again).llm.dtype is torch.float32
    weights = [load_file(folder / "model.safetensors") for folder in (again, first)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_runs_of_other_settings_are_refused(world: Path, done: tuple[RealSettings, Path]) -> None:
    _, folder = done
    with pytest.raises(ArgumentError, match="was made with other settings"):
        summarise(settings_of(world, max_new_tokens=5), folder)
    run = settings_of(world, batch=2)
    with pytest.raises(ArgumentError, match="was made with other settings"):
        runs.train_run(runs.translation(run, run.system("layalign-all"), read_data(run)), folder, 0)


def test_parts_taken_away(world: Path, done: tuple[RealSettings, Path]) -> None:
    settings, folder = done
    data, system = read_data(settings), settings.system("layalign-all")
    found = ablation.ablate_run(settings, system, data, folder, 0)
    checkpoint = runs.trained_folder(runs.translation(settings, system, data), folder, 0)
    answers, collator = runs.asked(settings, system, data, checkpoint)
    model, pairs = answers.model, [pair for group in data.test.values() for pair in group[: ablation.PER_LANGUAGE]]

    def nats(**changes: torch.Tensor) -> float:
        changed = copy.deepcopy(model)
        for name, value in changes.items():
            dict(changed.named_parameters())[name].data.copy_(value)
        values = target_log_probs(changed, collator, pairs)
        return -sum(value for value, _ in values) / sum(count for _, count in values)

    assert found["whole"] == pytest.approx(nats(), abs=1e-4)
    weights = dict(model.named_parameters())
    mix = weights["encoder_aligner.projector.fc1.weight"].detach().clone()
    mix[:, 2] = 0
    assert found["encoder layers"]["2"] == pytest.approx(
        nats(**{"encoder_aligner.projector.fc1.weight": mix}), abs=1e-4
    )
    closed = {"cross_attention.1.adaption_gate": torch.zeros(1)}
    assert found["LLM layers"]["1"] == pytest.approx(nats(**closed), abs=1e-4)
    closed["cross_attention.0.adaption_gate"] = torch.zeros(1)
    assert found["no gates"] == pytest.approx(nats(**closed), abs=1e-4)
    assert len({found["whole"], found["no gates"], found["no soft tokens"], found["encoder layers"]["2"]}) == 4
    assert len(found["encoder layers"]) == 4 and len(found["gates"]) == 2
    mix = weights["encoder_aligner.projector.fc1.weight"].detach().clone()
    mix[:, :3] = 0  # layers 0 to 2 of 0 to 3
    assert found["layer sets"]["all but the last"] == pytest.approx(
        nats(**{"encoder_aligner.projector.fc1.weight": mix}), abs=1e-4
    )
    assert found["layer sets"]["last"] == found["encoder layers"]["3"] and len(found["layer sets"]) == 5
    adapter = ablation.ablate_run(settings, settings.system("mindmerger-soft"), data, folder, 0)
    assert "no gates" not in adapter and adapter["no soft tokens"] != adapter["whole"]


def test_a_run_is_looked_into(world: Path, done: tuple[RealSettings, Path]) -> None:
    settings, folder = done
    data = read_data(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looks, "PER_LANGUAGE", 3)
        found = looks.look_run(settings, settings.system("layalign-all"), data, folder, 0)
    text = (folder / "runs/layalign-all/seed-0/looks.json").read_text()
    assert str(world) not in text and not [p for group in data.test.values() for p in group if p.source in text]
    result = AnalysisResult.from_dict(found["analysis"])
    assert result.to_dict() == found["analysis"] and result.sentences == {"German": 3, "Swahili": 3}
    assert list(result.similarity) == ["LLM alone", "untrained", "LayAlign"]
    assert [entry["step"] for entry in result.gate_history] == [0, 2, 4]
    # The encoder's layers by hand: means over all tokens, without the language's own mean.
    encoder, (tokenizer, _) = AutoModel.from_pretrained(world / "weights/encoder").eval(), runs.tokenizers_of(settings)
    encoder, means, tokens = encoder.get_encoder() if hasattr(encoder, "encoder") else encoder, [], []
    for side in ("source", "target"):
        states = []
        for pair in data.test["swh"]:
            ids = torch.tensor([tokenizer(getattr(pair, side)).input_ids])
            with torch.no_grad():
                hidden = encoder(ids, output_hidden_states=True).hidden_states
            states.append(torch.stack([layer[0].mean(0) for layer in hidden]))
            tokens += [torch.cat(hidden)] if side == "source" else []
        means.append(torch.stack(states) - torch.stack(states).mean(0))
    near = torch.einsum("ied,jed->eij", *[torch.nn.functional.normalize(side, dim=-1) for side in means])
    right = (near.argmax(-1) == torch.arange(7)).float().mean(-1)
    assert found["encoder retrieval"]["Swahili"] == pytest.approx(right.tolist())
    middle = torch.cat(tokens, dim=1).mean(1, keepdim=True)
    cosines: list[torch.Tensor] = []
    for sentence in tokens:
        unit = torch.nn.functional.normalize(sentence - middle, dim=-1)
        for i in range(unit.shape[1]):
            cosines += [(unit[:, i] * unit[:, j]).sum(-1) for j in range(unit.shape[1]) if j != i]
    assert found["token likeness"]["Swahili"] == pytest.approx(torch.stack(cosines).mean(0).tolist(), abs=1e-5)


# The task stage


@pytest.mark.slow
def test_task_goes_on_with_the_translation_stage(world: Path, done: tuple[RealSettings, Path]) -> None:
    settings, folder = done
    data, read = read_data(settings), task.read_task(settings)
    assert [len(group) for group in read.test.values()] == [5, 5, 5] and len(read.train) == 12
    found = {
        name: task.task_run(settings, settings.task.system(name), data, read, folder, seed)
        for stage, name, seed in settings.runs(stage="task")
    }
    for name, result in found.items():
        assert set(result["xnli"]) == {"English", "Swahili", "Urdu"}, name
        for language, of in result["xnli"].items():
            expected = [example.target for example in read.test[language]]
            assert of["right"] == [a == b for a, b in zip(of["label"], expected, strict=True)]
    # What goes on begins where the translation stage ended; what does not begins anew.
    begins = {}
    for name in ("layalign-all", "langbridge", "lora", "lora-alone"):
        trained = json.loads((folder / "runs" / name / "seed-0" / "trained-task.json").read_text())
        begins[name] = trained["dev_losses"][0][1]
        assert trained["steps"] == 4
    assert begins["lora"] != begins["lora-alone"]
    summary = summarise(settings, folder)
    cells = summary["task"]["layalign-all"]["xnli"]
    right = [np.mean(of["right"]) for of in found["layalign-all"]["xnli"].values()]
    assert cells["all"]["right"]["mean"] == pytest.approx(100 * np.mean(right))
    assert summary["task"]["llm"]["xnli"]["all"]["right"]["difference"]["mean"] == pytest.approx(
        summary["task"]["llm"]["xnli"]["all"]["right"]["mean"] - cells["all"]["right"]["mean"]
    )
    assert summary["missing"] == []
    table = TABLES["xnli"](summary)
    assert table[0][:5] == ["system", "seeds", "all (3)", "English (1)", "seen (2)"] and len(table) == 6


def test_task_text_is_checked(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"data: expected 103 lines in .*en\.tsv, got 15"):
        task.read_task(settings_of(world, task={**TASK, "train": 100}))
    with pytest.raises(ArgumentError, match=r"data: expected .*en\.tsv and"):
        task.read_task(settings_of(world, data=str(tmp_path)))
    with pytest.raises(ArgumentError, match="task: expected the settings"):
        task.read_task(settings_of(world, task=None))


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
    assert not [run for run in found["missing"] if run.startswith("translation")]
    assert found["systems"]["llm"]["ntrex"]["languages"].keys() == {"deu"}  # no examples of Yoruba to show


def test_report_and_page(done: tuple[RealSettings, Path]) -> None:
    settings, folder = done
    ablation.ablate_run(settings, settings.system("layalign-all"), read_data(settings), folder, 0)
    looks.look_run(settings, settings.system("layalign-all"), read_data(settings), folder, 0)
    found = write_results(settings, folder)
    assert str(folder) not in json.dumps(found) and settings.weights not in json.dumps(found)
    marks = "".join(f"<!-- evidence: {name} -->\n<!-- end of {name} -->\n" for name in ("state", *TABLES))
    page = written_into(marks, found)
    for system in settings.systems:
        assert page.count(f"| {system.label} |") >= 3
    assert set(pictures(found)) == set(PICTURES) and "no middle third" in page and "linear CKA" in page
    assert "5 runs are done." in page and "Swahili (unseen)" in page


def test_the_page_is_that_of_the_committed_results() -> None:
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks/results/real/results.json").read_text(encoding="utf-8"))
    page = (root / "docs/evidence.md").read_text(encoding="utf-8")
    assert written_into(page, found) == page
    for name in pictures(found):
        assert (root / "docs/images" / f"evidence-{name}.png").is_file()


def command(*words: str) -> Any:
    with pytest.raises(SystemExit) as end:
        main(["experiment", *words])
    return end.value.code


@pytest.mark.slow
def test_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "learning_rates": [1e-3], "seeds": [0]}))
    where = ["--weights", str(world / "weights"), "--data", str(world / "data"), "--output", str(tmp_path / "out")]
    assert command("--config", str(file), *where, "--only", "mindmerger-soft") == 0
    out = capsys.readouterr().out
    assert "translation, mindmerger-soft, seed 0: done" in out and "step 6/6: dev loss" in out
    assert "| MindMerger-Soft | 1 |" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "curves.png").is_file()
    assert command("--config", str(file), *where, "--report") == 0
    assert command("--data", str(world)) == 2
    assert command("--stage", "task") == 2
    assert "data: expected none with controlled" in capsys.readouterr().err


def test_a_run_that_fails_is_told(world: Path, tmp_path: Path) -> None:
    told: list[tuple[Run, float, str | None]] = []
    settings = settings_of(world, weights=str(tmp_path / "none"))
    only = ["mindmerger-soft", "lora"]
    failed = run_all(settings, tmp_path, only=only, stage="translation", tell=lambda *each: told.append(each))
    assert failed == [("translation", "mindmerger-soft", 0), ("translation", "lora", 0)]
    assert [run for run, *_ in told] == failed and all("none" in str(problem) for *_, problem in told)


@pytest.mark.parametrize("jobs", [1, 2])
def test_sigterm_ends_all_of_it(jobs: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def stopped(settings: RealSettings, folder: Path, run: Run) -> None:
        begun.append(str(run.system))
        raise StoppedError("stopped by SIGTERM after step 1")

    monkeypatch.setattr(schedule, "_run", stopped)
    monkeypatch.setattr(engine, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(1))
    with pytest.raises(StoppedError, match="after step 1"):
        run_all(settings_of(world), tmp_path, stage="translation", jobs=jobs)
    assert begun[0] == "layalign-all" and len(begun) < 5
