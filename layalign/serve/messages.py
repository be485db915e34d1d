"""The requests' fields, OpenAI's and ours, and the shapes of answers and errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from starlette.exceptions import HTTPException

STATUS_TYPES = {
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error",
    503: "server_error", 504: "timeout_error",
}  # fmt: skip


def _well_formed(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("Input holds half of a surrogate pair, expected valid text") from None
    return text


Text = Annotated[str, AfterValidator(_well_formed)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class ApiError(HTTPException):
    """An error that the client is told of.

    Args:
        status: of the response.
        message: what was found and what was expected.
        param: the field to blame, if one is.
        code: a word for programs.
        retry_after: seconds for the header of that name.
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
    """OpenAI's shape of an error."""
    kind = STATUS_TYPES.get(error.status_code, "invalid_request_error")
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False


class Common(BaseModel):
    """Fields of both endpoints. Those of OpenAI's that are not served may only have the value that does nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = Field(None, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=2.0, allow_inf_nan=False, description="0, the default: greedy.")
    top_p: float | None = Field(None, gt=0.0, le=1.0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    user: str | None = Field(None, max_length=256, description="Not looked at.")
    # Ours
    task: str | None = Field(None, max_length=64, description="The prompt for the LLM: none, math or source.")
    language: str | None = Field(None, max_length=64, description="Of the text: an English name or a code.")
    llm_prompt: Text | None = Field(
        None, description="Instead of a task: the prompt for the LLM; {source} in it stands for the text."
    )
    timeout: float | None = Field(None, gt=0.0, allow_inf_nan=False, description="Seconds; the server's at most.")

    @property
    def stops(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def longest(self) -> int | None:
        """The longest answer in tokens that was asked for."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Common):
    """Body of `/v1/completions`. `prompt` is the text for the encoder, in its language."""

    prompt: Text
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def text(self) -> str:
        """The text to answer."""
        return self.prompt


class Message(BaseModel):
    """The one message of a chat request."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["user"]
    content: Text
    name: str | None = None


class ChatRequest(Common):
    """Body of `/v1/chat/completions`: one message of the user; there is no memory of earlier ones."""

    messages: list[Message] = Field(min_length=1, max_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("max_completion_tokens")
    @classmethod
    def _once(cls, value: int | None, info: Any) -> int | None:
        if value is not None and info.data.get("max_tokens") is not None:
            raise ValueError("give either max_tokens or max_completion_tokens")
        return value

    @property
    def text(self) -> str:
        """The text to answer."""
        return self.messages[0].content

    @property
    def longest(self) -> int | None:
        """The longest answer in tokens that was asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def first_problem(errors: Sequence[Any]) -> tuple[str, str | None]:
    """(message, field) of a failed validation; nothing of the input is repeated."""
    problem = errors[0]
    where = [str(part) for part in problem.get("loc", ()) if part not in ("body", "function-wrap")]
    if problem.get("type") == "json_invalid":
        return "the body is not valid JSON", None
    # A union's branches stand behind the field's name; the field is what the user knows.
    name = where[0][:64].encode("ascii", "backslashreplace").decode() if where else None
    message = "a field that is not served" if problem.get("type") == "extra_forbidden" else str(problem.get("msg"))
    return f"{name or 'body'}: {message}", name


class Shape:
    """The objects that one answer is sent as.

    Args:
        chat: those of the chat endpoint.
        model: its name.
        usage: (tokens of the LLM's input, of the source).
    """

    def __init__(self, chat: bool, model: str, prompt_tokens: int, source_tokens: int) -> None:
        self.chat, self.prompt_tokens, self.source_tokens = chat, prompt_tokens, source_tokens
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def usage(self, tokens: int) -> dict[str, Any]:
        """OpenAI's usage. `prompt_tokens` is the LLM's input, slots of the source included."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "source_tokens": self.source_tokens,
        }

    def whole(self, text: str, reason: str, tokens: int) -> dict[str, Any]:
        """An answer in one piece."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": self.usage(tokens)}

    def piece(self, text: str, reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """A piece of a streamed answer."""
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or not reason else {})}
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
        return self._chunk([{"index": 0, **content, "logprobs": None, "finish_reason": reason}])

    def last(self, tokens: int) -> dict[str, Any]:
        """The chunk with the usage, for those who asked for it."""
        return {**self._chunk([]), "usage": self.usage(tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}
