"""Readers: training and test data in the published layout, in plain files, or from the `datasets` library.

What to read is a *spec*:

* ``"FORMAT:PATH"``, for example ``"pairs:data/tatoeba"`` or ``"mgsm:data/mgsm/mgsm_sw.tsv"``; a path alone when it
  contains the format's name;
* a mapping ``{"format": ..., "path": ..., <any keyword of load_examples>}``, as it stands in a YAML file;
* a list of such specs, read one after the other.

``"datasets:NAME"`` as the path reads a dataset through the `datasets` library.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from layalign.data.examples import BadRecord, Collected, Example, ReadReport
from layalign.data.files import (
    COMPRESSED,
    JsonRecords,
    all_quoted,
    by_name,
    csv_rows,
    decode,
    is_json_lines,
    opened,
    parallel_lines,
    parquet_rows,
    parse_json,
    plain_name,
    raw_lines,
    split_quoted,
    unquoted,
)
from layalign.data.languages import Language, find_language, language_of
from layalign.data.records import FORMATS, PROMPTS, Record
from layalign.utils.errors import ArgumentError, BackendError, DataError, refuse, whole_number

DATASETS = "datasets:"
MAX_DEPTH = 8  # of lists in lists
Spec = str | Path | Mapping[str, Any] | Sequence["str | Path | Mapping[str, Any]"]


@dataclass(frozen=True)
class _Request:
    """One spec with its options; see `load_examples` for their meaning."""

    path: str = ""
    format: str = ""
    languages: tuple[str, ...] | None = None
    language: str | None = None
    limit: int | None = None
    skip_bad: bool = False
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    subset: str | None = None
    header: bool | None = None


def load_examples(
    spec: Spec,
    *,
    format: str | None = None,
    languages: Sequence[str] | None = None,
    language: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    seed: int | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    subset: str | None = None,
    header: bool | None = None,
) -> tuple[list[Example], ReadReport]:
    """Read examples.

    Args:
        spec: what to read; see the head of this module. Keys of a mapping win over the arguments here.
        format: one of `FORMATS`.
        languages: names or codes of the languages to keep; files are read in this order. None keeps all that there are.
        language: language of everything that is read, when neither the records nor the file names tell. Unlike
            elsewhere, a name that is in no table is taken as it is.
        limit: most examples per language and spec (published: `train_num`).
        skip_bad: leave malformed lines out and list them in the report, where otherwise the first one raises.
        seed: shuffle everything; the same permutation as the published `random.seed(seed); random.shuffle(...)`.
        split: "train" or "test" chooses among the files of a folder; for `datasets` the split's own name.
        columns: our field name -> the data's name for it ("translation.sw" for a nested one). The fields: source,
            target, language, id, prompt; for xnli sentence1, sentence2, label; for xcopa its own keys.
        prompt: "math", "source" or "none" in place of the format's own prompt, for the formats without choices; or a
            template with "{source}", whose special tokens (chat markers) count as such.
        subset: configuration name of a `datasets` dataset.
        header: whether the first line of a TSV or CSV file names its columns. None looks: it does where every field is
            a name such as source, src, text, question, target, tgt, translation, answer, id, lang, or one names the
            file's language and the other English, or all those of `columns` are there. A CSV file needs one of these,
            or False.

    Returns:
        The examples, and the report of what was read and left out.

    Raises:
        ArgumentError: an option has a value that is none of those expected.
        DataError: no such data, or a malformed line ("path:line: what, expected what").
        BackendError: `datasets` is asked for and not installed.
    """
    defaults = dict(
        format=format, languages=languages, language=language, limit=limit, skip_bad=skip_bad, split=split,
        columns=columns, prompt=prompt, subset=subset, header=header,
    )  # fmt: skip
    report, examples = ReadReport(), []
    if seed is not None:
        whole_number("seed", seed)
    for request in _requests(spec, defaults):
        try:
            collected = _read(request)
        except OSError as error:
            raise DataError(f"{error.filename or request.path}: cannot be read: {error.strerror}") from error
        report.merge(collected.report)
        examples += collected.examples
    if seed is not None:
        random.Random(seed).shuffle(examples)
    return examples, report


def _names(languages: Sequence[str]) -> tuple[str, ...]:
    if isinstance(languages, str) or not isinstance(languages, Sequence):
        refuse("languages", "a list of names or codes", languages)
    return tuple(language_of(language).name for language in languages)


def _requests(spec: Spec, defaults: Mapping[str, Any], depth: int = 0) -> Iterable[_Request]:
    if isinstance(spec, str | Path):
        text = str(spec)
        format, colon, path = text.partition(":")
        spec = {"format": format, "path": path} if colon and format in FORMATS else {"path": text}
    if isinstance(spec, Mapping):
        yield _checked(spec, defaults)
    elif isinstance(spec, Sequence) and spec and depth < MAX_DEPTH and not isinstance(spec, bytes):
        for part in spec:
            yield from _requests(part, defaults, depth + 1)
    else:
        refuse("spec", "'FORMAT:PATH', a mapping with 'path', or a list of these", spec)


def _checked(spec: Mapping[str, Any], defaults: Mapping[str, Any]) -> _Request:
    options = {key: value for of in (defaults, spec) for key, value in of.items() if value is not None}
    unknown = [key for key in options if key not in _Request.__dataclass_fields__]
    if unknown:
        refuse("spec", f"keys {', '.join(_Request.__dataclass_fields__)}", unknown[0])
    options["path"] = str(options.get("path", ""))
    if "languages" in options:
        options["languages"] = _names(options["languages"])
    request = _Request(**options)
    _check_types(request)
    if not request.path:
        raise ArgumentError("spec: expected a 'path'")
    if not request.format:
        parts = Path(request.path).parts[-3:]
        named = [name for part in reversed(parts) for name in FORMATS if name in part.lower().replace("_csqa", "-csqa")]
        request = replace(request, format=named[0] if named else "")
    if request.format not in FORMATS:
        raise ArgumentError(f"format: expected one of {', '.join(FORMATS)}, got {request.format!r} for {request.path}")
    if request.prompt and request.prompt not in PROMPTS and "{source}" not in request.prompt:
        raise ArgumentError(f"prompt: expected one of {', '.join(PROMPTS)}, got {request.prompt!r}")
    if not request.path.startswith(DATASETS) and request.split not in ("train", "test"):
        raise ArgumentError(f"split: expected 'train' or 'test', got {request.split!r} for {request.path}")
    if request.language is not None:
        found = find_language(request.language)
        request = replace(request, language=found.name if found else request.language)
    return request


def _check_types(request: _Request) -> None:
    """Raise ArgumentError for an option of the wrong type."""
    for name in ("format", "split", "prompt", "language", "subset"):
        value = getattr(request, name)
        if not isinstance(value, str) and not (value is None and name in ("language", "subset")):
            refuse(name, "text", value)
    if not isinstance(request.skip_bad, bool):
        refuse("skip_bad", "true or false", request.skip_bad)
    if not isinstance(request.header, bool | None):
        refuse("header", "true, false or nothing", request.header)
    columns = request.columns
    if not isinstance(columns, Mapping) or not all(isinstance(part, str) for pair in columns.items() for part in pair):
        refuse("columns", "a mapping of our field names to the data's", columns)
    if request.limit is not None and whole_number("limit", request.limit) < 1:
        raise ArgumentError(f"limit: expected a number >= 1, got {request.limit}")


def _read(request: _Request) -> Collected:
    form = FORMATS[request.format]
    collected = Collected(request.languages, request.limit, request.skip_bad)
    if request.path.startswith(DATASETS):
        _read_dataset(request, collected)
    elif request.format == "bilingual_pairs" or (request.format == "pairs" and _bilingual_folders(Path(request.path))):
        _read_bilingual(request, collected)
    else:
        for path, language in _files(request):
            collected.report.files.append(str(path))
            _read_file(path, language, request, collected)
    if form.grouped:
        order = {name: i for i, name in enumerate(dict.fromkeys(e.language for e in collected.examples))}
        collected.examples.sort(key=lambda example: order[example.language])
    missing = [name for name in request.languages or () if not collected.report.counts[name]]
    if missing or not collected.examples:
        found = ", ".join(collected.report.counts) or "none"
        raise DataError(f"{request.path}: no examples of {', '.join(missing) or 'any language'}; found {found}")
    return collected


def language_of_path(path: Path) -> Language | None:
    """The language that a file is named after: sw.tsv, mgsm_sw.tsv, test_Swahili.jsonl, val.sw.jsonl, sw-en.tsv."""
    stem = plain_name(path).stem
    whole = find_language(stem)
    if whole is not None:
        return whole
    # Only the ends of a name count: "to" and "new" are codes of languages, and words.
    parts = stem.replace(".", "_").replace("-", "_").split("_")
    last, first = find_language(parts[-1]), find_language(parts[0])
    return first if last is not None and last.name == "English" and first is not None else last


def _files(request: _Request) -> list[tuple[Path, str | None]]:
    """The files to read, with the language each is named after; in the order of the languages asked for."""
    root, form = Path(request.path), FORMATS[request.format]
    if root.is_dir():
        patterns = form.test if request.split == "test" and form.test else form.train
        matching = (_matching(root, pattern) for pattern in patterns)
        paths = next((found for found in matching if found), [])
        if not paths:
            raise DataError(f"{root}: no {request.format} files, expected {' or '.join(patterns)}")
    elif root.is_file():
        paths = [root]
    else:
        raise DataError(f"{root}: no such file or folder")
    named: list[tuple[Path, str | None]] = []
    for path in paths:
        # The published X-CSQA files are called sw/dev.jsonl.
        in_folder = plain_name(path).name == "dev.jsonl"
        language = language_of_path(path) or (find_language(path.parent.name) if in_folder else None)
        named.append((path, request.language or (language.name if language else None)))
    wanted = request.languages
    if wanted is None or len(named) == 1:
        return named
    # A file whose name has no language may hold any; its records name theirs.
    kept = [pair for pair in named if pair[1] is None or pair[1] in wanted or request.language is not None]
    return sorted(kept, key=lambda pair: wanted.index(pair[1]) if pair[1] in wanted else -1)


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The files of a pattern, compressed ones too."""
    found = {path for end in ("", *COMPRESSED) for path in folder.glob(pattern + end) if path.is_file()}
    twice = [path for path in found if plain_name(path) != path and plain_name(path) in found]
    if twice:
        raise DataError(f"{twice[0]}: there is {plain_name(twice[0]).name} too, expected one of them")
    return sorted(found)


