"""The settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from layalign.data.collator import STAGES
from layalign.evaluation.measures import check_measures
from layalign.evaluation.scoring import Scorer, check_scorer
from layalign.utils.errors import ArgumentError, one_of, refuse, whole_number


@dataclass(frozen=True)
class EvalConfig:
    """How `evaluate` asks, judges and measures. `scorer`, `stage` and `max_new_tokens` are the task's own where None.

    Attributes:
        languages: names or codes of the languages to evaluate; None is all.
        batch_size: questions, or texts whose likelihood is measured, per batch.
        max_new_tokens: longest answer.
        limit: only the first questions of each language; None is all.
        skip_bad: leave malformed lines out and count them; otherwise the first one raises.
        resume: go on with what is in `output_dir`; False deletes the outputs there and starts again.
        scorer: "number" (published), "signed-number" (each language's own way of writing numbers), "label", "text"
            (equal after stripping) or "translation" (`measures`). An empty answer is no number. "label-likelihood"
            generates nothing: the answer is the label with the highest log-probability, its end included, given the
            question. "label-likelihood-mean" takes each label's mean over its tokens. Where two labels share the
            highest value, none is the answer. Or a function, as in `Task`.
        label_match: "exact" (published) or "start"; see `layalign.evaluation.metrics.parse_label`.
        measures: of translation: "chrf", "bleu", "nats", "nats-other-source", "right-one-of-N" (N of a language's
            sentences in a row; those left at the end are not counted), see `layalign.evaluation.measures`. None is chrF
            and BLEU. A rerun may ask for others; nothing is measured twice.
        stage: "task" gives the LLM the prompt, "translation" only the encoder's tokens.
        max_source_length, max_prompt_length: longest texts in tokens; what is longer is cut and counted.
        generation: further arguments of `generate` (num_beams, ...); greedy search without any.
        model_name: name of a function or of a model without parameters, for the check that a rerun is of the same one.
        non_finite: what an answer counts as whose logits were NaN or infinite. "stop" raises, for the cause (fp16, a
            damaged checkpoint) seldom concerns one answer alone. "fail" counts it as wrong, under `failed`. A
            likelihood that is not finite always raises.
        progress: show a progress bar.

    Raises:
        ArgumentError: a field is none of these.
    """

    languages: Sequence[str] | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None
    limit: int | None = None
    skip_bad: bool = False
    resume: bool = True
    scorer: str | Scorer | None = None
    label_match: str = "exact"
    measures: Sequence[str] | None = None
    stage: str | None = None
    max_source_length: int = 512
    max_prompt_length: int = 512
    generation: Mapping[str, Any] | None = None
    model_name: str | None = None
    non_finite: str = "stop"
    progress: bool = False

    def __post_init__(self) -> None:
        if self.languages is not None and (
            isinstance(self.languages, str | bytes) or not isinstance(self.languages, Sequence) or not self.languages
        ):
            refuse("languages", "a list of names or codes", self.languages)
        for name in ("batch_size", "limit", "max_new_tokens"):
            number = getattr(self, name)
            if (number is not None or name == "batch_size") and whole_number(name, number) < 1:
                raise ArgumentError(f"{name}: expected a number >= 1, got {number}")
        for name in ("max_source_length", "max_prompt_length"):
            whole_number(name, getattr(self, name), least=1)
        for name in ("skip_bad", "resume", "progress"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "true or false", getattr(self, name))
        if self.scorer is not None:
            check_scorer(self.scorer)
        if not isinstance(self.label_match, str) or self.label_match not in ("exact", "start"):
            refuse("label_match", "'exact' or 'start'", self.label_match)
        check_measures(self.measures)
        if self.stage is not None:
            one_of("stage", self.stage, STAGES)
        if not isinstance(self.generation, Mapping | None) or not all(
            isinstance(k, str) for k in self.generation or ()
        ):
            refuse("generation", "a mapping of arguments of generate", self.generation)
        if not isinstance(self.model_name, str | None):
            refuse("model_name", "text", self.model_name)
        one_of("non_finite", self.non_finite, ("stop", "fail"))

    def changed(self, changes: Mapping[str, Any]) -> EvalConfig:
        """A copy with other values of some fields.

        Raises:
            ArgumentError: there is no such field, or it cannot have the value.
        """
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                raise ArgumentError(f"{name}: expected a field of EvalConfig ({', '.join(names)})")
        return replace(self, **changes)
