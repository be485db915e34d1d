"""Grade-school arithmetic word problems, the same problem in every language, from templates of our own.

One JSON table per language (`templates/*.json`) holds names, nouns, problem templates and short sentences. A template
names its slots: ``{n}`` and ``{m}`` are people (``{n:gen}`` in a case), ``{a}`` a bare number, ``{a:obj}`` a counted
noun ("5 mangoes"), ``{obj}`` the bare plural (``{obj:poss}`` in a case) and ``{how:obj}`` the question ("how many
mangoes"). Wording and number ranges are chosen so that no language needs gender agreement or a singular; only Russian
has a second counted form (2, 3, 4). Where nouns take no plural after a number or in general (Chinese, Japanese,
Indonesian, Turkish), all forms are the same; a Japanese count is only the number with its counter.

The demo runs on `LANGUAGES`; the tables of `MORE_LANGUAGES` are for experiments that need more of them.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from layalign.utils.errors import ArgumentError

LANGUAGES = ("English", "Spanish", "German", "French", "Russian", "Chinese", "Swahili", "Bengali", "Haitian Creole")
MORE_LANGUAGES = ("Portuguese", "Japanese", "Indonesian", "Turkish")
ALL_LANGUAGES = LANGUAGES + MORE_LANGUAGES
LOW_RESOURCE = ("Swahili", "Bengali", "Haitian Creole")
SPLITS = ("train", "dev", "test")
OBJECTS = ("mango", "orange", "egg", "book", "pencil", "flower", "ball", "coin")

_SLOT = re.compile(r"\{(\w+)(?::(\w+))?\}")
_SENTENCE_START = re.compile(r"(^[¿¡]?|[.?!] [¿¡]?)(\w)")


@dataclass(frozen=True)
class Slots:
    """Values for a template: two people (English names), a noun, three numbers (0 if unused)."""

    n: str
    m: str
    obj: str
    a: int
    b: int = 0
    c: int = 0


@dataclass(frozen=True)
class Problem:
    """One problem in one language, with its English original and a worked English answer."""

    question: str
    english: str
    answer: str
    number: int
    language: str
    template: str
    slots: Slots

    @property
    def key(self) -> tuple[str, tuple[int, int, int], tuple[str, str]]:
        """Template, numbers and names; no key occurs in two splits."""
        return self.template, (self.slots.a, self.slots.b, self.slots.c), (self.slots.n, self.slots.m)


@dataclass(frozen=True)
class Sentence:
    """A short sentence and its English original."""

    text: str
    english: str
    language: str


@cache
def _plural_numbers(low: int, high: int) -> tuple[int, ...]:
    return tuple(n for n in range(max(low, 2), high + 1) if n % 10 != 1 or n == 11)


def _countable(rng: random.Random, low: int, high: int) -> int:
    """A number whose counted noun is a plural in every language: 1, 21, 31... take a singular in Russian."""
    return rng.choice(_plural_numbers(low, high))


def _pair(rng: random.Random) -> tuple[int, int, int]:
    return _countable(rng, 2, 10), _countable(rng, 2, 10), 0


def _less(rng: random.Random) -> tuple[int, int, int]:
    a = _countable(rng, 5, 18)
    return a, _countable(rng, 2, min(a - 2, 10)), 0


def _product(rng: random.Random) -> tuple[int, int, int]:
    return _countable(rng, 2, 9), _countable(rng, 2, 9), 0


def _exact_division(rng: random.Random) -> tuple[int, int, int]:
    while True:
        quotient, b = rng.randint(2, 9), rng.randint(2, 9)
        if (quotient * b) % 10 != 1:
            return quotient * b, b, 0


def _buy_and_lose(rng: random.Random) -> tuple[int, int, int]:
    a, b = _countable(rng, 2, 10), _countable(rng, 2, 10)
    return a, b, _countable(rng, 2, min(a + b - 2, 10))


def _bags(rng: random.Random) -> tuple[int, int, int]:
    return _countable(rng, 2, 5), _countable(rng, 2, 5), _countable(rng, 2, 10)


def _take_twice(rng: random.Random) -> tuple[int, int, int]:
    a = _countable(rng, 10, 20)
    b = _countable(rng, 2, min(a - 6, 10))
    return a, b, _countable(rng, 2, min(a - b - 2, 10))


def _three(rng: random.Random) -> tuple[int, int, int]:
    return _countable(rng, 2, 8), _countable(rng, 2, 8), _countable(rng, 2, 8)


@dataclass(frozen=True)
class Kind:
    """A kind of problem: how its numbers are drawn, its result, and the worked English answer."""

    draw: Callable[[random.Random], tuple[int, int, int]]
    result: Callable[[int, int, int], int]
    steps: str


# `{r}` is the result and `{s}` the result of the first of two steps.
KINDS: dict[str, Kind] = {
    "add_buy": Kind(_pair, lambda a, b, c: a + b, "{n} has {a} + {b} = {r} {obj}."),
    "add_together": Kind(_pair, lambda a, b, c: a + b, "They have {a} + {b} = {r} {obj}."),
    "sub_give": Kind(_less, lambda a, b, c: a - b, "{n} has {a} - {b} = {r} {obj}."),
    "sub_compare": Kind(_less, lambda a, b, c: a - b, "{n} has {a} - {b} = {r} more {obj}."),
    "mul_boxes": Kind(_product, lambda a, b, c: a * b, "There are {a} * {b} = {r} {obj}."),
    "mul_days": Kind(_product, lambda a, b, c: a * b, "{n} collects {a} * {b} = {r} {obj}."),
    "mul_price": Kind(_product, lambda a, b, c: a * b, "{n} pays {a} * {b} = {r} dollars."),
    "div_share": Kind(_exact_division, lambda a, b, c: a // b, "Each friend gets {a} / {b} = {r} {obj}."),
    "addsub_lose": Kind(
        _buy_and_lose, lambda a, b, c: a + b - c, "{n} has {a} + {b} = {s}, then {s} - {c} = {r} {obj}."
    ),
    "muladd_bags": Kind(_bags, lambda a, b, c: a * b + c, "{n} has {a} * {b} = {s}, then {s} + {c} = {r} {obj}."),
    "subsub_basket": Kind(
        _take_twice, lambda a, b, c: a - b - c, "There are {a} - {b} = {s}, then {s} - {c} = {r} {obj}."
    ),
    "addadd_pages": Kind(_three, lambda a, b, c: a + b + c, "{n} reads {a} + {b} = {s}, then {s} + {c} = {r} pages."),
}
_FIRST_STEP: dict[str, Callable[[int, int], int]] = {
    "addsub_lose": lambda a, b: a + b,
    "muladd_bags": lambda a, b: a * b,
    "subsub_basket": lambda a, b: a - b,
    "addadd_pages": lambda a, b: a + b,
}


@cache
def table(language: str) -> dict[str, Any]:
    """The table of a language; raises ArgumentError for one without a table."""
    if language not in ALL_LANGUAGES:
        raise ArgumentError(f"language: expected one of {', '.join(ALL_LANGUAGES)}, got {language!r}")
    name = language.lower().replace(" ", "_") + ".json"
    return json.loads(
        (resources.files("layalign.experiments.made_up") / "templates" / name).read_text(encoding="utf-8")
    )


def _counted(noun: dict[str, str], number: int) -> str:
    """The noun after a number: Russian takes `few` after 2, 3, 4 (but not 12, 13, 14)."""
    few = number % 10 in (2, 3, 4) and number % 100 not in (12, 13, 14)
    return noun["few" if few and "few" in noun else "count"].format(number)


def fill(template: str, slots: Slots, language: str) -> str:
    """The template's text in a language, sentences starting with a capital; an unknown slot raises KeyError."""
    words = table(language)

    def one(match: re.Match[str]) -> str:
        slot, form = match.group(1), match.group(2)
        if slot in ("n", "m"):
            name = words["names"][getattr(slots, slot)]
            return name if isinstance(name, str) else name[form or "base"]
        if slot == "how":
            return words["nouns"][slots.obj if form == "obj" else form]["how"]
        if slot == "obj":
            return words["nouns"][slots.obj][form or "plural"]
        number = {"a": slots.a, "b": slots.b, "c": slots.c}[slot]
        return str(number) if form is None else _counted(words["nouns"][slots.obj if form == "obj" else form], number)

    text = _SLOT.sub(one, template)
    return _SENTENCE_START.sub(lambda match: match.group(1) + match.group(2).upper(), text)


