"""Resource levels: how much data a language has, to average scores over languages that are alike.

"joshi" is the classes of Joshi et al., "The State and Fate of Linguistic Diversity and Inclusion in the NLP World" (ACL
2020), for the languages of `layalign.data.languages`. Classes 4 and 5 are high, 3 medium, 0 to 2 low, as Aya (Üstün et
al., ACL 2024) and others group them. Where their list has a language under several names, the highest class counts (it
has Haitian as 2 and Haitian Creole as 0). "paper" is the grouping of LayAlign and MindMerger, which exists for MGSM and
MSVAMP only: Bengali, Thai and Swahili are low, the other seven languages of the two papers high.

Source: the authors' list `lang2tax.txt`; LayAlign, the table of MGSM and MSVAMP results (its columns Lrl. and Hrl.).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from layalign.data.languages import Language, find_language
from layalign.evaluation.intervals import Interval, is_parallel, macro_interval
from layalign.utils.errors import one_of, refuse

# Of one language: (id of the question, whether the answer is right), in file order.
Outcomes = Sequence[tuple[str, bool]]

LEVELS = ("high", "medium", "low")
UNLISTED = "unlisted"
GROUPINGS = ("joshi", "paper")
PAPER_TASKS = ("mgsm", "msvamp")

_PAPER: dict[str, tuple[str, ...]] = {"low": ("Bengali", "Thai", "Swahili")}
_PAPER["high"] = ("English", "Spanish", "French", "German", "Russian", "Chinese", "Japanese")


def resource_class(language: str | Language) -> int | None:
    """The class of Joshi et al. (2020), from 0 (no data) to 5; None for a language that is not in their list.

    Args:
        language: anything `language_of` takes, or another name, which has no class.
    """
    found = find_language(language) if isinstance(language, str) else language
    return None if found is None else found.resource_class


def resource_level(language: str | Language, grouping: str = "joshi") -> str | None:
    """ "high", "medium" or "low"; None for a language that the grouping does not know.

    Args:
        language: anything `language_of` takes, or another name, which has no level.
        grouping: "joshi" or "paper".

    Raises:
        ArgumentError: there is no such grouping.
    """
    one_of("grouping", grouping, GROUPINGS)
    if not isinstance(language, str | Language):
        refuse("language", "the name or code of a language", language)
    if grouping == "paper":
        found = find_language(language) if isinstance(language, str) else language
        return next((level for level, names in _PAPER.items() if found is not None and found.name in names), None)
    number = resource_class(language)
    return None if number is None else "high" if number >= 4 else "medium" if number == 3 else "low"


def by_level(languages: Iterable[str], task: str, grouping: str = "joshi") -> dict[str, list[str]]:
    """Languages by their level, in the order high, medium, low, "unlisted"; empty levels are left out.

    Args:
        languages: English names.
        task: name of the evaluated task; under "paper" others than MGSM and MSVAMP have no levels.
        grouping: "joshi" or "paper".
    """
    names = list(languages)
    if grouping == "paper" and task not in PAPER_TASKS:
        return {}
    levels = {name: resource_level(name, grouping) or UNLISTED for name in names}
    groups = {level: [name for name in names if levels[name] == level] for level in (*LEVELS, UNLISTED)}
    return {level: members for level, members in groups.items() if members}


@dataclass(frozen=True)
class LevelScore:
    """Mean accuracy of the languages of one level, in percent, with its 95% bootstrap interval (`intervals`)."""

    languages: tuple[str, ...]
    average: float
    low: float
    high: float
    method: str


def average_interval(outcomes: Mapping[str, Outcomes], languages: Iterable[str] | None = None) -> Interval:
    """95% interval of the mean accuracy of some languages (all of `outcomes` by default)."""
    rows = [outcomes[name] for name in (outcomes if languages is None else languages)]
    parallel = is_parallel([[id for id, _ in row] for row in rows])
    return macro_interval([[int(correct) for _, correct in row] for row in rows], parallel)


def level_scores(task: str, outcomes: Mapping[str, Outcomes]) -> dict[str, dict[str, LevelScore]]:
    """Averages by level under each grouping that knows the task's languages.

    Args:
        task: name of the task.
        outcomes: by English language name.
    """
    scores: dict[str, dict[str, LevelScore]] = {}
    for grouping in GROUPINGS:
        for level, names in by_level(outcomes, task, grouping).items():
            means = [sum(correct for _, correct in outcomes[name]) / len(outcomes[name]) for name in names]
            interval = average_interval(outcomes, names)
            scores.setdefault(grouping, {})[level] = LevelScore(
                tuple(names), 100 * sum(means) / len(means), interval.low, interval.high, interval.method
            )
    return scores
