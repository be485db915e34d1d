"""Measures of a trained system on the test sentences: the likelihood of the references, and its translations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layalign.data import Example, LayAlignCollator
from layalign.evaluation.answering import LlmAnswers, ModelAnswers
from layalign.evaluation.likelihood import LogProb, choice_log_probs, right_ones, target_log_probs
from layalign.evaluation.translation import translation_scores
from layalign.experiments.real.settings import RealSettings

BATCH = 16  # for likelihoods
WRITTEN_BATCH = 50


def measure(
    settings: RealSettings, answers: ModelAnswers | LlmAnswers, collator: Any, pairs: Sequence[Example], closely: bool
) -> dict[str, Any]:
    """All measures of one language's test sentences.

    Args:
        settings: settings of the experiment.
        answers: writes the translations; its model also gives the likelihoods.
        collator: collator for the likelihoods.
        pairs: the sentences, as the system reads them.
        closely: whether the first ``written_per_language`` sentences are also translated and compared within groups of
            ``right_one_of``. A remainder joins the last group.

    Returns:
        Lists with an entry per sentence.

        - "nats": minus the log-probability of the reference given its source, summed over its tokens.
        - "tokens": the number of these tokens.
        - "nats_other", if `closely`: the same as "nats", given the source of the next sentence in the group.
        - "right", if `closely`: whether the source finds its reference among those of its group
          (`layalign.evaluation.likelihood.right_ones`).
        - "written" and "chrf", if `closely`: the translations and their chrF statistics.
    """
    model = answers.model if isinstance(answers, ModelAnswers) else answers.llm
    chosen = list(pairs[: settings.written_per_language]) if closely else []
    own: list[LogProb] = []
    found: dict[str, Any] = {}
    if chosen:
        groups = _groups(chosen, settings.right_one_of)
        choices = [[other.target for other in group] for group in groups for _ in group]
        flat = iter(choice_log_probs(model, collator, chosen, choices, batch_size=BATCH))
        found = {"nats_other": [], "right": []}
        for group in groups:
            table = [next(flat) for _ in group]
            sums = [[value for value, _ in row] for row in table]
            found["right"] += right_ones(sums, [pair.target for pair in group])
            found["nats_other"] += [round(-sums[(i + 1) % len(group)][i], 4) for i in range(len(group))]
            own += [row[i] for i, row in enumerate(table)]
        texts: list[str] = []
        for start in range(0, len(chosen), WRITTEN_BATCH):
            texts += [(text or "").strip() for text in answers(chosen[start : start + WRITTEN_BATCH])]
        found["written"] = texts
        scores = translation_scores(texts, [pair.target for pair in chosen], ("chrf",))
        found["chrf"] = scores["statistics"]["chrf"].tolist()
    own += target_log_probs(model, collator, pairs[len(chosen) :], batch_size=BATCH)
    return {"nats": [round(-value, 4) for value, _ in own], "tokens": [count for _, count in own], **found}


def _groups(pairs: Sequence[Example], size: int) -> list[list[Example]]:
    starts = list(range(0, max(1, len(pairs) - size + 1), size))
    ends = [*starts[1:], len(pairs)]
    return [list(pairs[a:b]) for a, b in zip(starts, ends, strict=True)]


def collators(model: Any, tokenizers: tuple[Any, Any], stage: str, longest: int = 256) -> tuple[Any, Any]:
    """Collators of a LayAlign model, (for likelihoods, for writing); texts are truncated after `longest` tokens."""
    lengths = {"max_source_length": longest, "max_prompt_length": longest, "max_target_length": longest}
    made = [
        LayAlignCollator.from_model(model, *tokenizers, stage=stage, with_targets=t, **lengths) for t in (True, False)
    ]
    return made[0], made[1]