def worked_answer(kind: str, slots: Slots) -> tuple[str, int]:
    """The English steps, ending in "The answer is: n", and n."""
    a, b, c = slots.a, slots.b, slots.c
    result = KINDS[kind].result(a, b, c)
    first = _FIRST_STEP[kind](a, b) if kind in _FIRST_STEP else result
    noun = table("English")["nouns"][slots.obj]["plural"]
    steps = KINDS[kind].steps.format(n=slots.n, a=a, b=b, c=c, s=first, r=result, obj=noun)
    return f"{steps} The answer is: {result}", result


def split_of(kind: str, slots: Slots) -> str:
    """train (80%), dev (10%) or test (10%): by template, numbers and names, so disjoint for every seed."""
    bucket = zlib.crc32(f"{kind}|{slots.a}|{slots.b}|{slots.c}|{slots.n}|{slots.m}".encode()) % 10
    return "dev" if bucket == 8 else "test" if bucket == 9 else "train"


@cache
def _used_slots(kind: str) -> frozenset[str]:
    """Slots of a kind's English template; "obj" when it has a free noun."""
    template = table("English")["problems"][kind]
    names = {match.group(1) for match in _SLOT.finditer(template)}
    return frozenset(names | ({"obj"} if ":obj}" in template else set()))


def draw_slots(rng: random.Random, kind: str) -> Slots:
    """Random slots for a kind of problem, from the kind's number ranges; slots the template does not use stay fixed."""
    used = _used_slots(kind)
    n, m = rng.sample(tuple(table("English")["names"]), 2)
    a, b, c = KINDS[kind].draw(rng)
    obj = rng.choice(OBJECTS) if "obj" in used else OBJECTS[0]
    return Slots(n=n if "n" in used else "Anna", m=m if "m" in used else "Anna", obj=obj, a=a, b=b, c=c)