def _read_file(path: Path, language: str | None, request: _Request, collected: Collected) -> None:
    kind = plain_name(path).suffix.lower()
    if kind in (".tsv", ".tab") and not FORMATS[request.format].columns:
        raise DataError(f"{path}: a TSV file, expected JSON for the format {request.format}")
    if kind not in _TABLES and not is_json_lines(path):
        _collect(JsonRecords(path), str(path), language, request, collected, counted=True)
    else:
        _collect(_rows(path, kind, language, request, collected.report), str(path), language, request, collected)


def _collect(
    rows: Iterable[tuple[int, Any]],
    name: str,
    language: str | None,
    request: _Request,
    collected: Collected,
    counted: bool = False,
) -> None:
    """Collect the examples of (line, values or the BadRecord that it is) of a file of one language, or of several.

    The number of a record without an id is its line; or, ``counted``, its place among the records.
    """
    parse = FORMATS[request.format].parse
    for count, (line, values) in enumerate(rows, 1):
        try:
            if isinstance(values, BadRecord):
                raise values
            collected.add(parse(_record(values, language, request, str(count if counted else line))))
        except BadRecord as error:
            collected.bad(name, line, str(error))
        if language is not None and not counted and not collected.takes(language):
            break


_TABLES = (".tsv", ".tab", ".txt", ".csv", ".parquet")
_SOURCES = (
    "source", "src", "source_text", "source_sentence", "src_text", "text", "sentence", "input", "query", "question",
)  # fmt: skip
_TARGETS = (
    "target", "tgt", "trg", "target_text", "target_sentence", "tgt_text", "translation", "output", "response", "answer",
    "reference",
)  # fmt: skip
_OTHERS = ("id", "idx", "language", "lang", "prompt")


