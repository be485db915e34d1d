"""What is too long for a model: cut within the limit that holds, counted and said; or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_text import byte_tokenizer, write_lines
from tiny import open_gates, tiny_encoder, tiny_llm
from tiny_training import save_parts, training_config
from transformers import AutoConfig, AutoModel

from layalign import LayAlignForCausalLM
from layalign.data import Example, LayAlignCollator
from layalign.data.lengths import positions
from layalign.evaluation import evaluate, llm_alone
from layalign.experiments.analysis import analyze
from layalign.training import train
from layalign.utils.errors import ArgumentError

ENCODER, LLM = byte_tokenizer(eos=True), byte_tokenizer()
SIZE = len(LLM)
LONG, SHORT = Example("x" * 200, "ab", "Swahili", "p" * 30, "long"), Example("x", "ab", "Swahili", "p", "short")


def tiny(encoder: str = "bert", llm: str = "llama", length: int | None = None, **config: Any) -> LayAlignForCausalLM:
    changes = {} if length is None else {"n_positions" if llm == "gpt2" else "max_position_embeddings": length}
    model = LayAlignForCausalLM.from_encoder_and_llm(
        tiny_encoder(encoder, vocab_size=SIZE), tiny_llm(llm, vocab_size=SIZE, **changes), **config
    )
    open_gates(model)
    return model.eval()


def collator(model: LayAlignForCausalLM, **options: Any) -> LayAlignCollator:
    return LayAlignCollator.from_model(model, ENCODER, LLM, **{"with_targets": False, **options})


BART = dict(
    vocab_size=SIZE, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40,
)  # fmt: skip


@pytest.mark.parametrize(
    "name, most", [("bert", 64), ("xlm-roberta", 62), ("mt5", None), ("m2m_100", None), ("mbart", 40)]
)
def test_the_most_tokens_that_an_encoder_reads(name: str, most: int | None) -> None:
    """One more than these is an error of torch's, and where there is no limit many more are none."""
    encoder = AutoModel.from_config(AutoConfig.for_model("mbart", **BART)) if name == "mbart" else tiny_encoder(name)
    encoder = encoder.eval().get_encoder() if name in ("mt5", "m2m_100", "mbart") else encoder
    assert positions(encoder, encoder.config) == (most, most is not None)
    ids = torch.full((1, 150 if most is None else most), 5)
    with torch.no_grad():
        encoder(input_ids=ids)
        if most is not None:
            with pytest.raises((RuntimeError, IndexError)):
                encoder(input_ids=torch.cat([ids, ids[:, :1]], dim=1))


@pytest.mark.parametrize("name, most", [("qwen2", 128), ("modernbert", 64)])
def test_rotary_positions_have_the_length_of_the_training(name: str, most: int) -> None:
    encoder = tiny_encoder(name)
    assert positions(encoder, encoder.config) == (most, False)


