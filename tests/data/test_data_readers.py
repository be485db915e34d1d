import bz2
import csv
import gzip
import json
import lzma
import random

import pytest
from helpers_text import write_json_lines, write_lines

from layalign.data import load_examples
from layalign.data.prompts import math_prompt, x_csqa_prompt, xcopa_prompt, xnli_prompt
from layalign.utils.errors import ArgumentError, DataError

CSQA = {
    "id": "q1",
    "lang": "sw",
    "question": {
        "stem": "Samaki huishi wapi?",
        "choices": [{"label": "A", "text": "mti"}, {"label": "B", "text": "maji"}],
    },
    "answerKey": "B",
}
XNLI = {"sentence1": "Ninaishi hapa.", "sentence2": "Niko hapa.", "label": "entailment", "language": "Swahili"}
XCOPA = {
    "premise": "Mvua ilinyesha.",
    "choice1": "Njia ililowa.",
    "choice2": "Jua liliwaka.",
    "question": "effect",
    "label": 0,
}


# Prompts: these texts are the interface to the published checkpoints.


def test_prompts_are_the_published_ones():
    assert math_prompt("1 + 1?") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n1 + 1?\n\n### Response: Let's think step by step."
    )
    assert xnli_prompt("P", "H") == "Premise: P\nHypothesis: H\nLabel:"
    assert x_csqa_prompt("Q", ["x", "y", "z"]) == "Q\nOptions:A. x\tB. y\tC. z\nAnswer:"


def test_xcopa_prompt_asks_for_cause_or_effect():
    assert xcopa_prompt("P.", "cause", ["x", "y"]) == "P. What was the cause?\nOptions:A. x\tB. y\nAnswer:"
    assert "happened as a result" in xcopa_prompt("P.", "effect", ["x", "y"])


# Layouts


def bilingual(root, **sides):
    for code, (sources, targets) in sides.items():
        write_lines(root / f"bilingual_pairs/en-{code}/train_100k.{code}", *sources)
        write_lines(root / f"bilingual_pairs/en-{code}/train_100k.en", *targets)
    return root


def test_bilingual_pairs(tmp_path):
    bilingual(tmp_path, sw=(["moja", "mbili ", "tatu"], ["one", "two", "three"]), nl=(["een"], ["one"]))
    for root in (tmp_path, tmp_path / "bilingual_pairs"):
        examples, report = load_examples(
            {"format": "bilingual_pairs", "path": root, "languages": ["Swahili", "Flemish"]}
        )
        assert [(e.source, e.target, e.language, e.prompt) for e in examples] == [
            ("moja", "one", "Swahili", ""), ("mbili", "two", "Swahili", ""), ("tatu", "three", "Swahili", ""),
            ("een", "one", "Flemish", ""),
        ]  # fmt: skip
        assert report.counts == {"Swahili": 3, "Flemish": 1}
        assert len(report.files) == 4
    assert [e.source for e in load_examples(f"pairs:{tmp_path}", languages=["nl"])[0]] == ["een"]
    assert len(load_examples(f"pairs:{tmp_path}/bilingual_pairs/en-sw", limit=2)[0]) == 2


def test_bilingual_sides_of_unequal_length(tmp_path):
    bilingual(tmp_path, sw=(["moja", "mbili"], ["one"]))
    with pytest.raises(DataError, match=r"train_100k.en:2: no such line, expected as many lines as in .*train_100k.sw"):
        load_examples(f"bilingual_pairs:{tmp_path}", skip_bad=True)


def test_shuffling_is_the_published_permutation(tmp_path):
    bilingual(tmp_path, sw=([f"s{i}" for i in range(50)], [f"e{i}" for i in range(50)]))
    examples, _ = load_examples(f"bilingual_pairs:{tmp_path}", seed=0)
    expected = [f"s{i}" for i in range(50)]
    state = random.getstate()
    random.seed(0)
    random.shuffle(expected)
    random.setstate(state)
    assert [e.source for e in examples] == expected
    assert examples != load_examples(f"bilingual_pairs:{tmp_path}", seed=1)[0]