def _rows(
    path: Path, kind: str, language: str | None, request: _Request, report: ReadReport
) -> Iterator[tuple[int, Any]]:
    """(line or number of the record, its values or the BadRecord that it is) of a file of records."""
    form = FORMATS[request.format]
    if kind == ".parquet":
        yield from enumerate(parquet_rows(path), 1)
    elif kind in (".csv", ".tsv", ".tab") or (kind == ".txt" and form.columns and not _starts_with_a_brace(path)):
        yield from _table_records(path, kind, language, request, report)
    else:
        for number, raw in raw_lines(path):
            try:
                yield number, parse_json(_text(raw, request))
            except BadRecord as error:
                yield number, error


def _starts_with_a_brace(path: Path) -> bool:
    with opened(path) as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _text(raw: bytes, request: _Request) -> str:
    line = decode(raw)
    if not line.strip():
        raise BadRecord(f"an empty line, expected a line of {request.format}")
    return line


def _table_records(
    path: Path, kind: str, language: str | None, request: _Request, report: ReadReport
) -> Iterator[tuple[int, dict[str, str] | BadRecord]]:
    """The rows of a table with tabs, or with commas."""
    form, commas = FORMATS[request.format], kind == ".csv"
    names, always = form.columns, not commas and form.plain and all_quoted(path)
    for number, row in csv_rows(path) if commas else raw_lines(path):
        try:
            if isinstance(row, BadRecord):
                raise row
            line = ",".join(row) if isinstance(row, list) else _text(row, request)
            values = row if isinstance(row, list) else line.split("\t")
            if number == 1 and request.header is not False:
                found = _header(values, language, request if names else replace(request, header=True))
                if found is not None:
                    report.headers.append(f"{path}: {line}")
                    names, always = found, always or (form.plain and line.startswith('"'))
                    continue
                if commas:
                    raise DataError(
                        f"{path}:1: no names of columns that are known ({', '.join(values)[:80]}), expected some such "
                        f"as {', '.join(names)}; 'columns' maps others, 'header: false' reads a file without names"
                    )
            if form.plain and not commas:
                values = split_quoted(line, len(names), always)
            yield number, by_name(values, names, "," if commas else "<TAB>")
        except BadRecord as error:
            yield number, error


