"""The analysis: each number against a known value or a second computation, and the whole command on a tiny model."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import batch, tiny_model
from tiny_training import TinyParts, byte_tokenizer, save_parts

from layalign import LayAlignForCausalLM, reference
from layalign.data import Example
from layalign.data.languages import languages
from layalign.experiments.analysis import analyze, centred_cosine, linear_cka, read_pairs, retrieval_accuracy
from layalign.experiments.analysis.fusion import attention_maps, contribution_norms, mix_weights
from layalign.experiments.analysis.measure import contributions, read_view, similarity
from layalign.experiments.analysis.reading import Reader, source_positions, untrained
from layalign.experiments.analysis.report import write_report
from layalign.experiments.analysis.result import AnalysisResult, Projection, Similarity
from layalign.experiments.analysis.tokens import CONTINUED, token_labels
from layalign.modeling.cross_attention import OnePass
from layalign.modeling.tokenization import save_tokenizers
from layalign.training.gates import gate_values
from layalign.utils.errors import ArgumentError, DataError

SENTENCES = {
    "de": ["eins zwei", "rot", "die Katze und der Hund", "blau blau", "zwei Hunde"],
    "bn": ["এক দুই", "লাল", "বিড়াল ও কুকুর", "নীল নীল", "দুই কুকুর"],
    "zh-CN": ["一二", "红", "猫和狗", "蓝蓝", "两只狗"],
}
ENGLISH = ["one two", "red", "the cat and the dog", "blue blue", "two dogs"]
NAMES = ["Bengali", "German", "Chinese"]  # in the order of the file names bn, de, zh-CN


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three languages as TSV files."""
    folder = tmp_path_factory.mktemp("pairs")
    for code, sources in SENTENCES.items():
        lines = [f"{source}\t{english}\n" for source, english in zip(sources, ENGLISH, strict=True)]
        (folder / f"{code}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def build(parts: TinyParts, **config: Any) -> LayAlignForCausalLM:
    torch.manual_seed(5)
    model = LayAlignForCausalLM.from_encoder_and_llm(parts.encoder, parts.llm, **config).eval()
    with torch.no_grad():
        for slot, module in enumerate(model.cross_attention):
            module.adaption_gate.fill_(0.4 - 0.7 * slot)
    return model


def tokenizers() -> tuple[Any, Any]:
    return byte_tokenizer(add_eos=True), byte_tokenizer(add_eos=False)


def states(rows: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Similarity


@pytest.mark.parametrize("size", [3, 40])  # fewer and more numbers than rows
def test_similarity_of_what_is_the_same(size: int) -> None:
    x = states(12, size)
    rotation = torch.linalg.qr(states(size, size, 1))[0]
    moved = 3 * x + states(1, size, 2)
    assert centred_cosine(x, x) == pytest.approx(1, abs=1e-12)
    assert centred_cosine(x, moved) == pytest.approx(1, abs=1e-12)
    assert centred_cosine(x, -x) == pytest.approx(-1, abs=1e-12)
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, moved @ rotation) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, torch.cat([x, x], dim=1)) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, states(12, size, 3)) < 0.95
    assert retrieval_accuracy(x, 2 * x) == 1


def test_similarity_of_what_is_orthogonal() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    y = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]])
    assert centred_cosine(x, y) == 0
    assert linear_cka(x, y) == 0
    assert linear_cka(x, torch.ones(4, 3)) == 0
    assert linear_cka(x, torch.full((4, 3), 0.1)) == 0  # their mean is not 0.1 to the last bit