@pytest.mark.parametrize("encoder, most", [("bert", 64), ("xlm-roberta", 62), ("mt5", 512)])
def test_a_source_keeps_to_the_encoders_positions(encoder: str, most: int, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(encoder, length=1024)
    collate, source = collator(model), Example("x" * 600, "", "Swahili")
    with caplog.at_level(logging.WARNING, "layalign"):
        batch = collate([SHORT, source])
        collate([source])
    assert batch["encoder_input_ids"].shape[1] == most == collate.max_source_length
    assert batch["encoder_input_ids"][1, -1] == ENCODER.eos_token_id
    assert model.generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2
    why = "max_source_length" if most == 512 else "the encoder's positions"
    said = f"1 source(s) of a batch cut to {most} tokens ({why}); said only once"
    assert [record.getMessage() for record in caplog.records] == [said]
    assert collate.last_cut == [("source",)]
    assert collate.cuts == {"examples": 3, "source": 2}


def test_a_source_keeps_to_what_the_tokenizer_says(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer(eos=True)
    tokenizer.model_max_length = 20
    with caplog.at_level(logging.WARNING, "layalign"):
        batch = LayAlignCollator(tokenizer, LLM, bos_token_id=1, source_token_id=0)([LONG])
    assert batch["encoder_input_ids"].shape[1] == 20
    assert "cut to 20 tokens (the model_max_length of the encoder's tokenizer)" in caplog.text
    collate = LayAlignCollator(tokenizer, LLM, bos_token_id=1, source_token_id=0, max_source_length=7)
    assert collate.max_source_length == 7


def test_prompts_and_targets_are_counted() -> None:
    collate = collator(
        tiny("mt5", length=1024), with_targets=True, stage="task", max_prompt_length=4, max_target_length=2
    )
    collate([LONG, SHORT])
    assert collate.last_cut == [("prompt", "target"), ("target",)]
    assert collate.cuts == {"examples": 2, "prompt": 1, "target": 2}


def test_more_than_the_llms_positions(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "layalign"):
        collate = collator(tiny("mt5", length=100))
        assert collate([LONG, SHORT])["input_ids"].shape[1] == 203
    assert "1 context(s) of a batch longer than the LLM's 100 positions" in caplog.text
    assert collate.last_cut == [("context",), ()]


def test_a_table_of_positions_refuses_more() -> None:
    collate = collator(tiny("mt5", "gpt2", length=128))
    with pytest.raises(
        ArgumentError, match=r"Swahili example 'long' takes 203 tokens of the LLM, expected at most its 128"
    ):
        collate([SHORT, LONG])
    fits = Example("x" * 125, "", "Swahili")  # [bos], an end and the boundary make it 128
    assert collate([fits])["input_ids"].shape[1] == 128


def test_an_evaluation_counts_what_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("bert", length=80)
    write_lines(tmp_path / "sw.tsv", f"{'x' * 70}\tab", "x\tab", "y\tab")
    arguments = (model, ENCODER, LLM, "tsv", f"tsv:{tmp_path / 'sw.tsv'}")
    options = {"max_new_tokens": 3, "max_prompt_length": 50, "batch_size": 1}
    with caplog.at_level(logging.WARNING, "layalign"):
        result = evaluate(*arguments, tmp_path / "out", **options)
    assert (result.cut["source"], result.cut["prompt"], result.cut["context"]) == (1, 1, 1)
    predictions = json.loads((tmp_path / "out/predictions/Swahili.json").read_text())
    said = [set(entry.get("cut", [])) for entry in predictions]
    assert {"source", "prompt", "context"} <= said[0] and said[1] <= {"answer"}
    assert result.cut["answer"] == sum("answer" in kinds for kinds in said)
    assert json.loads((tmp_path / "out/scores.json").read_text())["cut"] == result.cut
    assert "cut, of 3 questions: 1 of source, 1 of prompt, 1 of context" in caplog.text
    assert "1 of source cut" in str(result.table().title)
    # A run that goes on knows what was cut before.
    lines = (tmp_path / "out/predictions/Swahili.jsonl").read_text().splitlines(True)
    (tmp_path / "out/predictions/Swahili.jsonl").write_text("".join(lines[:2]))
    assert evaluate(*arguments, tmp_path / "out", **options).cut == result.cut


class Written(torch.nn.Module):
    """Writes these tokens to whatever it is asked."""

    def __init__(self, *rows: list[int]) -> None:
        super().__init__()
        self.rows, self.config = torch.tensor(rows), SimpleNamespace(llm_bos_token_id=1, source_token_id=0)

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.cat([input_ids, self.rows], dim=1)


@pytest.mark.parametrize("alone", [False, True])
def test_an_answer_without_an_end_is_counted(tmp_path: Path, alone: bool) -> None:
    examples = [Example(text, "ab", "Swahili", text, text) for text in ("zzz", "yy", "x")]
    model: Any = Written([5, LLM.eos_token_id, 0], [5, 6, LLM.eos_token_id], [5, 6, 7])
    answer = llm_alone(model, LLM, max_new_tokens=3) if alone else model
    result = evaluate(answer, ENCODER, LLM, "tsv", examples, tmp_path, max_new_tokens=3)
    entries = json.loads((tmp_path / "predictions/Swahili.json").read_text())
    assert [entry.get("cut") for entry in entries] == [None, None, ["answer"]]
    assert result.cut == {"source": 0, "prompt": 0, "context": 0, "answer": 1}


def test_an_llm_with_a_table_writes_up_to_its_end(tmp_path: Path) -> None:
    model = tiny("mt5", "gpt2", length=32)
    examples = [Example("x" * 20, "ab", "Swahili", "pp")]  # 25 of 32 positions: 8 tokens can be written
    result = evaluate(
        model, ENCODER, LLM, "tsv", examples, tmp_path, max_new_tokens=100, generation={"eos_token_id": -1}
    )
    assert result.cut == {"source": 0, "prompt": 0, "context": 0, "answer": 1}


@pytest.mark.slow
def test_the_analysis_counts_texts_that_are_cut(tmp_path: Path) -> None:
    rows = [("x" * 40, "one"), ("y", "t" * 40), ("z", "three"), ("w", "four")]
    write_lines(tmp_path / "sw.tsv", *("\t".join(row) for row in rows))
    found = analyze(tiny("mt5"), ENCODER, LLM, str(tmp_path / "sw.tsv"), max_length=20)
    assert found.settings["cut"] == {"source": 2, "target": 1, "text": 2}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_training_counts_what_it_cuts(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"max_source_length": 2, "max_target_length": 2, "max_steps": 2, "num_workers": workers}
    with caplog.at_level(logging.WARNING, "layalign"):
        summary = train(training_config(save_parts(tmp_path), tmp_path / "out", **changes))
    assert summary.cut["source"] == summary.cut["target"] == summary.cut["examples"] > 8
    assert json.loads((tmp_path / "out/training.json").read_text())["cut"] == summary.cut
    assert f"cut, of {summary.cut['examples']} examples read: {summary.cut['source']} of source" in caplog.text
