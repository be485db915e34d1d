"""vLLM's server answers as `layalign serve` does, refuses what it refuses, and outlives bad requests."""

from __future__ import annotations

import asyncio
import json
import time
from random import Random
from typing import Any

import httpx
import pytest
import torch
from helpers_serving import CHAT, COMPLETIONS, pieces, run
from transformers import GenerationConfig
from vllm_case import answers, cases, checkpoint, engine, healthy, save, server

from layalign import LayAlignForCausalLM
from layalign.modeling.loading import load_model
from layalign.serving.http.settings import ServeSettings
from layalign.serving.vllm import source_prompt

TEXT = "paka mbwa"


def completion(text: Any = TEXT, **fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"model": "layalign", "prompt": text, "max_tokens": 12, **fields}


def chat(content: Any = TEXT, *before: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [*before, {"role": "user", "content": content}], "max_tokens": 12, **fields}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


PARTS = [{"type": "text", "text": "paka"}, {"type": "text", "text": "mbwa"}]
SAMPLED = {"temperature": 1e-9, "seed": 3}  # takes the way of sampling, and finds the greedy answer
GOOD = [
    completion(),
    completion([TEXT]),
    completion("Habari ya asubuhi? Nzuri sana! \N{GRINNING FACE}", max_tokens=40),
    completion("  " + TEXT + "\n"),
    completion("\u0928\u092e\u0938\u094d\u0924\u0947", language="Hindi"),
    completion(language="Swahili"),
    completion(language="sw"),
    completion(task="none"),
    completion(task="math", max_tokens=60),
    completion(task="source"),
    completion(llm_prompt="Say: {source}, {source}."),
    completion(llm_prompt=" {other} {source"),
    completion("a" * 200, max_tokens=3),
    completion("x", max_tokens=1),
    completion(top_p=0.5, **SAMPLED),
    completion(user="u1", n=1, best_of=1, echo=False, suffix=None, logit_bias={}, presence_penalty=0),
    completion(stream=True),
    completion(stream=True, max_tokens=30, task="math", stream_options={"include_usage": True}),
    chat(),
    chat(PARTS),
    chat(TEXT, task="math"),
    chat(TEXT, system("Answer {source}:")),
    chat(TEXT, system([{"type": "text", "text": "Be brief."}], "developer")),
    chat(TEXT, system("")),
    chat(language="swh", max_tokens=None, max_completion_tokens=7),
    chat(max_tokens=None),
    chat(llm_prompt="{source}", tool_choice="none", store=False, top_logprobs=0, metadata={}),
    chat(response_format={"type": "text"}, parallel_tool_calls=True, service_tier="auto"),
    chat(stream=True, stream_options={"include_usage": True}),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    checkpoint(folder)
    say_letters(folder)
    return folder


def say_letters(folder):
    """Change a checkpoint so that all its answers are ASCII: vLLM drops an unfinished character at an answer's end."""
    model = LayAlignForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        head = model.llm.get_output_embeddings().weight
        head[:3], head[97:] = 0, 0  # logits of zero; the best letter's is above
    save(model, folder, save_frozen=True)


@pytest.fixture(scope="module")
def parts(folder):
    return load_model(str(folder), "cpu", "float32")


@pytest.fixture(scope="module")
def served(folder):
    with server(folder) as client:
        yield client


@pytest.fixture(autouse=True)
def in_order(request):
    """The server is healthy after each test, and its answers are right."""
    yield
    if "served" in request.fixturenames:
        client = request.getfixturevalue("served")
        assert healthy(client)
        for path, body in (completion(task="math", max_tokens=30), chat()):
            wanted = ours(request.getfixturevalue("parts"), [(path, body)])[0]
            assert answer(client.post(path, json=body)) == wanted


def answer(response: httpx.Response) -> tuple[str, str | None, int | None]:
    """(text, finish reason, tokens of the prompt) of an answer, streamed or not."""
    assert response.status_code == 200, response.text
    if "event-stream" not in response.headers["content-type"]:
        found = response.json()
        choice = found["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return text or "", choice["finish_reason"], found["usage"]["prompt_tokens"]
    text, reason, count = "", None, None
    for piece in pieces(response.text):
        count = (piece.get("usage") or {}).get("prompt_tokens", count)
        for choice in piece["choices"]:
            text += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            reason = choice["finish_reason"] or reason
    return text, reason, count


def ours(parts, requests, settings=None):
    """The answers of the server of this library."""
    found = []

    async def ask(service, client):
        for path, body in requests:
            found.append(answer(await client.post(path, json=body)))

    run(parts, ask, settings or ServeSettings())
    return found


def test_the_same_answers(served, parts):
    stops = [text[3:5] for text, _, _ in ours(parts, [completion(), chat(TEXT, task="math")])]
    asked = [
        *GOOD,
        completion(stop=stops[0]), completion(stop=["never", stops[0]], stream=True), chat(stop=stops),
        chat(TEXT, task="math", stop=[stops[1]], stream=True),
    ]  # fmt: skip
    wanted = ours(parts, asked)
    found = [answer(served.post(path, json=body)) for path, body in asked]
    for request, theirs, right in zip(asked, found, wanted, strict=True):
        assert theirs == right, request
    assert len(set(wanted)) > len(asked) // 2 and {reason for _, reason, _ in wanted} == {"stop", "length"}


def test_a_completion_without_a_length_has_that_of_vllm(served, parts):
    wanted = ours(parts, [completion(max_tokens=16)])[0]
    for body in ({"prompt": TEXT}, {"prompt": TEXT, "max_tokens": None}):
        assert answer(served.post(COMPLETIONS, json=body)) == wanted


# What is sent, and the field that the error names (None: any or none).
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
BAD: dict[str, tuple[tuple[str, Any], str | None]] = {
    "empty prompt": (completion(""), "prompt"),
    "blank prompt": (completion(" \n"), "prompt"),
    "no prompt": ((COMPLETIONS, {"max_tokens": 3}), None),
    "null prompt": (completion(None), None),
    "no prompts": (completion([]), "prompt"),
    "blank among two": (completion([TEXT, ""]), "prompt"),
    "token ids": (completion([5, 6, 7]), "prompt"),
    "lists of token ids": (completion([[5, 6], [7]]), "prompt"),
    "ids out of range": (completion([10**6]), "prompt"),
    "mapping": (completion({"text": "a"}), "prompt"),
    "language": (completion(language="Klingonese"), "language"),
    "empty language": (completion(language=""), "language"),
    "language as number": (completion(language=5), "language"),
    "task": (completion(task="maths"), "task"),
    "task and prompt": (completion(task="math", llm_prompt="a"), "llm_prompt"),
    "task and system": (chat(TEXT, system("a"), task="math"), None),
    "blank llm_prompt": (completion(llm_prompt=" "), "llm_prompt"),
    "llm_prompt too long": (completion(llm_prompt="{source}" * 4000), "llm_prompt"),
    "too many characters": (completion("a" * 8001), "prompt"),
    "too many encoder tokens": (completion("a" * 600), "prompt"),
    "too many of both in chat": (chat("a" * 600), "messages"),
    "no room in the context": (completion("a" * 250, max_tokens=300), "max_tokens"),
    "no room in chat": (chat("a" * 250, max_tokens=None, max_completion_tokens=300), "max_completion_tokens"),
    "no room by default": (chat("a" * 270, max_tokens=None), "max_tokens"),
    "max_tokens over the limit": (completion(max_tokens=513), "max_tokens"),
    "max_tokens huge": (completion(max_tokens=2**70), "max_tokens"),
    "max_tokens zero": (completion(max_tokens=0), "max_tokens"),
    "max_tokens negative": (completion(max_tokens=-5), "max_tokens"),
    "echo": (completion(echo=True), "echo"),
    "echo in chat": (chat(echo=True), "echo"),
    "suffix": (completion(suffix="b"), "suffix"),
    "truncate": (completion(truncate_prompt_tokens=3), "truncate_prompt_tokens"),
    "truncation_side": (completion(truncation_side="left"), "truncation_side"),
    "prompt_embeds": ((COMPLETIONS, {"prompt_embeds": "AAAA", "max_tokens": 3}), None),
    "prompt_embeds beside": (completion(prompt_embeds="AAAA"), None),
    "kv_transfer_params": (chat(kv_transfer_params={"prompt_token_ids": [5, 6]}), "kv_transfer_params"),
    "kv_transfer_params of text": (completion(kv_transfer_params={"do_remote_decode": True}), "kv_transfer_params"),
    "mm_processor_kwargs": (chat(mm_processor_kwargs={"a": 1}), "mm_processor_kwargs"),
    "media_io_kwargs": (chat(media_io_kwargs={"image": {}}), "media_io_kwargs"),
    "multi_modal_data": (completion(multi_modal_data={"source": TEXT}), "multi_modal_data"),
    "prompt_logprobs": (completion(prompt_logprobs=1), "prompt_logprobs"),
    "vllm_xargs": (completion(vllm_xargs={"a": 1}), "vllm_xargs"),
    "chat_template": (chat(chat_template="{{ messages }}"), None),
    "chat_template_kwargs": (chat(chat_template_kwargs={"a": 1}), "chat_template_kwargs"),
    "documents": (chat(documents=[{"a": "b"}]), "documents"),
    "continue_final_message": (chat(continue_final_message=True, add_generation_prompt=False), None),
    "image": (chat([IMAGE]), "messages"),
    "image beside text": (chat([*PARTS, IMAGE]), "messages"),
    "audio": (chat([{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}]), "messages"),
    "tools": (chat(tools=[FUNCTION], tool_choice="none"), "tools"),
    "tools called": (chat(tools=[FUNCTION]), None),
    "functions": (chat(functions=[{"name": "f"}]), "functions"),
    "an assistant's turn": (chat(TEXT, system(TEXT, "user"), system("a", "assistant")), "messages"),
    "an assistant alone": ((CHAT, {"messages": [system("a", "assistant")]}), "messages"),
    "a tool's turn": (chat(TEXT, {"role": "tool", "content": "a", "tool_call_id": "b"}), "messages"),
    "a strange role": (chat(TEXT, system("a", "narrator")), "messages"),
    "two systems": (chat(TEXT, system("a"), system("b")), "messages"),
    "no messages": ((CHAT, {"messages": []}), "messages"),
    "blank message": (chat(" "), "messages"),
    "message of a number": (chat(5), None),
    "timeout": (completion(timeout=5.0), "timeout"),
    "unknown field": (completion(taks="math"), "taks"),
    "no answers": (completion(n=0), None),
    "temperature": (completion(temperature=-1), None),
    "temperature not a number": (completion(temperature="NaN"), "temperature"),
    "top_p": (completion(top_p=1.5), "top_p"),
    "seed": (completion(seed=2**64), None),
    "stop empty": (completion(stop=""), None),
    "logit_bias out of range": (completion(logit_bias={"100000": 5}), None),
    "logit_bias of a text": (completion(logit_bias={"a": 5}), None),
    "allowed_token_ids": (completion(allowed_token_ids=[-1]), None),
    "stop_token_ids": (completion(stop_token_ids=["a"]), None),
    "best_of": (completion(best_of=3), "best_of"),
    "model": (completion(model="gpt-9"), None),
    "surrogate": ((COMPLETIONS, b'{"prompt": "a \\ud800 b", "max_tokens": 3}'), None),
    "surrogate in llm_prompt": ((COMPLETIONS, b'{"prompt": "a", "llm_prompt": "\\udc00", "max_tokens": 3}'), None),
    "surrogate in chat": ((CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 3}'), None),
    "surrogate in stop": ((COMPLETIONS, b'{"prompt": "a", "stop": "\\ud800", "max_tokens": 3}'), None),
    "not JSON": ((COMPLETIONS, b'{"prompt": '), None),
    "not UTF-8": ((COMPLETIONS, b'{"prompt": "\xff"}'), None),
    "not an object": ((COMPLETIONS, [1, 2]), None),
    "NaN": ((COMPLETIONS, b'{"prompt": "a", "temperature": NaN, "max_tokens": 3}'), None),
    "deep": ((COMPLETIONS, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"), None),
    "deep field": ((CHAT, b'{"messages": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}"), None),
    "tokenize": (("/tokenize", {"prompt": TEXT}), "endpoint"),
    "responses": (("/v1/responses", {"input": TEXT}), None),
    "scoring": (("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [5]}), None),
}


def post(client: Any, path: str, body: Any) -> Any:
    """A request whose body may be no JSON."""
    if isinstance(body, bytes):
        return client.post(path, content=body, headers={"Content-Type": "application/json"})
    return client.post(path, json=body)


def test_bad_requests(served):
    wrong = {}
    for name, ((path, body), field) in BAD.items():
        found = post(served, path, body)
        error = found.json().get("error", {})
        named = field is None or field in str(error.get("param")).split(".")  # vLLM's own errors say body.FIELD
        if not 400 <= found.status_code < 500 or not named:
            wrong[name] = found.status_code, found.text[:300]
    assert wrong == {}


TEXTS = ["", " ", TEXT, "NaN", "null", "\x00", "\u202e\ufffd", "\ud800", "a" * 9000, "{source}", "{" * 50, "sw", "math"]
NUMBERS = [0, 1, -1, 2, 17, 300, 513, 2**31, 2**63, -(2**70), 0.5, 1e308, -0.0, float("nan"), float("inf"), 10**400]


def drawn(random: Random, depth: int = 0) -> Any:
    """Any JSON, and what Python's parser takes besides."""
    kind = random.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return random.choice(TEXTS)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind == 4:
        return random.choice([None, True, False, [], {}, [5, 6, 7], [[5], [-1]], ["a", 5], [10**6], PARTS, [IMAGE]])
    if kind == 5:
        source = drawn(random, depth + 1)
        return {"multi_modal_data": {"source": source}, "prompt_token_ids": [5, random.choice(NUMBERS)]}
    many = [drawn(random, depth + 1) for _ in range(random.randrange(4))]
    return many if kind == 6 else dict(zip(["role", "content", "type", "text"], many, strict=False))


BASES = {
    COMPLETIONS: {"prompt": TEXT, "max_tokens": 2},
    CHAT: {"messages": [system(TEXT, "user")], "max_tokens": 2},
    "/v1/chat/completions/batch": {"messages": [[system(TEXT, "user")], [system("a", "user")]], "max_tokens": 2},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 2},
    "/v1/messages": {"model": "layalign", "messages": [system(TEXT, "user")], "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "layalign", "messages": [system(TEXT, "user")]},
    "/tokenize": {"prompt": TEXT},
    "/detokenize": {"tokens": [5, 6]},
    "/generative_scoring": {"query": TEXT, "items": ["a"], "label_token_ids": [5, 6]},
    "/v1/systemone": {"state": TEXT, "questions": {"a": {"type": "yes_no", "instructions": "b"}}},
    "/inference/v1/generate": {"token_ids": [5, 6], "sampling_params": {"max_tokens": 2}},
    "/invocations": {"prompt": TEXT, "max_tokens": 2},
}


def fuzz_requests(document: Any, count: int) -> list[tuple[str, bytes]]:
    """Requests of every route, right but for up to three fields of its schema, of ours, or unknown ones."""
    random, schemas = Random(11), document["components"]["schemas"]
    known = {}
    for path in BASES.keys() & document["paths"].keys():
        texts = json.dumps(document["paths"][path]["post"].get("requestBody"))
        known[path] = sorted({
            name for title, schema in schemas.items() if f'/{title}"' in texts for name in schema.get("properties", {})
        } | set(BASES[path]))  # fmt: skip
    assert {COMPLETIONS, CHAT, "/v1/responses", "/tokenize", "/generative_scoring"} <= known.keys()
    paths = [*known, COMPLETIONS, CHAT, COMPLETIONS, CHAT]
    found = []
    for _ in range(count):
        path = random.choice(sorted(paths))
        # vLLM answers 500 to `structured_outputs` that is no mapping, whatever the model is.
        names = {*known[path], "task", "language", "llm_prompt", "timeout", "multi_modal_data", "x"}
        names = sorted(names - {"structured_outputs"})
        changed = {random.choice(names): drawn(random) for _ in range(random.randint(0, 3))}
        found.append((path, json.dumps({**BASES[path], **changed}).encode()))
    return found


async def sent(base: Any, asked: list[tuple[str, bytes]]) -> list[int | str]:
    """The statuses, or the names of the client's errors, of requests sent 16 at a time."""
    places = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=base, timeout=20, limits=httpx.Limits(max_keepalive_connections=0)) as client:

        async def one(path: str, body: bytes) -> int | str:
            async with places:
                try:
                    return (await post(client, path, body)).status_code
                except httpx.HTTPError as error:
                    return type(error).__name__

        return await asyncio.gather(*(one(path, body) for path, body in asked))


def test_random_requests(served):
    asked = fuzz_requests(served.get("/openapi.json").json(), 1000)
    statuses = asyncio.run(sent(served.base_url, asked))
    wrong = [(code, path, body[:400]) for code, (path, body) in zip(statuses, asked, strict=True)
             if not isinstance(code, int) or (code >= 500 and code != 501)]  # fmt: skip
    assert not wrong
    assert statuses.count(200) > 200 and statuses.count(400) > 400


def test_gone_clients_free_their_places(served):
    def figure(name):
        lines = served.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))

    before = figure("generation_tokens_total")
    for path, body in [completion(max_tokens=480), chat(max_tokens=480)] * 6:
        with served.stream("POST", path, json={**body, "stream": True, "ignore_eos": True}) as response:
            assert response.status_code == 200 and next(response.iter_lines()).startswith("data:")
    until = time.monotonic() + 20
    while figure("num_requests_running") or figure("num_requests_waiting") or figure("kv_cache_usage_perc"):
        assert time.monotonic() < until
        time.sleep(0.2)
    assert 12 <= figure("generation_tokens_total") - before < 12 * 480 / 2


def both(encoder, ids):
    return {"encoder_prompt": encoder, "decoder_prompt": {"prompt_token_ids": ids}}


def ids_of(source, ids=(5, 6)):
    return {"prompt_token_ids": list(ids), "multi_modal_data": {"source": source}}


BAD_OFFLINE = {
    "no source": {"prompt_token_ids": [5, 6]},
    "a text": TEXT,
    "a mapping with a text": {"prompt": TEXT},
    "empty": {"prompt_token_ids": [5, 6], "multi_modal_data": {}},
    "null": {"prompt_token_ids": [5, 6], "multi_modal_data": None},
    "another modality": {"prompt_token_ids": [5, 6], "multi_modal_data": {"image": [5]}},
    "null source": ids_of(None),
    "source of nothing": ids_of([]),
    "empty source": ids_of(""),
    "blank source": ids_of(" "),
    "a number": ids_of(5),
    "two sources": ids_of([TEXT, TEXT]),
    "two sources of ids": ids_of([[5, 6], [7]]),
    "too many ids": ids_of([5] * 600),
    "too long": ids_of("a" * 600),
    "too many characters": ids_of("a" * 9000),
    "id too large": ids_of([5, 10**6]),
    "id negative": ids_of([5, -1]),
    "id no integer": ids_of([5, True]),
    "id huge": ids_of([5, 2**70]),
    "read before": ids_of({"ids": [10**6], "prompt": [5]}, []),
    "unknown key": ids_of({"text": TEXT, "lang": "sw"}, []),
    "no text": ids_of({"task": "math"}, []),
    "text of a number": ids_of({"text": 5}, []),
    "surrogate": ids_of({"text": "\ud800"}, []),
    "surrogate in llm_prompt": ids_of({"text": "a", "llm_prompt": "\ud800"}, []),
    "language": source_prompt(TEXT, language="Klingonese"),
    "task": source_prompt(TEXT, task="maths"),
    "task and prompt": source_prompt(TEXT, task="math", llm_prompt="a"),
    "prompt beside fields": ids_of({"text": TEXT, "task": "math"}),
    "prompt id too large": ids_of([5, 6], [10**6]),
    "prompt id negative": ids_of([5, 6], [-1]),
    "prompt too long": ids_of([5, 6], [5] * 600),
    "no room": ids_of([5] * 290, [5] * 220),
    "decoder without slots": both(ids_of([5] * 8, []), [5, 6]),
    "decoder with few slots": both(ids_of([5] * 8, []), [1, 5, 5, 5]),
    "decoder alone": both({"prompt_token_ids": [5, 6]}, [5, 6]),
}  # fmt: skip


def test_bad_requests_offline(folder, parts):
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=12)
    wanted = [text for text, _, _ in ours(parts, [completion(), completion(language="sw", task="math")])]
    wrong = {}
    with engine(folder) as llm:

        def asked():
            good = [source_prompt(TEXT), source_prompt(TEXT, language="sw", task="math")]
            return [each.outputs[0].text for each in llm.generate(good, how, use_tqdm=False)]

        assert asked() == wanted
        for name, prompt in BAD_OFFLINE.items():
            try:
                wrong[name] = llm.generate(prompt, how, use_tqdm=False)[0].outputs[0].text
            except Exception as error:
                if not any(word in str(error) for word in ("source", "prompt", "language", "modality", "Token id")):
                    wrong[name] = repr(error)
            assert asked() == wanted, name
    assert wrong == {}


def test_the_repetition_penalty_of_a_checkpoint(tmp_path):
    checkpoint(tmp_path)
    plain = [each.answer for each in cases(tmp_path)]
    settings = GenerationConfig.from_pretrained(tmp_path)
    settings.repetition_penalty = 1.3
    settings.save_pretrained(tmp_path)
    asked = cases(tmp_path, repetition_penalty=1.3)
    with engine(tmp_path) as llm:
        penalty = llm.get_default_sampling_params().repetition_penalty
        found = answers(llm, asked, repetition_penalty=penalty)
    assert penalty == 1.3 and found == [each.answer for each in asked]
    assert sum(each.answer != before for each, before in zip(asked, plain, strict=True)) > len(plain) // 2