def test_tsv_pairs_in_a_folder_and_alone(tmp_path):
    write_lines(tmp_path / "sw.tsv", "moja\tone", "mbili\ttwo")
    write_lines(tmp_path / "tel.tsv", "ఒకటి\tone")
    write_lines(tmp_path / "zho-CN.tsv", "一\tone")
    examples, report = load_examples(f"pairs:{tmp_path}")
    assert report.counts == {"Swahili": 2, "Telugu": 1, "Chinese": 1}
    assert [e.id for e in examples] == ["1", "2", "1", "1"]
    ordered, _ = load_examples(f"pairs:{tmp_path}", languages=["te", "Swahili"], limit=1)
    assert [e.source for e in ordered] == ["ఒకటి", "moja"]
    alone, _ = load_examples(f"pairs:{tmp_path / 'sw.tsv'}")
    assert [e.source for e in alone] == ["moja", "mbili"]
    other = write_lines(tmp_path / "more" / "file.tsv", "nuqnuq\tknock")
    assert load_examples(f"pairs:{other}", language="Klingon")[0][0].language == "Klingon"


def test_separators_that_are_text_do_not_end_a_line(tmp_path):
    write_lines(tmp_path / "sw.tsv", "a\u2028b\x0bc\x85d\tone", "e\x1cf\ttwo")
    examples, _ = load_examples(f"pairs:{tmp_path}")
    assert [e.source for e in examples] == ["a\u2028b\x0bc\x85d", "e\x1cf"]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "sw.tsv").write_bytes("\ufeffmoja\tone\r\nmbili\ttwo".encode())
    assert [(e.source, e.target) for e in load_examples(f"pairs:{tmp_path}")[0]] == [("moja", "one"), ("mbili", "two")]


def test_metamath_limits_filters_and_groups_by_language(tmp_path):
    rows = [
        {"query": f"{lang} {i}", "response": f"so #### {i}", "lang": lang}
        for i in range(3)
        for lang in ("Thai", "English", "Swahili")
    ]
    path = tmp_path / "query_translation" / "metamath_615k.json"
    path.parent.mkdir()
    path.write_text(json.dumps(rows), encoding="utf-8")
    examples, report = load_examples(f"math:{tmp_path}", languages=["Swahili", "Thai"], limit=2)
    assert [e.source for e in examples] == ["Thai 0", "Thai 1", "Swahili 0", "Swahili 1"]
    assert examples[0].prompt == math_prompt("Thai 0")
    assert report.counts == {"Thai": 2, "Swahili": 2}


def test_math_json_lines(tmp_path):
    write_json_lines(tmp_path / "sw.jsonl", {"lang": "sw", "query": "q", "response": "r #### 7", "query_en": "e"})
    write_json_lines(tmp_path / "zh.jsonl", {"question": "q2", "answer": "r2"})
    examples, _ = load_examples(f"math:{tmp_path}")
    assert [(e.source, e.target, e.language) for e in examples] == [
        ("q", "r #### 7", "Swahili"),
        ("q2", "r2", "Chinese"),
    ]
    pairs, _ = load_examples(f"pairs:{tmp_path / 'sw.jsonl'}", columns={"source": "query", "target": "query_en"})
    assert (pairs[0].source, pairs[0].target, pairs[0].prompt) == ("q", "e", "")