def test_retrieval_counts_pairs_and_shares_ties() -> None:
    x = torch.eye(6)
    swapped = x[[1, 0, 2, 3, 5, 4]]
    assert retrieval_accuracy(x, swapped) == pytest.approx(2 / 6)
    assert retrieval_accuracy(x, x.roll(1, 0)) == 0
    assert retrieval_accuracy(x, torch.ones(6, 6)) == pytest.approx(1 / 6)  # all the same: chance
    twice = torch.cat([x, x])
    assert retrieval_accuracy(twice, twice) == pytest.approx(1 / 2)
    # From X everything is nearest to one hub, from the hub's side only that one is right.
    hub = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    near = torch.tensor([[1.0, 0.1], [1.0, 0.2]])
    assert (retrieval_accuracy(near, hub), retrieval_accuracy(hub, near)) == (0.5, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, size", [(7, 4), (5, 11)])
def test_similarity_against_plain_loops(rows: int, size: int, dtype: torch.dtype) -> None:
    x, y = states(rows, size, 4, dtype) + 1, states(rows, size, 5, dtype) - 2
    y = (y + x) / 2
    a, b = x.double().numpy(), y.double().numpy()
    a_mean, b_mean = (sum(rows_) / len(rows_) for rows_ in (a, b))

    def cosine(u: Any, v: Any) -> float:
        return sum(p * q for p, q in zip(u, v, strict=True)) / math.sqrt(sum(p * p for p in u) * sum(q * q for q in v))

    expected = sum(cosine(u - a_mean, v - b_mean) for u, v in zip(a, b, strict=True)) / rows
    assert centred_cosine(x, y) == pytest.approx(expected, rel=1e-10)

    def cross(u: Any, v: Any) -> float:
        return sum(
            sum((u[n, i] - u[:, i].mean()) * (v[n, j] - v[:, j].mean()) for n in range(rows)) ** 2
            for i in range(size)
            for j in range(size)
        )

    assert linear_cka(x, y) == pytest.approx(cross(a, b) / math.sqrt(cross(a, a) * cross(b, b)), rel=1e-10)
    right = sum(int(np.argmax([cosine(u, v) for v in b])) == n for n, u in enumerate(a))
    assert retrieval_accuracy(x, y) == pytest.approx(right / rows)


@pytest.mark.parametrize("function", [centred_cosine, linear_cka, retrieval_accuracy])
def test_similarity_errors(function: Any) -> None:
    x = states(4, 3)
    for bad, message in (
        (x[0], "expected floating-point states (N, D) with N >= 2, got float64 (3,) on cpu"),
        (x[:1], "got float64 (1, 3) on cpu"),
        (x.long(), "got int64 (4, 3) on cpu"),
        (x / 0, "expected finite states"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            function(bad, x)
    with pytest.raises(ArgumentError, match=r"second: expected .* of first, \(4, 3\), got \(3, 3\)"):
        function(x, x[:3])


def test_every_layer_is_compared_with_its_own() -> None:
    x, noise = states(8, 6), states(8, 6, 1)
    found = similarity(torch.stack([x, x], 1), torch.stack([x, noise], 1), seed=0)
    assert found.cosine[0] == pytest.approx(1) and abs(found.cosine[1]) < 0.5
    assert (found.cka[0], found.to_english[0], found.from_english[0]) == (pytest.approx(1), 1, 1)
    assert found.to_english[1] == retrieval_accuracy(x, noise)
    assert found.from_english[1] == retrieval_accuracy(noise, x)
    assert found.shuffled_cka[0] < 0.9


def test_every_sentence_meets_its_own_translation() -> None:
    """Also where languages have other sentences, in another order, and share some."""
    texts = ["a", "b", "c", "d", "e"]
    vectors = dict(zip(texts, states(5, 4)[:, None], strict=True))
    data = {"German": [Example(t, t, "German") for t in "cab"], "Swahili": [Example(t, t, "Swahili") for t in "edca"]}
    found, projection = read_view(lambda rows: torch.stack([vectors[row.source] for row in rows]), data, 0, seed=0)
    for name, rows in data.items():
        assert (found[name].cosine[0], found[name].to_english[0]) == (pytest.approx(1), 1)
        assert len(projection.pca[name]) == len(projection.tsne[name]) == len(rows)
    assert list(projection.pca) == ["German", "Swahili", "English"]
    assert projection.pca["English"] == projection.pca["German"]


# Inside the aligner and the gates


def recorded(model: LayAlignForCausalLM, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """What each language layer attends with, taken where the LLM hands it over."""
    found: dict[int, Any] = {}
    attend = OnePass.attend

    def spy(self: OnePass, layer: int, query: Any, residual: Any, scale: Any, overwrite: bool = False) -> Any:
        source = self.source
        if layer in source.layers:
            slot = source.layers.index(layer)
            found[slot] = (query, source.keys[slot], source.values[slot], source.mask, residual, scale)
        return attend(self, layer, query, residual, scale)  # which leaves the residual as it was

    monkeypatch.setattr(OnePass, "attend", spy)
    with torch.no_grad():
        model(**inputs)
    monkeypatch.undo()
    return found


VARIANTS = [
    {},
    {"llm": "llama_gqa_wide_heads", "language_layers": [2, 0], "encoder_layers": [3, 0, 4]},
    {"structure": "MLP", "fold_projections": "never"},
    {"llm": "gemma2"},  # scales its scores in its own way
    {"mask_encoder_padding": False},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_contribution_norms_are_the_references(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**changes)
    inputs = batch(model=model)
    inputs.pop("labels")
    calls = recorded(model, inputs, monkeypatch)
    found = contribution_norms(model, inputs)
    assert found.shape == (len(model.config.language_layers), *inputs["input_ids"].shape)
    inside = inputs["attention_mask"].bool()
    for slot, (query, key, value, mask, residual, scale) in calls.items():
        gate = model.cross_attention[slot].adaption_gate.detach()
        added = reference.gated_cross_attention(query, key, value, gate, key_mask=mask, scale=scale)
        expected = added.flatten(2).norm(dim=-1) / residual.flatten(2).norm(dim=-1)
        torch.testing.assert_close(found[slot][inside], expected[inside], rtol=1e-4, atol=1e-6)
        assert float(expected[inside].min()) > 1e-4
    assert not any(module._forward_hooks for module in model.cross_attention)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_attention_maps_are_the_softmax(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**changes)
    inputs = batch(model=model)
    inputs.pop("labels")
    calls = recorded(model, inputs, monkeypatch)
    found = attention_maps(model, inputs)
    assert found.shape == (len(calls), *inputs["input_ids"].shape, inputs["encoder_input_ids"].shape[1])
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:-1]))
    padding = ~inputs["encoder_attention_mask"].bool()
    if model.config.mask_encoder_padding:
        assert float(found.transpose(1, 2)[:, :, padding].abs().max()) == 0
    for slot, (query, key, _, mask, _, scale) in calls.items():
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        torch.testing.assert_close(found[slot], scores.softmax(dim=-1).mean(dim=1), rtol=1e-4, atol=1e-6)


def test_attention_to_more_tokens_than_a_head_is_wide() -> None:
    model = tiny_model()
    inputs = batch((21, 3, 17), (2, 4, 1), None, model)
    assert 21 > model.llm.config.head_dim == 8
    torch.testing.assert_close(
        attention_maps(model, inputs).sum(dim=-1)[:, 0], torch.ones(3, inputs["input_ids"].shape[1])
    )


def test_mix_weights_and_gates_in_their_places() -> None:
    model = tiny_model(encoder_layers=[4, 1], language_layers=[2, 0])
    with torch.no_grad():
        model.encoder_aligner.projector.fc1.weight.copy_(torch.arange(8.0).view(4, 2))
        for module, gate in zip(model.cross_attention, (0.5, -2.0), strict=True):
            module.adaption_gate.fill_(gate)
    keys, values = mix_weights(model)
    assert keys.tolist() == [[0, 1], [4, 5]]
    assert values.tolist() == [[2, 3], [6, 7]]
    assert gate_values(model) == [0.5, -2.0]
    assert mix_weights(tiny_model(language_layers=[])) is None


# Reading


def test_source_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert source_positions(mask, True, torch.tensor([2, 3])).int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0]]
    assert source_positions(mask, False, torch.tensor([2, 3])).int().tolist() == [
        [0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
    ]
    assert source_positions(mask, True).int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert source_positions(torch.tensor([[1, 1, 0]]), True).int().tolist() == [[0, 1, 0]]


def test_sentence_vectors_do_not_depend_on_the_batch_and_leave_out_the_first_token(parts: TinyParts) -> None:
    model, (encoder_tokenizer, llm_tokenizer) = build(parts), tokenizers()
    texts = SENTENCES["bn"]
    alone = Reader(model, encoder_tokenizer, llm_tokenizer, batch_size=3).llm_alone(texts)
    examples = [Example(text, "", "Bengali") for text in texts]
    read = Reader(model, encoder_tokenizer, llm_tokenizer, batch_size=3).through_encoder(examples)
    assert alone.shape == read.shape == (5, 3, 48)
    for row, text in enumerate(texts):
        ids = torch.tensor([[model.config.llm_bos_token_id, *llm_tokenizer(text)["input_ids"]]])
        source = torch.tensor([encoder_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = model.llm(input_ids=ids, output_hidden_states=True).hidden_states
            inside = model(encoder_input_ids=source, output_hidden_states=True).hidden_states
        for layer in range(3):
            torch.testing.assert_close(alone[row, layer], hidden[layer][0, 1:].mean(dim=0), rtol=1e-4, atol=1e-5)
            slots = inside[layer][0, 1 : 1 + source.shape[1]]  # [bos] [slots] [boundary]
            torch.testing.assert_close(read[row, layer], slots.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_untrained_is_without_the_trained_weights_and_then_they_are_back(parts: TinyParts) -> None:
    pytest.importorskip("peft")
    model = build(parts, lora={"r": 2, "target_modules": ["q_proj"]})
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    reader = Reader(model, *tokenizers())
    examples = [Example(text, "", "German") for text in SENTENCES["de"]]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trained, alone, seen = reader.through_encoder(examples), reader.llm_alone(["rot"]), []
    for seed in (0, 0, 1):
        with untrained(model, seed):
            assert gate_values(model) == [0.0, 0.0]
            assert not torch.equal(model.mapping.mlp.linear1.weight, before["mapping.mlp.linear1.weight"])
            seen.append(reader.through_encoder(examples))
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])
    assert not torch.allclose(seen[0], trained)
    assert torch.equal(reader.through_encoder(examples), trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    # The LLM alone is the one without LoRA.
    torch.testing.assert_close(alone, Reader(build(parts), *tokenizers()).llm_alone(["rot"]))


def test_sentences_are_cut_to_what_the_models_can_read(parts: TinyParts) -> None:
    model = build(parts)
    assert Reader(model, *tokenizers(), max_length=7).max_length == 7
    assert Reader(model, *tokenizers(), max_length=9999).max_length == (1024 - 2) // 2
    long = Example("ab" * 300, "cd" * 300, "German")
    assert Reader(model, *tokenizers(), max_length=9).through_encoder([long, long]).isfinite().all()


def test_labels_show_whole_characters() -> None:
    tokenizer = byte_tokenizer(add_eos=True)
    assert token_labels(tokenizer, tokenizer("a é 猫")["input_ids"]) == [
        "a", "␣", "é", CONTINUED, "␣", "猫", CONTINUED, CONTINUED, "</s>",
    ]  # fmt: skip
    broken = tokenizer("猫")["input_ids"][1:3]
    assert len(token_labels(tokenizer, broken)) == 2


# The whole


@pytest.fixture(scope="module")
def checkpoint(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build(parts, encoder_layers=[2, 0, 1], language_layers=[1, 0]).save_pretrained(folder)
    save_tokenizers(folder, *tokenizers())
    lines = [json.dumps({"step": step, "gates": [0.01 * step, -0.02 * step]}) for step in (0, 5, 10)]
    (folder / "gates.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(*arguments: object) -> int:
    from layalign.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_writes_a_page_that_stands_alone(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--pairs", folder, "--output", tmp_path, "--device", "cpu", "--sentence", "zh:2"]
    assert run("analyze", checkpoint, *arguments, "--before", "untrained", "--languages", "de,Chinese,bn") == 0
    assert "centred cosine" in re.sub(r"\s+", " ", capsys.readouterr().out)
    found = json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    assert found["sentences"] == {"German": 5, "Chinese": 5, "Bengali": 5}
    assert (found["language_layers"], found["encoder_layers"]) == ([1, 0], [2, 0, 1])
    assert np.shape(found["mix"]["keys"]) == np.shape(found["mix"]["values"]) == (2, 3)
    assert found["gates"] == pytest.approx([0.4, -0.3])
    assert found["gate_history"][-1] == {"step": 10, "gates": [0.1, -0.2]}
    assert list(found["contribution"]) == ["mean", "German", "Chinese", "Bengali"]
    assert list(found["similarity"]) == list(found["projections"]) == ["LLM alone", "untrained", "LayAlign"]
    assert all(
        len(found["similarity"]["LayAlign"]["German"][metric]) == 3 for metric in ("cosine", "cka", "to_english")
    )
    assert found["layer"] == 1
    points = found["projections"]["LayAlign"]
    assert np.shape(points["pca"]["English"]) == np.shape(points["tsne"]["Bengali"]) == (5, 2)
    attention = found["attention"]
    assert attention["columns"] == ["红", CONTINUED, CONTINUED, "</s>"]
    assert attention["rows"] == ["r", "e", "d", "</s>"]
    assert np.shape(attention["weights"]) == (2, 4, 4)
    assert np.sum(attention["weights"], axis=-1) == pytest.approx(np.ones((2, 4)), abs=1e-5)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "://" not in page and "<script" not in page
    assert set(re.findall(r'(?:src|href)="([a-z:/]+)', page)) == {"data:image/png"}
    assert ">红</text>" in page and "Gates now, and at every logged step" in page
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert page.count("<img ") == len(pictures) == 10
    assert {"mix", "gates", "contribution", "similarity", "pca", "tsne"} <= set(pictures)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_the_mean_is_over_positions(parts: TinyParts, folder: Path) -> None:
    model = build(parts)
    settings: dict[str, Any] = {"before": build(parts, structure="MLP"), "limit": 4, "generate": 3, "layer": 2}
    one, two = (analyze(model, *tokenizers(), str(folder), **settings) for _ in range(2))
    assert one.to_dict() == two.to_dict()
    assert list(one.sentences) == NAMES
    assert list(one.similarity) == ["LLM alone", "before", "LayAlign"]
    assert one.similarity["before"] != one.similarity["LayAlign"]
    assert one.similarity["LLM alone"]["German"].to_english != one.similarity["LLM alone"]["Bengali"].to_english
    assert one.gate_history is None and one.attention is not None and one.attention.generated
    assert len(one.attention.rows) <= 3
    assert one.contribution is not None
    alone = analyze(model, *tokenizers(), {"German": folder / "de.tsv"}, limit=4, batch_size=1)
    assert alone.contribution is not None
    assert alone.contribution["mean"] == alone.contribution["German"] == pytest.approx(one.contribution["German"], 1e-4)
    # Every language has the same English text, so the mean over positions is that of the languages.
    means = np.mean([one.contribution[name] for name in NAMES], axis=0)
    assert one.contribution["mean"] == pytest.approx(list(means))
    # By hand for one sentence: the English text and its end.
    (example, *_), tokenizer = read_pairs(str(folder))["German"], byte_tokenizer(add_eos=True)
    targets = [tokenizer(example.target)["input_ids"]]
    ids = torch.tensor([tokenizer(example.source)["input_ids"]])
    packed = model.build_inputs(torch.ones_like(ids), None, targets)
    packed.pop("labels")
    norms = contribution_norms(model, {**packed, "encoder_input_ids": ids})
    reader = Reader(model, *tokenizers())
    expected = norms[:, 0, -len(targets[0]) :].mean(dim=1).tolist()
    assert contributions(reader, {"German": [example]})["mean"] == pytest.approx(expected, 1e-4)  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"language_layers": []}, {"use_adapter": False}, {"mix": "shared", "fixed_gate": 1.0}], ids=str
)
def test_models_without_some_part(changes: dict[str, Any], parts: TinyParts, folder: Path, tmp_path: Path) -> None:
    model = LayAlignForCausalLM.from_encoder_and_llm(parts.encoder, parts.llm, **changes).eval()
    result = analyze(model, *tokenizers(), str(folder), tmp_path, before="untrained", limit=3)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(result.similarity) == {"LLM alone", "untrained", "LayAlign"}
    if changes == {"language_layers": []}:
        assert result.mix is result.gates is result.contribution is result.attention is None
        assert "This model has no aligner" in page and not (tmp_path / "mix.png").exists()
    else:
        assert "This model has no aligner" not in page and "no gates.jsonl" in page
        assert result.mix is not None and np.shape(result.mix["keys"]) == (2, len(model.config.encoder_layers))
        assert result.attention is not None and result.contribution is not None
    if "adapter" in changes:
        assert "no soft tokens" in page
        # Gates of 0: the LLM reads the text as it does alone.
        fused, alone = (result.similarity[view]["German"].cosine for view in ("LayAlign", "LLM alone"))
        assert fused == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_pictures_of_a_deep_model_and_many_languages(tmp_path: Path) -> None:
    draw, layers, names = np.random.default_rng(0), 14, [language.name for language in languages()[:22]]
    alike = {name: Similarity(*draw.uniform(-0.2, 0.9, (5, layers + 1)).tolist()) for name in names}
    points = {name: draw.normal(size=(3, 2)).tolist() for name in [*names, "English"]}
    result = AnalysisResult(
        sentences=dict.fromkeys(names, 3),
        settings={
            "checkpoint": None, "encoder": None, "llm": None, "llm_layers": layers, "structure": "MLP",
            "mix": "layer-wise", "adapter": True, "lora": False, "max_length": 9, "seed": 0, "versions": {},
        },
        language_layers=list(range(layers)),
        encoder_layers=list(range(24)),
        mix={"keys": np.zeros((layers, 24)).tolist(), "values": np.zeros((layers, 24)).tolist()},
        gates=[0.0] * layers,
        gate_history=[{"step": 3 * step, "gates": [0.1 * step] * layers} for step in range(4)],
        contribution={name: [0.0] * layers for name in ("mean", *names)},
        similarity={"LayAlign": alike},
        layer=3,
        projections={"LayAlign": Projection(points, points, [1.0], 2.0)},
        attention=None,
    )  # fmt: skip
    page = write_report(result, tmp_path).read_text(encoding="utf-8")
    assert page.count("<img ") == 10


def test_pairs_by_name_file_or_folder(folder: Path) -> None:
    found = read_pairs([f"Swahili={folder / 'de.tsv'}", folder / "bn.tsv"], limit=2)
    assert [(name, len(rows)) for name, rows in found.items()] == [("Swahili", 2), ("Bengali", 2)]
    assert found["Bengali"][0] == Example("এক দুই", "one two", "Bengali", "", "1")
    assert list(read_pairs(str(folder), languages=["zh", "German"])) == ["Chinese", "German"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "Klingon={}/de.tsv"], "pairs: expected the name or code of a known language, got 'Klingon'"),
        (["-p", "English={}/de.tsv"], "pairs: expected languages other than English, got "),
        (["-p", "{}", "-p", "de={}/bn.tsv"], "pairs: expected one file for German, got "),
        (["-p", "de={}/none.tsv"], "pairs: expected a file for German, got "),
        (["-p", "{}/none"], "pairs: expected NAME=FILE, a TSV file or a folder of them, got "),
        (["-p", "{}", "-l", "de,fr"], "languages: expected some of Bengali, German, Chinese, got French"),
        (["-p", "{}", "-l", "Klingon"], "languages: expected the name or code of a known language, got 'Klingon'"),
        (["-p", "{}", "--limit", "1"], "limit: expected a number >= 2, got 1"),
        (["-p", "{}", "--sentence", "x"], "sentence: expected a number or LANGUAGE:NUMBER, got 'x'"),
        (["-p", "{}"], "checkpoint: no such folder: nowhere"),
        ([], "Missing option '--pairs'"),
    ],
)
def test_errors_of_the_command(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run("analyze", "nowhere", *(argument.format(folder) for argument in arguments)) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {message}") and line.count("\n") == 1
    assert not (tmp_path / "analysis").exists()


def test_errors_of_files_and_arguments(
    parts: TinyParts, folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sw.tsv").write_text("moja\tone\nmbili two\n")
    with pytest.raises(DataError, match=r"sw\.tsv:2: 1 columns, expected 2"):
        read_pairs(str(tmp_path))
    (tmp_path / "sw.tsv").write_text("moja\tone\n")
    with pytest.raises(ArgumentError, match="pairs: expected at least 2 sentences of Swahili, got 1 in"):
        read_pairs(str(tmp_path))
    (tmp_path / "sw.tsv").rename(tmp_path / "qqq.tsv")
    with pytest.raises(ArgumentError, match="pairs: expected a file named after its language"):
        read_pairs(str(tmp_path))
    model = build(parts)
    for changes, message in (
        ({"layer": 3}, "layer: expected 0 (embeddings) to 2, got 3"),
        ({"sentence": 6}, "sentence: expected 1 to 5, the sentences of Bengali, got 6"),
        ({"sentence_language": "fr"}, "sentence_language: expected one of Bengali, German, Chinese, got 'fr'"),
        ({"before": "nothing"}, "before: expected 'untrained' or a LayAlign model, got 'nothing'"),
        ({"before": tiny_model()}, "before: expected the encoder vocabulary of the model, 260, got 64"),
        ({"batch_size": 0}, "batch_size: expected a number >= 1, got 0"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            analyze(model, *tokenizers(), str(folder), **changes)
    with pytest.raises(ArgumentError, match="model: expected a LayAlign model, got Linear"):
        analyze(torch.nn.Linear(1, 1), None, None, str(folder))
    assert run("analyze", checkpoint, "-p", folder, "--before", "nowhere", "-o", tmp_path / "x", "--device", "cpu") == 2
    assert capsys.readouterr().err.startswith("error: before: expected 'untrained' or a checkpoint, got")


@pytest.mark.slow
def test_importing_loads_neither_sklearn_nor_matplotlib() -> None:
    code = (
        "import sys, layalign, layalign.experiments.analysis\nfrom layalign.experiments.analysis import linear_cka\n"
        "print(sorted({'sklearn', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