def _header(fields: list[str], language: str | None, request: _Request) -> tuple[str, ...] | None:
    """The names of our fields for the columns that a first line names; None for a line of data."""
    form, mapped = FORMATS[request.format], set(request.columns.values())
    given = [unquoted(field.strip()) for field in fields]
    plain = [re.sub(r"[\s-]+", "_", field.strip().casefold()) for field in given]
    roles: list[str | None] = [None] * len(given)
    if form.two_sided:
        roles = ["source" if name in _SOURCES else "target" if name in _TARGETS else None for name in plain]
        spoken = [found.name if (found := find_language(field)) else None for field in given]
        if (
            len(given) == 2
            and language not in (None, "English")
            and sorted(map(str, spoken)) == sorted(["English", str(language)])
        ):
            roles = ["target" if name == "English" else "source" for name in spoken]
    known = [role is not None or name in (*_OTHERS, *form.columns) for role, name in zip(roles, plain, strict=True)]
    names = tuple(
        field if field in mapped else role or (name if name in (*_OTHERS, *form.columns) else field)
        for field, role, name in zip(given, roles, plain, strict=True)
    )
    two_sided = not form.two_sided or {"source", "target"} <= set(roles)
    recognised = (mapped and mapped <= set(given)) or (all(known) and two_sided and len(set(names)) == len(names))
    return names if recognised or request.header else None


