"""Log-probabilities of given texts against loops over the logits in float64, and what is decided by them."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from helpers_text import byte_tokenizer
from tiny import tiny_encoder, tiny_llm

from layalign import LayAlignForCausalLM
from layalign.data import Example, LayAlignCollator
from layalign.data.prompts import few_shot_prompt
from layalign.evaluation import likelihood, llm_alone
from layalign.evaluation.likelihood import best_label, choice_log_probs, right_ones, target_log_probs
from layalign.utils.errors import ArgumentError, NonFiniteError

ENCODER, TEXT = byte_tokenizer(eos=True), byte_tokenizer()
SIZE = len(TEXT)
EXAMPLES = [
    Example("moja", "one", "Swahili", "p", "1"),
    Example("mbili na tatu", "two and three", "Swahili", "say:", "2"),
    Example("x", "y", "Swahili", "a longer prompt", "3"),
    Example("nne", "", "Swahili", "p", "4"),  # nothing but its end
]


def joined(llm: str = "llama", encoder: str = "mt5", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    parts = tiny_encoder(encoder, vocab_size=SIZE).to(dtype), tiny_llm(llm, vocab_size=SIZE).to(dtype)
    torch.manual_seed(2)
    model = LayAlignForCausalLM.from_encoder_and_llm(*parts, **config)
    with torch.no_grad():
        for module in model.cross_attention or ():
            module.adaption_gate.fill_(0.7)
    return model.eval()


def collator(model: Any, stage: str = "translation", **options: Any) -> LayAlignCollator:
    return LayAlignCollator.from_model(model, ENCODER, TEXT, stage=stage, **options)


def directly(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    """The sum over the labels of one row, token by token."""
    labels = batch.pop("labels")[0].tolist()
    with torch.no_grad():
        logits = model(**batch).logits[0].double()
    values = [float(logits[place - 1].log_softmax(-1)[label]) for place, label in enumerate(labels) if label != -100]
    return sum(values), len(values)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["translation", "task"])
@pytest.mark.parametrize("llm", ["llama", "mistral", "qwen2", "gemma2", "gpt2"])
def test_targets_and_choices_are_what_the_logits_say(llm: str, stage: str) -> None:
    model = joined(llm)
    collate = collator(model, stage)
    expected = [directly(model, collate([example])) for example in EXAMPLES]
    for size in (1, 3, 16):
        found = target_log_probs(model, collate, EXAMPLES, batch_size=size)
        assert [count for _, count in found] == [4, 14, 2, 1] == [count for _, count in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-4)
    # Every target behind every source; the context is read once.
    texts = [example.target for example in EXAMPLES]
    crossed = [[Example(e.source, text, e.language, e.prompt) for text in texts] for e in EXAMPLES]
    table = [[directly(model, collate([example])) for example in row] for row in crossed]
    for size in (1, 3, 16):
        rows = choice_log_probs(model, collate, EXAMPLES, [texts] * 4, batch_size=size)
        assert [[count for _, count in row] for row in rows] == [[4, 14, 2, 1]] * 4
        np.testing.assert_allclose([[v for v, _ in row] for row in rows], [[v for v, _ in r] for r in table], atol=2e-4)


@pytest.mark.parametrize("config", [{"structure": "Linear"}, {"use_adapter": False}, {"use_prompt": False}])
def test_other_shapes_of_the_model(config: dict[str, Any]) -> None:
    model = joined(**config)
    collate = collator(model, "task")
    expected = [directly(model, collate([example])) for example in EXAMPLES]
    rows = choice_log_probs(model, collate, EXAMPLES, [[example.target] for example in EXAMPLES], batch_size=2)
    assert [row[0][0] for row in rows] == pytest.approx([value for value, _ in expected], abs=2e-4)


def test_low_precision_is_summed_in_float64() -> None:
    model, whole = joined(dtype=torch.bfloat16), joined()
    found = target_log_probs(model, collator(model), EXAMPLES)
    expected = target_log_probs(whole, collator(whole), EXAMPLES)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=0.05)
    assert model.llm.dtype == torch.bfloat16


@pytest.mark.parametrize("llm", ["llama", "gpt2"])
def test_the_llm_alone(llm: str) -> None:
    model, tokenizer = tiny_llm(llm, vocab_size=SIZE), byte_tokenizer(bos=True, eos=True)
    alone = llm_alone(model, tokenizer, max_new_tokens=3)
    expected = []
    for example in EXAMPLES:
        context, target = [1, *TEXT(example.prompt)["input_ids"]], [*TEXT(" " + example.target)["input_ids"], 2]
        ids = torch.tensor([context + target])
        expected.append(directly(model, {"input_ids": ids, "labels": torch.tensor([[-100] * len(context) + target])}))
    for size in (1, 16):
        found = target_log_probs(alone.llm, alone.collator, EXAMPLES, batch_size=size)
        assert [count for _, count in found] == [count for _, count in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-4)
        choices = choice_log_probs(alone.llm, alone.collator, EXAMPLES, [[e.target, "no"] for e in EXAMPLES], size)
        assert [row[0][0] for row in choices] == pytest.approx([value for value, _ in expected], abs=2e-4)


SHOTS = [Example("tano", "five", "Swahili"), Example("sita\n", "six", "Swahili"), Example("un", "one", "French")]


def test_an_llm_with_examples_in_its_prompt() -> None:
    model, tokenizer = tiny_llm(vocab_size=SIZE), byte_tokenizer(bos=True)
    alone = llm_alone(model, tokenizer, examples=SHOTS, max_new_tokens=3)
    prompt = few_shot_prompt([("tano", "five"), ("sita", "six")], "moja", "Swahili")
    assert prompt == "Swahili: tano\nEnglish: five\n\nSwahili: sita\nEnglish: six\n\nSwahili: moja\nEnglish:"
    context, target = [1, *TEXT(prompt)["input_ids"]], TEXT(" one\n")["input_ids"]
    labels = torch.tensor([[-100] * len(context) + target])
    expected = directly(model, {"input_ids": torch.tensor([context + target]), "labels": labels})
    found = target_log_probs(alone.llm, alone.collator, EXAMPLES[:2])
    assert found[0] == (pytest.approx(expected[0], abs=2e-4), 5) and found[1][1] == 15
    with pytest.raises(ArgumentError, match="examples: expected some in Thai, which is asked; got Swahili, French"):
        alone([Example("a", "b", "Thai")])
    with pytest.raises(ArgumentError, match="examples: expected none that is asked, got 'tano'"):
        alone([Example("tano", "b", "Swahili")])
    others = llm_alone(model, tokenizer, examples=SHOTS[1:], max_new_tokens=3)
    assert alone.fingerprint != others.fingerprint != llm_alone(model, tokenizer, max_new_tokens=3).fingerprint


@pytest.mark.parametrize("llm", ["llama", "gpt2", "mistral", "gemma3_text"])
@pytest.mark.parametrize("longest", [512, 60])  # the second cuts prompts at their start, so that they share none
def test_examples_are_read_once(llm: str, longest: int) -> None:
    model, tokenizer = tiny_llm(llm, seed=8, vocab_size=SIZE).double(), byte_tokenizer(bos=True)
    settings: dict[str, Any] = {"examples": SHOTS, "max_new_tokens": 8, "max_prompt_length": longest}
    alone, usual = llm_alone(model, tokenizer, **settings), llm_alone(model, tokenizer, do_sample=False, **settings)
    sources = ["moja", "m", "kumi na nane na tisa"]
    asked = [Example(source, "yes and no"[: 2 + place], "Swahili") for place, source in enumerate(sources)]
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: read.append(args[0].numel()))
    answers, wanted = alone(asked), usual(asked)
    assert answers == wanted and (len(set(answers)) > 1 or longest == 60)
    found, one_pass = target_log_probs(model, alone.collator, asked), likelihood._targets(model, alone.collator, asked)
    assert [count for _, count in found] == [count for _, count in one_pass]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in one_pass], abs=1e-9)
    read.clear()
    alone(asked)
    whole = alone.collator.contexts(asked)["input_ids"].numel()
    shares = llm in ("llama", "gpt2") and longest == 512  # the others have windows
    assert (sum(read[:2]) < 0.7 * whole) == shares


class Written(torch.nn.Module):
    """Writes a text token by token, and goes on after its end."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.rows = [TEXT(text)["input_ids"] for text in texts]

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, stopping_criteria: Any = None, **_: Any) -> Any:
        ids, done = input_ids, torch.zeros(len(input_ids), dtype=torch.bool)
        for step in range(max_new_tokens):
            new = torch.tensor([row[step] for row in self.rows]).masked_fill(done, 0)
            ids = torch.cat([ids, new[:, None]], dim=1)
            done = done | (False if stopping_criteria is None else stopping_criteria(ids, None))
            if done.all():
                break
        self.steps = step + 1
        return ids


