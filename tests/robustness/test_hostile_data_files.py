"""Mutated data files: every line is read, or left out and counted, or stops the reader with its file and line."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
from pathlib import Path

import pytest
from bad_inputs import times, tried
from mutate import mutated

from layalign import ArgumentError, DataError
from layalign.data import Example, language_of, load_examples


def lines_of(*rows: object) -> list[bytes]:
    return [(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)).encode() for row in rows]


CHOICES = [{"label": "A", "text": "kitabu"}, {"label": "B", "text": "mbwa"}, {"label": "C", "text": "maji"}]
CSQA = {"question": {"stem": "Nini?", "choices": CHOICES}, "answerKey": "B", "id": "q1", "lang": "sw"}
XCOPA = {"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 0, "idx": 3}
XNLI = {"sentence1": "Paka", "sentence2": "Mbwa", "label": 1, "language": "Swahili"}
MATH = {"query": "2 + 2?", "response": "The answer is 4", "lang": "Swahili"}
# (format, file, valid lines)
LINES: dict[str, tuple[str, str, list[bytes]]] = {
    "pairs.tsv": ("pairs", "sw.tsv", lines_of("paka\tcat", "mbwa mkubwa\ta large dog", "\u00e9t\u00e9\tsummer")),
    "pairs.jsonl": ("pairs", "sw.jsonl", lines_of({"source": "paka", "target": "cat", "id": 5}, {"source": "a",
    "target": "b"})),
    "free.tsv": ("tsv", "sw.tsv", lines_of("swali\tjibu", "1\t2")),
    "free.jsonl": ("jsonl", "de.jsonl", lines_of({"source": "a", "target": "b", "prompt": "c", "language": "de"})),
    "math.jsonl": ("math", "math.jsonl", lines_of(MATH, {**MATH, "lang": "German", "id": "x"})),
    "mgsm.tsv": ("mgsm", "mgsm_sw.tsv", lines_of("Ngapi?\t1,234", "Ngapi tena?\t-7.5")),
    "msvamp.json": ("msvamp", "test_Swahili.json", lines_of({"m_query": "Ngapi?", "response": 12.0}, {"m_query": "a",
    "response": "3"})),
    "xnli.tsv": ("xnli", "sw.tsv", lines_of("Paka\tMbwa\tneutral", "a\tb\t0")),
    "xnli.jsonl": ("xnli", "any.jsonl", lines_of(XNLI, {**XNLI, "label": "contradictory"})),
    "x-csqa.jsonl": ("x-csqa", "dev_sw.jsonl", lines_of(CSQA)),
    "xcopa.jsonl": ("xcopa", "val.sw.jsonl", lines_of(XCOPA, {**XCOPA, "question": "effect", "label": 1})),
}  # fmt: skip


def check_examples(examples: list[Example]) -> None:
    for example in examples:
        assert language_of(example.language).name == example.language
        for text in (example.source, example.target, example.prompt, example.id, *example.choices):
            assert isinstance(text, str)
            text.encode("utf-8")  # can be written to a file again
        assert example.source.strip() and example.target.strip()
        assert not example.choices or example.target in example.choices


@pytest.mark.parametrize("kind", list(LINES))
def test_mutated_lines(kind: str, tmp_path: Path) -> None:
    form, name, good = LINES[kind]
    draw, path, count = random.Random(f"lines {kind}"), tmp_path / name, 0
    outcomes = {"read": 0, "left out": 0}
    for _ in range(times(24)):
        rows = [mutated(draw.choice(good), draw, good) if draw.randrange(8) else draw.choice(good) for _ in range(400)]
        path.write_bytes(
            (b"" if name.endswith(".json") else draw.choice([b"", b"\xef\xbb\xbf"])) + b"\n".join([good[0], *rows])
        )
        there = path.read_bytes().count(b"\n") + (not path.read_bytes().endswith(b"\n"))
        examples, report = load_examples({"format": form, "path": str(path)}, skip_bad=True)
        check_examples(examples)
        assert len(examples) + len(report.skipped) == there == report.total + len(report.skipped)
        bad = [line.line for line in report.skipped]
        assert bad == sorted(set(bad)) and all(line.path == str(path) and line.reason for line in report.skipped)
        with pytest.raises(DataError) as stopped:
            load_examples({"format": form, "path": str(path)})
        assert str(stopped.value).startswith(f"{path}:{bad[0]}: ") and len(str(stopped.value)) < 20_000
        count += len(rows)
        outcomes["read"] += len(examples)
        outcomes["left out"] += len(bad)
    tried("lines of data files", count)
    assert outcomes["read"] > count / 8 and outcomes["left out"] > count / 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array", "data object", "bytes"])
def test_mutated_json_files(kind: str, tmp_path: Path) -> None:
    """A file that is one JSON value: what cannot be parsed ends it, with its line."""
    draw, path, count = random.Random(f"json {kind}"), tmp_path / "math.json", times(500)
    outcomes = {"read": 0, "stopped": 0}
    for _ in range(count):
        records = [json.dumps({**MATH, "id": i}).encode() for i in range(4)]
        if kind != "bytes":
            place = draw.randrange(4)
            records[place] = mutated(records[place], draw, records)
        whole = b"[\n" + b",\n".join(records) + b"\n]\n"
        if kind == "data object":
            whole = b'{"version": "1",\n"data": ' + whole + b', "rest": {}}'
        path.write_bytes(mutated(whole, draw, [whole]) if kind == "bytes" else whole)
        try:
            examples, report = load_examples({"format": "math", "path": str(path)}, skip_bad=True)
        except DataError as error:
            outcomes["stopped"] += 1
            message = str(error)
        else:
            outcomes["read"] += 1
            message = f"{path}:1: "
            check_examples(examples)
            assert all(1 <= line.line <= path.read_bytes().count(b"\n") + 1 for line in report.skipped)
        assert re.match(re.escape(str(path)) + r"(:\d+)?: ", message), message
    tried("JSON files", count)
    assert min(outcomes.values()) > count / 20


def test_mutated_parallel_files(tmp_path: Path) -> None:
    folder = tmp_path / "bilingual_pairs" / "en-sw"
    folder.mkdir(parents=True)
    draw, count = random.Random("parallel"), 0
    for _ in range(times(40)):
        one, two = ([mutated(b"paka mkubwa", draw).replace(b"\n", b"") for _ in range(200)] for _ in range(2))
        if draw.randrange(5) == 0:
            two.append(b"one too many")
        (folder / "train_100k.sw").write_bytes(b"".join(line + b"\n" for line in [b"paka", *one]))
        (folder / "train_100k.en").write_bytes(b"".join(line + b"\n" for line in [b"cat", *two]))
        try:
            examples, report = load_examples(f"bilingual_pairs:{tmp_path}", skip_bad=True)
        except DataError as error:
            assert len(one) != len(two) and f"train_100k.sw:{len(one) + 2}: no such line" in str(error)  # noqa: PT017
        else:
            check_examples(examples)
            assert len(examples) + len(report.skipped) == len(one) + 1 == len(two) + 1
        count += len(one)
    tried("lines of data files", count)


DEEP = "[" * 100_000
FILES = {
    "sw.tsv": [b"", b"\n", b"\x00" * 4096, b"\xef\xbb\xbf", b"a" * 10**6, "\ufeff\ufeff".encode(), b"a\tb\tc",
    b"\xff\xfea\x00\t\x00"],
    "math.json": [
        b"", b"[", b"{", b"[]", b"{}", b'{"data": 5}', b'{"data": []}', b"null", b"NaN", DEEP.encode(),
        b"[" + b"9" * 5000 + b"]",
        b'[{"query": "a", "response": "b", "lang": "sw"}] trailing', b'[{"query": "a"}][{"query": "b"}]', b"[,]",
        b"[1,]", b"\xff\xfe[\x00",
        b'{"a": ' * 5000, b'["\\ud800"]', b"[NaN]", b'{"data":\n\n[{]', b'{"version" "1"}', b"{1: 2}",
    ],
    "sw.jsonl": [
        DEEP.encode(), b"9" * 5000, b'{"source": NaN, "target": "a"}', b'{"source": 1e999, "target": "a"}',
        b"\xef\xbb\xbf\xef\xbb\xbf{}",
        b'{"source": "\\ud800", "target": "a"}', b'{"source": "a", "target": "b", "id": "\\udfff"}', b'"text"', b"[]",
        b'{"source": {"a": 1}, "target": true}', b'{"source": "", "target": " "}',
        b'{"source": "a", "target": ' + b"9" * 4400 + b"}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", list(FILES))
def test_whole_files_that_are_no_data(name: str, tmp_path: Path) -> None:
    path, form = tmp_path / name, {"sw.tsv": "pairs", "math.json": "math", "sw.jsonl": "pairs"}[name]
    for content in FILES[name]:
        path.write_bytes(content)
        for skip in (False, True):
            with pytest.raises(DataError) as stopped:
                load_examples({"format": form, "path": str(path)}, skip_bad=skip)
            assert str(stopped.value).startswith(str(path))
            tried("JSON files" if "json" in name else "lines of data files")


def test_numbers_that_the_scorers_would_read_otherwise_are_malformed(tmp_path: Path) -> None:
    """Python's float takes them all; a scorer would see 0, 3, 5 and 5 in them."""
    path = tmp_path / "mgsm_sw.tsv"
    for text in ("1_000", "1e3", ".5", "1.5.", "infinity", "nan", "9" * 400):
        path.write_text(f"Ngapi?\t{text}\n", encoding="utf-8")
        with pytest.raises(DataError, match=f"{path}:1: 'target' is .*expected a number"):
            load_examples(f"mgsm:{path}")
        tried("lines of data files")


