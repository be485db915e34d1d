"""Evaluation: a test set in every language, answered in batches, scored, kept, and resumable."""

from layalign.evaluation.answering import llm_alone
from layalign.evaluation.run import TASKS, EvaluationResult, LanguageScore, evaluate

__all__ = ["TASKS", "EvaluationResult", "LanguageScore", "evaluate", "llm_alone"]
