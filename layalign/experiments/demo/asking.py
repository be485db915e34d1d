"""Both systems translate the same sentences: their answers, and how likely the references are for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from layalign.data import Example, LayAlignCollator
from layalign.evaluation.answering import LlmAnswers, ModelAnswers
from layalign.evaluation.likelihood import target_log_probs
from layalign.evaluation.translation import translation_scores
from layalign.experiments.demo.models import Joined

_ROWS = 64  # questions in a batch


@dataclass(frozen=True)
class Answer:
    """The result of a system for one sentence.

    Attributes:
        text: its translation, by greedy search.
        log_prob: sum of the log-probabilities of the reference's tokens, including its end, in nats.
        tokens: number of these tokens.
    """

    text: str
    log_prob: float
    tokens: int


def layalign_answers(
    joined: Joined,
    questions: Mapping[str, Sequence[Example]],
    longest_answer: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, list[Answer]]:
    """Answers of a LayAlign model that was trained to translate, and how likely the references are.

    Args:
        joined: the model.
        questions: sentences and their references, by language.
        longest_answer: maximum length of an answer in tokens.
        advance: called with the number of questions answered.
    """
    tokenizers = joined.encoder_tokenizer, joined.llm_tokenizer
    with_targets, without = (
        LayAlignCollator.from_model(joined.model, *tokenizers, with_targets=kind) for kind in (True, False)
    )
    ask = ModelAnswers(joined.model, without, longest_answer)
    flat = [(language, example) for language, examples in questions.items() for example in examples]
    found: dict[str, list[Answer]] = {language: [] for language in questions}
    for start in range(0, len(flat), _ROWS):
        rows = flat[start : start + _ROWS]
        examples = [example for _, example in rows]
        likely = target_log_probs(joined.model, with_targets, examples, _ROWS // 2)
        for (language, _), text, (log_prob, tokens) in zip(rows, ask(examples), likely, strict=True):
            found[language].append(Answer((text or "").strip(), log_prob, tokens))
        advance(len(rows))
    return found


def llm_answers(
    alone: LlmAnswers, questions: Mapping[str, Sequence[Example]], advance: Callable[[int], None] = lambda count: None
) -> dict[str, list[Answer]]:
    """Answers of an LLM with examples in its prompt, one language at a time, so that the examples are read once.

    Args:
        alone: the result of `llm_alone`.
        questions, advance: as for `layalign_answers`.
    """
    found = {}
    for language, examples in questions.items():
        likely = target_log_probs(alone.llm, alone.collator, examples, len(examples))
        texts = alone(examples)
        found[language] = [Answer(text or "", *pair) for text, pair in zip(texts, likely, strict=True)]
        advance(len(examples))
    return found


def score(answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
    """chrF (0..100) of the answers, and nats per token of the references; both lists are in the same order."""
    chrf = translation_scores([answer.text for answer in answers], [e.target for e in examples], ["chrf"])["chrf"]
    return {"chrf": chrf, "nats": -sum(a.log_prob for a in answers) / sum(a.tokens for a in answers)}