def test_mgsm_and_msvamp(tmp_path):
    write_lines(tmp_path / "evaluation/mgsm/mgsm_sw.tsv", "Ngapi?\t2,125")
    write_json_lines(tmp_path / "evaluation/msvamp/test_Swahili.jsonl", {"m_query": "Ngapi?", "response": "8.0"})
    write_json_lines(
        tmp_path / "evaluation/msvamp/test_Thai.json",
        {"m_query": "A", "response": "1"},
        {"m_query": "B", "response": 2},
    )
    (mgsm,), _ = load_examples(f"mgsm:{tmp_path}")
    assert (mgsm.source, mgsm.target, mgsm.language, mgsm.prompt) == (
        "Ngapi?",
        "2125",
        "Swahili",
        math_prompt("Ngapi?"),
    )
    msvamp, report = load_examples(tmp_path / "evaluation/msvamp")
    assert [e.target for e in msvamp] == ["8.0", "1", "2"]
    assert report.counts == {"Swahili": 1, "Thai": 2}


def test_xnli_published_files(tmp_path):
    (tmp_path / "query_translation").mkdir()
    (tmp_path / "evaluation/xnli").mkdir(parents=True)
    (tmp_path / "query_translation/xnli_dev.json").write_text(json.dumps([XNLI]))
    (tmp_path / "evaluation/xnli/test.json").write_text(json.dumps({"version": 1, "data": [{**XNLI, "label": 2}]}))
    (train,), _ = load_examples(f"xnli:{tmp_path}")
    (test,), _ = load_examples(f"xnli:{tmp_path}", split="test")
    assert train.source == train.prompt == xnli_prompt("Ninaishi hapa.", "Niko hapa.")
    assert (train.target, test.target, test.language) == ("entailment", "contradiction", "Swahili")
    assert test.choices == ("entailment", "neutral", "contradiction")


def test_xnli_tsv(tmp_path):
    for split, label in (("dev", "neutral"), ("test", "1")):
        write_lines(tmp_path / f"{split}/sw.tsv", f"P\tH {split}\t{label}")
    (train,), _ = load_examples(f"xnli:{tmp_path}")
    (test,), _ = load_examples(f"xnli:{tmp_path}", split="test")
    assert (train.source, test.source) == (xnli_prompt("P", "H dev"), xnli_prompt("P", "H test"))
    assert train.target == test.target == "neutral"


def test_x_csqa(tmp_path):
    write_json_lines(tmp_path / "query_translation/x-csqa/train_sw.jsonl", CSQA)
    write_json_lines(tmp_path / "evaluation/x-csqa/nl/dev.jsonl", {key: CSQA[key] for key in ("question", "answerKey")})
    (train,), _ = load_examples(f"x-csqa:{tmp_path}")
    (test,), _ = load_examples(f"x-csqa:{tmp_path}", split="test")
    assert train.source == train.prompt == x_csqa_prompt("Samaki huishi wapi?", ["mti", "maji"])
    assert (train.target, train.id, train.language, train.choices) == ("B", "q1", "Swahili", ("A", "B"))
    assert test.language == "Flemish"


def test_xcopa(tmp_path):
    write_json_lines(tmp_path / "val.qu.jsonl", XCOPA, {**XCOPA, "question": "cause", "label": 1})
    examples, _ = load_examples(f"xcopa:{tmp_path}", split="test")
    assert [e.target for e in examples] == ["A", "B"]
    assert examples[0].language == "Quechua"
    assert examples[0].prompt == xcopa_prompt("Mvua ilinyesha.", "effect", ["Njia ililowa.", "Jua liliwaka."])


def test_several_specs_and_generic_formats(tmp_path):
    write_lines(tmp_path / "sw.tsv", "moja\tone")
    write_json_lines(tmp_path / "th.jsonl", {"query": "q", "response": "r", "prompt": "p"})
    examples, report = load_examples([f"tsv:{tmp_path}", {"format": "jsonl", "path": tmp_path}])
    assert [(e.prompt, e.language) for e in examples] == [("moja", "Swahili"), ("p", "Thai")]
    assert report.total == 2
    assert load_examples(f"tsv:{tmp_path}", prompt="math")[0][0].prompt == math_prompt("moja")