def test_an_answer_after_examples_ends_with_its_line() -> None:
    model = Written(" one\nSwahili: more", " twenty-two \nx more", "\nnothing here, more")
    alone = llm_alone(model, TEXT, examples=SHOTS, max_new_tokens=15)
    assert alone(EXAMPLES[:3]) == ["one", "twenty-two", ""]
    assert model.steps == 13 and alone.last_cut == [(), (), ()]
    beams = llm_alone(model, TEXT, examples=SHOTS, max_new_tokens=15, num_beams=2)  # which go on after a line
    assert beams(EXAMPLES[:3]) == ["one", "twenty-two", ""] and model.steps == 15
    assert beams.last_cut == [(), (), ()]
    short = llm_alone(model, TEXT, examples=SHOTS, max_new_tokens=6)
    assert short(EXAMPLES[:3]) == ["one", "twent", ""]
    assert short.last_cut == [(), ("answer",), ()]


def test_a_target_wins_by_what_its_source_adds() -> None:
    # The first text is likely behind every source; by log-probability alone it would always win.
    scores = [[-1.0, -9.0, -9.5], [-2.0, -5.0, -9.0], [-2.0, -9.0, -9.0]]
    assert right_ones(scores, ["a", "b", "c"]) == [True, True, True]
    table = np.array(scores)
    gains = table - np.log(np.exp(table).sum(axis=0))
    assert gains.argmax(axis=1).tolist() == [0, 1, 2]
    assert right_ones([[-1.0, -1.0], [-3.0, -1.0]], ["a", "b"]) == [True, True]
    assert right_ones([[-1.0, -1.0], [-2.0, -1.0]], ["a", "b"]) == [True, True]
    assert right_ones([[-5.0, -1.0], [-2.0, -4.0]], ["a", "b"]) == [False, False]
    assert right_ones([[-5.0, -1.0], [-2.0, -4.0]], ["a", "a"]) == [True, True]  # the same words
    with pytest.raises(ArgumentError, match="scores: expected 2 rows of 2 numbers"):
        right_ones([[1.0, 2.0]], ["a", "b"])


