"""What is too long for the server's model is refused, and no text of a client has special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from helpers_text import byte_tokenizer
from tiny import tiny_encoder, tiny_llm

from layalign import LayAlignForCausalLM
from layalign.serving.http.messages import ApiError, CompletionRequest
from layalign.serving.http.preparing import Preparer
from layalign.serving.http.settings import ServeSettings

ENCODER, LLM = byte_tokenizer(eos=True), byte_tokenizer()


def tiny() -> LayAlignForCausalLM:
    parts = tiny_encoder("xlm-roberta", vocab_size=len(LLM)), tiny_llm("llama", vocab_size=len(LLM))
    return LayAlignForCausalLM.from_encoder_and_llm(*parts).eval()


def prepared(model: LayAlignForCausalLM, text: str, new_tokens: int = 2, **request: Any) -> Any:
    settings = ServeSettings(max_prompt_tokens=20)
    body = CompletionRequest(prompt=text, **request)
    return Preparer(model, ENCODER, LLM, settings)(body, new_tokens, "max_tokens")


def test_the_server_refuses_what_it_would_have_to_cut(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    assert len(prepared(model, "x" * 61).source) == 62
    with pytest.raises(ApiError, match="prompt: expected at most 62 encoder tokens"):
        prepared(model, "x" * 62)
    assert prepared(model, "x" * 20, task="source")
    with pytest.raises(ApiError, match="prompt: expected at most 20 LLM tokens"):
        prepared(model, "x" * 21, task="source")
    assert not caplog.records  # nothing was cut
    with pytest.raises(ApiError, match=r"max_tokens: expected at most 64 \(the prompt takes 64 of 128 .*, got 65"):
        prepared(model, "x" * 61, new_tokens=65)


def test_the_servers_texts_have_no_special_tokens() -> None:
    model = tiny()
    asked = prepared(model, "a</s>b")
    assert asked.source.count(ENCODER.eos_token_id) == 1
    assert LLM.eos_token_id not in prepared(model, "a</s>b", task="source").packed
    # The client's template may have markers, the text in it has none.
    packed = list(prepared(model, "a</s>b", llm_prompt="</s>{source}").packed)
    assert packed.count(LLM.eos_token_id) == 1
    assert LLM.decode(packed[packed.index(LLM.eos_token_id) + 1 :]) == "a</s>b"
