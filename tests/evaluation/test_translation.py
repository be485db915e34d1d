"""Translation in evaluation: sacrebleu's scores from sums of sentence statistics, intervals, runs and comparisons."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from helpers_text import byte_tokenizer, write_lines
from rich.console import Console
from tiny import tiny_encoder, tiny_llm

from layalign import LayAlignForCausalLM
from layalign.cli import main
from layalign.data import Example, LayAlignCollator
from layalign.evaluation import compare_runs, evaluate, llm_alone, translation
from layalign.evaluation.answering import ModelAnswers
from layalign.evaluation.likelihood import Likelihoods, target_log_probs
from layalign.evaluation.measures import Sentences
from layalign.evaluation.metrics import wilson_interval
from layalign.evaluation.store import prediction_path
from layalign.evaluation.translation import score_of, translation_scores
from layalign.modeling.tokenization import save_tokenizers
from layalign.utils.errors import ArgumentError, BackendError, DataError, NonFiniteError

OUTPUTS = ["The men went to work.", "I don't speak Japanese", "", "a", "Where is the station?"]
REFERENCES = ["The men have gone to work.", "I speak no Japanese.", "Nothing at all.", "a", "Where's the station?"]


def test_scores_are_those_of_sacrebleu() -> None:
    found = translation_scores(OUTPUTS, REFERENCES)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(OUTPUTS, [REFERENCES]).score, abs=1e-12)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(OUTPUTS, [REFERENCES]).score, abs=1e-12)
    assert 20 < found["bleu"] < found["chrf"] < 80
    assert found["signatures"]["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    # Any sentences, any number of times, from their statistics alone.
    for drawn in ([0, 0, 3], [2], [1, 4, 4, 0]):
        own = [[texts[i] for i in drawn] for texts in (OUTPUTS, REFERENCES)]
        sums = {name: found["statistics"][name][drawn].sum(axis=0) for name in ("chrf", "bleu")}
        assert score_of("chrf", sums["chrf"]) == pytest.approx(sacrebleu.corpus_chrf(own[0], [own[1]]).score, abs=1e-12)
        assert score_of("bleu", sums["bleu"]) == pytest.approx(sacrebleu.corpus_bleu(own[0], [own[1]]).score, abs=1e-12)
    assert set(translation_scores(["a"], ["a"], ["chrf"])) == {"chrf", "statistics", "signatures"}


def test_scores_of_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in [
        (("ab", ["a", "b"]), "outputs: expected a list of texts, got 'ab'"),
        ((["a"], [None]), "references: expected a list of texts"),
        (([], []), "outputs: expected one for each of the references, got 0, 0"),
        ((["a"], ["a", "b"]), "outputs: expected one for each of the references, got 1, 2"),
        ((["a"], ["a"], ["ter"]), "metrics: expected one of chrf, bleu"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            translation_scores(*arguments)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    translation.metric_of.cache_clear()
    with pytest.raises(BackendError, match=r"sacrebleu: not installed; pip install 'layalign\[translation\]'"):
        translation_scores(["a"], ["a"])


ENCODER, TEXT = byte_tokenizer(eos=True), byte_tokenizer()
WORDS = ("one", "two men", "three", "four or five", "six", "seven")
ENGLISH = {"Swahili": WORDS, "Thai": WORDS, "Klingon/old": ("yes", "no", "never")}
DATA = [
    Example(f"{language[:2]} {i} {'x' * (7 * i % 5)}", text, language, id=str(i))
    for language, texts in ENGLISH.items()
    for i, text in enumerate(texts)
]
EVERYTHING = ("chrf", "bleu", "nats", "nats-other-source", "right-one-of-3")


@pytest.fixture
def model() -> LayAlignForCausalLM:
    parts = tiny_encoder(vocab_size=len(TEXT)), tiny_llm(vocab_size=len(TEXT))
    torch.manual_seed(2)
    made = LayAlignForCausalLM.from_encoder_and_llm(*parts)
    with torch.no_grad():
        for module in made.cross_attention:
            module.adaption_gate.fill_(0.7)
    return made.eval()


def run(model: Any, out: Path, data: Any = DATA, task: str = "translation", **options: Any) -> Any:
    tokenizers = (ENCODER, TEXT) if hasattr(model, "encoder") else (None, None)
    return evaluate(model, *tokenizers, task, data, out, **{"max_new_tokens": 6, "batch_size": 2, **options})


def said(examples: list[Example]) -> list[str]:
    """Some translations that are right, some nearly, some not."""
    return [{"0": e.target, "1": e.target[1:] + "s", "4": ""}.get(e.id, "men of four") for e in examples]


@pytest.mark.slow
def test_every_measure_is_what_it_says(model: LayAlignForCausalLM, tmp_path: Path) -> None:
    result = run(model, tmp_path, measures=EVERYTHING)
    assert list(result.measures) == list(EVERYTHING)
    collator = LayAlignCollator.from_model(model, ENCODER, TEXT)
    for language, texts in ENGLISH.items():
        own = [example for example in DATA if example.language == language]
        entries = json.loads(prediction_path(tmp_path, language, ".json").read_text())
        outputs, references = [entry["output"] for entry in entries], [[entry["gold"] for entry in entries]]
        assert references == [list(texts)]
        answers = ModelAnswers(model, LayAlignCollator.from_model(model, ENCODER, TEXT, with_targets=False), 6)
        assert outputs == [answers([example])[0] for example in own]
        value = {name: result.measures[name].languages[language].value for name in EVERYTHING}
        assert value["chrf"] == pytest.approx(sacrebleu.corpus_chrf(outputs, references).score)
        assert value["bleu"] == pytest.approx(sacrebleu.corpus_bleu(outputs, references).score)
        for name, step in (("nats", 0), ("nats-other-source", 1)):
            asked = [replace(e, source=own[(i + step) % len(own)].source) for i, e in enumerate(own)]
            each = [target_log_probs(model, collator, [example])[0] for example in asked]
            assert value[name] == pytest.approx(-sum(v for v, _ in each) / sum(n for _, n in each), rel=1e-5)
            kept = [entry["measures"][name] for entry in entries]
            assert kept == [[pytest.approx(-v, rel=1e-4), n] for v, n in each]
        rights = []
        for start in range(0, len(own), 3):
            group = own[start : start + 3]
            table = np.array(
                [[target_log_probs(model, collator, [replace(t, source=s.source)])[0][0] for t in group] for s in group]
            )
            rights += (np.argmax(table - np.log(np.exp(table).sum(0)), axis=1) == np.arange(3)).tolist()
        assert [entry["measures"]["right-one-of-3"] for entry in entries] == rights
        assert value["right-one-of-3"] == pytest.approx(100 * np.mean(rights))
        low, high = wilson_interval(sum(rights), len(rights))
        found = result.measures["right-one-of-3"].languages[language]
        assert (found.low, found.high, found.count) == (pytest.approx(100 * low), pytest.approx(100 * high), len(own))
    assert len({result.measures["nats"].languages[name].value for name in ENGLISH}) == 3
    for name in EVERYTHING:
        scores = result.measures[name]
        assert scores.average.value == pytest.approx(np.mean([s.value for s in scores.languages.values()]))
        assert scores.average.low <= scores.average.value <= scores.average.high
        assert scores.average.count == 15
        assert scores.levels["joshi"]["low"].value == scores.languages["Swahili"].value
        assert list(scores.levels) == ["joshi"] and list(scores.levels["joshi"]) == ["medium", "low", "unlisted"]


def test_what_is_written(tmp_path: Path) -> None:
    result = run(said, tmp_path, model_name="x")
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    assert set(saved["measures"]) == {"chrf", "bleu"} and saved["scoring"]["chrf"].startswith("nrefs:1|")
    lines = (tmp_path / "scores.tsv").read_text().splitlines()
    score = result.measures["chrf"].languages["Swahili"]
    assert lines[0] == "language\tmeasure\tvalue\tlow\thigh\tcount"
    assert lines[1] == f"Swahili\tchrf\t{score.value:.4f}\t{score.low:.4f}\t{score.high:.4f}\t6"
    assert lines[4].startswith("Average\tchrf\t") and lines[4].endswith("\t15")
    assert any(line.startswith("Average joshi low\tbleu\t") for line in lines)
    console = Console(width=160, record=True)
    console.print(result.table())
    text = console.export_text()
    assert "translation: values with 95% intervals" in text
    assert f"{score.value:.2f} ({score.low:.2f} - {score.high:.2f})" in text and "Average joshi low" in text
    entries = json.loads((tmp_path / "predictions/Swahili.json").read_text())
    assert entries[0]["measures"] == {"chrf": 100.0} and entries[4]["measures"] == {"chrf": 0.0}
    assert entries[1]["measures"]["chrf"] == pytest.approx(
        sacrebleu.sentence_chrf("wo mens", ["two men"]).score, abs=1e-4
    )
    assert np.isnan(result.average) and result.scores == {}


@pytest.mark.slow
def test_intervals_are_a_bootstrap_over_sentences(tmp_path: Path) -> None:
    score = run(said, tmp_path, model_name="x").measures["chrf"].languages["Swahili"]
    generator = np.random.default_rng(5)
    outputs, drawn = said(DATA[:6]), []
    for _ in range(2000):  # sentences themselves, scored again
        rows = generator.integers(0, 6, 6)
        drawn.append(sacrebleu.corpus_chrf([outputs[i] for i in rows], [[WORDS[i] for i in rows]]).score)
    assert (score.low, score.high) == (
        pytest.approx(np.quantile(drawn, 0.025), abs=2.5),
        pytest.approx(np.quantile(drawn, 0.975), abs=2.5),
    )
    assert run(said, tmp_path, model_name="x").measures["chrf"].languages["Swahili"] == score


def test_languages_with_the_same_sentences_are_drawn_together() -> None:
    generator = np.random.default_rng(0)
    rows = np.stack([generator.random(50) * 9, np.ones(50)], axis=1)
    ids = [str(i) for i in range(50)]
    together = Sentences("nats", {"a": rows, "b": rows}, {"a": ids, "b": ids})
    alone = Sentences("nats", {"a": rows, "b": rows}, {"a": ids, "b": ids[::-1]})
    assert together.parallel and not alone.parallel
    widths = []
    for sentences in (together, alone):
        score = sentences.scores("translation").average
        widths.append(score.high - score.low)
    assert widths[0] == pytest.approx(
        together.scores("translation").languages["a"].high - together.scores("translation").languages["a"].low
    )
    assert widths[1] < 0.85 * widths[0]  # by the square root of two, if the languages are drawn by themselves


@pytest.mark.slow
def test_a_rerun_goes_on_and_may_measure_more(model: LayAlignForCausalLM, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[tuple[str, int]] = []
    real = Likelihoods.__call__

    def counting(self: Likelihoods, measure: str, examples: Any, numbers: Any) -> Any:
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append((measure, len(numbers)))
        return real(self, measure, examples, numbers)

    monkeypatch.setattr(Likelihoods, "__call__", counting)
    stop, measures = 5, ("nats", "right-one-of-2")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "a", measures=measures)
    assert asked == [("nats", 2)] * 3 + [("right-one-of-2", 2)] * 2
    stop = 10**6
    first = run(model, tmp_path / "a", measures=measures)
    assert len(asked) == 3 + 3 + 3 + 3 + 2 + 1
    # A half-written line is dropped, its example measured again.
    path = tmp_path / "a/predictions/Thai.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 9])
    asked.clear()
    assert run(model, tmp_path / "a", measures=measures).measures == first.measures
    assert asked == [("right-one-of-2", 2)]
    asked.clear()
    more = run(model, tmp_path / "a", measures=(*measures, "chrf", "nats-other-source"))
    assert set(asked) == {("nats-other-source", 2), ("nats-other-source", 1)}
    assert {name: more.measures[name] for name in measures} == first.measures
    for line in (b'{"index": 0, "measure": "nats", "values": [NaN]}\n', b'{"index": 0, "measure": 1, "values": [1]}\n'):
        path.write_bytes(line + whole)
        with pytest.raises(DataError, match=r"Thai.jsonl:1: a damaged line"):
            run(model, tmp_path / "a", measures=measures)


def test_an_llm_alone_with_examples(tmp_path: Path) -> None:
    llm = tiny_llm(vocab_size=len(TEXT), max_position_embeddings=512)
    shots = [Example("moja", "one!", name) for name in ENGLISH]
    alone = llm_alone(llm, TEXT, examples=shots, max_new_tokens=6)
    result = run(alone, tmp_path, measures=EVERYTHING)
    each = target_log_probs(alone.llm, alone.collator, DATA[:6])
    value = result.measures["nats"].languages["Swahili"].value
    assert value == pytest.approx(-sum(v for v, _ in each) / sum(n for _, n in each), rel=1e-5)
    entries = json.loads((tmp_path / "predictions/Swahili.json").read_text())
    assert [entry["output"] for entry in entries] == alone(DATA[:6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ["ter"]}, "measures: expected some of chrf, bleu, nats, nats-other-source, right-one-of-N"),
        ({"measures": ["right-one-of-1"]}, "measures: expected some of"),
        ({"measures": ["right-one-of-1001"]}, "measures: expected some of"),
        ({"measures": "chrf"}, "measures: expected a list of measures, got 'chrf'"),
        ({"measures": []}, "measures: expected a list of measures"),
        ({"measures": ["nats"]}, r"model: expected a LayAlign model or llm_alone\(...\) for nats, got said"),
        ({"measures": ["right-one-of-4"]}, "measures: expected at least 4 Klingon/old examples for right-one-of-4"),
        ({"task": "tsv", "measures": ["chrf"]}, r"measures: expected none for the scorer text, got \['chrf'\]"),
        ({"stage": "third"}, "stage: expected one of translation, task, got 'third'"),
    ],
)  # fmt: skip
def test_impossible_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(said, tmp_path, **options)
    assert not (tmp_path / "settings.json").exists()


def test_one_source_alone_has_no_other(model: LayAlignForCausalLM, tmp_path: Path) -> None:
    same = [Example("a", "b", "Thai"), Example("a", "c", "Thai")]
    with pytest.raises(ArgumentError, match="data: expected different Thai sources for nats-other-source, all are one"):
        run(model, tmp_path / "a", same, measures=["nats-other-source"])
    with pytest.raises(ArgumentError, match="measures: expected at least 2 Thai examples for nats-other-source, got 1"):
        run(model, tmp_path / "b", same[:1], measures=["nats-other-source"])


def test_likelihoods_that_are_not_finite(tmp_path: Path) -> None:
    parts = tiny_encoder(vocab_size=len(TEXT)), tiny_llm(vocab_size=len(TEXT))
    broken = LayAlignForCausalLM.from_encoder_and_llm(*parts).eval()
    with torch.no_grad():
        broken.encoder.get_input_embeddings().weight[TEXT("Z")["input_ids"][0]] = float("nan")
    data = [Example("Z", "a", "Thai", id="1"), Example("b", "b", "Thai", id="2"), Example("cc", "c", "Thai", id="3")]
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"for Thai example 1 of 3 \(id '1', 'Z'\)$"):
            run(broken, tmp_path / "a", data, measures=["nats"], non_finite="fail")
    kept = (tmp_path / "a/predictions/Thai.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in kept) == [1, 2]  # nothing is lost
    result = run(broken, tmp_path / "b", data, measures=["chrf"], non_finite="fail")
    assert result.failed == 1 == json.loads((tmp_path / "b/scores.json").read_text())["failed"]
    assert json.loads((tmp_path / "b/predictions/Thai.json").read_text())[0]["output"] is None


# Two runs


def better(examples: list[Example]) -> list[str]:
    return [e.target if e.id in "013" else "men of four" for e in examples]


def test_two_runs_are_compared_by_sentence(tmp_path: Path) -> None:
    run(said, tmp_path / "a", model_name="a")
    run(better, tmp_path / "b", [e for e in DATA if e.language != "Thai"], model_name="b", measures=["chrf"])
    found = compare_runs(tmp_path / "a", tmp_path / "b", seed=3)
    assert list(found.measures) == ["chrf"] and found.only_in_a == ("Thai",)
    row = found.measures["chrf"].languages["Swahili"]
    texts = said(DATA[:6]), better(DATA[:6])
    values = [sacrebleu.corpus_chrf(outputs, [list(WORDS)]).score for outputs in texts]
    assert (row.a, row.b, row.difference) == pytest.approx((*values, values[1] - values[0]))
    generator, drawn = np.random.default_rng(3), []
    for times in generator.multinomial(6, [1 / 6] * 6, size=1000):
        rows = np.repeat(np.arange(6), times)
        refs = [[WORDS[i] for i in rows]]
        a, b = (sacrebleu.corpus_chrf([outputs[i] for i in rows], refs).score for outputs in texts)
        drawn.append(b - a)
    assert (row.low, row.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert row.p == pytest.approx(2 * (1 + sum(d <= 0 for d in drawn)) / 1001)
    assert row.p_holm is not None and row.p_holm >= row.p
    pooled = found.measures["chrf"].pooled
    assert pooled.count == 9 and pooled.p_holm is None
    assert found.measures["chrf"].levels["joshi"]["low"].difference == row.difference
    same = compare_runs(tmp_path / "a", tmp_path / "a").measures["bleu"].pooled
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.slow
def test_likelihoods_of_two_runs(model: LayAlignForCausalLM, tmp_path: Path, capsys: Any) -> None:
    measures = ("nats", "right-one-of-3")
    first = run(model, tmp_path / "a", measures=measures, model_name="a")
    with torch.no_grad():
        model.cross_attention[0].adaption_gate.fill_(-0.7)
    second = run(model, tmp_path / "b", measures=measures, model_name="b")
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    for name in measures:
        for language, row in found.measures[name].languages.items():
            values = [result.measures[name].languages[language].value for result in (first, second)]
            assert (row.a, row.b) == (pytest.approx(values[0]), pytest.approx(values[1]))
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "c.json")])
    out = capsys.readouterr().out
    assert "nats (less is better)" in out and "all 3" in out and "settings that differ: model" in out
    assert json.loads((tmp_path / "c.json").read_text()) == found.to_dict()
    run(said, tmp_path / "c", model_name="c")
    with pytest.raises(ArgumentError, match="run_b: expected a measure that run_a has, got nats, right-one-of-3 and"):
        compare_runs(tmp_path / "a", tmp_path / "c")
    path = tmp_path / "b/predictions/Thai.json"
    whole = json.loads(path.read_text())
    for wrong in ([1.0], [1.0, 0], ["a", 1], None, [True, 3], [1e999, 2]):
        path.write_text(json.dumps([{**whole[0], "measures": {**whole[0]["measures"], "nats": wrong}}, *whole[1:]]))
        with pytest.raises(DataError, match=r"Thai.json:1: not "):
            compare_runs(tmp_path / "a", tmp_path / "b")


# Labels by likelihood

XNLI = ("entailment", "neutral", "contradiction")
QUESTIONS = [
    Example(f"p{i}", XNLI[i % 3], name, f"q{i}", str(i), XNLI) for name in ("Swahili", "Thai") for i in range(5)
]


@pytest.mark.parametrize("scorer", ["label-likelihood", "label-likelihood-mean"])
def test_labels_by_likelihood(model: LayAlignForCausalLM, tmp_path: Path, scorer: str) -> None:
    result = run(model, tmp_path, QUESTIONS, "xnli", scorer=scorer)
    collator = LayAlignCollator.from_model(model, ENCODER, TEXT, stage="task")
    chosen = []
    for example in QUESTIONS[:5]:
        each = [target_log_probs(model, collator, [replace(example, target=label)])[0] for label in XNLI]
        values = [value / count if scorer.endswith("mean") else value for value, count in each]
        chosen.append(XNLI[values.index(max(values))])
    entries = json.loads((tmp_path / "predictions/Swahili.json").read_text())
    assert [entry["parsed"] for entry in entries] == chosen
    assert entries[0]["log_probs"]["neutral"][1] == 8 and "output" not in entries[0]
    right = sum(label == example.target for label, example in zip(chosen, QUESTIONS, strict=False))
    low, high = wilson_interval(right, 5)
    score = result.scores["Swahili"]
    assert (score.correct, score.accuracy) == (right, 20 * right)
    assert (score.low, score.high) == (pytest.approx(100 * low), pytest.approx(100 * high))
    assert result.scoring["scorer"] == scorer
    assert compare_runs(tmp_path, tmp_path).pooled.difference == 0
    run(lambda batch: ["neutral"] * len(batch), tmp_path / "b", QUESTIONS, "xnli", model_name="x")
    with pytest.raises(ArgumentError, match="run_b: expected answers scored as those of run_a"):
        compare_runs(tmp_path, tmp_path / "b")


def test_labels_of_equal_likelihood_are_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = tiny_llm(vocab_size=len(TEXT))
    with torch.no_grad():
        llm.lm_head.weight.zero_()  # all tokens alike
    labels = ("yes", "no", "why")
    data = [Example("a", "no", "Thai", "a", "1", labels), Example("b", "yes", "Thai", "b", "2", labels)]
    with caplog.at_level("WARNING", "layalign"):
        result = run(llm_alone(llm, TEXT), tmp_path / "a", data, "xnli", scorer="label-likelihood")
        means = run(llm_alone(llm, TEXT), tmp_path / "b", data, "xnli", scorer="label-likelihood-mean")
    assert (result.scores["Thai"].correct, means.scores["Thai"].correct) == (1, 0)  # the shortest label; none
    assert caplog.messages == ["Thai: 2 of 2 questions have two best labels; none is their answer"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((), "expected several different labels, none of them empty"),
        (("a", " "), "expected several different labels, none of them empty"),
        (("a", "a"), "expected several different labels, none of them empty"),
        (("b", "c"), "expected the right label among b, c, got 'a'"),
    ],
)
def test_labels_that_cannot_be_chosen(choices: tuple[str, ...], message: str, tmp_path: Path) -> None:
    data = [Example("q", "a", "Thai", "q", "7", choices)]
    with pytest.raises(ArgumentError, match=f"data: the Thai example '7': {message}"):
        run(llm_alone(tiny_llm(vocab_size=len(TEXT)), TEXT), tmp_path, data, "xnli", scorer="label-likelihood")


def test_the_command(model: LayAlignForCausalLM, tmp_path: Path, capsys: Any) -> None:
    model.save_pretrained(tmp_path / "model", save_frozen=True)
    save_tokenizers(tmp_path / "model", ENCODER, TEXT)
    write_lines(tmp_path / "data/sw.tsv", "moja\tone", "mbili\ttwo", "tatu\tthree")
    arguments = ["evaluate", "-c", str(tmp_path / "model"), "-t", "translation", "-d", f"pairs:{tmp_path / 'data'}"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "-o", str(tmp_path / "out"), "-m", "chrf,nats,right-one-of-3", "--max-new-tokens", "3"])
    out = capsys.readouterr().out
    assert stop.value.code in (0, None) and "right-one-of-3" in out and "Swahili" in out
    assert list(json.loads((tmp_path / "out/scores.json").read_text())["measures"]) == [
        "chrf",
        "nats",
        "right-one-of-3",
    ]
    assert json.loads((tmp_path / "out/settings.json").read_text())["settings"]["stage"] == "translation"
