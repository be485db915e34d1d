"""Fields of requests (OpenAI's and ours), and the JSON of answers and errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException

from layalign.utils.pages import print_or_write

STATUS_TYPES = {
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error",
    503: "server_error", 504: "timeout_error",
}  # fmt: skip


def _well_formed(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("expected valid text, got a lone surrogate") from None
    return text


def _one_prompt(value: Any) -> Any:
    """Unpack a list with one text."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(text, str) for text in value):
        raise ValueError("expected a text; token ids are not supported")
    if len(value) != 1:
        raise ValueError(f"expected one text in a request, got {len(value)}")
    return value[0]


def _as_parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("expected a text or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_well_formed)]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_well_formed)]
Label = Annotated[str, Field(max_length=256)]


@dataclass(frozen=True, eq=False)  # `Annotated` caches by equal metadata, and 0 == False
class NotServed:
    """Validates an OpenAI field that is not supported: it accepts only values that have no effect.

    Args:
        neutral: the accepted values, besides null.
        why: reason for refusing any other value, for the error.
    """

    neutral: tuple[Any, ...]
    why: str

    def __call__(self, value: Any) -> Any:
        # True == 1 in Python
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.neutral):
            raise ValueError(f"expected {' or '.join(map(json.dumps, (*self.neutral, None)))}; {self.why}")
        return value


def _only(*neutral: Any, why: str) -> AfterValidator:
    return AfterValidator(NotServed(neutral, why))


class ApiError(HTTPException):
    """An error response.

    Args:
        status: HTTP status.
        message: what was expected and what was found.
        param: the field that caused it, if any.
        code: machine-readable code.
        retry_after: seconds for the header Retry-After.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def error_body(error: HTTPException) -> dict[str, Any]:
    """An error as OpenAI's API returns it."""
    kind = STATUS_TYPES.get(error.status_code, "invalid_request_error")
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


