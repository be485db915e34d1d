"""Every way of decoding that transformers has gives what the model without a cache gives, or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from text_only_model import TextOnly, characters
from tiny import batch, row, tiny_llm, tiny_model
from transformers import DynamicCache, GenerationMixin, StaticCache, cache_utils

from layalign import ArgumentError
from layalign.modeling.cache import get_source, set_source
from layalign.utils.versions import cache_of

PAGE = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text(encoding="utf-8")
GREEDY = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=[])
Change = Callable[[Any, dict[str, Any]], dict[str, Any]]


@dataclass
class Mode:
    """A row of the table in docs/decoding.md.

    Args:
        name: its first column.
        holds: its second; "refused: ..." for what is.
        settings: arguments of `generate`.
        own: further arguments that the reference does not get, made from the model and its inputs.
        llms: where it is tried.
        rows: samples of the batch.
        error: "" where the model answers; else what the error says, before the reason of a refusal.
    """

    name: str
    holds: str
    settings: dict[str, Any] = field(default_factory=dict)
    own: Change = lambda model, inputs: {}
    llms: tuple[str, ...] = ("llama",)
    rows: tuple[int, ...] = (0, 1, 2)
    error: str = ""

    @property
    def id(self) -> str:
        return re.sub("[`, ]+", "-", self.name).strip("-")


def refused(name: str, why: str, error: str, settings: Any = None, own: Change = lambda model, inputs: {}) -> Mode:
    return Mode(name, f"refused: {why}", settings or {}, own, error=error, rows=(0,))


DRAFTS = "the drafts would be made from the filler in the source's slots; prompt_lookup_num_tokens is served"
AGAIN = "it runs the model on input_ids, where the source's slots hold a filler instead of the soft tokens"
HUB = "its code comes from the hub and does not know of a source"
GUIDANCE = "it is for guidance_scale, which is not served"
BEAMS = dict(num_beams=3, eos_token_id=2, max_new_tokens=4)
WINDOWS = ("llama", "mistral", "gemma3_text")


def drawn(**settings: Any) -> dict[str, Any]:
    return dict(do_sample=True, temperature=2.0, top_k=0, **settings)


MODES = [
    Mode("greedy search", "right", llms=WINDOWS),
    Mode("`do_sample`: temperature, top-k, top-p and the other warpers", "right, the same draws for a seed",
         drawn(top_p=0.9, min_p=0.01), rows=(0,)),
    Mode("`num_return_sequences`", "right", drawn(num_return_sequences=3), rows=(1,)),
    Mode("`num_beams`", "right; `length_penalty` counts new tokens alone", BEAMS, llms=WINDOWS),
    Mode("`num_beams` with `do_sample`", "right", {**BEAMS, **drawn(), "max_new_tokens": 4}, rows=(1,)),
    Mode("`prompt_lookup_num_tokens`", "right for one row without stop strings, stopping criteria or a given cache",
         dict(max_new_tokens=12), lambda m, i: {"prompt_lookup_num_tokens": 3}, rows=(1,)),
    Mode("`streamer`", "right; it gets the prompt's text, then every new token",
         own=lambda m, i: {"streamer": SimpleNamespace(put=lambda v: None, end=lambda: None)}),
    Mode("`stop_strings`", "right; the text alone is looked at",
         dict(stop_strings=["q"], tokenizer=characters(), eos_token_id=2)),
    Mode("`max_time`", "right", dict(max_time=1e4)),
    Mode("`output_scores`, `output_logits`, `output_hidden_states`, `output_attentions`, `return_dict_in_generate`",
         "right; hidden states and attentions cover the packed input",
         own=lambda m, i: dict(output_scores=True, output_logits=True, output_hidden_states=True,
                               output_attentions=True, return_dict_in_generate=True)),
    Mode("`logits_to_keep`", "right; only the last position is read", own=lambda m, i: {"logits_to_keep": 0}),
    Mode("`synced_gpus`", "right", own=lambda m, i: {"synced_gpus": True}),
    Mode("`use_cache=False`", "right; the cache is used all the same, as with any `inputs_embeds`",
         own=lambda m, i: {"use_cache": False}, llms=("llama", "mistral")),
    Mode('`cache_implementation="static"`', "right", own=lambda m, i: {"cache_implementation": "static"}, llms=WINDOWS),
    Mode('`cache_implementation="static"` with `num_beams`', "right", BEAMS,
         lambda m, i: {"cache_implementation": "static"}),
    Mode('`cache_implementation="offloaded"`, `"offloaded_static"`', "right; the source stays on its device",
         own=lambda m, i: {"cache_implementation": "offloaded"}),
    Mode('`cache_implementation="quantized"`, `cache_config`', "right up to the cache's own rounding",
         own=lambda m, i: {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}}),
    Mode("`compile_config`", "right",
         own=lambda m, i: {"cache_implementation": "static", "compile_config": transformers.CompileConfig()}),
    Mode("`past_key_values`, empty", "right; it carries the source afterwards", own=lambda m, i: {
        "past_key_values": DynamicCache(config=m.llm.config)}, llms=WINDOWS),
    Mode("`past_key_values`, an empty static one", "right", own=lambda m, i: {
        "past_key_values": StaticCache(config=m.llm.config, max_cache_len=40)}),
    refused("`assistant_model`, `assistant_tokenizer`", DRAFTS, "assistant_model: ",
            own=lambda m, i: {"assistant_model": tiny_llm()}),
    refused("`assistant_model`, a LayAlign model", DRAFTS, "assistant_model: ",
            own=lambda m, i: {"assistant_model": m}),
    refused("`assistant_early_exit`, `use_mtp`", DRAFTS, "assistant_early_exit: ", dict(assistant_early_exit=1)),
    refused("`penalty_alpha` with `top_k`", AGAIN, "penalty_alpha: ", dict(penalty_alpha=0.6, top_k=4)),
    refused("`dola_layers`", AGAIN, "dola_layers: ", dict(dola_layers="low")),
    refused("`num_beam_groups`, `diversity_penalty`", HUB, "num_beam_groups: ",
            dict(num_beams=2, num_beam_groups=2, diversity_penalty=0.5)),
    refused("`constraints`, `force_words_ids`", HUB, "constraints, force_words_ids: ",
            dict(num_beams=2, force_words_ids=[[5]])),
    refused("`custom_generate`, a function or a name",
            "another decoding loop may feed input_ids where embeddings belong, which cannot be checked",
            "custom_generate: ", own=lambda m, i: {"custom_generate": GenerationMixin._sample}),
    refused("`guidance_scale`", "the pass without the prompt would have neither soft tokens nor a source",
            "guidance_scale: ", dict(guidance_scale=1.5)),
    refused("`negative_prompt_ids`, `negative_prompt_attention_mask`", GUIDANCE, "negative_prompt_ids: ",
            own=lambda m, i: {"negative_prompt_ids": i["input_ids"]}),
    refused("`prefill_chunk_size`", "transformers cuts input_ids into chunks, but not their embeddings",
            "prefill_chunk_size: ", dict(prefill_chunk_size=2)),
    refused("`token_healing`", "it rewrites the prompt from input_ids, without the source's slots",
            "token_healing: ", dict(token_healing=True)),
    refused('`cache_implementation="paged"`', "only transformers' own caches carry a source; see layalign serve",
            "cache_implementation: ", dict(cache_implementation="paged")),
    refused("`inputs_embeds`",
            "the model makes the embeddings of input_ids and source; call model.llm.generate without a source",
            "inputs_embeds: ", own=lambda m, i: {"inputs_embeds": torch.zeros(1, 4, 32)}),
    refused("`position_ids`", "they follow from attention_mask, and not every transformers continues from given ones",
            "position_ids: ", own=lambda m, i: {"position_ids": torch.zeros_like(i["input_ids"])}),
    refused("`source_states`", "the source is given as encoder_input_ids, or in past_key_values", "source_states: ",
            own=lambda m, i: {"source_states": m.encode_source(i["encoder_input_ids"], i["encoder_attention_mask"])}),
    Mode("`low_memory` with `num_beams`", "refused by transformers", dict(low_memory=True, num_beams=2),
         error="low_memory"),
    Mode("`token_type_ids`, `decoder_input_ids`, `encoder_outputs` and any unknown argument",
         "refused by transformers: not used by the model",
         own=lambda m, i: {"token_type_ids": torch.zeros_like(i["input_ids"])}, error="token_type_ids"),
]  # fmt: skip
CASES = [pytest.param(mode, llm, id=f"{mode.id}-{llm}") for mode in MODES for llm in mode.llms]


class Exact(cache_utils.QuantizedLayer):
    """A quantised layer that rounds nothing."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class Stream(nullcontext[None]):
    """A stream where there are none."""

    def wait_stream(self, other: Any) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "llm"), CASES)