@pytest.mark.slow
def test_a_long_file_of_malformed_records_is_read_in_linear_time(tmp_path: Path) -> None:
    """The line of each of them is counted from the last one on: 40,000 bad records take a second, not minutes."""
    path = tmp_path / "math.json"
    path.write_text("[" + ",\n".join(['{"query": "a"}'] * 40_000 + [json.dumps(MATH)]) + "]", encoding="utf-8")
    _, report = load_examples(f"math:{path}", skip_bad=True)
    assert [line.line for line in report.skipped] == list(range(1, 40_001))


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "sw.tsv").mkdir()
    os.mkfifo(tmp_path / "de.tsv")  # opening it would wait for ever
    for path in (
        tmp_path,
        tmp_path / "sw.tsv",
        tmp_path / "de.tsv",
        "/dev/null",
        "a" * 5000,
        "a\x00b",
        tmp_path / "none",
    ):
        with pytest.raises(DataError):
            load_examples({"format": "pairs", "path": str(path)})
        tried("options of the readers")
    (tmp_path / "fr.tsv").write_text("un\tone\n")
    assert [example.language for example in load_examples(f"pairs:{tmp_path}")[0]] == ["French"]


BAD_OPTIONS = [
    ("limit", ["3", 0, -1, 2.5, float("nan"), True, [1]]),
    ("split", ["tset", "dev", 5, ["train"], ""]),
    ("columns", [5, "source", ["source"], {"source": 5}, {1: "source"}]),
    ("languages", [5, "sw", {"sw"}, ["Klingon"], [5], [None]]),
    ("language", [5, ["sw"], b"sw"]),
    ("skip_bad", ["yes", 1]),
    ("prompt", ["sing", 5, ["math"]]),
    ("format", ["csv", 5, ["pairs"], {}]),
    ("seed", ["0", 1.5, [1], float("inf")]),
    ("spec", [5, b"pairs:x", {}, {"paht": "x"}, {5: "x"}, object(), [[[[[[[[[["pairs:x"]]]]]]]]]], {"path": ""}]),
]