def test_datasets_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"translation": {"en": "one", "sw": "moja"}}, {"translation": {"en": "two", "sw": ""}}]
    write_json_lines(tmp_path / "set" / "train.jsonl", *rows)
    options = {"columns": {"source": "translation.sw", "target": "translation.en"}, "language": "sw"}
    spec = f"pairs:datasets:{tmp_path / 'set'}"
    with pytest.raises(DataError, match=r"set:2: 'source' is empty"):
        load_examples(spec, **options)
    examples, report = load_examples(spec, skip_bad=True, **options)
    assert [(e.source, e.target, e.language) for e in examples] == [("moja", "one", "Swahili")]
    assert len(report.skipped) == 1
    with pytest.raises(DataError, match="cannot be loaded, split 'nosuch'"):
        load_examples(spec, split="nosuch", **options)


# Malformed lines


BAD = [
    ("pairs", "sw.tsv", b"a\tb\tc", r"3 columns, expected 2 \(source<TAB>target\)"),
    ("pairs", "sw.tsv", b"alone", "1 columns, expected 2"),
    ("pairs", "sw.tsv", b"\tb", "'source' is empty, expected text"),
    ("pairs", "sw.tsv", b"a\t ", "'target' is empty, expected text"),
    ("pairs", "sw.tsv", b"a\xff\tb", "byte 0xff at position 2, expected UTF-8"),
    ("pairs", "sw.tsv", b"", "an empty line, expected a line of pairs"),
    ("mgsm", "mgsm_sw.tsv", b"a\tmany", "'target' is 'many', expected a number"),
    ("mgsm", "mgsm_sw.tsv", b"a\tnan", "'target' is 'nan', expected a number"),
    ("xnli", "sw.tsv", b"a\tb\tmaybe", "label 'maybe', expected entailment, neutral, contradiction or 0, 1, 2"),
    ("msvamp", "test_Swahili.jsonl", b'{"m_query": "a"', "bad JSON .*, expected an object"),
    ("msvamp", "test_Swahili.jsonl", b'{"m_query": "a"}', "no 'target or response or answer' among the keys"),
    ("msvamp", "test_Swahili.jsonl", b"[1]", "a list, expected an object with keys"),
    ("math", "sw.jsonl", b'{"query": ["a"], "response": "b"}', "'source' is a list, expected text"),
    ("math", "sw.jsonl", b'{"query": "\\ud83d", "response": "b"}', "half of a surrogate pair, expected valid text"),
    ("math", "all.jsonl", b'{"query": "a", "response": "b", "lang": "xx"}', "language 'xx', expected a known one"),
    ("math", "all.jsonl", b'{"query": "a", "response": "b"}', "no language, expected a known one"),
    ("xnli", "sw.jsonl", b'{"premise": "a", "hypothesis": "b", "label": true}', "label True, expected"),
    ("xnli", "sw.jsonl", b'{"premise": "a", "hypothesis": "b", "label": -1}', "label -1, expected"),
    ("x-csqa", "train_sw.jsonl", b'{"question": "a", "answerKey": "A"}', "'question' is a str, expected an object"),
    (
        "x-csqa", "train_sw.jsonl",
        b'{"question": {"stem": "a", "choices": [{"text": "x"}, {"text": "y"}]}, "answerKey": "C"}',
        "'answerKey' is 'C', expected one of A, B",
    ),
    ("x-csqa", "train_sw.jsonl", b'{"question": {"stem": "a", "choices": []}, "answerKey": "C"}', "'choices' is no"),
    ("xcopa", "val.sw.jsonl", json.dumps({**XCOPA, "label": 2}).encode(), "'label' is 2, expected 0 or 1"),
    ("xcopa", "val.sw.jsonl", json.dumps({**XCOPA, "question": "why"}).encode(), "'question' is 'why', expected"),
]  # fmt: skip
GOOD = {
    "pairs": b"a\tb",
    "mgsm": b"a\t1",
    "msvamp": b'{"m_query": "a", "response": "1"}',
    "math": b'{"query": "a", "response": "b", "lang": "sw"}',
    "x-csqa": json.dumps(CSQA).encode(),
    "xcopa": json.dumps(XCOPA).encode(),
    "xnli.tsv": b"a\tb\tneutral",
    "xnli.jsonl": json.dumps(XNLI).encode(),
}


