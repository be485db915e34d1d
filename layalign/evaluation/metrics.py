"""Reading an answer out of generated text, and how sure an accuracy is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from layalign.data.numbers import find_number

_COMMA = re.compile(r"(\d),(\d)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
NUMBER_TOLERANCE = 1e-3


def last_number(text: str, signed: bool = False, language: str | None = None) -> float:
    """The last number of a text, 0.0 when there is none.

    Args:
        text: any text. Digits of every script count.
        signed: False as published: a comma between two digits is dropped, and a minus sign is not seen. True reads
            signs, thousands, decimal commas and fractions, see :func:`layalign.data.numbers.find_number`.
        language: of the text, with ``signed``: name or code; None where it is not known.

    Source: the published `extract_last_num`.
    """
    if signed:
        return float(find_number(text, language) or 0)
    found = _NUMBER.findall(_COMMA.sub(r"\1\2", text))
    return float(found[-1]) if found else 0.0


def same_number(answer: float | None, gold: float | None) -> bool:
    """Whether two numbers count as equal: closer than 0.001, as published. None, no number, equals nothing."""
    return answer is not None and gold is not None and abs(answer - gold) < NUMBER_TOLERANCE


def parse_label(text: str, labels: Sequence[str], match: str = "exact") -> str | None:
    """The label that a generated answer gives.

    Args:
        text: the answer.
        labels: the labels to choose from; may be empty with "exact".
        match: "exact" is the published way: the whole answer without outer white space, whatever it says. "start" takes
            the label that the answer starts with, in any case, after an opening bracket or quotation mark, and before
            no letter or digit ("B. The river", "(b)", "Entailment because"); None when there is none. After a label of
            one letter there is no space either ("A river" is no A).
    """
    text = text.strip()
    if match == "exact":
        return text
    start = text.lstrip("([{\"'*`“‘ ").casefold()
    for label in sorted(labels, key=len, reverse=True):
        folded = label.casefold()
        after = start[len(folded) : len(folded) + 1]
        if start.startswith(folded) and not after.isalnum() and not (len(label) == 1 and after == " "):
            return label
    return None


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a rate (95% by default), as fractions; (0, 1) without any trial."""
    if count == 0:
        return 0.0, 1.0
    rate, weight = correct / count, z * z / count
    centre = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / count + weight / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)
