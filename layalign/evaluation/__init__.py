"""Evaluation: a test set in every language, answered in batches, scored, kept, and resumable."""

from layalign.evaluation.answering import llm_alone
from layalign.evaluation.compare import compare_runs
from layalign.evaluation.levels import resource_level
from layalign.evaluation.measures import MeasureScore, MeasureScores
from layalign.evaluation.run import EvaluationResult, LanguageScore, evaluate
from layalign.evaluation.tasks import SCORERS, TASKS

__all__ = [
    "SCORERS",
    "TASKS",
    "EvaluationResult",
    "LanguageScore",
    "MeasureScore",
    "MeasureScores",
    "compare_runs",
    "evaluate",
    "llm_alone",
    "resource_level",
]
