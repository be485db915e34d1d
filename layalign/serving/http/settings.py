"""What a server allows, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from layalign.data.languages import language_of
from layalign.data.records import PROMPTS
from layalign.utils.errors import ArgumentError

_AT_LEAST_ONE = (
    "max_batch", "max_batch_tokens", "max_characters", "max_source_tokens", "max_prompt_tokens", "max_new_tokens",
    "default_new_tokens", "max_body_bytes", "max_idle",
)  # fmt: skip
_SECONDS = ("timeout", "step_timeout", "header_timeout", "body_timeout", "grace")


def checked_key(name: str, key: str) -> str:
    """An API key without the line's end that files and secrets have.

    Raises:
        ArgumentError: what is left is empty or cannot stand in a header. The text does not show it.
    """
    key = key.strip()
    if not (key and key.isascii() and key.isprintable()) or " " in key:
        raise ArgumentError(
            f"{name}: expected a key of printable ASCII characters without spaces, got {len(key)} characters"
            + (", not all of them such" if key else "")
        )
    return key


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server. What is over a limit is refused, never cut.

    Attributes:
        model_name: what `/v1/models` says, and what `model` in a request must be.
        task: prompt of a request that names none: a key of `layalign.data.records.PROMPTS` ("none", "math", "source").
        language: language of a request that names none.
        max_batch: most sequences decoded together.
        max_batch_tokens: most cache entries: sequences times the longest prompt and answer among them.
        max_queue: most requests that wait for a place; one more is answered 429.
        max_characters: longest text of a request.
        max_source_tokens, max_prompt_tokens: longest source (encoder tokens) and prompt (LLM tokens).
        max_new_tokens, default_new_tokens: longest answer in tokens, and the one for a request that does not say.
        timeout: seconds from a request's arrival to its whole answer.
        step_timeout: seconds after which a step of the model that still runs counts as one that never ends.
        header_timeout: seconds in which the whole header of a connection's next request must have come.
        body_timeout: seconds in which a request's body must have come.
        max_body_bytes: longest body.
        max_idle: most connections that wait for their client; the one that has waited longest is closed for another.
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
        if self.task not in PROMPTS:
            raise ArgumentError(f"task: expected one of {', '.join(PROMPTS)}, got {self.task!r}")
        language_of(self.language)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected a number >= 1, got {getattr(self, name)}")
        if self.max_queue < 0:
            raise ArgumentError(f"max_queue: expected a number >= 0, got {self.max_queue}")
        for name in _SECONDS:
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ArgumentError(f"{name}: expected seconds > 0, got {getattr(self, name)}")
        if self.default_new_tokens > self.max_new_tokens:
            most = self.max_new_tokens
            raise ArgumentError(f"default_new_tokens: expected at most {most}, got {self.default_new_tokens}")

    @property
    def max_open(self) -> int:
        """Most requests between admission and answer."""
        return self.max_batch + self.max_queue
