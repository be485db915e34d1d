"""The formats: the files of each, and how one record (a JSON object, a row of a table) becomes an `Example`.

Every parse function takes a `Record`. A malformed one raises `BadRecord`: what was found, what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from layalign.data.examples import BadRecord, Example
from layalign.data.languages import find_language
from layalign.data.numbers import whole_number_text
from layalign.data.prompts import choice_letters, math_prompt, x_csqa_prompt, xcopa_prompt, xnli_prompt
from layalign.modeling.tokenization import Prompt

XNLI_LABELS = ("entailment", "neutral", "contradiction")
# XTREME's translated training files say "contradictory".
_XNLI_SPELLINGS = {**{label: label for label in XNLI_LABELS}, "contradictory": "contradiction"}
_XNLI_SPELLINGS.update({str(i): label for i, label in enumerate(XNLI_LABELS)})

PROMPTS: dict[str, Callable[[str], str]] = {
    "math": math_prompt,
    "source": lambda source: source,
    "none": lambda source: "",
}


class Record:
    """Named values of one record, read under the names a file uses for them.

    Args:
        values: the record.
        columns: our field name -> the record's key ("translation.sw" for a nested one).
        language: English name when it is known from outside (argument or file name).
        prompt: the prompt of a format that has no fixed one: one of `PROMPTS`, or a template with "{source}"; "" is the
            format's default.
        id: used where the record has none.
    """

    __slots__ = ("columns", "id", "language", "prompt", "values")

    def __init__(
        self, values: Any, columns: Mapping[str, str], language: str | None = None, prompt: str = "", id: str = ""
    ) -> None:
        if not isinstance(values, Mapping):
            raise BadRecord(f"a {type(values).__name__}, expected an object with keys")
        self.values, self.columns, self.language, self.prompt, self.id = values, columns, language, prompt, id

    def find(self, *names: str) -> Any:
        """The value of the first name there is; None without any. A mapped column is looked for alone."""
        value: Any
        mapped = self.columns.get(names[0]) if self.columns else None
        if mapped is None:
            for name in names:
                value = self.values.get(name)
                if value is not None:
                    return value
            return None
        value = self.values
        for part in [mapped] if mapped in self.values else mapped.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def get(self, *names: str) -> Any:
        """Like `find`; a missing value raises."""
        value = self.find(*names)
        if value is None:
            empty = next((name for name in names if name in self.values and names[0] not in self.columns), None)
            if empty is not None:
                raise BadRecord(f"{empty!r} is null, expected a value")
            expected = self.columns.get(names[0]) or " or ".join(names)
            raise BadRecord(f"no {expected!r} among the keys {sorted(map(str, self.values))}, expected one")
        return value

    def text(self, *names: str) -> str:
        """A value as text without outer white space; empty or not text raises. Numbers count as text."""
        value = self.get(*names)
        if type(value) in (int, float):
            if not math.isfinite(value):
                raise BadRecord(f"{names[0]!r} is {value}, expected a number or text")
            value = str(value)
        if not isinstance(value, str):
            hint = ": one record a line, or an array of records" if isinstance(value, list | dict) else ""
            raise BadRecord(f"{names[0]!r} is a {type(value).__name__}, expected text{hint}")
        if "\0" in value:
            raise BadRecord(f"{names[0]!r} holds a null character, expected text")
        value = value.strip()
        if not value:
            raise BadRecord(f"{names[0]!r} is empty, expected text")
        if not value.isascii():
            _require_valid(names[0], value)
        return value

    def name_of_language(self) -> str:
        """English name of the language: from outside, or from the record."""
        if self.language is not None:
            return self.language
        text = self.find("language", "lang")
        found = find_language(text) if isinstance(text, str) else None
        if found is None:
            what = "no language" if text is None else f"language {text!r}"
            raise BadRecord(f"{what}, expected a known one in the record, in the file name or as an argument")
        return found.name

    def own_id(self) -> str:
        """The record's own id, or the one given."""
        value = self.find("id", "idx")
        if value is None:
            return self.id
        text = str(value)
        _require_valid("id", text)
        return text

    def prompt_for(self, source: str, default: str) -> str:
        """The prompt around a source text."""
        return fill_prompt(self.prompt or default, source)


