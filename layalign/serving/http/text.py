"""Incremental detokenization: complete characters only, and nothing after a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing sequence of tokens, in pieces that are never revised.

    The concatenated pieces equal the text of the whole sequence, up to the first stop text. A piece ends at the end of
    a character, since a token may hold only a part of one. One exception: with byte fallback (Llama 2), an answer that
    ends inside a character keeps the characters before it, where decoding the whole sequence may replace them too.

    `DecodeStream` of the package tokenizers was not used: it raises on bytes that never become a character, does not
    return the rest at the end, and needs a fast tokenizer.

    Args:
        tokenizer: the LLM's tokenizer; special tokens are omitted from the text.
        stops: texts at which the answer ends, before the text itself.

    Attributes:
        stopped: whether a stop text was found; later tokens have no effect.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.stopped = False
        self._ids: list[int] = []
        self._start = self._read = 0  # tokens before `_read` have been decoded; those from `_start` are kept as context
        self._held = ""  # text that may be the beginning of a stop text

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, which may be empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._released(self._new_text(last=False), last=False)

    def finish(self) -> str:
        """The remaining text, when no more tokens follow."""
        return "" if self.stopped else self._released(self._new_text(last=True), last=True)

    def _new_text(self, last: bool) -> str:
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not last):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _released(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