@pytest.mark.parametrize("format, name, line, message", BAD)
def test_malformed_line(tmp_path, format, name, line, message):
    good = GOOD.get(format) or GOOD[f"{format}.{name.rpartition('.')[2]}"]
    path = tmp_path / name
    path.write_bytes(b"\n".join([good, line, good, b""]))
    with pytest.raises(DataError, match=rf"{name}:2: .*{message}"):
        load_examples(f"{format}:{path}")
    examples, report = load_examples(f"{format}:{path}", skip_bad=True)
    assert [e.id for e in examples] in (["1", "3"], ["q1", "q1"])
    assert [(line.path, line.line) for line in report.skipped] == [(str(path), 2)]
    assert "left out 1 malformed lines" in report.summary()
    assert f"{name}:2: " in report.summary()


def test_malformed_record_in_a_json_array(tmp_path):
    path = tmp_path / "math.json"
    path.write_text('[\n{"query": "a", "response": "b", "lang": "sw"},\n\n{"query": "a",\n"lang": "sw"}\n]')
    with pytest.raises(DataError, match=r"math.json:4: no 'target or response or answer'"):
        load_examples(f"math:{path}")
    examples, report = load_examples(f"math:{path}", skip_bad=True)
    assert (len(examples), report.skipped[0].line) == (1, 4)


@pytest.mark.parametrize(
    "text, message",
    [
        ('[\n{"query": "a"', r":2: .*expected , or \]|:2: bad JSON"),
        ('[{"a": 1}\n{"a": 1}]', r":2: '\{', expected , or \]"),
        ("[1,\n]", ":2: bad JSON"),
        ("", ":1: the end of the file, expected"),
        ('{"rows":\n[]}\n', "an object without 'data'"),
    ],
)
def test_broken_json_file(tmp_path, text, message):
    path = tmp_path / "math.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_examples(f"math:{path}", skip_bad=text.startswith("["))


def test_broken_utf8_in_a_json_file(tmp_path):
    path = tmp_path / "math.json"
    path.write_bytes(b'[\n{"query": "\xff"}]')
    with pytest.raises(DataError, match=r"math.json:2: byte 0xff, expected UTF-8"):
        load_examples(f"math:{path}")


def test_bad_lines_of_bilingual_pairs_name_the_right_side(tmp_path):
    bilingual(tmp_path, sw=(["moja", "", "tatu"], ["one", "two", " "]))
    with pytest.raises(DataError, match=r"train_100k.sw:2: an empty line"):
        load_examples(f"bilingual_pairs:{tmp_path}")
    examples, report = load_examples(f"bilingual_pairs:{tmp_path}", skip_bad=True)
    assert [e.source for e in examples] == ["moja"]
    assert [str(line).rpartition("/")[2] for line in report.skipped] == [
        "train_100k.sw:2: an empty line, expected a sentence",
        "train_100k.en:3: an empty line, expected a sentence",
    ]


def test_skipped_lines_do_not_count_against_the_limit(tmp_path):
    write_lines(tmp_path / "sw.tsv", "a\tb", "bad", "c\td", "e\tf")
    examples, report = load_examples(f"pairs:{tmp_path}", skip_bad=True, limit=2)
    assert ([e.source for e in examples], len(report.skipped)) == (["a", "c"], 1)


# Requests that cannot be met


@pytest.mark.parametrize(
    "spec, options, message",
    [
        ("pairs:nowhere", {}, "nowhere: no such file or folder"),
        ("pairs:.", {"languages": ["Klingon"]}, "expected an English name or a language code"),
        ("pairs:.", {"languages": "sw"}, "languages: expected a list"),
        ("pairs:.", {"limit": 0}, "limit: expected a number >= 1, got 0"),
        ("pairs:.", {"prompt": "poem"}, "prompt: expected one of math, source, none, got 'poem'"),
        ("somewhere", {}, "format: expected one of bilingual_pairs, pairs"),
        ({"path": "x", "format": "pears"}, {}, "format: expected one of .*'pears'"),
        ({"path": "x", "formt": "pairs"}, {}, "spec: expected keys .*'formt'"),
        ({"format": "pairs"}, {}, "spec: expected a 'path'"),
        ([], {}, "spec: expected 'FORMAT:PATH'"),
        (3, {}, "spec: expected 'FORMAT:PATH'"),
    ],
)
def test_impossible_requests(tmp_path, monkeypatch, spec, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ArgumentError, DataError), match=message):
        load_examples(spec, **options)


