"""Which examples are the same sentence in English, and a dev split that shares none with the training text."""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from layalign.data.examples import Example


@lru_cache(maxsize=1)
def _spaces() -> dict[int, str]:
    """Punctuation, spaces and control characters, each to a space; built once, in a third of a second."""
    return {code: " " for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in "PZC"}


def sentence_key(text: str) -> str:
    """A text without what does not make it another sentence: case, punctuation, spaces, compatibility forms.

    >>> sentence_key("I’m  fine!") == sentence_key("i'm fine")
    True
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(plain.translate(_spaces()).split()) or plain.strip()  # a text may be punctuation alone


def english_keys(examples: Sequence[Example], *, translation: bool, same_files: bool = True) -> list[str]:
    """A key for each example; examples with the same one are the same sentence or question, in whichever language.

    The key of a translation pair is its target, which is English; so is that of a question whose answer is written out
    in English. An answer that several questions of one language share ("7", "positive") tells no question from another,
    nor does a choice. Their key is the id, which the languages of X-CSQA and of files parallel by line have in common;
    in different files, or without an id, it is the source.

    Args:
        examples: of one stage.
        translation: whether they are translation pairs.
        same_files: whether an id stands for the same question everywhere.
    """
    keys = [sentence_key(example.target) for example in examples]
    if translation:
        return keys
    first: dict[tuple[str, str], str] = {}
    shared = {
        key
        for key, example in zip(keys, examples, strict=True)
        if first.setdefault((key, example.language), example.source) != example.source
    }

    def otherwise(example: Example) -> str:
        return f"\0{example.id}" if same_files and example.id else f"\0\0{sentence_key(example.source)}"

    pairs = zip(keys, examples, strict=True)
    return [otherwise(example) if example.choices or key in shared else key for key, example in pairs]


def cut_by_sentence(
    examples: Sequence[Example], dev_size: int, *, translation: bool
) -> tuple[list[Example], list[Example], int]:
    """Cut a dev split off so that no English sentence of it stands in the training text, in any language.

    Whole sentences are taken, in the order in which they first appear, with all their translations, until there are
    ``dev_size`` examples. Without repeated sentences these are the first ``dev_size`` examples.

    Returns:
        Training examples, dev examples (``dev_size`` of them, if there are so many), and how many examples are in
        neither, because the last sentence had more translations than there was room for.
    """
    keys = english_keys(examples, translation=translation)
    chosen: set[str] = set()
    taken = 0
    for key, count in Counter(keys).items():
        if taken >= dev_size:
            break
        chosen.add(key)
        taken += count
    inside = [example for key, example in zip(keys, examples, strict=True) if key in chosen]
    rest = [example for key, example in zip(keys, examples, strict=True) if key not in chosen]
    return rest, inside[:dev_size], max(0, taken - dev_size)


def apart_from(train: Sequence[Example], dev: Sequence[Example], *, translation: bool) -> tuple[list[Example], int]:
    """Training examples whose English sentence is none of the dev examples', and how many dev examples had one there.

    Returns:
        The training examples that are left, and the number of dev examples with a sentence that stands in ``train``.
    """
    keys = english_keys([*train, *dev], translation=translation, same_files=False)
    of_train, of_dev = keys[: len(train)], keys[len(train) :]
    inside, trained = set(of_dev), set(of_train)
    rest = [example for key, example in zip(of_train, train, strict=True) if key not in inside]
    return rest, sum(key in trained for key in of_dev)
