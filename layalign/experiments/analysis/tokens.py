"""Human-readable labels of tokens, in any script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTINUED = "·"  # a token that only continues the character before it
SPACE = "␣"
_BROKEN = "\ufffd"
_LONGEST = 8  # maximum number of tokens of one character


def token_labels(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """A label for each token.

    The bytes of one character are decoded together: the first token gets the character, the others a dot.

    Args:
        tokenizer: a transformers tokenizer.
        ids: token ids, including special ones.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    labels: list[str] = []
    while len(labels) < len(ids):
        start = len(labels)
        piece = str(tokenizer.convert_ids_to_tokens(int(ids[start])))
        if ids[start] in special:
            labels.append(piece)
            continue
        text, count = _whole(tokenizer, ids[start : start + _LONGEST])
        labels.append(piece if text is None else (text.strip() or SPACE))
        labels += [CONTINUED] * (count - 1)
    return labels


def _whole(tokenizer: Any, ids: Sequence[int]) -> tuple[str | None, int]:
    """The shortest prefix of ``ids`` that decodes to complete characters: (text, number of tokens), or (None, 1)."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:count]), clean_up_tokenization_spaces=False)
        if _BROKEN not in text:
            return text, count
    return None, 1