class Fields(BaseModel):
    """An object of a request. A field that is null counts as absent."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Fields):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, _only(False, why="nothing is added to hide the length of a piece")] = None


_ONE = "a request has one answer"
_PENALTIES = "the model's own penalty is applied, and no other"
_TOOLS = "the model calls no tools"
_STORED = "nothing is stored"
_TEXT = "answers are text"
_CACHED = "prompts are not cached"
_FREE = "Any text of at most 256 characters; ignored."


class Common(Fields):
    """Fields of both endpoints."""

    model: Label | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=2.0, allow_inf_nan=False, description="0, the default: greedy.")
    top_p: float | None = Field(None, gt=0.0, le=1.0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[list[Stop], BeforeValidator(_as_list)] = Field(default_factory=list, max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Label | None = Field(None, description=_FREE)
    n: Annotated[Any, _only(1, why=_ONE)] = None
    logprobs: Annotated[Any, _only(False, why="log probabilities are not returned")] = None
    logit_bias: Annotated[Any, _only({}, why="logits cannot be changed")] = None
    presence_penalty: Annotated[Any, _only(0, why=_PENALTIES)] = None
    frequency_penalty: Annotated[Any, _only(0, why=_PENALTIES)] = None
    # Ours
    task: str | None = Field(None, max_length=64, description="The prompt for the LLM: none, math or source.")
    language: str | None = Field(None, max_length=64, description="Of the text: an English name or a code.")
    llm_prompt: Text | None = Field(
        None, description="Instead of a task: the prompt for the LLM; {source} in it is replaced by the text."
    )
    timeout: float | None = Field(None, gt=0.0, allow_inf_nan=False, description="Seconds; at most the server's.")

    @property
    def longest(self) -> tuple[int | None, str]:
        """The requested maximum length of the answer in tokens, and the name of the field that sets it."""
        return self.max_tokens, "max_tokens"


class CompletionRequest(Common):
    """Body of `/v1/completions`. `prompt` is the text for the encoder, in its language."""

    prompt: Annotated[Text, BeforeValidator(_one_prompt)]
    best_of: Annotated[Any, _only(1, why=_ONE)] = None
    echo: Annotated[Any, _only(False, why="the prompt is not repeated")] = None
    suffix: Annotated[Any, _only("", why="text cannot be inserted before a suffix")] = None

    @property
    def text(self) -> str:
        """The text to answer."""
        return self.prompt


class Part(Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: Annotated[Any, _only(why=_CACHED)] = None


class Message(Fields):
    """A message of a chat request."""

    role: Literal["user", "system", "developer", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)] = Field(default_factory=list)
    name: Label | None = Field(None, description=_FREE)
    refusal: Annotated[Any, _only("", why="earlier answers are not supported")] = None
    audio: Annotated[Any, _only(why=_TEXT)] = None
    tool_calls: Annotated[Any, _only([], why=_TOOLS)] = None
    function_call: Annotated[Any, _only(why=_TOOLS)] = None

    @property
    def text(self) -> str:
        """The text of all parts, each on a line of its own."""
        return "\n".join(part.text for part in self.content)


class ChatRequest(Common):
    """Body of `/v1/chat/completions`: one user message, and at most one system message before it, which is the prompt
    for the LLM (`llm_prompt`). Earlier turns are not supported."""

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    safety_identifier: Label | None = Field(None, description=_FREE)
    prompt_cache_key: Label | None = Field(None, description=_FREE)
    top_logprobs: Annotated[Any, _only(0, why="log probabilities are not returned")] = None
    tools: Annotated[Any, _only([], why=_TOOLS)] = None
    tool_choice: Annotated[Any, _only("none", "auto", why=_TOOLS)] = None
    parallel_tool_calls: Annotated[Any, _only(True, False, why=_TOOLS)] = None
    functions: Annotated[Any, _only([], why=_TOOLS)] = None
    function_call: Annotated[Any, _only("none", "auto", why=_TOOLS)] = None
    response_format: Annotated[Any, _only({"type": "text"}, why="answers are free text")] = None
    modalities: Annotated[Any, _only(["text"], why=_TEXT)] = None
    audio: Annotated[Any, _only(why=_TEXT)] = None
    store: Annotated[Any, _only(False, why=_STORED)] = None
    metadata: Annotated[Any, _only({}, why=_STORED)] = None
    service_tier: Annotated[Any, _only("auto", "default", why="all requests have the same tier")] = None
    reasoning_effort: Annotated[Any, _only("none", why="the model does not reason before it answers")] = None
    verbosity: Annotated[Any, _only("medium", why="only max_tokens limits an answer")] = None
    prediction: Annotated[Any, _only(why="predicted outputs are not supported")] = None
    prompt_cache_retention: Annotated[Any, _only("in_memory", why=_CACHED)] = None
    prompt_cache_options: Annotated[Any, _only({}, why=_CACHED)] = None
    moderation: Annotated[Any, _only(why="nothing is moderated")] = None
    web_search_options: Annotated[Any, _only(why="nothing is searched")] = None

    @field_validator("messages")
    @classmethod
    def _one_question(cls, messages: list[Message]) -> list[Message]:
        said = [message for message in messages if message.text.strip()]
        roles = ["system" if message.role == "developer" else message.role for message in said]
        if roles not in (["user"], ["system", "user"]):
            raise ValueError(
                "expected one message with text of the role user, at most one of the role system before it"
            )
        return said

    @model_validator(mode="after")
    def _system_is_prompt(self) -> ChatRequest:
        if len(self.messages) == 2:
            if self.llm_prompt is not None or self.task is not None:
                raise ValueError("messages: give either a message of the role system, or task or llm_prompt")
            self.llm_prompt = self.messages[0].text
        return self

    @field_validator("max_completion_tokens")
    @classmethod
    def _once(cls, value: int | None, info: Any) -> int | None:
        if info.data.get("max_tokens") not in (None, value):
            raise ValueError("expected the same as max_tokens, or only one of the two")
        return value

    @property
    def text(self) -> str:
        """The text to answer."""
        return self.messages[-1].text

    @property
    def longest(self) -> tuple[int | None, str]:
        """As for `Common`, but `max_completion_tokens` comes first."""
        if self.max_completion_tokens is None:
            return super().longest
        return self.max_completion_tokens, "max_completion_tokens"


def first_problem(errors: Sequence[Any]) -> tuple[str, str | None]:
    """(message, field) for a failed validation. The message repeats nothing of the input."""
    problem = errors[0]
    if problem.get("type") == "json_invalid":
        return "the body is not valid JSON", None
    where = [
        part if isinstance(part, int) else part[:64].encode("ascii", "backslashreplace").decode()
        for part in problem.get("loc", ())[1:]  # the first says "body"
        if part != "function-wrap"
    ]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
    message = str(problem.get("msg")).removeprefix("Value error, ")
    if problem.get("type") == "extra_forbidden":
        message = "unknown field, or one that is not supported"
    return f"{path or 'body'}: {message}", str(where[0]) if where else None


class Shape:
    """Builds the JSON objects of one answer.

    Args:
        chat: whether it is for the chat endpoint.
        model: name of the model.
        prompt_tokens: number of tokens of the LLM's input.
        source_tokens: number of tokens of the source.
        with_usage: whether a stream ends with the usage.
    """

    def __init__(self, chat: bool, model: str, prompt_tokens: int, source_tokens: int, with_usage: bool) -> None:
        self.chat, self.prompt_tokens, self.source_tokens = chat, prompt_tokens, source_tokens
        self.with_usage = with_usage
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def usage(self, tokens: int) -> dict[str, Any]:
        """OpenAI's usage. `prompt_tokens` counts the LLM's input, including the source's slots."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "source_tokens": self.source_tokens,
        }

    def whole(self, text: str, reason: str, tokens: int) -> dict[str, Any]:
        """A complete answer."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": self.usage(tokens)}

    def piece(self, text: str, reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """A piece of a streamed answer."""
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or not reason else {})}
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
        return self._chunk([{"index": 0, **content, "logprobs": None, "finish_reason": reason}])

    def last(self, tokens: int) -> dict[str, Any]:
        """The final chunk of a stream, with the usage."""
        return {**self._chunk([]), "usage": self.usage(tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        usage = {"usage": None} if self.with_usage else {}  # OpenAI's other chunks have the field too
        return {**self.head, "object": kind, "choices": choices, **usage}


# The table of unsupported fields in docs/serving.md

BEGIN, END = "<!-- fields -->", "<!-- end of fields -->"


def markdown() -> str:
    """The unsupported fields: values that are accepted, and why others are refused."""
    models: list[tuple[str, type[Fields]]] = [
        ("", CompletionRequest), ("", ChatRequest), ("stream_options.", StreamOptions), ("messages[].", Message),
        ("messages[].content[].", Part),
    ]  # fmt: skip
    taken: dict[str, dict[str, None]] = {}
    for prefix, model in models:
        for name, field in model.model_fields.items():
            for check in (getattr(each, "func", None) for each in field.metadata):
                if isinstance(check, NotServed):
                    texts = [f"`{prefix}{name}: {json.dumps(value)}`" for value in check.neutral or (None,)]
                    taken.setdefault(check.why, {}).update(dict.fromkeys(texts))
    rows = [f"| {', '.join(fields)} | {why} |" for why, fields in taken.items()]
    return "\n".join(["| accepted (null always is) | why other values are refused |", "|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print_or_write(BEGIN, END, markdown)