@pytest.mark.parametrize(("name", "values"), BAD_OPTIONS)
def test_wrong_options_are_named(name: str, values: list, tmp_path: Path) -> None:
    path = tmp_path / "sw.tsv"
    path.write_text("paka\tcat\n")
    for value in values:
        with pytest.raises(ArgumentError, match=f"^{name.removesuffix('s')}"):  # noqa: PT012
            if name == "spec":
                load_examples(value)
            elif name == "seed":
                load_examples(f"pairs:{path}", seed=value)
            else:
                load_examples({"format": "pairs", "path": str(path), name: value})
        tried("options of the readers")
    endless: list = []
    endless.append(endless)
    with pytest.raises(ArgumentError, match="spec"):
        load_examples(endless)


def test_a_line_of_many_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a bad line like any other, and is never in memory; the lines around it are read."""
    monkeypatch.setattr("layalign.data.files.MAX_LINE_BYTES", 1000)
    good, path = b"paka\tcat\n", tmp_path / "sw.tsv"
    for long in (b"a" * 1001, b"a" * 3_000_000, b"a\tb" + b"\r" * 9_000, b"a\t" + b"b" * 998 + b"\r\r"):
        path.write_bytes(good + long + b"\n" + good)
        with pytest.raises(DataError, match=r"sw.tsv:2: a line of more than 1000 bytes"):
            load_examples(f"pairs:{path}", languages=["Swahili"])
        examples, report = load_examples(f"pairs:{path}", languages=["Swahili"], skip_bad=True)
        assert len(examples) == 2 and [(each.line, len(report.skipped)) for each in report.skipped] == [(2, 1)]
    for line in (b"a\t" + b"b" * 998, b"a\t" + b"b" * 998 + b"\r"):
        for end in (b"", b"\n" + good):
            path.write_bytes(line + end)
            assert len(load_examples(f"pairs:{path}", languages=["Swahili"])[0][0].target) == 998
    tried("data files", 8)


@pytest.mark.slow
def test_a_line_of_300_megabytes_takes_little_memory(tmp_path: Path) -> None:
    """As 300 kB of gzip."""
    path = tmp_path / "sw.tsv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b"a" * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"sw.tsv.gz:1: a line of more than 16777216 bytes"):
        load_examples(f"pairs:{path}", languages=["Swahili"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.slow
def test_json_and_parquet_that_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layalign.data.files.MAX_WHOLE_BYTES", 2**20)
    path = tmp_path / "sw.json"
    path.write_bytes(gzip.compress(b"[" + b" " * 2**21))
    with pytest.raises(DataError, match=r"sw.json: more than 1048576 bytes, expected JSON lines"):
        load_examples(f"pairs:{path}", languages=["Swahili"])
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("layalign.data.files.MAX_ROWS_BYTES", 2**20)
    path = tmp_path / "sw.parquet"
    texts = pyarrow.array(["a" * 10_000] * 5000)  # written once, and said 5000 times
    parquet.write_table(pyarrow.table({"source": texts, "target": texts}), path)
    assert path.stat().st_size < 2**20
    with pytest.raises(DataError, match=r"sw.parquet: 1024 rows of \d+ bytes, expected 1048576"):
        load_examples(f"pairs:{path}", languages=["Swahili"])