def test_missing_language_and_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"no mgsm files, expected mgsm_\*.tsv"):
        load_examples(f"mgsm:{tmp_path}")
    write_lines(tmp_path / "mgsm_sw.tsv", "a\t1")
    with pytest.raises(DataError, match="no examples of Thai; found Swahili"):
        load_examples(f"mgsm:{tmp_path}", languages=["sw", "th"])


# What else people keep pairs in


def pairs_of(path, **options):
    examples, report = load_examples(f"pairs:{path}", **options)
    return [(e.source, e.target) for e in examples], report


PAIRS = [("habari", "hello"), ('say "hi"', 'a "b" c'), ("x, y", "z")]
ROWS = [{"source": source, "target": target} for source, target in PAIRS]


@pytest.mark.parametrize("end, pack", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path, end, pack):
    tsv = "".join(f"{source}\t{target}\n" for source, target in PAIRS).encode()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / f"a_sw.jsonl{end}").write_bytes(pack(lines))
    (tmp_path / "named.tsv").write_bytes(pack(tsv))  # what is in it counts, not its name
    (tmp_path / f"sw.json{end}").write_bytes(pack(json.dumps(ROWS).encode()))
    assert pairs_of(tmp_path / f"a_sw.jsonl{end}")[0] == PAIRS
    assert pairs_of(tmp_path / "named.tsv", language="sw")[0] == PAIRS
    assert pairs_of(tmp_path / f"sw.json{end}")[0] == PAIRS
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"sw.tsv{end}").write_bytes(pack(tsv))
    (folder / "th.tsv").write_bytes(b"a\tb\n")
    found, report = pairs_of(folder)
    assert (found, report.counts) == ([*PAIRS, ("a", "b")], {"Swahili": 3, "Thai": 1})
    (folder / "sw.tsv").write_bytes(tsv)
    with pytest.raises(DataError, match=r"sw.tsv\.\w+: there is sw.tsv too, expected one of them"):
        pairs_of(folder)
    (tmp_path / f"cut_sw.tsv{end}").write_bytes(pack(tsv * 9)[:-9])
    with pytest.raises(DataError, match=rf"cut_sw.tsv{end}: damaged, expected a whole compressed file"):
        pairs_of(tmp_path / f"cut_sw.tsv{end}")


def test_compressed_bilingual_pairs(tmp_path):
    bilingual(tmp_path, sw=(["moja"], ["one"]))
    folder = tmp_path / "bilingual_pairs/en-sw"
    for path in sorted(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert [(e.source, e.target) for e in load_examples(f"bilingual_pairs:{tmp_path}")[0]] == [("moja", "one")]


def test_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "sw.parquet")
    assert pairs_of(tmp_path / "sw.parquet")[0] == pairs_of(tmp_path)[0] == PAIRS
    pandas.DataFrame([*ROWS, {"source": "a", "target": None}]).to_parquet(tmp_path / "sw.parquet")
    with pytest.raises(DataError, match=r"sw.parquet:4: 'target' is null, expected a value"):
        pairs_of(tmp_path / "sw.parquet")
    (tmp_path / "none.parquet").write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"none.parquet: expected a Parquet file"):
        pairs_of(tmp_path / "none.parquet")


