"""What a trained system does on the test sentences: how likely it finds the references, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layalign.data import Example, LayAlignCollator
from layalign.evaluation.answering import LlmAnswers, ModelAnswers
from layalign.evaluation.likelihood import LogProb, choice_log_probs, right_ones, target_log_probs
from layalign.evaluation.translation import translation_scores
from layalign.experiments.real.settings import RealSettings

BATCH = 16  # of likelihoods: sentences of much the same length, so that little is padded
WRITTEN_BATCH = 50


def measure(
    settings: RealSettings, answers: ModelAnswers | LlmAnswers, collator: Any, pairs: Sequence[Example], closely: bool
) -> dict[str, Any]:
    """Everything that is measured of one language's test sentences.

    Args:
        answers: what writes translations, and whose model is asked for likelihoods.
        collator: of the likelihoods.
        pairs: the sentences, as the system reads them.
        closely: whether the first ``written_per_language`` of them are also answered, and compared with one another.

    Returns:
        Lists with an entry per sentence: under "nats" the log-probability of the reference given its source, summed
        over its tokens, with the sign turned; under "tokens" the number of tokens. Of those that are looked at closely,
        under "nats_other" the first given the source of the group's next sentence; under "right" whether its source
        finds it among its group's (`layalign.evaluation.likelihood.right_ones`); under "written" and "chrf" the
        translations and their chrF statistics. Groups are of ``right_one_of`` sentences in the order given; what is
        left at the end joins the last.
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
    """(for likelihoods, for writing) of a LayAlign model; nothing of a test sentence is cut before `longest` tokens."""
    lengths = {"max_source_length": longest, "max_prompt_length": longest, "max_target_length": longest}
    made = [
        LayAlignCollator.from_model(model, *tokenizers, stage=stage, with_targets=t, **lengths) for t in (True, False)
    ]
    return made[0], made[1]
