"""The demo's word problems: answers recomputed from the slots, the same problem in every language, disjoint splits."""

from __future__ import annotations

import re

import pytest

from layalign.data.languages import language_of
from layalign.evaluation.metrics import last_number
from layalign.experiments.made_up.problems import (
    ALL_LANGUAGES,
    KINDS,
    LANGUAGES,
    MORE_LANGUAGES,
    OBJECTS,
    SPLITS,
    Slots,
    fill,
    generate_problems,
    generate_sentences,
    make_problem,
    split_of,
    table,
)
from layalign.utils.errors import ArgumentError

EXPECTED = {
    "add_buy": "a + b",
    "add_together": "a + b",
    "sub_give": "a - b",
    "sub_compare": "a - b",
    "mul_boxes": "a * b",
    "mul_days": "a * b",
    "mul_price": "a * b",
    "div_share": "a / b",
    "addsub_lose": "a + b - c",
    "muladd_bags": "a * b + c",
    "subsub_basket": "a - b - c",
    "addadd_pages": "a + b + c",
}


def numbers(text: str) -> list[int]:
    return sorted(int(digits) for digits in re.findall(r"\d+", text))


def test_at_least_ten_kinds_and_eight_languages() -> None:
    assert set(KINDS) == set(EXPECTED) and len(KINDS) >= 10
    assert len(LANGUAGES) >= 8


def test_the_demo_keeps_its_nine_languages() -> None:
    assert len(LANGUAGES) == 9 and not set(LANGUAGES) & set(MORE_LANGUAGES)
    assert ALL_LANGUAGES == LANGUAGES + MORE_LANGUAGES
    assert len({table(language)["code"] for language in ALL_LANGUAGES}) == len(ALL_LANGUAGES)


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_the_library_knows_a_language_by_its_name_and_code(language: str) -> None:
    found = language_of(language)
    assert found == language_of(table(language)["code"])
    assert (found.name, found.alpha2) == (language, table(language)["code"])


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_a_language_has_every_template_noun_and_name(language: str) -> None:
    english, words = table("English"), table(language)
    assert words["language"] == language
    for part in ("problems", "sentences", "names", "nouns"):
        assert list(words[part]) == list(english[part]), part
    for noun in OBJECTS:
        assert set(words["nouns"][noun]) >= {"count", "plural", "how"}
    names = [str(name) for name in words["names"].values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_a_template_names_the_same_people_and_numbers_as_the_english_one(language: str) -> None:
    for part in ("problems", "sentences"):
        for kind, template in table("English")[part].items():
            used = {
                name: {slot for slot in re.findall(r"\{(\w+)", text) if slot in "nmabc"}
                for name, text in (("English", template), (language, table(language)[part][kind]))
            }
            assert used["English"] == used[language], kind


def slots_of(template: str) -> tuple[list[str], set[str]]:
    """The numbers of a template, each as often as it stands there, and its nouns ("obj" for the free one)."""
    slots = re.findall(r"\{(\w+)(?::(\w+))?\}", template)
    nouns = {"obj" if slot == "obj" else form for slot, form in slots if slot not in ("n", "m")}
    return sorted(slot for slot, _ in slots if slot in "abc"), nouns - {""}


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_a_template_has_each_number_once_and_the_nouns_of_the_english_one(language: str) -> None:
    for part in ("problems", "sentences"):
        for kind, template in table("English")[part].items():
            found, nouns = slots_of(table(language)[part][kind])
            assert (found, nouns) == slots_of(template), kind
            assert len(set(found)) == len(found), kind


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_every_template_fills_for_every_name_and_noun_and_no_two_alike(language: str) -> None:
    words, names = table(language), tuple(table("English")["names"])
    for n, m in zip(names, names[1:] + names[:1], strict=True):
        for obj in OBJECTS:
            slots = Slots(n, m, obj, a=12, b=3, c=2)
            texts = [
                fill(template, slots, language)
                for part in ("problems", "sentences")
                for template in words[part].values()
            ]
            assert len(set(texts)) == len(texts)
            for text in texts:
                assert not re.search(r"[{}]|None|  ", text) and text == text.strip()


def test_an_answer_is_what_its_slots_give() -> None:
    for problem in generate_problems("train", 600, "English", seed=3):
        slots = {"a": problem.slots.a, "b": problem.slots.b, "c": problem.slots.c}
        value = eval(EXPECTED[problem.template], {}, slots)  # our own formulas
        assert value == problem.number > 0
        assert last_number(problem.answer) == value
        assert problem.answer.endswith(f"The answer is: {problem.number}")
        for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.answer):
            assert eval(f"{left} {sign} {right}") == int(result)


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_every_text_is_complete_and_keeps_the_numbers(language: str) -> None:
    for problem in generate_problems("train", 360, language, seed=1):
        assert not re.search(r"[{}]|None", problem.question + problem.answer)
        assert numbers(problem.question) == numbers(problem.english)
        assert problem.question[-1] in "?？" and not problem.question[0].islower()
    for sentence in generate_sentences(60, language, seed=1):
        assert "{" not in sentence.text
        assert numbers(sentence.text) == numbers(sentence.english)