CSV = [("a\nb", 'he said "c"'), ("d, e", "f"), ('"g"', "h\ti")]


def test_csv(tmp_path):
    path = tmp_path / "sw.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "Source", "target text"), *((str(i), *row) for i, row in enumerate(CSV))])
    examples, report = load_examples(f"pairs:{path}")
    assert [(e.source, e.target, e.id) for e in examples] == [(*row, str(i)) for i, row in enumerate(CSV)]
    assert report.headers == [f"{path}: id,Source,target text"]
    path.write_text('habari,hello\ndunia,"world"\n')
    with pytest.raises(DataError, match=r"sw.csv:1: no names of columns that are known \(habari, hello\), expected"):
        pairs_of(path)
    assert pairs_of(path, header=False)[0] == [("habari", "hello"), ("dunia", "world")]
    path.write_text('one,two\nx,y\n"x" y,z\n"a\nb",c,d\n,e\nf,g\n')
    told, report = pairs_of(path, columns={"source": "two", "target": "one"}, skip_bad=True)
    assert told == [("y", "x"), ("g", "f")]
    assert [line.line for line in report.skipped] == [3, 4, 6]
    path.write_text('source,target\na,b\n"c,d\ne,f\n')
    with pytest.raises(DataError, match=r"sw.csv:3: a quoted field that does not end"):
        pairs_of(path, skip_bad=True)
    (tmp_path / "val.sw.csv").write_text("premise,choice1,choice2,question,label\nP,a,b,cause,1\n")
    assert load_examples(f"xcopa:{tmp_path / 'val.sw.csv'}")[0][0].target == "B"


@pytest.mark.parametrize(
    "name, header, swapped",
    [
        ("sw.tsv", "source\ttarget", False), ("sw.tsv", "Target Text\tsource-text", True),
        ("sw.tsv", "question\tanswer", False), ("sw.txt", "text\ttranslation", False),
        ("sw.tsv", '"src"\t"tgt"', False), ("sw.tsv", "swh\tEnglish", False), ("sw.tsv", "en\tsw", True),
        ("sw.tsv", "\ufeffeng_Latn\tKiswahili", True),
    ],
)  # fmt: skip
def test_a_header_line_is_no_pair(tmp_path, name, header, swapped):
    path = write_lines(tmp_path / name, header, "moja\tone")
    found, report = pairs_of(path)
    assert found == [("one", "moja") if swapped else ("moja", "one")]
    assert len(report.headers) == 1 and "1 header lines, as " in report.summary()
    assert len(pairs_of(path, header=False)[0]) == 2


@pytest.mark.parametrize(
    "line", ["text\ttext", "Kiswahili\tSwahili", "ingles\tEnglish", "source\tsource", "chanzo\tsource"]
)
def test_a_pair_of_words_is_no_header_line(tmp_path, line):
    path = write_lines(tmp_path / "sw.tsv", line, "moja\tone")
    found, report = pairs_of(path)
    assert (len(found), report.headers) == (2, [])
    assert pairs_of(path, header=True, columns=dict(zip(("source", "target"), line.split("\t"), strict=True)))[0] == [
        ("one", "one") if line.split("\t")[0] == line.split("\t")[1] else ("moja", "one")
    ]


def test_a_header_is_told_by_the_columns_asked_for(tmp_path):
    path = write_lines(tmp_path / "sw.tsv", "nr\tkwa\tkutoka", "7\tone\tmoja")
    assert pairs_of(path, columns={"source": "kutoka", "target": "kwa"})[0] == [("moja", "one")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_quotes_that_a_writer_put_around_fields(tmp_path, quoting):
    rows = [("habari", "hello"), ('say "hi" now', "a\tb"), ("it's", 'x "y"'), ('"', "q")]
    path = tmp_path / "sw.tsv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n").writerows(rows)
    assert pairs_of(path)[0] == rows


