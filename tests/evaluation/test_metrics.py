import math

import pytest

from layalign.evaluation.metrics import last_number, parse_label, same_number, wilson_interval


@pytest.mark.parametrize(
    "text, value",
    [
        ("The answer is: 42", 42.0), ("1 then 2.50 dollars", 2.5), ("2,125", 2125.0), ("114,200 eggs", 114200.0),
        ("1,234,567.5", 1234567.5), ("no number", 0.0), ("", 0.0), ("5.", 5.0), (".5", 5.0), ("-7", 7.0), ("১৮", 18.0),
        ("٣٫٥", 5.0), ("1,2,3", 3.0), ("#### 72", 72.0), ("3.14.15", 15.0),
    ],
)  # fmt: skip
def test_last_number_as_published(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize(
    "text, value",
    [
        ("it is -7", -7.0), ("−7.5 degrees", -7.5), ("10-7", 7.0), ("x-7", 7.0), ("(3) -4", -4.0), ("2,125", 2125.0),
        ("1,2", 2.0), ("-1,234.5", -1234.5), ("٣٫٥", 3.5), ("١٬٢٣٤", 1234.0), ("১৮", 18.0), ("１，２３４．５", 1234.5),
        ("none", 0.0),
    ],
)  # fmt: skip
def test_last_number_signed(text, value):
    assert last_number(text, signed=True) == value


def test_an_endless_row_of_digits_equals_nothing():
    assert last_number("9" * 500) == math.inf
    assert not same_number(math.inf, math.inf)


def test_same_number():
    assert same_number(8.0, 8.0009)
    assert not same_number(8.0, 8.0011)


def test_labels_exact_as_published():
    assert parse_label("  neutral\n", ("neutral",)) == "neutral"
    assert parse_label("Neutral.", ("neutral",)) == "Neutral."


@pytest.mark.parametrize(
    "text, label",
    [
        ("B", "B"), (" b. The river", "B"), ("(C) because", "C"), ("A river runs", None), ("Because", None), ("", None),
        ("**D**", "D"), ("E: yes", "E"), ("A\nB", "A"), ("F", None),
    ],
)  # fmt: skip
def test_letter_at_the_start(text, label):
    assert parse_label(text, ("A", "B", "C", "D", "E"), "start") == label


def test_word_at_the_start():
    labels = ("entailment", "neutral", "contradiction")
    assert parse_label("Entailment because", labels, "start") == "entailment"
    assert parse_label("Neutrality", labels, "start") is None
    assert parse_label("yes", ("yes", "yes and no"), "start") == "yes"
    assert parse_label("yes and no", ("yes", "yes and no"), "start") == "yes and no"


def test_wilson_interval():
    # Newcombe 1998, table I: 81 of 263.
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 10)[0] == pytest.approx(0.0)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)
