"""From tokens to text while they come: whole characters only, and nothing behind a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing row of tokens, in pieces that are never taken back.

    The pieces put together are the whole row's text (cut before the first stop text). A piece ends where a character
    ends: tokens may hold parts of one. Only where an answer breaks off inside a character is there a difference for
    tokenizers with byte fallback (Llama 2): what came before it stays, and is not replaced as well. tokenizers' own
    `DecodeStream` would do, but raises on bytes that never become a character, does not give its rest at the end, and
    needs a fast tokenizer.

    Args:
        tokenizer: the LLM's; special tokens are left out of the text.
        stops: texts before which the answer ends.

    Attributes:
        stopped: whether a stop text was met; later tokens have no effect.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.stopped = False
        self._ids: list[int] = []
        self._start = self._read = 0  # tokens before `_read` are text already; those from `_start` are their context
        self._held = ""  # may be the beginning of a stop text

    def push(self, token: int) -> str:
        """The text that is certain with one more token; often "" ."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._released(self._new_text(last=False), last=False)

    def finish(self) -> str:
        """The rest, once no token follows."""
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
    """Length of the longest end of `text` with which `stop` begins (and does not end)."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
