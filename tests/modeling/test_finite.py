"""Logits that are NaN or infinite never become an answer: generation, evaluation and the command name the sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_text import byte_tokenizer, write_lines
from tiny import batch, open_gates, tiny_encoder, tiny_llm, tiny_model
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from layalign import LayAlignForCausalLM
from layalign.data import Example
from layalign.evaluation import compare_runs, evaluate, llm_alone
from layalign.utils.errors import ArgumentError, DataError, NonFiniteError

TOKENIZER, ENCODER = byte_tokenizer(), byte_tokenizer(eos=True)


def poisoned(model: LayAlignForCausalLM, token: int, value: float = float("nan")) -> LayAlignForCausalLM:
    """Sources that hold the token overflow in the encoder, as in fp16."""
    with torch.no_grad():
        model.encoder.get_input_embeddings().weight[token] = value
    return model


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    return model.generate(**inputs, **{"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3}, {"return_dict_in_generate": True},
    ],
)  # fmt: skip
def test_generate_names_the_rows_and_keeps_the_others(settings: dict[str, Any]) -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    token = int(inputs["encoder_input_ids"][1, 0])
    others = inputs["encoder_input_ids"] == token
    others[1] = False
    inputs["encoder_input_ids"][others] = 5 if token != 5 else 6
    torch.manual_seed(0)
    clean = generate(model, inputs, **settings)
    torch.manual_seed(0)
    with pytest.raises(NonFiniteError, match="finite logits, got NaN or infinity for row 1 of 3") as stopped:
        generate(poisoned(model, token), inputs, **settings)
    assert stopped.value.rows == (1,)
    if not settings.get("do_sample"):
        found, wanted = (getattr(output, "sequences", output) for output in (stopped.value.output, clean))
        assert torch.equal(found[[0, 2]], wanted[[0, 2]])


def put_into_logits(model: LayAlignForCausalLM, changes: dict[int, dict[int, tuple[int, float]]]) -> None:
    """``{step: {row: (token, logit)}}``, written over what the head gives."""
    steps = iter(range(1000))

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for row, (token, logit) in changes.get(next(steps), {}).items():
            output[row, -1, token] = logit
        return output

    model.llm.lm_head.register_forward_hook(hook)


def test_what_comes_after_the_end_of_a_row_does_not_count() -> None:
    model, nan = tiny_model(), float("nan")
    inputs = batch(model=model, targets=None)
    put_into_logits(model, {1: {0: (2, 1e4)}, 2: {0: (7, nan)}, 3: {0: (7, nan)}})
    generate(model, inputs)  # row 0 has ended in step 1
    model = tiny_model()
    put_into_logits(model, {2: {0: (7, nan)}})  # in one step alone, and gone in the next
    with pytest.raises(NonFiniteError, match="row 0 of 3"):
        generate(model, inputs)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinity_counts_where_no_token_is_the_likeliest(value: float) -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    put_into_logits(model, {0: {2: (slice(None) if value < 0 else 7, value)}})
    with pytest.raises(NonFiniteError, match="row 2 of 3"):
        generate(model, inputs)
    model = tiny_model()
    put_into_logits(model, {0: {2: (7, -float("inf"))}})  # a token that is ruled out
    assert generate(model, inputs, suppress_tokens=[5, 6], bad_words_ids=[[4, 9]]).shape[0] == 3


def test_other_logits_processors_and_a_replacement_by_transformers_work_as_before() -> None:
    class Always(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill(1, torch.tensor([9]), 1e4)

    model = tiny_model()
    inputs = batch(model=model, targets=None)
    width, mine = inputs["input_ids"].shape[1], LogitsProcessorList([Always()])
    found = generate(model, inputs, logits_processor=mine)
    ids = inputs.pop("input_ids")
    assert (found[:, width:] == 9).all() and len(mine) == 1
    assert torch.equal(model.generate(ids, None, mine, **inputs, max_new_tokens=5, pad_token_id=0), found)
    nan = poisoned(tiny_model(), int(inputs["encoder_input_ids"][0, 0]))
    assert len(generate(nan, {**inputs, "input_ids": ids}, remove_invalid_values=True)) == 3


# Evaluation


@pytest.fixture(scope="module")
def model() -> LayAlignForCausalLM:
    """Not finite where the source has a Z."""
    parts = tiny_encoder(vocab_size=len(TOKENIZER)), tiny_llm(vocab_size=len(TOKENIZER), max_position_embeddings=256)
    torch.manual_seed(2)
    joined = LayAlignForCausalLM.from_encoder_and_llm(*parts)
    open_gates(joined)
    return poisoned(joined.eval(), ENCODER("Z")["input_ids"][0])


def asked(model: Any, data: Any, out: Path, task: str = "mgsm", **options: Any) -> Any:
    tokenizers = (ENCODER, TOKENIZER) if isinstance(model, LayAlignForCausalLM) else (None, None)
    return evaluate(model, *tokenizers, task, data, out, **{"max_new_tokens": 3, **options})


def test_evaluation_stops_and_names_the_example(model: LayAlignForCausalLM, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_lines(data / "mgsm_sw.tsv", "moja?\t5", "mbili Z?\t0", "tatu Z?\t0")
    for _ in range(2):  # a rerun too
        with pytest.raises(
            NonFiniteError, match=r"Swahili example 2 of 3 \(id '2', 'mbili Z\?'\) and 1 more; non_finite="
        ):
            asked(model, str(data), tmp_path / "out")
    kept = (tmp_path / "out/predictions/Swahili.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in kept] == [0]  # nothing is lost
    result = asked(model, str(data), tmp_path / "out", non_finite="fail")
    score = result.scores["Swahili"]
    assert (score.correct, score.count, score.failed) == (0, 3, 2)
    assert json.loads((tmp_path / "out/scores.json").read_text())["languages"]["Swahili"]["failed"] == 2
    assert "2 answers failed" in str(result.table().title)
    predictions = json.loads((tmp_path / "out/predictions/Swahili.json").read_text(), parse_constant=pytest.fail)
    assert [(p["output"] is None, p["parsed"] is None, p["correct"]) for p in predictions][1:] == [
        (True, True, False)
    ] * 2
    assert asked(model, str(data), tmp_path / "out", non_finite="fail").scores["Swahili"].failed == 2
    with pytest.raises(NonFiniteError, match="Swahili example 2"):  # what failed is asked again
        asked(model, str(data), tmp_path / "out")
    with pytest.raises(ArgumentError, match="non_finite: expected one of stop, fail, got 'ignore'"):
        asked(model, str(data), tmp_path / "out", non_finite="ignore")


@pytest.mark.parametrize("task", ["xnli", "tsv"])
def test_a_failed_answer_equals_no_label_and_no_text(model: LayAlignForCausalLM, tmp_path: Path, task: str) -> None:
    examples = [Example("Z", "", "Thai", "p", "1", ("", "a"))]
    assert asked(model, examples, tmp_path, task, non_finite="fail").scores["Thai"].correct == 0


def test_the_llm_alone_is_looked_at_too(tmp_path: Path) -> None:
    llm = tiny_llm(vocab_size=len(TOKENIZER), max_position_embeddings=256)
    with torch.no_grad():
        llm.model.embed_tokens.weight[TOKENIZER("Z")["input_ids"][0]] = float("inf")
    examples = [Example(text, "0", "Thai", text) for text in ("ab", "aZ", "b")]
    answer = llm_alone(llm, TOKENIZER, max_new_tokens=3)
    assert [text is None for text in answer(examples)] == [False, True, False]
    with pytest.raises(NonFiniteError, match="Thai example 2 of 3"):
        asked(answer, examples, tmp_path)


@pytest.mark.parametrize(
    ("scorer", "output", "right"),
    [
        ("number", "", False), ("number", " \n", False), ("number", "0", True), ("number", "none", True),
        ("signed-number", "", False), ("signed-number", "none", False), ("signed-number", "it is 0", True),
    ],
)  # fmt: skip
def test_an_empty_answer_is_not_zero(tmp_path: Path, scorer: str, output: str, right: bool) -> None:
    examples = [Example("q", "0", "Thai", "q", "1")]
    result = evaluate(
        lambda rows: [output] * len(rows), None, None, "mgsm", examples, tmp_path, scorer=scorer, model_name="m"
    )
    assert result.scores["Thai"].correct == right


def test_answers_and_gold_values_are_read_in_their_language(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/mgsm_de.tsv", "a\t1.234", "b\t12,5", "c\t114,200", "d\t-5")
    say = {"a": "Es sind 1.234 Euro", "b": "12,5", "c": "114.200", "d": "−5"}

    def answer(rows: list[Example]) -> list[str]:
        return [say[row.source] for row in rows]

    def score(**options: Any) -> int:
        out = tmp_path / str(options)
        return asked(answer, str(tmp_path / "data"), out, model_name="m", **options).scores["German"].correct

    assert score(scorer="signed-number") == 4
    assert score() == 1  # the published rule sees 1.234, 125, 114.2 and 5


def test_a_comparison_takes_nothing_but_true_and_false(tmp_path: Path) -> None:
    examples = [Example("q", "1", "Thai", "q", "1")]
    for name in "ab":
        asked(lambda rows: ["1"] * len(rows), examples, tmp_path / name, model_name="m")
    file = tmp_path / "b/predictions/Thai.json"
    for value in ("NaN", "0.5", '"false"', "null", "2"):
        file.write_text(f'[{{"id": "1", "correct": {value}}}]')
        with pytest.raises(DataError, match=r"Thai\.json:1: not the predictions"):
            compare_runs(tmp_path / "a", tmp_path / "b")


def test_the_command_answers_the_other_sources_and_names_the_one_that_failed(
    model: LayAlignForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from layalign.cli import main
    from layalign.modeling.tokenization import save_tokenizers

    model.save_pretrained(tmp_path)
    save_tokenizers(str(tmp_path), ENCODER, TOKENIZER)
    command = [
        "generate",
        "-c",
        str(tmp_path),
        "--json",
        "--max-new-tokens",
        "3",
        "--device",
        "cpu",
        "--task",
        "source",
    ]
    for extra, sources in (((), ("ab", "cZ", "de")), (("--stream",), ("Z",))):
        arguments = [word for word in command if word != "--json" or not extra]
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *extra, *(part for text in sources for part in ("-s", text))])
        told = capsys.readouterr()
        assert stopped.value.code == 2
        assert f"expected finite logits, got NaN or infinity for '{sources[len(sources) // 2]}'" in told.err
        if not extra:
            assert [json.loads(line)["source"] for line in told.out.splitlines()] == ["ab", "de"]
