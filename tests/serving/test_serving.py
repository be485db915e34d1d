"""The server in this process: equal answers in any company, streams, drawing, keys."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_serving import CHAT, COMPLETIONS, SETTINGS, Client, Parts, case, figures, pieces, run, tiny_parts, until

from layalign.serving.http.decoding import Decoder
from layalign.serving.http.messages import CompletionRequest
from layalign.serving.http.service import Service
from layalign.utils.errors import ArgumentError


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny_parts()


@pytest.fixture(scope="module")
def questions(parts: Parts) -> list[Any]:
    found = [question for question in case.questions(*parts, 24) if question.margin >= case.MARGIN]
    assert len({question.text for question in found}) > len(found) // 2
    return found


# Answers


@pytest.mark.slow
def test_many_at_once_get_what_each_gets_alone(parts: Parts, questions: list[Any]) -> None:
    async def test(service: Service, client: Client) -> None:
        async def whole(question: Any) -> tuple[str, str]:
            (choice,) = (await client.post(COMPLETIONS, json=question.body())).json()["choices"]
            return choice["text"], choice["finish_reason"]

        async def streamed(question: Any) -> tuple[str, str]:
            body = {**question.body(), "stream": True}
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            chunks = pieces((await client.post(CHAT, json=body)).text)
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            return text, chunks[-1]["choices"][0]["finish_reason"]

        expected = [(question.text, question.reason) for question in questions]
        found = await asyncio.gather(*map(whole, questions), *map(streamed, questions))
        assert found == [*expected, *expected]
        counted = figures(service)
        assert counted[f"layalign_requests_total/{COMPLETIONS}/200"] == len(questions)
        assert counted[f"layalign_requests_total/{CHAT}/200"] == len(questions)
        assert counted["layalign_step_rows_bucket/2.0"] < 0.5 * counted["layalign_step_rows_count"]  # was batched
        assert counted["layalign_first_token_seconds_count"] == 2 * len(questions)
        assert counted["layalign_tokens_total/generated"] > 5 * len(questions)
        assert counted["layalign_requests_admitted"] == 0
        await until(lambda: figures(service)["layalign_batch_rows"] == 0)

    run(parts, test, replace(SETTINGS, max_batch=7, max_queue=200))


@pytest.mark.parametrize(("llm", "masked"), [("mistral", True), ("gemma2", True), ("gpt2", True), ("llama", False)])
def test_rows_join_and_leave_between_steps(llm: str, masked: bool) -> None:
    """Sliding windows, learned positions, and source padding that is attended to: logits as of each row alone."""
    from tiny import tiny_model

    from layalign.serving.http.decoding import Inputs, State, kept, merged

    model = tiny_model(llm=llm, mask_encoder_padding=masked)
    decoder, draw = Decoder(model, 0), torch.Generator().manual_seed(0)

    def inputs(source: int, prompt: int) -> Inputs:
        ids = [torch.randint(4, 64, (count,), generator=draw).tolist() for count in (source, prompt)]
        packed = model.build_inputs(torch.ones(1, source), [ids[1]])["input_ids"][0].tolist()
        return Inputs(tuple(ids[0]), tuple(packed))

    rows = [inputs(*sizes) for sizes in ((9, 3), (2, 0), (5, 11), (1, 1))]
    tokens = [torch.randint(4, 64, (8,), generator=draw).tolist() for _ in rows]

    def alone(row: int) -> list[torch.Tensor]:
        state, logits = decoder.prefill([rows[row]])
        return [logits[0]] + [decoder.step(state, [token])[0] for token in tokens[row]]

    expected = [alone(row) for row in range(4)]
    done, members = [0] * 4, [0, 1]
    state, logits = decoder.prefill([rows[0], rows[1]])

    def check(logits: torch.Tensor, which: list[int]) -> None:
        for row, found in zip(which, logits, strict=True):
            torch.testing.assert_close(found, expected[row][done[row]], rtol=1e-4, atol=1e-5)

    def step(state: State) -> None:
        logits = decoder.step(state, [tokens[row][done[row]] for row in members])
        for row in members:
            done[row] += 1
        check(logits, members)

    check(logits, members)
    step(state)
    joining, logits = decoder.prefill([rows[2], rows[3]])
    check(logits, [2, 3])
    state, members = merged(state, joining), [0, 1, 2, 3]
    step(state)
    step(state)
    state, members = kept(state, [3, 1]), [3, 1]  # the longest leave: their padding is cut off
    assert state.width == max(state.lengths) == state.cache.layers[0].keys.shape[2]
    assert state.cache.source.keys[0].shape[2] == max(state.sources) == 2
    for _ in range(4):
        step(state)


def test_positions_of_a_stream(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        body = {"prompt": "paka", "stream": True, "max_tokens": 6, "stream_options": {"include_usage": True}}
        response = await client.post(COMPLETIONS, json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = pieces(response.text)
        assert len({chunk["id"] for chunk in chunks}) == 1 and len(chunks) > 3  # as it comes, not at the end
        whole = (await client.post(COMPLETIONS, json={"prompt": "paka", "max_tokens": 6})).json()
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert whole["usage"]["source_tokens"] == 5 and whole["usage"]["prompt_tokens"] == 7

    run(parts, test)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_what_may_begin_a_stop_text_comes_at_the_end(parts: Parts, questions: list[Any], reason: str) -> None:
    question = next(q for q in questions if q.reason == reason and q.stop is None and len(q.text) > 1)

    async def test(service: Service, client: Client) -> None:
        body = {**question.body(), "stop": question.text[-2:] + "\x00"}
        (choice,) = (await client.post(COMPLETIONS, json=body)).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (question.text, reason)

    run(parts, test)


@pytest.mark.slow
def test_drawn_answers_follow_their_seed_in_any_company(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        async def drawn(**fields: Any) -> str:
            body = {"prompt": "paka mbwa", "max_tokens": 12, "temperature": 1.5, **fields}
            return str((await client.post(COMPLETIONS, json=body)).json()["choices"][0]["text"])

        alone = [await drawn(seed=seed) for seed in range(4)]
        assert len(set(alone)) == 4
        assert await asyncio.gather(*(drawn(seed=seed) for seed in range(4))) == alone
        assert await drawn() != await drawn()
        greedy = await drawn(temperature=0.0)
        assert await drawn(top_p=1e-6, seed=1) == greedy != alone[1]

    run(parts, test)


def test_a_repetition_penalty_of_the_model_is_kept(parts: Parts) -> None:
    config = parts[0].generation_config
    config.repetition_penalty = 1.7
    try:
        expected, _, _ = case.single_answer(*parts, "paka mbwa", "source", 16)
        config.repetition_penalty = 1.0
        assert case.single_answer(*parts, "paka mbwa", "source", 16)[0] != expected
        config.repetition_penalty = 1.7

        async def test(service: Service, client: Client) -> None:
            body = {"prompt": "paka mbwa", "task": "source", "max_tokens": 16}
            bodies = [body, {**body, "prompt": "nyumba"}, body]
            answers = await asyncio.gather(*(client.post(COMPLETIONS, json=each) for each in bodies))
            texts = [answer.json()["choices"][0]["text"] for answer in answers]
            assert texts[0] == texts[2] == expected != texts[1]

        run(parts, test)
        config.no_repeat_ngram_size = 2
        with pytest.raises(ArgumentError, match="generation_config: expected no_repeat_ngram_size=0, got 2"):
            Service(*parts, SETTINGS)
    finally:
        config.repetition_penalty, config.no_repeat_ngram_size = 1.0, 0


def test_a_system_message_is_the_prompt_of_the_llm(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        said = [{"role": "system", "content": "Be brief: {source}"}, {"role": "user", "content": "paka"}]
        asked = {"prompt": "paka", "llm_prompt": "Be brief: {source}"}
        text = (await client.post(CHAT, json={"messages": said})).json()["choices"][0]["message"]["content"]
        assert text == (await client.post(COMPLETIONS, json=asked)).json()["choices"][0]["text"]
        refused = (await client.post(CHAT, json={"messages": said, "task": "math"})).json()["error"]
        assert "messages: give either" in refused["message"]

    run(parts, test)


@pytest.mark.parametrize("filler", [2, 5])
def test_a_repetition_penalty_does_not_count_the_slots(parts: Parts, filler: int) -> None:
    """With an end token in the slots, or a byte, the penalty is that of the text alone."""
    model, _, tokenizer = parts
    before, model.config.source_token_id = model.config.source_token_id, filler

    async def test(service: Service, client: Client) -> None:
        body = {"prompt": "paka mbwa", "llm_prompt": "abc"}
        job = await service.prepare(CompletionRequest(**body), lambda event: None)
        prompt = tokenizer("abc", add_special_tokens=False)["input_ids"]
        assert job.inputs.packed.count(filler) > 5
        assert job.chooser.ids == [model.config.llm_bos_token_id, *prompt]
        job = await service.prepare(CompletionRequest(prompt="paka mbwa", task="none"), lambda event: None)
        assert job.chooser.ids == [model.config.llm_bos_token_id]
        job.chooser.ids.clear()  # an LLM without a first token
        assert job.chooser(torch.tensor([[0.0, 1.0]])) == 1

    model.generation_config.repetition_penalty = 1.7
    try:
        run(parts, test)
    finally:
        model.config.source_token_id, model.generation_config.repetition_penalty = before, 1.0


# Keys


def test_a_key_is_asked_for(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        body = {"prompt": "a"}
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "siri"}, {"Authorization": "Bearer é"}):
            raw = {name: value.encode() for name, value in headers.items()}
            response = await client.post(COMPLETIONS, json=body, headers=raw)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/health")).status_code == 200
        good = {"Authorization": "Bearer siri"}
        assert (await client.post(COMPLETIONS, json=body, headers=good)).status_code == 200
        models = (await client.get("/v1/models", headers=good)).json()
        assert [model["id"] for model in models["data"]] == ["layalign"]
        assert not any(name.startswith("access-control") for name in response.headers)

    run(parts, test, key="siri")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "layalign-engine"]
