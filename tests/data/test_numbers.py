"""Numbers as people write them, read by the conventions of each language."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layalign.data import load_examples
from layalign.data.numbers import find_number, whole_number_text
from layalign.evaluation.metrics import last_number
from layalign.utils.errors import DataError

ANY = (None, "English", "German", "French", "Russian", "Bengali", "Chinese", "Swahili", "Arabic")
UNAMBIGUOUS = {  # the same in every language
    "1,234": 1234, "1,234,567": 1234567, "1,23,456": 123456, "12,34,56,789": 123456789, "1,234.5": 1234.5,
    "1.234,5": 1234.5, "1.234.567,89": 1234567.89, "1.000.000": 1000000, "10\u00a0000": 10000, "10\u202f000,5": 10000.5,
    "10'000": 10000, "1’234’567.25": 1234567.25, "1,23,456.75": 123456.75, "0,5": 0.5, "0.125": 0.125, "0,125": 0.125,
    "12.5": 12.5, "18.": 18, "72, in total": 72, "100, 200": 200, "1,2,3": 3, "24.12.2024": 2024,
    "2020 100": 100, "12:30": 30, "1.5,2.5": 2.5, ".5": 0.5,
    "1٬٢٣٤٫٥": 1234.5, "١٬٢٣٤٬٥٦٧": 1234567, "১২": 12, "๑๘": 18, "१८": 18, "１８": 18, "１，２３４．５": 1234.5,
    "౪౨": 42,
    "-7": -7, "−7": -7, "－７": -7, "–7.5": -7.5, "-$5": -5, "$-5": -5, "5-3=2": 2, "10-7": 7, "x-7": 7, "(3) -4": -4,
    "3/4": 0.75, "-3/4": -0.75, "2 1/2": 2.5, "2½": 2.5, "2 ½": 2.5, "½": 0.5, "3⁄4": 0.75, "1/2/2024": 2024, "7/0": 0,
    r"\frac{3}{4}": 0.75, r"2\frac{1}{2}": 2.5, r"-\dfrac{3}{4}": -0.75,
    "1.2e3": 1200, "1e-2": 0.01, "1.2 × 10^3": 1200, r"1.2 \times 10^{-2}": 0.012, "5·10³": 5000, "5 10³": 10,
    r"9{,}500": 9500, r"10\,000": 10000, r"\boxed{9{,}500}": 9500, r"\boxed{\frac{3}{4}} in step 2": 0.75,
    r"\boxed{42} (check: 6 * 7)": 42, r"\boxed{} is 7": 7, r"\boxed{5": 5, "#### 42": 42, "x = 5 (step 2)": 5,
    "2(x + 5)": 5, "= (7)": 7, "50%": 50, "$1,000.00": 1000, "5 km": 5,
    "十八": 18, "一百零五": 105, "三千五百": 3500, "两万": 20000, "二〇二四": 2024, "1万2千": 12000, "1.5億": 150000000,
    "答案是18。一共": 18, "一億二千万": 120000000,
}  # fmt: skip


@pytest.mark.parametrize("language", ANY)
def test_what_can_be_read_in_one_way_is_read_so_in_every_language(language: str | None) -> None:
    found = {text: find_number(text, language) for text in UNAMBIGUOUS}
    assert {text: float(value) for text, value in found.items()} == UNAMBIGUOUS


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("1.234", "German", 1234), ("1.234", "Spanish", 1234), ("1.234", "Indonesian", 1234),
        ("1.234", "English", 1.234),
        ("1.234", "French", 1.234), ("1.234", "Swahili", 1.234), ("1.234", None, 1.234), ("12.345", "de", 12345),
        ("12,5", "German", 12.5), ("12,5", "French", 12.5), ("12,5", "ru", 12.5), ("1,5", "Spanish", 1.5),
        ("12,5", None, 12.5), ("12,5", "English", 5), ("12,5", "Thai", 5), ("1,2", None, 2), ("1,2", "Japanese", 2),
        ("1234,567", "German", 1234.567), ("1234.567", "German", 1234.567), ("3,1416", "Italian", 3.1416),
        ("10 000", "French", 10000), ("10 000", "Russian", 10000), ("10 000", "German", 10000), ("10 000", None, 10000),
        ("1 234 567,5", "Russian", 1234567.5), ("in 5 100 boxes", "English", 100), ("5 100 boîtes", "French", 5100),
        ("10 000 shillings", "Swahili", 0), ("Die Antwort ist 1.234,5", "German", 1234.5),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_read_as_the_language_writes(
    text: str, language: str | None, value: float
) -> None:
    assert last_number(text, signed=True, language=language) == value


# Decimal mark, what parts thousands, sizes of the groups from the right, digits.
LATIN, NARROW = "0123456789", "\u202f"
WRITTEN = {
    "English": (".", ",", (3,), LATIN), "Chinese": (".", ",", (3,), LATIN), "Japanese": (".", ",", (3,), LATIN),
    "Thai": (".", ",", (3,), "๐๑๒๓๔๕๖๗๘๙"), "Swahili": (".", ",", (3,), LATIN),
    "Bengali": (".", ",", (3, 2), "০১২৩৪৫৬৭৮৯"),
    "Telugu": (".", ",", (3, 2), LATIN), "Hindi": (".", ",", (3, 2), "०१२३४५६७८९"), "German": (",", ".", (3,), LATIN),
    "Spanish": (",", ".", (3,), LATIN), "Turkish": (",", ".", (3,), LATIN), "Vietnamese": (",", ".", (3,), LATIN),
    "French": (",", NARROW, (3,), LATIN), "Russian": (",", "\u00a0", (3,), LATIN), "Polish": (",", " ", (3,), LATIN),
    "Finnish": (",", " ", (3,), LATIN), "Arabic": ("٫", "٬", (3,), "٠١٢٣٤٥٦٧٨٩"),
    "Persian": ("٫", "٬", (3,), "۰۱۲۳۴۵۶۷۸۹"),
}  # fmt: skip


def written(number: Decimal, language: str, minus: str, grouped: bool) -> str:
    decimal, mark, sizes, digits = WRITTEN[language]
    whole, _, places = f"{abs(number):f}".partition(".")
    groups: list[str] = []
    while grouped and len(whole) > (size := sizes[min(len(groups), len(sizes) - 1)]):
        whole, group = whole[:-size], whole[-size:]
        groups.insert(0, group)
    text = mark.join([whole, *groups]) + (decimal + places if places else "")
    return minus * (number < 0) + text.translate(str.maketrans(LATIN, digits))


@pytest.mark.parametrize("language", WRITTEN)
@settings(max_examples=40, deadline=None)
@given(
    number=st.integers(-(10**9), 10**9),
    places=st.integers(0, 5),
    minus=st.sampled_from("-−"),
    grouped=st.booleans(),
)
def test_what_a_language_writes_is_read_again(
    language: str, number: int, places: int, minus: str, grouped: bool
) -> None:
    if WRITTEN[language][0] == "," and places == 3:
        places = 2  # the test sets write thousands so, in every language
    value = Decimal(number).scaleb(-places)
    text = written(value, language, minus, grouped)
    assert find_number(f"1, 2 = {text}.", language) == value
    assert Decimal(whole_number_text(text, language) or "nan") == value  # a gold value


@pytest.mark.parametrize(
    ("file", "gold", "target"),
    [
        ("mgsm_de.tsv", "1.234.567", "1234567"), ("mgsm_de.tsv", "12,5", "12.5"), ("mgsm_de.tsv", "114,200", "114200"),
        ("mgsm_de.tsv", "1.234", "1234"), ("mgsm_en.tsv", "1.234", "1.234"), ("mgsm_bn.tsv", "১২", "12"),
        ("mgsm_bn.tsv", "1,23,456", "123456"), ("mgsm_sw.tsv", "-5", "-5"), ("mgsm_sw.tsv", "−5", "-5"),
        ("mgsm_sw.tsv", "$5", "5"), ("mgsm_fr.tsv", "10 000 €", "10000"), ("mgsm_sw.tsv", "50%", "50"),
        ("mgsm_fr.tsv", "3/4", "0.75"), ("mgsm_zh.tsv", "十八", "18"), ("mgsm_th.tsv", "๑๘", "18"),
        ("mgsm_en.tsv", "7.0", "7.0"),
    ],
)  # fmt: skip
def test_gold_values_are_read_by_the_same_rule(tmp_path, file: str, gold: str, target: str) -> None:
    (tmp_path / file).write_text(f"question?\t{gold}\n", encoding="utf-8")
    examples, _ = load_examples(f"mgsm:{tmp_path / file}")
    assert [example.target for example in examples] == [target]


@pytest.mark.parametrize("gold", ["12,5", "1,2,3", "5 apples", "12:30", "24.12.2024", "5-3", "x", "-"])
def test_a_gold_value_that_is_not_one_number_in_its_language_is_malformed(tmp_path, gold: str) -> None:
    (tmp_path / "mgsm_en.tsv").write_text(f"question?\t{gold}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"mgsm_en\.tsv:1: .*expected a number as English writes it"):
        load_examples(f"mgsm:{tmp_path / 'mgsm_en.tsv'}")


def test_gold_numbers_of_json_are_no_text_of_any_language(tmp_path) -> None:
    (tmp_path / "test_German.jsonl").write_text('{"m_query": "?", "response": 1.234}\n', encoding="utf-8")
    examples, _ = load_examples(f"msvamp:{tmp_path / 'test_German.jsonl'}")
    assert examples[0].target == "1.234"
