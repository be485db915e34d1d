"""Texts of errors for numbers and for files that cannot be written."""

from __future__ import annotations

from typing import Any

import pytest

from layalign.utils.errors import MAX_SIZE, ArgumentError, OutputError, whole_number
from layalign.utils.files import writing


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("layers", "a"), "layers: expected a whole number, got 'a'"),
        (("seed", -1, 0), "seed: expected a whole number from 0 up, got -1"),
        (("width", 0, 1, MAX_SIZE), "width: expected 1..2147483647, got 0"),
    ],
)
def test_a_wrong_number_is_told_its_range(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ArgumentError) as error:
        whole_number(*arguments)
    assert str(error.value) == text


def test_an_error_without_a_text_is_named_by_its_class() -> None:
    with pytest.raises(OutputError, match="file: cannot be written: RuntimeError"), writing("file"):
        raise RuntimeError
