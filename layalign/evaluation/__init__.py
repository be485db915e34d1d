"""Evaluation: a test set in every language, answered in batches, scored, kept, and resumable."""

from layalign.evaluation.answering import llm_alone
from layalign.evaluation.compare import compare_runs
from layalign.evaluation.config import EvalConfig
from layalign.evaluation.levels import resource_level
from layalign.evaluation.measures import MeasureScore, MeasureScores
from layalign.evaluation.result import EvaluationResult, LanguageScore
from layalign.evaluation.run import evaluate
from layalign.evaluation.scoring import SCORERS
from layalign.evaluation.tasks import TASKS, Task, register_task, unregister_task

__all__ = [
    "SCORERS",
    "TASKS",
    "EvalConfig",
    "EvaluationResult",
    "LanguageScore",
    "MeasureScore",
    "MeasureScores",
    "Task",
    "compare_runs",
    "evaluate",
    "llm_alone",
    "register_task",
    "resource_level",
    "unregister_task",
]
