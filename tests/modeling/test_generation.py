"""generate: greedy, sampling, beams, several sequences, streaming, static cache, continued caches."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, row, tiny_model
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from layalign import ArgumentError
from layalign.modeling.cache import SourceKeyValues, get_source

NEVER = 10_000  # beam search wants some end-of-sequence id; this one is outside the vocabulary


def new_tokens(model, inputs, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("llm", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_greedy_equals_choosing_from_the_full_forward(llm: str) -> None:
    model = tiny_model(llm=llm)
    inputs = batch(model=model, targets=None)
    found = new_tokens(model, inputs, eos_token_id=[])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(6):
            token = model(**dict(inputs, input_ids=ids, attention_mask=mask)).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(found, ids[:, -6:])


@pytest.mark.parametrize("llm", ["llama", "mistral"])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_of_a_batch_equal_beams_of_each_sample(llm: str, settings: dict) -> None:
    model = tiny_model(llm=llm)
    inputs = batch(model=model, targets=None)
    together = new_tokens(model, inputs, **settings)
    count = settings.get("num_return_sequences", 1)
    for index in range(3):
        alone = new_tokens(model, row(inputs, index), **settings)
        part = together[index * count : (index + 1) * count]
        width = alone.shape[1]
        assert torch.equal(part[:, :width], alone)
        assert (part[:, width:] == 0).all()


def test_beam_search_scores_are_those_of_the_full_forward() -> None:
    """The source must follow its beam: the score of every returned beam is recomputed without any cache."""
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    found = model.generate(
        **inputs, max_new_tokens=5, num_beams=4, num_return_sequences=4, do_sample=False, eos_token_id=NEVER,
        pad_token_id=0, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    repeated = {name: tensor.repeat_interleave(4, 0) for name, tensor in inputs.items()}
    length = inputs["input_ids"].shape[1]
    repeated["input_ids"] = found.sequences
    repeated["attention_mask"] = torch.nn.functional.pad(repeated["attention_mask"], (0, 5), value=1)
    with torch.no_grad():
        scores = model(**repeated).logits[:, length - 1 : -1].log_softmax(-1)
    total = scores.gather(2, found.sequences[:, length:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, total, rtol=1e-4, atol=1e-4)


BEAMS = dict(num_beams=4, eos_token_id=NEVER, return_dict_in_generate=True, output_scores=True, max_new_tokens=6)


def test_beams_share_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of keys and values a sequence, the same tensors in every step, and the results of a row for each beam."""
    model = tiny_model(llm="llama_gqa_wide_heads").double()
    inputs = batch(model=model, targets=None)
    with torch.no_grad():
        _, own = model.encode_source(inputs["encoder_input_ids"], inputs["encoder_attention_mask"])
    shared = model.generate(**inputs, **BEAMS)
    source = get_source(shared.past_key_values)
    assert source.copies == 4 and source.rows == 12 and source.lengths.flatten().tolist() == [6] * 4 + [3] * 4 + [5] * 4
    assert all(map(torch.equal, (*source.keys, *source.values), (*own.keys, *own.values)))
    monkeypatch.setattr(SourceKeyValues, "share", SourceKeyValues.repeat)
    single = model.generate(**inputs, **BEAMS)
    assert len(get_source(single.past_key_values).keys[0]) == 12
    assert torch.equal(shared.sequences, single.sequences)
    torch.testing.assert_close(shared.sequences_scores, single.sequences_scores, rtol=1e-12, atol=1e-12)


def test_beams_copy_nothing_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copied = tiny_model(), []
    change = SourceKeyValues.map
    monkeypatch.setattr(SourceKeyValues, "map", lambda self, function: copied.append(1) or change(self, function))
    model.generate(**batch(model=model, targets=None), **BEAMS)
    assert copied == []


def test_what_watches_a_layer_sees_a_row_for_each_beam() -> None:
    model, seen = tiny_model().double(), []
    inputs = batch(model=model, targets=None)
    expected = model.generate(**inputs, **BEAMS)
    look = lambda module, args, output: seen.append((len(args[0]), len(args[1]), len(output)))  # noqa: E731
    model.cross_attention[1].register_forward_hook(look)
    found = model.generate(**inputs, **BEAMS)
    assert set(seen) == {(12, 12, 12)} and torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-12, atol=1e-12)


def test_rows_that_leave_their_sequence_get_states_of_their_own() -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    with torch.no_grad():
        _, source = model.encode_source(inputs["encoder_input_ids"], inputs["encoder_attention_mask"])
    shared, repeated = source.share(2), source.repeat(2)
    assert shared.select(torch.tensor([1, 1, 2, 3, 5, 4])) is shared
    for rows in ([2, 3, 0, 1, 4, 5], [0, 1, 2], [5]):
        index = torch.tensor(rows)
        found, expected = shared.select(index), repeated.select(index)
        assert found.copies == 1 and found.rows == len(rows)
        assert torch.equal(found.mask, expected.mask)
        assert all(map(torch.equal, (*found.keys, *found.values), (*expected.keys, *expected.values)))
    assert torch.equal(shared.lengths, repeated.lengths) and shared.share(3).copies == 6


def test_the_encoder_runs_once_per_sequence() -> None:
    model = tiny_model()
    calls = []
    model.encoder.register_forward_hook(lambda module, args, kwargs, out: calls.append(out[0].shape), with_kwargs=True)
    projected = []
    model.encoder_aligner.projector.register_forward_hook(lambda *_: projected.append(1))
    new_tokens(model, batch(model=model, targets=None), num_beams=3, eos_token_id=NEVER)
    assert [shape[0] for shape in calls] == [3]
    assert projected == [1]