def _record(values: Any, language: str | None, request: _Request, number: str) -> Record:
    """A record; what it says of its language counts more than the file name, and less than the `language` argument."""
    told = request.language
    if told is None and language is not None:
        own = isinstance(values, Mapping) and (values.get("language") or values.get("lang"))
        told = language if not own and "language" not in request.columns else None
    return Record(values, request.columns, told, request.prompt, number)


def _bilingual_folders(root: Path) -> list[Path]:
    if root.name.startswith("en-"):
        return [root] if root.is_dir() else []
    return sorted(root.glob("en-*")) or sorted(root.glob("bilingual_pairs/en-*"))


def _read_bilingual(request: _Request, collected: Collected) -> None:
    """The published bilingual_pairs/en-XX/train_100k.{XX,en}, or one such en-XX folder."""
    root = Path(request.path)
    folders = _bilingual_folders(root)
    if not folders:
        raise DataError(f"{root}: no bilingual_pairs, expected folders en-XX with train_*.XX and train_*.en")
    named = {language_of(folder.name.removeprefix("en-")).name: folder for folder in folders}
    for name in request.languages or tuple(named):
        if name in named:
            _read_bilingual_folder(named[name], name, collected)


def _read_bilingual_folder(folder: Path, language: str, collected: Collected) -> None:
    code = folder.name.removeprefix("en-")
    sources = _matching(folder, f"train_*.{code}")
    if len(sources) != 1:
        raise DataError(f"{folder}: {len(sources)} files train_*.{code}, expected one")
    source, target = sources[0], plain_name(sources[0]).with_suffix(".en")
    target = next((path for path in _matching(folder, target.name)), target)
    if not target.is_file():
        raise DataError(f"{target}: no such file, expected the English side of {source.name}")
    collected.report.files += [str(source), str(target)]
    for number, one, other in parallel_lines(source, target):
        at = source
        try:
            values = [decode(one).strip()]
            at = target if values[0] else source
            values.append(decode(other).strip())
            if not all(values):
                raise BadRecord("an empty line, expected a sentence")
            collected.add(Example(values[0], values[1], language, "", str(number)))
        except BadRecord as error:
            collected.bad(str(at), number, str(error))
        if not collected.takes(language):
            break


def _read_dataset(request: _Request, collected: Collected) -> None:
    """Rows of a dataset of the `datasets` library (downloaded by it, or from a local folder)."""
    try:
        import datasets
    except ImportError as error:
        raise BackendError(f"datasets: {request.path} needs the 'datasets' package ({error})") from None
    name = request.path.removeprefix(DATASETS)
    try:
        rows = datasets.load_dataset(name, request.subset, split=request.split)
    except Exception as error:  # the library raises what its many loaders raise
        raise DataError(f"{request.path}: cannot be loaded, split {request.split!r} ({error})") from error
    collected.report.files.append(request.path)
    subset = find_language(request.subset or "")
    language = request.language or (subset.name if subset else None)
    _collect(enumerate(rows, 1), request.path, language, request, collected, counted=True)


def by_language(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Examples by language, in the order in which the languages first appear."""
    try:
        examples = list(examples)
    except TypeError:
        refuse("examples", "some Example", examples)
    if not all(isinstance(getattr(example, "language", None), str) for example in examples):
        refuse("examples", "Example objects alone", examples)
    groups: dict[str, list[Example]] = {}
    for language, run in groupby(examples, key=lambda example: example.language):
        groups.setdefault(language, []).extend(run)
    return groups
