"""The server's parts without a model: text in pieces, token choice, settings, addresses."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.main import get_command

from layalign.cli.app import app
from layalign.serving.http import ServeSettings
from layalign.serving.http.sampling import Chooser, choose, repetition_penalty
from layalign.serving.http.server import is_loopback
from layalign.serving.http.text import TextStream
from layalign.utils.errors import ArgumentError
from layalign.utils.pages import replaced

ROOT = Path(__file__).parents[2]
SPECIAL = ["<pad>", "</s>"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: words behind "▁", the first space dropped, unknown characters as bytes."""
    words = ["▁", "▁The", "▁cat", "s", "The", "▁▁", "é", "数"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words, *(f"<0x{i:02X}>" for i in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT's: pieces inside a word behind "##"."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "the", "cat", "##s", "##ing", "é", "数", ".", "[UNK]"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


TOKENIZERS = {
    "bytes": byte_tokenizer(add_eos=False),
    "sentencepiece": sentencepiece_like(),
    "word pieces": word_pieces(),
}


def streamed(tokenizer: Any, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.finish()], stream


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(name: str, data: st.DataObject) -> None:
    """Any tokens: parts of characters, bytes that never become one, special tokens in between."""
    tokenizer = TOKENIZERS[name]
    few, any_token = st.integers(0, min(len(tokenizer), 10) - 1), st.integers(0, len(tokenizer) - 1)
    if name == "sentencepiece":  # of its bytes only whole characters; the next test has the others
        any_token = st.characters(codec="utf-8").map(lambda letter: [10 + byte for byte in letter.encode()])
    drawn = data.draw(st.lists(st.one_of(few, any_token), max_size=24))
    ids = [token for each in drawn for token in (each if isinstance(each, list) else [each])]
    pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == decoded(tokenizer, ids)


def test_what_came_before_a_broken_character_stays() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [10 + byte for byte in "數😀".encode()][:-1]
    assert decoded(tokenizer, ids) == "\N{REPLACEMENT CHARACTER}" * 6
    assert streamed(tokenizer, ids)[0] == ["", "", "數", "", "", "", "\N{REPLACEMENT CHARACTER}" * 5]


@pytest.mark.parametrize("text", ["größer", "数学😀!", "প্রশ্ন ১", "e\u0301 \N{REPLACEMENT CHARACTER} x"])
def test_no_piece_holds_part_of_a_character(text: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    pieces, _ = streamed(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
    whole = [piece for piece in pieces if piece]
    assert len(whole) >= len(text) - 1  # each character as soon as it is there
    assert [piece for piece in whole if "\N{REPLACEMENT CHARACTER}" in piece] == (
        ["\N{REPLACEMENT CHARACTER} "] if "\N{REPLACEMENT CHARACTER}" in text else []
    )


@settings(max_examples=250, deadline=None)
@given(
    text=st.text("ab", max_size=14),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_nothing_behind_a_stop_text_is_shown(text: str, stops: list[str]) -> None:
    tokenizer = TOKENIZERS["bytes"]
    pieces, stream = streamed(tokenizer, tokenizer(text)["input_ids"], tuple(stops))
    found = [text.index(stop) for stop in stops if stop in text]
    # The stop text that ends first stops the answer; of several that end there, the one that begins first cuts it.
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(found)
    expected = text
    if found:
        seen = text[: min(ends)]
        expected = seen[: min(seen.index(stop) for stop in stops if stop in seen)]
    assert "".join(pieces) == expected


def test_text_is_not_held_back_without_need() -> None:
    tokenizer = TOKENIZERS["bytes"]
    pieces, _ = streamed(tokenizer, tokenizer("abcabd")["input_ids"], ("abd",))
    assert pieces == ["", "", "abc", "", "", "", ""]
    pieces, _ = streamed(tokenizer, tokenizer("xab")["input_ids"], ("abd",))
    assert pieces == ["x", "", "", "ab"]


def test_each_row_is_drawn_by_its_own_settings() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 50) * 3
    rows = [
        Chooser(),
        Chooser(1.0, seed=3),
        Chooser(1.0, 1e-9, seed=4),
        Chooser(penalty=1e6, ids=[int(logits[3].argmax())]),
    ]
    found = choose(logits, rows)
    assert found[0] == int(logits[0].argmax()) and found[2] == int(logits[2].argmax())
    assert found[3] != int(logits[3].argmax()) and rows[3].ids[-1] == found[3]
    assert found[1] == choose(logits[[1, 0]], [Chooser(1.0, seed=3), Chooser()])[0]
    logits[1, 7] = float("nan")
    assert [token is None for token in choose(logits, rows)] == [False, True, False, False]

    probabilities, chooser = torch.tensor([[0.6, 0.3, 0.1]]).log(), Chooser(1.0, 0.8, seed=0)
    drawn = [chooser(probabilities) for _ in range(1000)]
    assert set(drawn) == {0, 1}  # 0.6 alone is not yet 0.8
    assert abs(drawn.count(0) / 1000 - 2 / 3) < 0.05
    chooser = Chooser(0.5, seed=0)
    drawn = [chooser(probabilities) for _ in range(1000)]
    assert abs(drawn.count(0) / 1000 - 0.36 / 0.46) < 0.05


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_name": " "}, "model_name"),
        ({"task": "chess"}, "task"),
        ({"language": "Klingon"}, "language"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_queue": -1}, "max_queue"),
        ({"timeout": float("inf")}, "timeout"),
        ({"grace": 0}, "grace"),
        ({"max_new_tokens": 5}, "default_new_tokens"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{word}: "):
        ServeSettings(**change)


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.4", "example.org", "")))


def test_the_page_shows_the_committed_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    soak_report = importlib.import_module("soak_report")
    result = json.loads((ROOT / "benchmarks/results/serve/soak.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert replaced(page, soak_report.BEGIN, soak_report.END, soak_report.markdown(result)) == page, "run `make docs`"
    for phase in ("saturation", "kills"):
        counts = result[phase]["counts"]
        assert counts["checked"] > 0 and counts["wrong"] == counts["lost"] == counts["4xx missing"] == 0


def test_the_page_names_every_option_status_and_metric() -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    said = {"--checkpoint", "--device", "--dtype", "--port", "--default-new-tokens", "--help"}
    options = {name for option in get_command(app).commands["serve"].params for name in option.opts}
    options = {name for name in options if name.startswith("--")} - said
    assert len(options) > 15 and options <= set(re.findall(r"--[a-z-]+", page))
    metrics = set(re.findall(r'"(layalign_\w+)"', (ROOT / "layalign/serving/http/metrics.py").read_text()))
    assert {name for name in metrics if name not in page} == set()
    defaults = ServeSettings()
    for name in ("max_characters", "max_source_tokens", "max_new_tokens", "max_batch", "max_queue", "timeout", "grace"):
        assert re.search(rf"`--{name.replace('_', '-')}` \({getattr(defaults, name):g}( s)?\)", page), name


def test_a_generation_configuration_that_asks_for_nothing_is_taken() -> None:
    empty = {"bad_words_ids": [], "suppress_tokens": [], "sequence_bias": {}, "min_new_tokens": 0, "min_length": None}
    assert repetition_penalty(SimpleNamespace(**empty, repetition_penalty=1.3)) == 1.3
    for name, value in {"bad_words_ids": [[5]], "min_new_tokens": 2, "forced_bos_token_id": 0}.items():
        with pytest.raises(ArgumentError, match=f"generation_config: expected {name}="):
            repetition_penalty(SimpleNamespace(**{name: value}))