def test_labels() -> None:
    labels = ["yes", "no", "neither"]
    values = [(-4.0, 1), (-6.0, 2), (-6.0, 4)]
    assert best_label(values, labels) == "yes"
    assert best_label(values, labels, mean=True) == "neither"
    assert best_label([(-4.0, 1), (-4.0, 2), (-5.0, 1)], labels) is None
    assert best_label([(-4.0, 1), (-5.0, 2), (-5.0, 1)], labels) == "yes"


@pytest.mark.parametrize("value", [nan, inf])
def test_logits_that_are_not_finite(value: float) -> None:
    model = joined()
    with torch.no_grad():
        model.encoder.get_input_embeddings().weight[TEXT("Z")["input_ids"][0]] = value
    examples = [EXAMPLES[0], Example("Z", "a", "Thai", id="7"), EXAMPLES[1], Example("ZZ", "a", "Thai")]
    with pytest.raises(NonFiniteError, match=r"for the Thai example '7' \('Z'\) and 1 more") as caught:
        target_log_probs(model, collator(model), examples, batch_size=2)
    assert caught.value.rows == (1, 3)
    good = target_log_probs(model, collator(model), [examples[0], examples[2]])
    assert [caught.value.output[i][0] for i in (0, 2)] == pytest.approx([v for v, _ in good], abs=2e-4)
    with pytest.raises(NonFiniteError) as caught:
        choice_log_probs(model, collator(model), examples, [["a", "b"]] * 4, batch_size=2)
    assert caught.value.rows == (1, 3)