def test_a_way_of_decoding_is_right_or_refused(mode: Mode, llm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # No other process and no stream is here, and real quantisation rounds: what is tried is the way through the cache.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)  # a group of one
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", Exact)
    model = tiny_model(llm=llm)
    inputs = batch(model=model, targets=None)
    inputs["input_ids"][1, -4:] = torch.tensor([5, 9, 5, 9])  # prompt lookup finds candidates at once
    if len(mode.rows) == 1:
        inputs = row(inputs, mode.rows[0])
    settings = {**GREEDY, **mode.settings}
    own = mode.own(model, inputs)
    torch.manual_seed(5)
    if mode.error:
        with pytest.raises(ValueError, match=mode.error) as caught:
            model.generate(**inputs, **settings, **own)
        if mode.holds.startswith("refused: "):
            assert isinstance(caught.value, ArgumentError)
            assert f"is not served with a source: {mode.holds.removeprefix('refused: ')}" in str(caught.value)
        return
    found = model.generate(**inputs, **settings, **own)
    found = (found if isinstance(found, torch.Tensor) else found.sequences)[:, inputs["input_ids"].shape[1] :]
    assert found.shape[1] > 1
    for index, _ in enumerate(mode.rows):
        torch.manual_seed(5)
        expected = TextOnly(model, inputs, index).new_tokens(**settings)
        same = found[index * len(expected) : (index + 1) * len(expected)]
        assert torch.equal(same[:, : expected.shape[1]], expected)
        assert (same[:, expected.shape[1] :] == 0).all()


def test_the_page_has_these_rows() -> None:
    assert re.findall(r"^\| (.+) \| (.+) \|$", PAGE, re.MULTILINE) == [
        ("asked for by", "with a source"), *((mode.name, mode.holds) for mode in MODES),
    ]  # fmt: skip


def test_a_way_of_decoding_that_nobody_has_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    inputs = row(batch(model=model, targets=None), 0)
    later = SimpleNamespace(value="speculative_beams")
    monkeypatch.setattr(transformers.GenerationConfig, "get_generation_mode", lambda self, *args: later)
    with pytest.raises(ArgumentError, match="generation mode: 'speculative_beams' is not served with a source"):
        model.generate(**inputs, **GREEDY)


def test_the_models_own_configuration_and_a_given_one_are_looked_at() -> None:
    model = tiny_model()
    inputs = row(batch(model=model, targets=None), 0)
    given = transformers.GenerationConfig(**{**GREEDY, "guidance_scale": 2.0})
    with pytest.raises(ArgumentError, match="guidance_scale: 2.0 is not served"):
        model.generate(**inputs, generation_config=given)
    with pytest.raises(ArgumentError, match="guidance_scale: 2.0 is not served"):
        model.generate(inputs.pop("input_ids"), given, **inputs)
    inputs = row(batch(model=model, targets=None), 0)
    first, cache = begun(model, inputs)
    model.generation_config.prompt_lookup_num_tokens = 2
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens: not served with stop_strings: several tokens"):
        model.generate(**inputs, **GREEDY, stop_strings=["a"])
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens: not served with past_key_values"):
        model.generate(input_ids=first, past_key_values=cache, **GREEDY)
    model.generation_config.prompt_lookup_num_tokens = None
    assert model.generate(**inputs, **GREEDY, guidance_scale=1.0).shape[1] > 5


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_of_transformers_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="not served with a source: .*`layalign serve` batches"):
        getattr(tiny_model(), name)([[1, 5, 9]])