def fill_prompt(prompt: str, source: str) -> str:
    """The prompt around a source text: `prompt` is one of `PROMPTS`, or a template with "{source}"."""
    return Prompt.fill(prompt, source) if "{source}" in prompt else PROMPTS[prompt](source)


def _require_valid(name: str, text: str) -> None:
    """No half of a surrogate pair, which JSON can write and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{name!r} holds half of a surrogate pair, expected valid text") from None


def number_text(record: Record, language: str, *names: str) -> str:
    """A numeric answer in plain digits, read by the conventions of its language (`layalign.data.numbers`)."""
    value = record.find(*names)
    if type(value) in (int, float) and math.isfinite(value):
        return f"{Decimal(str(value)):f}"
    text = record.text(*names)
    found = whole_number_text(text, language)
    if found is None or not math.isfinite(float(found)):
        raise BadRecord(f"{names[0]!r} is {text!r}, expected a number as {language} writes it")
    return found


def parse_pair(record: Record) -> Example:
    """A sentence and its translation: source, target. No prompt, as in the published translation stage."""
    source, target = record.text("source"), record.text("target")
    return Example(source, target, record.name_of_language(), record.prompt_for(source, "none"), record.own_id())


def parse_math(record: Record) -> Example:
    """A question and its worked answer: query, response, lang."""
    source, target = record.text("source", "query", "question"), record.text("target", "response", "answer")
    return Example(source, target, record.name_of_language(), record.prompt_for(source, "math"), record.own_id())


def parse_numeric(record: Record) -> Example:
    """A question and a number: MGSM's question, answer; MSVAMP's m_query, response."""
    source = record.text("source", "m_query", "question")
    language = record.name_of_language()
    target = number_text(record, language, "target", "response", "answer")
    return Example(source, target, language, record.prompt_for(source, "math"), record.own_id())


def parse_free(record: Record) -> Example:
    """Any task: source (query), target (response), and a prompt; without one the source is the prompt."""
    source = record.text("source", "query", "question")
    target = record.text("target", "response", "answer")
    own = record.find("prompt")
    prompt = record.text("prompt") if own is not None else record.prompt_for(source, "source")
    return Example(source, target, record.name_of_language(), prompt, record.own_id())


def parse_xnli(record: Record) -> Example:
    """Natural language inference: sentence1 (premise), sentence2 (hypothesis), label (word, or 0, 1, 2), language."""
    prompt = xnli_prompt(record.text("sentence1", "premise"), record.text("sentence2", "hypothesis"))
    given = record.get("label", "gold_label")
    label = None if isinstance(given, bool) else _XNLI_SPELLINGS.get(str(given).strip().lower())
    if label is None:
        raise BadRecord(f"label {given!r}, expected {', '.join(XNLI_LABELS)} or 0, 1, 2")
    return Example(prompt, label, record.name_of_language(), prompt, record.own_id(), XNLI_LABELS)


def parse_x_csqa(record: Record) -> Example:
    """X-CSQA: question {stem, choices [{label, text}]}, answerKey. Choices are lettered in the order they stand in."""
    question = record.get("question")
    if not isinstance(question, Mapping):
        raise BadRecord(f"'question' is a {type(question).__name__}, expected an object with 'stem' and 'choices'")
    inner = Record(question, {})
    choices = inner.get("choices")
    # The `datasets` library turns a list of objects into an object of lists.
    texts = choices.get("text") if isinstance(choices, Mapping) else choices
    if not isinstance(texts, list) or not 2 <= len(texts) <= 26:
        raise BadRecord("'choices' is no list of 2 to 26 choices, expected objects with 'text'")
    words = [Record(text if isinstance(text, Mapping) else {"text": text}, {}).text("text") for text in texts]
    letters, answer = choice_letters(len(words)), record.text("answerKey", "answer_key")
    if answer not in letters:
        raise BadRecord(f"'answerKey' is {answer!r}, expected one of {', '.join(letters)}")
    prompt = x_csqa_prompt(inner.text("stem"), words)
    return Example(prompt, answer, record.name_of_language(), prompt, record.own_id(), letters)


def parse_xcopa(record: Record) -> Example:
    """XCOPA: premise, choice1, choice2, question ("cause" or "effect"), label (0 or 1)."""
    question, label = record.text("question"), record.get("label")
    if question not in ("cause", "effect"):
        raise BadRecord(f"'question' is {question!r}, expected 'cause' or 'effect'")
    if isinstance(label, bool) or str(label) not in ("0", "1"):
        raise BadRecord(f"'label' is {label!r}, expected 0 or 1")
    letters = choice_letters(2)
    prompt = xcopa_prompt(record.text("premise"), question, [record.text("choice1"), record.text("choice2")])
    return Example(prompt, letters[int(label)], record.name_of_language(), prompt, record.own_id(), letters)


@dataclass(frozen=True)
class Format:
    """How one format is read.

    Attributes:
        parse: makes an Example from a Record.
        train, test: glob patterns, below the given folder, of the training and of the test files; the first that
            matches anything is taken.
        columns: the columns of its TSV and CSV files.
        plain: its TSV files are anybody's, and may have fields in quotes; those of published data have none.
        grouped: order the examples by language, as the published reader does.
    """

    parse: Callable[[Record], Example]
    train: tuple[str, ...]
    test: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    plain: bool = False
    grouped: bool = False

    @property
    def two_sided(self) -> bool:
        """Whether its records are a source and a target, by whatever name; these take any prompt."""
        return self.parse in (parse_pair, parse_free, parse_math, parse_numeric)


FORMATS: dict[str, Format] = {
    "bilingual_pairs": Format(parse_pair, ()),
    "pairs": Format(
        parse_pair, ("*.tsv", "*.jsonl", "*.csv", "*.parquet", "*.ndjson"),
        columns=("source", "target"), plain=True,
    ),
    "tsv": Format(parse_free, ("*.tsv", "*.csv"), columns=("source", "target"), plain=True),
    "jsonl": Format(parse_free, ("*.jsonl", "*.ndjson", "*.parquet")),
    "math": Format(
        parse_math,
        ("*.jsonl", "metamath*.json", "math*.json", "query_translation/metamath_615k.json"),
        grouped=True,
    ),
    "mgsm": Format(
        parse_numeric, ("mgsm_*.tsv", "mgsm/mgsm_*.tsv", "evaluation/mgsm/mgsm_*.tsv"),
        columns=("question", "answer"),
    ),
    "msvamp": Format(
        parse_numeric, ("test_*.json*", "msvamp/test_*.json*", "evaluation/msvamp/test_*.json*")
    ),
    "xnli": Format(
        parse_xnli,
        ("*.tsv", "dev/*.tsv", "xnli_dev.json", "query_translation/xnli_dev.json", "*.jsonl"),
        ("*.tsv", "test/*.tsv", "test.json", "xnli/test.json", "evaluation/xnli/test.json", "*.jsonl"),
        columns=("premise", "hypothesis", "label"),
    ),
    "x-csqa": Format(
        parse_x_csqa,
        ("train_*.jsonl", "x-csqa/train_*.jsonl", "query_translation/x-csqa/train_*.jsonl"),
        ("*/dev.jsonl", "x-csqa/*/dev.jsonl", "evaluation/x-csqa/*/dev.jsonl", "dev_*.jsonl", "dev.jsonl"),
    ),
    "xcopa": Format(
        parse_xcopa,
        ("val.*.jsonl", "*/val.*.jsonl"),
        ("test.*.jsonl", "*/test.*.jsonl", "val.*.jsonl", "*/val.*.jsonl"),
    ),
}  # fmt: skip
