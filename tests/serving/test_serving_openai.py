"""The server against OpenAI's own client: every field that its types have, its errors, and strict shapes of answers."""

from __future__ import annotations

import asyncio
import gzip
import json
import typing
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from helpers_serving import CHAT, COMPLETIONS, ROOT, SETTINGS, Client, Parts, case, pieces, run, tiny_parts
from openai.types import Completion, Model
from openai.types import completion_create_params as completion_params
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionAssistantMessageParam,
    ChatCompletionChunk,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_params,
)
from pydantic import BaseModel, ValidationError

from layalign.serving.http import messages
from layalign.serving.http.service import Service
from layalign.utils.pages import replaced

TEXT = "paka mbwa"
USER = {"role": "user", "content": TEXT}
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "layalign", "prompt": TEXT, "max_tokens": 4},
    CHAT: {"model": "layalign", "messages": [USER], "max_tokens": 4},
}

# Of every field of the client's types: values that ask for nothing (besides null), and values that are refused.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "n": ([1], [2, 0, True, "1"]),
    "best_of": ([1], [2]),
    "echo": ([False], [True, 0]),
    "suffix": ([""], ["b"]),
    "logit_bias": ([{}], [{"50256": -100}, {"a": 1}, []]),
    "presence_penalty": ([0, 0.0], [0.5, -2, 3, False]),
    "frequency_penalty": ([0, 0.0], [0.5, -2, 3]),
    "logprobs": ([False], [True, 0, 5]),
    "top_logprobs": ([0], [3]),
    "tools": ([[]], [[{"type": "function", "function": {"name": "f"}}], {}]),
    "tool_choice": (["none", "auto"], ["required", {"type": "function", "function": {"name": "f"}}]),
    "parallel_tool_calls": ([True, False], [1]),
    "functions": ([[]], [[{"name": "f"}]]),
    "function_call": (["none", "auto"], [{"name": "f"}]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}]),
    "modalities": ([["text"]], [["text", "audio"], []]),
    "audio": ([], [{"format": "wav", "voice": "alloy"}]),
    "store": ([False], [True]),
    "metadata": ([{}], [{"a": "b"}]),
    "service_tier": (["auto", "default"], ["flex", "priority"]),
    "reasoning_effort": (["none"], ["low", "high"]),
    "verbosity": (["medium"], ["low", "high"]),
    "prediction": ([], [{"type": "content", "content": "a"}]),
    "prompt_cache_retention": (["in_memory"], ["24h"]),
    "prompt_cache_options": ([{}], [{"mode": "explicit"}]),
    "moderation": ([], [{"model": "omni-moderation-latest"}]),
    "web_search_options": ([], [{}]),  # the empty one asks for a search
}
# Fields that are done: values that do not change the answer, values that are refused, and (fields beside it, a value)
# with another answer than the fields beside it alone have.
SERVED: dict[str, tuple[Any, ...]] = {
    "model": (["layalign"], ["gpt-9", 5, "m" * 257], None),
    "prompt": (
        [TEXT, [TEXT]],
        [5, ["a", "b"], [], [1, 2], [[1, 2]], [[1], [2]], "", [""], {"text": "a"}],
        ({}, "mbwa"),
    ),
    "messages": (
        [
            [{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
            [{"role": "system", "content": ""}, {"role": "developer", "content": []}, USER],
            [USER, {"role": "assistant", "content": None}],
        ],
        [
            [],
            [USER, USER],
            [USER, {"role": "system", "content": "Be brief."}],
            [{"role": "system", "content": "Be"}, {"role": "developer", "content": "brief."}, USER],
            [USER, {"role": "assistant", "content": "a"}],
            [USER, {"role": "tool", "content": "a", "tool_call_id": "b"}],
            [USER, {"role": "function", "content": "a", "name": "b"}],
            [{"role": "assistant", "content": "a"}],
            [{"role": "user"}],
            [{"role": "user", "content": 5}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
            [{"role": "user", "content": [{"type": "text", "text": TEXT}, {"type": "input_audio", "input_audio": {}}]}],
            [{"role": "user", "content": [{"type": "file", "file": {"file_id": "a"}}]}],
            ["a"],
            "a",
            {},
        ],
        ({}, [{"role": "user", "content": [{"type": "text", "text": "paka"}, {"type": "text", "text": "mbwa"}]}]),
    ),
    "max_tokens": ([4], [0, -1, 201, "4", 4.5, True], ({}, 2)),
    "max_completion_tokens": ([4], [0, -1, 3, 201, "4"], ({"max_tokens": None}, 2)),
    "temperature": ([0, 0.0], [-1, 2.1, "0"], ({"seed": 1}, 1.5)),
    "top_p": ([1, 0.5], [0, 1.1], ({"seed": 1, "temperature": 1.5}, 1e-6)),
    "seed": ([1234], [-1, 0.5, "1"], ({"seed": 1, "temperature": 1.5}, 2)),
    "stop": ([[], "\x00", ["\x00"] * 4], ["", [""], ["a"] * 5, "a" * 257, 5, [5]], ({}, "R")),
    "stream": ([False], ["yes", 1], None),  # see the streams' own test
    "stream_options": ([{}, {"include_usage": False}], [5, [], {"include_usage": 1}, {"chunks": 1}], None),
    "user": (["u1"], [5, "u" * 257], None),
    "safety_identifier": (["u1"], [5, "u" * 257], None),
    "prompt_cache_key": (["u1"], [5, "u" * 257], None),
}
PARAMS = {
    COMPLETIONS: (completion_params.CompletionCreateParamsNonStreaming,
                  completion_params.CompletionCreateParamsStreaming),
    CHAT: (chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming),
}  # fmt: skip
REQUIRED = {"model", "prompt", "messages"}


def names(*types: Any) -> set[str]:
    """The fields of the client's typed dictionaries."""
    return {name for each in types for name in typing.get_type_hints(each)}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny_parts()


def run_with_openai(
    parts: Parts, test: Callable[[openai.AsyncOpenAI, Client], Awaitable[None]], **options: Any
) -> None:
    async def whole(service: Service, client: Client) -> None:
        async with openai.AsyncOpenAI(
            base_url="http://server/v1", api_key="any", max_retries=0, http_client=client
        ) as api:
            await test(api, client)

    run(parts, whole, **options)


def creator(api: openai.AsyncOpenAI, path: str) -> Any:
    return (api.chat.completions if path == CHAT else api.completions).create


def answer(completion: Any) -> tuple[str, str]:
    choice = completion.choices[0]
    return choice.message.content if hasattr(choice, "message") else choice.text, choice.finish_reason


async def refused(create: Any, field: str, body: dict[str, Any], status: int = 400) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await create(**body)
    assert (caught.value.status_code, caught.value.param) == (status, field), (body, caught.value.message)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.body["message"].startswith(field) and len(caught.value.body["message"]) < 300


# Fields


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_field_of_the_client_is_known(path: str) -> None:
    """A new one: say in `layalign.serving.http.messages` which values ask for nothing, and put it here."""
    new = names(*PARAMS[path]) - set(NOT_SERVED) - set(SERVED)
    assert not new, f"openai {openai.__version__} has fields for {path} that neither server nor test know: {new}"


@pytest.mark.slow
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_value_that_asks_for_nothing_changes_nothing(path: str, parts: Parts) -> None:
    async def test(api: openai.AsyncOpenAI, client: Client) -> None:
        create, body = creator(api, path), BODIES[path]
        expected = answer(await create(**body))
        cases = [
            (field, value)
            for field in sorted(names(*PARAMS[path]))
            for value in [*(NOT_SERVED | SERVED)[field][0], *([] if field in REQUIRED else [None])]
            if (field, value) != ("max_tokens", None)  # the server's default is another
        ]
        answers = await asyncio.gather(*(create(**{**body, field: value}) for field, value in cases))
        assert [each for each, found in zip(cases, answers, strict=True) if answer(found) != expected] == []
        everything = {field: values[0] for field, (values, *_) in NOT_SERVED.items() if values}
        everything = {field: value for field, value in everything.items() if field in names(*PARAMS[path])}
        assert answer(await create(**body, **everything)) == expected

    lead = case.single_answer(*parts, TEXT, "none", 4)[2]
    assert lead > case.MARGIN  # the answer is the same in any batch
    run_with_openai(parts, test, settings=replace(SETTINGS, max_queue=200))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_value_that_asks_for_something_is_done_or_refused(path: str, parts: Parts) -> None:
    async def test(api: openai.AsyncOpenAI, client: Client) -> None:
        create, body = creator(api, path), BODIES[path]
        for field in sorted(names(*PARAMS[path])):
            for value in (NOT_SERVED | SERVED)[field][1]:
                status = 404 if (field, value) == ("model", "gpt-9") else 400
                await refused(create, field, {**body, field: value}, status)
            changed = SERVED[field][2] if field in SERVED else None
            if changed is not None:
                beside, value = changed
                without = answer(await create(**{**body, **beside}))
                assert answer(await create(**{**body, **beside, field: value})) != without, field

    run_with_openai(parts, test)


OF_OTHERS = {
    "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 3, "ignore_eos": True, "guided_json": {"a": 1},
    "stop_token_ids": [1], "chat_template_kwargs": {"a": 1}, "max_output_tokens": 5, "source": "a", "body": 1,
    "a\x00b" * 40: 1,
}  # fmt: skip


def test_fields_of_others_are_refused_by_name(parts: Parts) -> None:
    async def test(api: openai.AsyncOpenAI, client: Client) -> None:
        for path, body in BODIES.items():
            for field, value in OF_OTHERS.items():
                await refused(creator(api, path), field[:64], {**body, "extra_body": {field: value}})

    run_with_openai(parts, test)


def test_fields_inside_of_others(parts: Parts) -> None:
    inside: dict[str, tuple[Any, dict[str, tuple[list[Any], list[Any]]]]] = {
        "messages": (
            (ChatCompletionUserMessageParam, ChatCompletionSystemMessageParam, ChatCompletionDeveloperMessageParam,
             ChatCompletionAssistantMessageParam),
            {
                "role": (["user"], ["other", None]),
                "content": ([TEXT], []),
                "name": (["mimi", None], [5]),
                "refusal": (["", None], ["no"]),
                "audio": ([None], [{"id": "a"}]),
                "tool_calls": ([[], None], [[{"id": "a"}]]),
                "function_call": ([None], [{"name": "f", "arguments": ""}]),
            },
        ),
        "content": (
            (ChatCompletionContentPartTextParam,),
            {
                "type": (["text"], ["refusal", None]),
                "text": ([TEXT], [5, None]),
                "prompt_cache_breakpoint": ([None], [{"mode": "explicit"}]),
            },
        ),
        "stream_options": (
            (ChatCompletionStreamOptionsParam,),
            {
                "include_usage": ([True, False, None], ["yes"]),
                "include_obfuscation": ([False, None], [True]),
            },
        ),
    }  # fmt: skip
    roles = {
        typing.get_args(typing.get_type_hints(each)["role"])[0] for each in typing.get_args(ChatCompletionMessageParam)
    }
    assert roles <= {"developer", "system", "user", "assistant", "tool", "function"}, roles

    def bodies(where: str, field: str, value: Any) -> dict[str, Any]:
        if where == "messages":
            return {**BODIES[CHAT], "messages": [{**USER, field: value}]}
        if where == "content":
            content = [{"type": "text", "text": TEXT, field: value}]
            return {**BODIES[CHAT], "messages": [{"role": "user", "content": content}]}
        return {**BODIES[CHAT], where: {field: value}}

    async def test(api: openai.AsyncOpenAI, client: Client) -> None:
        create = api.chat.completions.create
        expected = answer(await create(**BODIES[CHAT]))
        for where, (types, fields) in inside.items():
            new = names(*types) - set(fields)
            assert not new, (
                f"openai {openai.__version__} has fields in {where} that neither server nor test know: {new}"
            )
            for field, (neutral, bad) in fields.items():
                for value in neutral:
                    assert answer(await create(**bodies(where, field, value))) == expected, (where, field, value)
                for value in bad:
                    await refused(create, "messages" if where == "content" else where, bodies(where, field, value))

    run_with_openai(parts, test)


def test_the_page_lists_every_field() -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert replaced(page, messages.BEGIN, messages.END, messages.markdown()) == page, "run `make docs`"
    models: list[type[BaseModel]] = [messages.CompletionRequest, messages.ChatRequest, messages.Message]
    for name in {name for model in models for name in model.model_fields} - {"role"}:
        assert any(f"`{prefix}{name}{end}" in page for prefix in ("", "messages[].") for end in "`:."), name


# What is built on the client sends by itself

SENT: dict[str, tuple[str, dict[str, Any]]] = {
    "LangChain, completions": (COMPLETIONS, {
        "prompt": [TEXT], "temperature": 0.7, "max_tokens": 4, "top_p": 1, "frequency_penalty": 0, "n": 1,
        "presence_penalty": 0, "logit_bias": {}, "seed": None, "logprobs": None}),
    "LangChain, chats": (CHAT, {"messages": [{"content": TEXT, "role": "user"}], "stream": False, "n": 1}),
    "LangChain.js": (CHAT, {
        "messages": [USER], "temperature": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1,
        "stream": True, "stream_options": {"include_usage": True}}),
    "LlamaIndex": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
                          "stream": False, "temperature": 0.1}),
    "Semantic Kernel": (COMPLETIONS, {"prompt": TEXT, "stream": False, "echo": False, "suffix": None, "logit_bias": {},
                                      "frequency_penalty": 0.0, "presence_penalty": 0.0, "top_p": 1.0}),
    "Vercel's AI SDK": (CHAT, {"messages": [USER], "temperature": 0, "tool_choice": "auto", "stream": True,
                               "stream_options": {"include_usage": True}}),
    "LiteLLM, aider": (CHAT, {"messages": [USER], "temperature": 0, "stream": True}),
    "Open WebUI": (CHAT, {"messages": [USER], "stream": True, "stop": [], "seed": 0, "frequency_penalty": 0.0}),
    "lm-eval, local-completions": (COMPLETIONS, {"prompt": TEXT, "max_tokens": 4, "temperature": 0, "seed": 1234,
                                                 "stop": ["\n\n", "</s>"]}),
    "lm-eval, local-chat-completions": (CHAT, {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 4,
                                               "temperature": 0, "stop": ["\n\n"], "seed": 1234}),
    "vLLM's benchmark of chats": (CHAT, {
        "messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}], "max_completion_tokens": 4,
        "stream": True, "stream_options": {"include_usage": True}}),
    "agents, names": (CHAT, {"messages": [{**USER, "name": "mimi"}], "tools": [], "parallel_tool_calls": True}),
}  # fmt: skip


# Who, the field that is refused, and what else is asked for.
ASKED: list[tuple[str, str, str, dict[str, Any]]] = [
    ("instructor", "tools", CHAT, {"tools": [{"type": "function", "function": {"name": "Answer"}}],
                                   "tool_choice": {"type": "function", "function": {"name": "Answer"}}}),
    ("instructor, JSON", "response_format", CHAT, {"response_format": {"type": "json_object"}}),
    ("lm-eval, tokens", "prompt", COMPLETIONS, {"prompt": [[5, 6, 7]], "seed": 1234}),
    ("lm-eval, likelihoods", "logprobs", COMPLETIONS, {"logprobs": 1, "echo": True, "max_tokens": 1}),
    ("vLLM's benchmark of completions", "repetition_penalty", COMPLETIONS, {"repetition_penalty": 1.0}),
]  # fmt: skip


def test_what_clients_send_by_themselves(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        async def post(path: str, body: dict[str, Any]) -> Any:
            return await client.post(path, json=body, params={"api-version": "2026-01-01"})

        for who, (path, body) in SENT.items():
            response = await post(path, {"model": "layalign", **body})
            assert response.status_code == 200, (who, response.text)
        for who, field, path, body in ASKED:
            response = await post(path, {**BODIES[path], **body})
            assert (response.status_code, response.json()["error"]["param"]) == (400, field), (who, response.text)

    run(parts, test)


# Shapes


def strictly(kind: type[BaseModel], data: dict[str, Any], extra: frozenset[str] = frozenset()) -> Any:
    """`data` as the client's type, nothing of a wrong type, missing or unknown."""
    found = kind.model_validate_json(json.dumps(data), strict=True)

    def unknown(value: Any) -> Iterator[str]:
        if isinstance(value, BaseModel):
            yield from value.model_extra or {}
            for each in value.__dict__.values():
                yield from unknown(each)
        elif isinstance(value, list):
            for each in value:
                yield from unknown(each)

    assert set(unknown(found)) == extra
    return found


OURS = frozenset({"source_tokens"})


def test_answers_have_the_shape_of_the_clients_types(parts: Parts) -> None:
    with pytest.raises(ValidationError):  # the types do look
        strictly(Completion, {"id": 5})

    async def test(api: openai.AsyncOpenAI, client: Client) -> None:
        for path, kind in ((COMPLETIONS, Completion), (CHAT, ChatCompletion)):
            found = strictly(kind, (await client.post(path, json=BODIES[path])).json(), OURS)
            (choice,) = found.choices
            assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
            assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
            raw = await (api.chat.completions if path == CHAT else api.completions).with_raw_response.create(
                **BODIES[path], extra_body={"language": "sw", "task": "source", "timeout": 60.0}
            )
            assert raw.request_id and raw.parse()._request_id == raw.request_id
            assert raw.parse().usage.prompt_tokens > found.usage.prompt_tokens  # the task's prompt
        strictly(Model, (await client.get("/v1/models")).json()["data"][0])

    run_with_openai(parts, test)


@pytest.mark.parametrize("usage", [None, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_streams_have_the_shape_of_the_clients_types(path: str, usage: bool | None, parts: Parts) -> None:
    body = {**BODIES[path], "stream": True, "stream_options": usage and {"include_usage": usage}}

    async def test(api: openai.AsyncOpenAI, client: Client) -> None:
        whole = await creator(api, path)(**BODIES[path])
        text, reason = answer(whole)
        chunks = pieces((await client.post(path, json=body)).text)
        if usage:
            assert all("usage" in chunk and chunk["usage"] is None for chunk in chunks[:-1])
            *chunks, last = chunks
            assert last["choices"] == [] and last["usage"] == whole.usage.model_dump(exclude_unset=True)
            strictly(ChatCompletionChunk if path == CHAT else Completion, last, OURS)
        else:
            assert not any("usage" in chunk for chunk in chunks)
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + [reason]
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        for chunk in chunks:
            if path == COMPLETIONS:  # the client has one type for whole and streamed completions, without null
                chunk["choices"][0]["finish_reason"] = reason
            strictly(ChatCompletionChunk if path == CHAT else Completion, chunk)
        if path == CHAT:
            assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks] == [
                "assistant", *[None] * (len(chunks) - 1)
            ]  # fmt: skip
        found = ""
        async for event in await creator(api, path)(**body):
            for choice in event.choices:
                found += (choice.delta.content or "") if path == CHAT else choice.text
        assert found == text

    run_with_openai(parts, test)


# The rest of the interface


def test_models_by_name(parts: Parts) -> None:
    async def test(api: openai.AsyncOpenAI, client: Client) -> None:
        (model,) = (await api.models.list()).data
        assert model == await api.models.retrieve("org/tiny model")
        assert (await client.get("/v1/models/org/tiny%20model")).json()["id"] == "org/tiny model"
        for name in ("gpt-9", "org", "org/tiny model/x"):
            with pytest.raises(openai.NotFoundError) as caught:
                await api.models.retrieve(name)
            assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
        with pytest.raises(openai.NotFoundError) as caught:
            await api.completions.create(model="gpt-9", prompt="a")
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")

    run_with_openai(parts, test, settings=replace(SETTINGS, model_name="org/tiny model"))


def test_what_is_not_there_is_told_in_the_same_shape(parts: Parts) -> None:
    async def test(api: openai.AsyncOpenAI, client: Client) -> None:
        for call in (api.embeddings.create(model="layalign", input="a"), api.responses.create(input="a")):
            with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
                await call
        for method, path, status in [
            ("GET", "/v1/nothing", 404), ("POST", "/chat/completions", 404), ("GET", CHAT, 405), ("PUT", CHAT, 405),
            ("OPTIONS", CHAT, 405), ("POST", "/v1/models", 405), ("DELETE", "/v1/models/layalign", 405),
        ]:  # fmt: skip
            headers = {"Content-Type": "application/json"}
            response = await client.request(method, path, headers=headers)
            assert response.status_code == status, (method, path)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert COMPLETIONS in response.json()["error"]["message"]
            assert "allow" in response.headers or status == 404
            assert response.headers["x-request-id"]
        assert (await client.head(CHAT)).status_code == 405

    run_with_openai(parts, test)


def test_bodies_as_clients_may_send_them(parts: Parts) -> None:
    async def test(service: Service, client: Client) -> None:
        content = json.dumps({"prompt": TEXT}).encode()
        for kind in ("application/json; charset=utf-8", "Application/JSON"):
            assert (await client.post(COMPLETIONS, content=content, headers={"Content-Type": kind})).status_code == 200
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        response = await client.post(COMPLETIONS, content=gzip.compress(content), headers=headers)
        assert response.status_code == 415 and "content-encoding" in response.json()["error"]["message"]
        response = await client.post(COMPLETIONS + "/", json={"prompt": TEXT}, follow_redirects=True)
        assert response.status_code == 200

    run(parts, test)