def begun(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> tuple[torch.Tensor, Any]:
    output = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 3, **settings}, return_dict_in_generate=True)
    return output.sequences, cache_of(output)


@pytest.mark.parametrize("adapter", [True, False])
def test_a_batch_goes_on_with_its_cache(adapter: bool) -> None:
    model = tiny_model(use_adapter=adapter, use_prompt=True)
    inputs = batch(model=model, prompts=(2, 4, 1), targets=None)
    first, cache = begun(model, inputs)
    more = torch.cat([first, torch.tensor([[5, 9], [7, 7], [8, 4]])], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    found = model.generate(input_ids=more, attention_mask=mask, past_key_values=cache, **GREEDY)
    whole = dict(inputs, input_ids=more, attention_mask=mask)
    for index in range(3):
        expected = TextOnly(model, whole, index).new_tokens(**GREEDY)
        assert torch.equal(found[index : index + 1, -5:], expected)


def test_a_cache_of_another_batch_or_source_is_refused() -> None:
    model = tiny_model()
    inputs = row(batch(model=model, targets=None), 0)
    first, cache = begun(model, inputs)
    past = int(cache.get_seq_length())
    with pytest.raises(ArgumentError, match=f"past_key_values: expected an empty cache with .* one of {past} tokens"):
        model.generate(**inputs, past_key_values=cache, **GREEDY)
    two = first.repeat(2, 1)
    with pytest.raises(ArgumentError, match="past_key_values: expected a cache of 2 rows, got 1"):
        model.generate(input_ids=two, past_key_values=cache, **GREEDY)
    with pytest.raises(ArgumentError, match="past_key_values: expected a cache of 3 rows, got 1"):
        model.generate(input_ids=first, past_key_values=cache, **{**GREEDY, **BEAMS})
    with pytest.raises(ArgumentError, match=f"expected the whole sequence, more than the {past} tokens"):
        model.generate(input_ids=first[:, -1:], past_key_values=cache, **GREEDY)
    with pytest.raises(ArgumentError, match="the slots do not match"):
        model.generate(input_ids=first.roll(1, 1), past_key_values=cache, **GREEDY)
    with pytest.raises(ArgumentError, match="past_key_values: expected a transformers cache, got"):
        model.generate(**inputs, past_key_values=(1,), **GREEDY)
    with pytest.raises(ArgumentError, match="input_ids: expected token ids"):
        model.generate(past_key_values=cache, **GREEDY)
    empty = set_source(DynamicCache(), get_source(cache))
    with pytest.raises(ArgumentError, match=r"encoder_input_ids: expected \(B, S\) token ids where a sequence begins"):
        model.generate(input_ids=inputs["input_ids"], past_key_values=empty, **GREEDY)

    cache.batch_repeat_interleave(3)
    found = model.generate(input_ids=first, past_key_values=cache, **{**GREEDY, **BEAMS})
    whole = dict(inputs, input_ids=first, attention_mask=torch.ones_like(first))
    assert torch.equal(found[:, first.shape[1] :], TextOnly(model, whole).new_tokens(**{**GREEDY, **BEAMS}))


def test_ids_alone_do_not_begin_a_sequence() -> None:
    """Whatever runs the model by itself and drops the embeddings, is told so."""
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    _, source = model.encode_source(inputs["encoder_input_ids"], inputs["encoder_attention_mask"])
    with pytest.raises(ArgumentError, match="the slots of input_ids hold no soft tokens"):
        model(input_ids=inputs["input_ids"], past_key_values=set_source(DynamicCache(), source))
