"""Evaluation: a test set in every language, answered in batches, scored, kept, and resumable."""

from layalign.evaluation.answering import llm_alone
from layalign.evaluation.compare import compare_runs
from layalign.evaluation.levels import resource_level
from layalign.evaluation.run import TASKS, EvaluationResult, LanguageScore, evaluate

__all__ = ["TASKS", "EvaluationResult", "LanguageScore", "compare_runs", "evaluate", "llm_alone", "resource_level"]