def test_what_is_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = joined()
    collate = collator(model, max_target_length=3)
    with caplog.at_level("WARNING", "layalign"):
        assert target_log_probs(model, collate, EXAMPLES[:1])[0][1] == 3
        found = choice_log_probs(model, collator(model, max_target_length=3), EXAMPLES[:1], [["one"]])
        assert found[0][0] == (pytest.approx(target_log_probs(model, collate, EXAMPLES[:1])[0][0], abs=2e-4), 3)
        alone = llm_alone(model.unload(), TEXT, max_prompt_length=4)
        target_log_probs(alone.llm, alone.collator, EXAMPLES * 2, batch_size=1)
    assert caplog.messages == [
        "1 target(s) of a batch cut to max_target_length; said only once",
        "1 target(s) of a batch cut to max_target_length; said only once",
        "a prompt lost its start, to fit max_prompt_length=4; said only once",
    ]


def test_examples_may_have_different_choices() -> None:
    model = joined()
    collate = collator(model)
    choices = [["a", "bc", "d"], [], ["two"], ["x", ""]]
    found = choice_log_probs(model, collate, EXAMPLES, choices, batch_size=3)
    assert [[count for _, count in row] for row in found] == [[2, 3, 2], [], [4], [2, 1]]
    for example, texts, row in zip(EXAMPLES, choices, found, strict=True):
        for text, (value, _) in zip(texts, row, strict=True):
            expected = directly(model, collate([Example(example.source, text, example.language)]))
            assert value == pytest.approx(expected[0], abs=2e-4)


def test_wrong_arguments() -> None:
    model = joined()
    collate = collator(model)
    for arguments, message in [
        ((len, collate, EXAMPLES), "model: expected a LayAlign model or a causal language model"),
        ((model, len, EXAMPLES), "collator: expected a LayAlignCollator or a PromptCollator"),
        ((model, collate, "abc"), "examples: expected a list of Example"),
        ((model, collate, EXAMPLES, 0), "batch_size: expected a whole number from 1 up"),
        ((model, collator(model, with_targets=False), EXAMPLES), "collator: expected one with targets"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            target_log_probs(*arguments)
    for choices in (["a"] * 4, [["a"]] * 3, [[1]] * 4):
        with pytest.raises(ArgumentError, match="choices: expected a list of texts for each of 4 examples"):
            choice_log_probs(model, collate, EXAMPLES, choices)
    assert target_log_probs(model, collate, []) == [] == choice_log_probs(model, collate, [], [])
    with pytest.raises(ArgumentError, match=r"examples: expected a list of Example, got 3"):
        llm_alone(model.llm, TEXT, examples=3)


def test_a_table_of_positions_is_not_left() -> None:
    model = joined("gpt2")
    longer = Example("x" * 60, "y" * 80, "Thai", id="9")
    with pytest.raises(ArgumentError, match=r"the Thai example '9' takes 144 tokens of the LLM, expected at most"):
        choice_log_probs(model, collator(model), [EXAMPLES[0], longer], [["a"], [longer.target]])
    alone = llm_alone(model.llm, TEXT)
    with pytest.raises(ArgumentError, match=r"the Thai example '9' takes 142 tokens of the LLM, expected at most"):
        target_log_probs(alone.llm, alone.collator, [longer])


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model = joined().train()
    first = target_log_probs(model, collator(model), EXAMPLES)
    assert model.training and first == target_log_probs(model.eval(), collator(model), EXAMPLES)