def make_problem(kind: str, slots: Slots, language: str) -> Problem:
    """The problem of a kind with these slots, in a language."""
    answer, number = worked_answer(kind, slots)
    english = fill(table("English")["problems"][kind], slots, "English")
    question = fill(table(language)["problems"][kind], slots, language)
    return Problem(question, english, answer, number, language, kind, slots)


def generate_problems(split: str, count: int, language: str, seed: int = 0) -> list[Problem]:
    """`count` problems of a split, kinds in turn; the same seed gives the same problems in every language.

    Raises:
        ArgumentError: the split or language is unknown.
    """
    if split not in SPLITS:
        raise ArgumentError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    stream = _slot_stream(split, seed)
    return [make_problem(*next(stream), language) for _ in range(count)]


def _slot_stream(split: str, seed: int) -> Iterator[tuple[str, Slots]]:
    rng = random.Random(f"problems {split} {seed}")
    while True:
        for kind in KINDS:
            slots = draw_slots(rng, kind)
            while split_of(kind, slots) != split:
                slots = draw_slots(rng, kind)
            yield kind, slots


def generate_sentences(count: int, language: str, seed: int = 0) -> list[Sentence]:
    """`count` short sentences (no problems), each with its English original."""
    rng = random.Random(f"sentences {seed}")
    english, words = table("English"), table(language)
    kinds = tuple(english["sentences"])
    sentences = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        n, m = rng.sample(tuple(english["names"]), 2)
        slots = Slots(n=n, m=m, obj=rng.choice(OBJECTS), a=_countable(rng, 2, 20))
        sentences.append(
            Sentence(
                fill(words["sentences"][kind], slots, language),
                fill(english["sentences"][kind], slots, "English"),
                language,
            )
        )
    return sentences