def test_the_same_seed_gives_the_same_problems_in_every_language() -> None:
    english = generate_problems("test", 48, "English", seed=5)
    for language in ALL_LANGUAGES:
        problems = generate_problems("test", 48, language, seed=5)
        assert [problem.key for problem in problems] == [problem.key for problem in english]
        assert [problem.english for problem in problems] == [problem.question for problem in english]
        assert [problem.answer for problem in problems] == [problem.answer for problem in english]
        assert problems == generate_problems("test", 48, language, seed=5)
    assert english != generate_problems("test", 48, "English", seed=6)
    assert (
        generate_sentences(24, "French", 5)
        == generate_sentences(24, "French", 5)
        != generate_sentences(24, "French", 6)
    )


def test_splits_are_disjoint_whatever_the_seed() -> None:
    keys = {
        split: {problem.key for seed in (0, 1) for problem in generate_problems(split, 600, "English", seed)}
        for split in SPLITS
    }
    assert not keys["train"] & keys["dev"] and not keys["train"] & keys["test"] and not keys["dev"] & keys["test"]
    for split in SPLITS:
        assert {key[0] for key in keys[split]} == set(KINDS)


def test_a_split_follows_from_template_numbers_and_names_alone() -> None:
    first = Slots(n="Anna", m="Tom", obj="egg", a=7, b=4)
    other_object = Slots(n="Anna", m="Tom", obj="book", a=7, b=4)
    assert split_of("add_together", first) == split_of("add_together", other_object)


def test_russian_counts_take_the_right_form() -> None:
    words = [fill("{a:obj}", Slots("Anna", "Tom", "book", a=n), "Russian") for n in (2, 4, 5, 11, 12, 14, 22, 25)]
    forms = ["книги", "книги", "книг", "книг", "книг", "книг", "книги", "книг"]
    assert [word.split()[1] for word in words] == forms


def test_turkish_names_keep_vowel_harmony() -> None:
    for name in table("Turkish")["names"].values():
        base = name["base"]
        last = [letter for letter in base.lower() if letter in "aeıioöuü"][-1]
        high, low = {"a": "ıa", "e": "ie", "i": "ie", "o": "ua"}[last]
        open_end = base[-1] in "aei"
        assert name["gen"] == f"{base}'{'n' if open_end else ''}{high}n"
        assert name["dat"] == f"{base}'{'y' if open_end else ''}{low}"
        assert name["abl"] == f"{base}'d{low}n"


def test_no_turkish_sentence_starts_with_a_small_i() -> None:
    # Python's capital of "i" is "I"; Turkish wants "İ".
    for problem in generate_problems("train", 360, "Turkish", seed=4):
        assert not re.search(r"(^|[.?] )I", problem.question)


@pytest.mark.parametrize("language", ["Chinese", "Japanese"])
def test_a_language_without_spaces_has_none(language: str) -> None:
    for text in (*table(language)["problems"].values(), *table(language)["sentences"].values()):
        assert " " not in fill(text, Slots("Anna", "Tom", "egg", a=9, b=3, c=2), language)


def test_no_count_needs_a_singular() -> None:
    for problem in generate_problems("train", 1200, "English", seed=2):
        counted = [n for n in (problem.slots.a, problem.slots.b, problem.slots.c) if n]
        assert all(n > 1 and (n % 10 != 1 or n == 11) for n in counted)


def test_a_problem_in_words() -> None:
    problem = make_problem("sub_give", Slots("Anna", "Peter", "egg", a=9, b=3), "Russian")
    assert problem.question == "У Анны 9 яиц. Анна даёт Петру 3 яйца. Сколько яиц остаётся у Анны?"
    assert problem.english == "Anna has 9 eggs. Anna gives 3 eggs to Peter. How many eggs does Anna have left?"
    assert (problem.answer, problem.number) == ("Anna has 9 - 3 = 6 eggs. The answer is: 6", 6)


@pytest.mark.parametrize(
    ("language", "question"),
    [
        ("Portuguese", "Ana tem 9 ovos. Ana dá 3 ovos para Pedro. Com quantos ovos Ana fica?"),
        (
            "Japanese",
            "アンナさんは卵を9個持っています。アンナさんはピーターさんに卵を3個あげます。アンナさんの手元に卵は何個残りますか？",
        ),
        (
            "Indonesian",
            "Anna memiliki 9 telur. Anna memberikan 3 telur kepada Peter. "
            "Berapa banyak telur yang masih dimiliki Anna?",
        ),
        ("Turkish", "Anna'nın 9 yumurtası var. Anna, Peter'e 3 yumurta veriyor. Anna'nın kaç yumurtası kalıyor?"),
    ],
)
def test_a_problem_in_the_words_of_a_further_language(language: str, question: str) -> None:
    assert make_problem("sub_give", Slots("Anna", "Peter", "egg", a=9, b=3), language).question == question


def test_unknown_language_and_split_are_named() -> None:
    with pytest.raises(ArgumentError, match="language: expected one of English.*'Klingon'"):
        generate_problems("train", 1, "Klingon")
    with pytest.raises(ArgumentError, match="split: expected one of train, dev, test, got 'exam'"):
        generate_problems("exam", 1, "English")
