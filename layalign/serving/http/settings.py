"""Settings of a server: its limits and its model's name."""

from __future__ import annotations

from dataclasses import dataclass, fields

from layalign.data.languages import language_of
from layalign.data.records import PROMPTS
from layalign.utils.errors import ArgumentError, finite_number, one_of, refuse, whole_number


def checked_key(name: str, key: str) -> str:
    """Strip an API key, since files and secrets often end with a newline, and check it.

    Raises:
        ArgumentError: the key is empty or not valid in a header. The text does not show the key.
    """
    key = key.strip()
    if not (key and key.isascii() and key.isprintable()) or " " in key:
        raise ArgumentError(
            f"{name}: expected a key of printable ASCII characters without spaces, got {len(key)} characters"
            + (", some of them others" if key else "")
        )
    return key


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server. A request that exceeds a limit is refused; nothing is truncated.

    Attributes:
        model_name: name of the model in `/v1/models` and in the field `model` of requests.
        task: default prompt of requests: a key of `layalign.data.records.PROMPTS` ("none", "math", "source").
        language: default language of requests.
        max_batch: maximum number of sequences in a batch.
        max_batch_tokens: maximum number of cache entries: sequences times the longest prompt and answer among them.
        max_queue: maximum number of requests that wait for a place; others are answered 429.
        max_characters: maximum length of a text in a request.
        max_source_tokens, max_prompt_tokens: maximum length of a source (encoder tokens) and of a prompt (LLM tokens).
        max_new_tokens: maximum length of an answer in tokens.
        default_new_tokens: the same, for a request that sets none.
        timeout: seconds from the arrival of a request until its answer must be complete.
        step_timeout: seconds after which a running step of the model counts as hung.
        header_timeout: seconds until the header of a connection's next request must be complete.
        body_timeout: seconds until the body of a request must be complete.
        max_body_bytes: maximum size of a body.
        max_idle: maximum number of connections that wait for their client. Beyond it, the one that has waited longest
            is closed.
        grace: seconds that running requests have after SIGTERM.

    Raises:
        ArgumentError: a value is out of range; the text names it.
    """

    model_name: str = "layalign"
    task: str = "none"
    language: str = "English"
    max_batch: int = 16
    max_batch_tokens: int = 32768
    max_queue: int = 64
    max_characters: int = 8000
    max_source_tokens: int = 512
    max_prompt_tokens: int = 512
    max_new_tokens: int = 512
    default_new_tokens: int = 256
    timeout: float = 120.0
    step_timeout: float = 60.0
    header_timeout: float = 10.0
    body_timeout: float = 10.0
    max_body_bytes: int = 256 * 1024
    max_idle: int = 1024
    grace: float = 30.0

    def __post_init__(self) -> None:
        if not self.model_name.strip():
            raise ArgumentError("model_name: expected a name, got an empty one")
        one_of("task", self.task, PROMPTS)
        language_of(self.language)
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            if entry.type == "int":
                whole_number(name, value, least=0 if name == "max_queue" else 1)
            elif entry.type == "float" and finite_number(name, value, "seconds > 0") <= 0:
                refuse(name, "seconds > 0", value)
        if self.default_new_tokens > self.max_new_tokens:
            refuse("default_new_tokens", f"at most {self.max_new_tokens}", self.default_new_tokens)

    @property
    def max_open(self) -> int:
        """Maximum number of requests between admission and the end of their answer."""
        return self.max_batch + self.max_queue
