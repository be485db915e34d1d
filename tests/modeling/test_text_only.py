"""Slots are no text: processors, criteria and streamers see what a run on the text alone shows them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from text_only_model import TextOnly, characters
from tiny import batch, row, tiny_model
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from layalign import ArgumentError
from layalign.utils.versions import cache_of

FILLERS = {"pad": 0, "eos": 2, "a word": 9}
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": dict(repetition_penalty=1.8),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=1),
    "encoder_repetition_penalty": dict(encoder_repetition_penalty=30.0),
    "encoder_no_repeat_ngram_size": dict(encoder_no_repeat_ngram_size=1),
    "bad_words_ids": dict(bad_words_ids=[[n, 33] for n in (0, 2, 9)] + [[n, n + 1] for n in range(10, 60)]),
    "sequence_bias": dict(sequence_bias=[[[n, 33], 20.0] for n in (0, 2, 9)] + [[[1, 34], 20.0]]),
    "exponential_decay_length_penalty": dict(exponential_decay_length_penalty=(1, 3.0)),
    "min_new_tokens": dict(min_new_tokens=2, sequence_bias=[[[2], 50.0]]),
    "forced_bos_token_id": dict(forced_bos_token_id=40),
    "forced_eos_token_id": dict(forced_eos_token_id=2),
    "begin_suppress_tokens": dict(begin_suppress_tokens=list(range(30, 64))),
    "watermarking_config": dict(watermarking_config=WatermarkingConfig(bias=6.0, greenlist_ratio=0.3)),
    "a stateful watermark": dict(
        watermarking_config=SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=2),
    ),
    "prefix_allowed_tokens_fn": dict(
        prefix_allowed_tokens_fn=lambda number, ids: [5 + len(ids) % 3, 20 + int(ids.sum()) % 7]
    ),
    "stop_strings": dict(stop_strings=[a + chr(65 + n) for a in "Fd" for n in range(60)], tokenizer=characters()),
    "beams": dict(num_beams=3, repetition_penalty=1.8, no_repeat_ngram_size=2),
    "beams that stop": dict(num_beams=2, stop_strings=[chr(65 + n) for n in range(30)], tokenizer=characters()),
    "warpers": dict(temperature=2.0, repetition_penalty=1.5, renormalize_logits=True),
}


@functools.cache
def model_with(filler: int) -> Any:
    return tiny_model(source_token_id=filler)


GREEDY: dict[str, Any] = dict(max_new_tokens=4, eos_token_id=2, pad_token_id=0, do_sample=False)
SCORES: dict[str, Any] = dict(return_dict_in_generate=True, output_scores=True)


def answers(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    return model.generate(**inputs, **{**GREEDY, **settings})[:, inputs["input_ids"].shape[1] :]


def require_text_runs(model: Any, inputs: dict[str, Tensor], found: Any, **settings: Any) -> None:
    """Every step's scores in ``found``, and so the tokens, are what transformers gives for each row's text alone."""
    for index, tokens in enumerate(found.sequences[:, inputs["input_ids"].shape[1] :]):
        text = TextOnly(model, inputs, index)
        expected = text.generate(text.text, use_cache=False, **{**GREEDY, **SCORES, **settings})
        new = expected.sequences[0, text.text.shape[1] :]
        assert tokens[: len(new)].tolist() == new.tolist()
        assert set(tokens[len(new) :].tolist()) <= {0, 2}  # beam search fills with the end token
        for step, scores in enumerate(expected.scores):
            same = found.scores[step][index * len(scores) : (index + 1) * len(scores)]
            torch.testing.assert_close(same, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_processor_sees_the_text_alone(name: str, filler: str) -> None:
    model, settings = model_with(FILLERS[filler]), SETTINGS[name]
    inputs = batch(model=model, targets=None)
    found = model.generate(**inputs, **{**GREEDY, **SCORES, **settings})
    require_text_runs(model, inputs, found, **settings)


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.8}, {"stop_strings": ["Q", "F"], "tokenizer": 0}])
@pytest.mark.parametrize("kind", ["no adapter", "no bos", "padding attended to"])
def test_other_layouts(kind: str, settings: dict[str, Any]) -> None:
    changes: dict[str, Any] = {
        "no adapter": dict(use_adapter=False, use_prompt=True),
        "no bos": {},
        "padding attended to": dict(mask_encoder_padding=False),
    }[kind]
    if "tokenizer" in settings:
        settings = {**settings, "tokenizer": characters()}
    model = tiny_model(source_token_id=9, **changes)
    if kind == "no bos":
        model.config.llm_bos_token_id = None
    inputs = batch(model=model, targets=None, prompts=(2, 4, 1))
    if kind == "padding attended to":  # then a row alone is another question
        inputs = row(inputs, 1)
    found = model.generate(**inputs, **{**GREEDY, **SCORES, **settings})
    require_text_runs(model, inputs, found, **settings)


def test_lengths_count_packed_positions() -> None:
    model = model_with(0)
    inputs = batch(model=model, targets=None)
    width = inputs["input_ids"].shape[1]
    ends = dict(sequence_bias=[[[2], 50.0]])  # would end at once
    assert answers(model, inputs, max_new_tokens=None, max_length=width + 5, eos_token_id=[]).shape[1] == 5
    found = answers(model, inputs, min_length=width + 3, max_new_tokens=7, **ends)
    assert (found[:, :3] != 2).all() and (found[:, 3] == 2).all() and found.shape[1] == 4


class Spy(LogitsProcessor):
    """Keeps what it sees, and in its own third call forces a token."""

    def __init__(self, packed: bool = False) -> None:
        self.seen: list[Tensor] = []
        self.calls = 0
        self.packed_ids = packed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids)
        self.calls += 1
        return scores if self.calls != 3 else torch.full_like(scores, -1e9).index_fill(1, torch.tensor([7]), 0.0)


class Stop(StoppingCriteria):
    """Keeps what it sees, and ends a row that has a given token in its text."""

    def __init__(self, token: int, packed: bool = False) -> None:
        self.seen: list[Tensor] = []
        self.token, self.packed_ids = token, packed

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids)
        assert scores is None or len(scores[0]) == len(input_ids)
        return (input_ids == self.token).any(dim=1)


def test_processors_and_criteria_of_the_caller() -> None:
    model = model_with(9)
    inputs = batch(model=model, targets=None)
    spy, stop = Spy(), Stop(9)
    settings = {**GREEDY, **SCORES, "eos_token_id": []}
    output = model.generate(**inputs, logits_processor=LogitsProcessorList([spy]), stopping_criteria=[stop], **settings)
    found = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert found.shape[1] == 4 and (found[:, 2] == 7).all()  # each group counts its own calls
    for index in range(3):
        text = [*TextOnly(model, inputs, index).text[0].tolist(), *found[index, :3].tolist()]
        for size in range(len(text) - 3, len(text) + 1):
            assert any(text[:size] in seen.tolist() for seen in spy.seen)
        assert any(text in seen.tolist() for seen in stop.seen)

    spy, stop = Spy(packed=True), Stop(9, packed=True)
    output = model.generate(**inputs, logits_processor=[spy], stopping_criteria=[stop], **settings)
    assert torch.equal(spy.seen[0], inputs["input_ids"])
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + 1  # ended by the slots

    model.generate(**row(inputs, 1), max_new_tokens=3, logits_processor=[spy := Spy()], do_sample=False)
    assert spy.calls == 3  # one row: the object itself
    given = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8)])
    found = model.generate(**inputs, **GREEDY, **SCORES, logits_processor=given)
    require_text_runs(model, inputs, found, repetition_penalty=1.8)


def test_a_processor_for_the_whole_batch_is_told_so() -> None:
    class ForAll(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores + torch.zeros(3, 1)

    model = model_with(0)
    inputs = batch(model=model, targets=None)
    with pytest.raises(ArgumentError, match=r"logits_processor: expected \(1, 64\) from ForAll, got \(3, 64\)"):
        answers(model, inputs, logits_processor=[ForAll()])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_allowed_tokens_are_asked_for_by_the_row_of_the_batch(settings: dict[str, Any]) -> None:
    model = model_with(0)
    inputs = batch(model=model, targets=None, prompts=(2, 4, 1))
    texts = [TextOnly(model, inputs, index).text[0].tolist() for index in range(3)]
    numbers: dict[int, set[int]] = {}

    def allowed(number: int, ids: Tensor) -> list[int]:
        (sample,) = (n for n, text in enumerate(texts) if ids[: len(text)].tolist() == text)
        numbers.setdefault(sample, set()).add(number)
        return [10 + sample]

    found = answers(model, inputs, prefix_allowed_tokens_fn=allowed, max_new_tokens=2, **settings)
    times = len(found) // 3
    assert found[:, 0].tolist() == [10 + sample for sample in range(3) for _ in range(times)]
    seen = sorted(number for each in numbers.values() for number in each)
    assert seen == list(range(len(seen)))  # 0 to 2, or one number for each sequence


@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_gets_the_text_of_the_prompt_first(rows: int) -> None:
    class Collector:
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value)

        def end(self) -> None:
            self.pieces.append(torch.tensor([-1]))

    model = model_with(9)
    inputs = batch(model=model, targets=None)
    inputs = row(inputs, 1) if rows == 1 else inputs
    collector = Collector()
    found = answers(model, inputs, streamer=collector, eos_token_id=[])
    texts = [TextOnly(model, inputs, index).text[0].tolist() for index in range(rows)]
    width = max(map(len, texts))
    assert collector.pieces[0].tolist() == [[9] * (width - len(text)) + text for text in texts]
    assert torch.equal(torch.stack(collector.pieces[1:-1], dim=1).view(rows, -1), found)


def test_a_continued_sequence_hides_its_slots_too() -> None:
    model = model_with(9)
    inputs = row(batch(model=model, targets=None), 0)
    settings = dict(repetition_penalty=1.8, eos_token_id=[])
    first = model.generate(**inputs, **{**GREEDY, **SCORES, **settings})
    more = torch.cat([first.sequences, torch.tensor([[5, 7, 11]])], dim=1)
    found = model.generate(input_ids=more, past_key_values=cache_of(first), **{**GREEDY, **SCORES, **settings})
    whole = dict(inputs, input_ids=more, attention_mask=torch.ones_like(more))
    require_text_runs(model, whole, found, **settings)