RAW = [
    ('"Ndiyo"', '"Yes"'), ('"Ndiyo," alisema, "sawa"', '"Yes," he said, "fine"'), ('"Twende', 'She said "go'),
    ('sawa"', 'ok"'), ('5" bomba', '5" pipe'), ('""', "''"),
]  # fmt: skip


def test_quotes_that_are_text_stay(tmp_path):
    lines = ["\t".join(pair) for pair in RAW]
    assert pairs_of(write_lines(tmp_path / "sw.tsv", *lines))[0] == RAW
    for first in range(len(RAW)):  # no line is joined with others, whichever stands first
        turned = [*RAW[first:], *RAW[:first]]
        assert pairs_of(write_lines(tmp_path / "sw.tsv", *("\t".join(pair) for pair in turned)))[0] == turned
    questions = ['"Juma" ana "machungwa"', '"Ngapi?"', '""a""']
    write_lines(tmp_path / "mgsm_sw.tsv", *(f"{question}\t{i}" for i, question in enumerate(questions)))
    assert [e.source for e in load_examples(f"mgsm:{tmp_path / 'mgsm_sw.tsv'}")[0]] == questions
    broken = write_lines(tmp_path / "de.tsv", "eins\tone", '"zwei', 'drei"\ttwo', '"a\tb\tc')
    with pytest.raises(DataError, match=r"de.tsv:2: 1 columns and a quoted field that does not end on its line"):
        pairs_of(broken)
    assert [line.line for line in pairs_of(broken, skip_bad=True)[1].skipped] == [2, 4]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("sw.tsv", "habari\thello\n".encode("utf-16"), "sw.tsv:1: UTF-16, by its byte-order mark, expected text"),
        ("sw.tsv", "habari\thello\n".encode("utf-16-le"), "sw.tsv:1: a null character at position 2, expected text"),
        ("de.tsv", "schön\tnice\n".encode("cp1252"), "de.tsv:1: byte 0xf6 at position 4, expected UTF-8"),
        ("sw.tsv", b"habari\thello\rdunia\tworld\r", "sw.tsv:1: lines that end in a carriage return alone"),
        ("sw.tsv", b"ha\x00bari\thello\n", "sw.tsv:1: a null character at position 3, expected text"),
        ("sw.jsonl", b'{"source": "a\\u0000", "target": "b"}\n', "sw.jsonl:1: 'source' holds a null character"),
        ("sw.jsonl", b'{"source": null, "target": "b"}\n', "sw.jsonl:1: 'source' is null, expected a value"),
        ("sw.json", b'{"source": ["a"], "target": ["b"]}', "'source' is a list, expected text: one record a line"),
        ("sw.json", b'{"source": {"0": "a"}, "target": {"0": "b"}}', "'source' is a dict, expected text: one record"),
        ("sw.tsv", b"1\thabari\thello\n", r"sw.tsv:1: 3 columns, expected 2 \(source<TAB>target\)"),
        ("sw.zip", b"PK\x03\x04rest", r"sw.zip:1: a zip file \(or a spreadsheet\), expected text in UTF-8"),
        ("sw.tsv.zst", b"\x28\xb5\x2f\xfdrest", "sw.tsv.zst:1: compressed by zstd, expected text"),
        ("sw.tsv", b"PAR1rest", r"sw.tsv:1: a Parquet file, for which the name has to end in .parquet"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        pairs_of(tmp_path / name)


def test_a_template_as_prompt(tmp_path):
    path = write_lines(tmp_path / "sw.tsv", "moja\tone")
    (example,), _ = load_examples(f"tsv:{path}", prompt="<|user|>{source}<|end|>")
    assert (example.prompt, example.prompt.template) == ("<|user|>moja<|end|>", "<|user|>{source}<|end|>")
