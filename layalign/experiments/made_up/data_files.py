"""The demo's data in the layouts that `layalign train` and `layalign evaluate` read."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from layalign.experiments.made_up.problems import generate_problems, generate_sentences, table

TRANSLATION, MATH, TEST = "translation", "math", "mgsm"


def write_files(
    folder: Path,
    settings: Any,
    seed: int,
    *,
    translation: Sequence[str],
    task: Sequence[str],
    test: Sequence[str],
    questions: int,
) -> dict[str, int]:
    """Write `translation/train.jsonl`, `math/train.jsonl` and `mgsm/mgsm_XX.tsv`.

    Args:
        folder: created if needed.
        settings: settings with the budgets of both stages, and the split of the questions ("test" or "dev").
        seed: seed of the draws.
        translation, task, test: languages of a stage, and of the questions.
        questions: questions in each language.

    Returns:
        The number of lines of each.
    """
    pairs, problems = (budget.steps * budget.batch for budget in (settings.translation, settings.task))
    counts = {
        TRANSLATION: _write_jsonl(folder / TRANSLATION / "train.jsonl", _pairs(translation, pairs, seed)),
        MATH: _write_jsonl(folder / MATH / "train.jsonl", _problems(task, problems, seed)),
        TEST: 0,
    }
    (folder / TEST).mkdir(parents=True, exist_ok=True)
    for language in test:
        rows = generate_problems(settings.split, questions, language, seed)
        text = "".join(f"{problem.question}\t{problem.number}\n" for problem in rows)
        (folder / TEST / f"mgsm_{table(language)['code']}.tsv").write_text(text, encoding="utf-8")
        counts[TEST] += len(rows)
    return counts


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _share(languages: Iterable[str], count: int) -> Iterable[tuple[int, str, int]]:
    """(index, language, its share of `count`, rounded up) for each language."""
    names = list(languages)
    return [(number, name, -(-count // len(names))) for number, name in enumerate(names)]


def _pairs(languages: Iterable[str], count: int, seed: int) -> list[dict[str, str]]:
    """Translation pairs: two thirds short sentences, in which words are easy to align, and one third problems."""
    rng = random.Random(f"translation {seed}")
    rows = []
    for number, language, share in _share(languages, count):
        # A separate stream: the texts differ between languages, and from those of the encoder's pre-training.
        stream = seed * 1000 + 500 + number
        for problem in generate_problems("train", share // 3, language, stream):
            rows.append({"source": problem.question, "target": problem.english, "language": language})
        for sentence in generate_sentences(share - share // 3, language, stream):
            rows.append({"source": sentence.text, "target": sentence.english, "language": language})
    rng.shuffle(rows)
    return rows


def _problems(languages: Iterable[str], count: int, seed: int) -> list[dict[str, str]]:
    rows = []
    for number, language, share in _share(languages, count):
        for problem in generate_problems("train", share, language, seed * 1000 + 700 + number):
            rows.append({"query": problem.question, "response": problem.answer, "lang": language})
    return rows


def tokenizer_texts(language: str, count: int, seed: int, *, answers: bool = False) -> list[str]:
    """Training text for a tokenizer, the same amount in every language, so that none is split into bytes."""
    problems = generate_problems("train", count, language, seed)
    texts = [problem.question for problem in problems] + [s.text for s in generate_sentences(count, language, seed)]
    return texts + [problem.answer for problem in problems] if answers else texts