def test_sampling_is_reproducible_and_varied() -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    settings = dict(do_sample=True, num_return_sequences=4, temperature=2.0, eos_token_id=[])
    torch.manual_seed(7)
    first = new_tokens(model, inputs, **settings)
    torch.manual_seed(7)
    second = new_tokens(model, inputs, **settings)
    assert first.shape == (12, 6)
    assert torch.equal(first, second)
    assert len({tuple(ids) for ids in first[:4].tolist()}) > 1


def test_streaming_yields_the_generated_tokens() -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[torch.Tensor] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value)

        def end(self) -> None:
            self.ended = True

    model = tiny_model()
    inputs = row(batch(model=model, targets=None), 0)
    streamer = Collector()
    found = new_tokens(model, inputs, streamer=streamer, eos_token_id=[])
    assert streamer.ended
    assert torch.equal(torch.cat([piece.flatten() for piece in streamer.pieces[1:]]), found[0])


@pytest.mark.parametrize("llm", ["llama", "mistral", "gemma3_text"])
def test_static_cache_gives_the_same_tokens(llm: str) -> None:
    model = tiny_model(llm=llm)
    inputs = batch(model=model, targets=None)
    dynamic = new_tokens(model, inputs, eos_token_id=[])
    static = new_tokens(model, inputs, eos_token_id=[], cache_implementation="static")
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("llm", ["llama", "mistral"])
def test_use_cache_false_gives_the_same_tokens(llm: str) -> None:
    model = tiny_model(llm=llm)
    inputs = batch(model=model, targets=None)
    assert torch.equal(new_tokens(model, inputs), new_tokens(model, inputs, use_cache=False))


def test_no_prompt_needs_no_input_ids() -> None:
    model = tiny_model()
    inputs = batch(model=model, prompts=(0, 0, 0), targets=None)
    source = {name: inputs[name] for name in ("encoder_input_ids", "encoder_attention_mask")}
    packed = model.build_inputs(source["encoder_attention_mask"])
    assert torch.equal(packed["input_ids"], inputs["input_ids"])
    found = model.generate(**source, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_the_cache_carries_the_source_and_a_dialogue_goes_on_with_it() -> None:
    model = tiny_model()
    inputs = row(batch(model=model, targets=None), 0)
    cache = DynamicCache(config=model.llm.config)
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=[])
    assert isinstance(cache, DynamicCache) and get_source(cache) is not None
    more = torch.cat([first, torch.tensor([[5, 9, 11]])], dim=1)
    continued = model.generate(
        input_ids=more, past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=[]
    )
    again = model.generate(**dict(inputs, input_ids=more, attention_mask=torch.ones_like(more)), max_new_tokens=3,
                           do_sample=False, eos_token_id=[])  # fmt: skip
    assert torch.equal(continued, again)


def test_step_by_step_forward_with_a_cache_equals_the_full_forward() -> None:
    model = tiny_model(llm="qwen2")
    inputs = batch(model=model, targets=None)
    tail = torch.randint(4, 64, (3, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    with torch.no_grad():
        whole = dict(inputs, input_ids=torch.cat([inputs["input_ids"], tail], 1), attention_mask=mask)
        full = model(**whole).logits
        output = model(**inputs, use_cache=True)
        steps = []
        length = inputs["input_ids"].shape[1]
        for step in range(4):
            output = model(
                input_ids=tail[:, step : step + 1],
                attention_mask=mask[:, : length + step + 1],
                past_key_values=output.past_key_values,
            )
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full[:, length:], rtol=1e-4, atol=1e-4)


def test_cache_reorder_repeat_and_select_move_the_source() -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    key, mask = get_source(cache).keys[1].clone(), get_source(cache).mask.clone()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(get_source(cache).keys[1], key[[2, 0, 1]])
    assert torch.equal(get_source(cache).mask, mask[[2, 0, 1]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(get_source(cache).keys[1], key[[2, 2, 0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert len(get_source(cache).values[0]) == 2
    assert torch.equal(get_source(cache).keys[1], key[[2, 1]])


def test_a_user_made_static_cache_is_used() -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    cache = StaticCache(config=model.llm.config, max_cache_len=40)
    found = new_tokens(model, inputs, past_key_values=cache, eos_token_id=[])
    assert torch.equal(found, new_tokens(model, inputs, eos_token_id=[]))
    assert isinstance(cache, StaticCache) and get_source(cache) is not None


def test_an_argument_given_twice_is_named() -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    settings = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    assert model.generate(inputs.pop("input_ids"), settings, **inputs).shape[1] > 2
    with pytest.raises(ArgumentError, match="generation_config: expected once, got it by position and by name"):
        model.generate(None, settings, generation_config=settings, **inputs)


def test_missing_source_and_bad_packing_are_named() -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    with pytest.raises(ArgumentError, match="encoder_input_ids: expected"):
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=2)
    with pytest.raises(ArgumentError, match="encoder_input_ids: expected"):
        model(input_ids=inputs["input_ids"])
    text = dict(inputs, input_ids=torch.full_like(inputs["input_ids"], 9))
    with pytest.raises(ArgumentError, match=r"input_ids: expected \[bos\]\[one slot per encoder token\]"):
        model(**text)
    short = dict(inputs, encoder_attention_mask=torch.ones_like(inputs["encoder_attention_mask"]))
    with pytest.raises(ArgumentError, match="the slots do not match encoder_attention_mask"):
        model(**short)
    with pytest.raises(ArgumentError, match="with the B of encoder_input_ids"):
        model(**dict(inputs, input_ids=inputs["input_ids"][:2], attention_mask=inputs["attention_mask"][:2]))
