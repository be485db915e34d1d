"""The two tokenizers of a model: saving them with its weights, loading them again, and encoding texts.

Every text is encoded by `encode_texts`: all of it is text, even where it looks like a special token.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from layalign.modeling import names
from layalign.modeling.claims import require_files
from layalign.utils.errors import ArgumentError, CheckpointError, first_line, one_of
from layalign.utils.files import written_aside

if TYPE_CHECKING:
    from layalign.modeling.configuration import LayAlignConfig

_PROBE = (
    "The answer is 1,234.56 dollars.\n\n### Wie viele Äpfel? ¿Cuántos? Сколько яблок? ஆப்பிள் 多少个苹果？ "
    "りんごはいくつ كم تفاحة কতগুলো आपल กี่ผล ngapi  x^2\t"
)
FOLDERS = {"encoder": "encoder_tokenizer", "llm": "llm_tokenizer"}


class Prompt(str):
    """A prompt made from a template. Special tokens in the template are special; in the text put into it they are text.

    In any other `str` they are text.

    Attributes:
        template: the template.
        source: the text in place of each "{source}" in it.
    """

    template: str
    source: str

    @classmethod
    def fill(cls, template: str, source: str) -> Prompt:
        """The template with `source` in place of each "{source}"."""
        prompt = cls(template.replace("{source}", source))
        prompt.template, prompt.source = template, source
        return prompt


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text, and whether some of it was cut off."""

    ids: list[int]
    cut: bool


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, special: bool = False, longest: int | None = None, side: str = "right"
) -> list[Encoded]:
    """Token ids of texts, in which nothing is a special token: "</s>" in a text is four characters.

    Tokens that were added to the vocabulary and are not special (words of a domain) stay tokens. A `Prompt` may have
    special tokens.

    Args:
        tokenizer: one of transformers.
        texts: the texts.
        special: add the special tokens that the tokenizer puts around a text.
        longest: largest number of ids of a text, those around it included; None is no limit.
        side: where a text that is too long is cut, "right" or "left"; the tokens around it stay.

    Raises:
        ArgumentError: `side` is neither, or the tokenizer has no way to write a special token's text as text.
    """
    one_of("side", side, ("right", "left"))
    if not texts:
        return []
    encoded = []
    for before, ids, after in _framed(tokenizer, list(texts), special):
        room = len(ids) if longest is None else max(longest - len(before) - len(after), 0)
        cut = len(ids) > room
        if cut:
            ids = ids[:room] if side == "right" else ids[len(ids) - room :]
        encoded.append(Encoded([*before, *ids, *after][:longest], cut))
    return encoded


def tokenizers_hash(*tokenizers: Any) -> str:
    """A hash of the vocabularies of tokenizers, and of the ids that they give a text in many scripts."""
    sha = hashlib.sha256()
    for tokenizer in tokenizers:
        words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
        sha.update("\n".join(f"{index} {word}" for word, index in sorted(words.items())).encode(errors="replace"))
        sha.update(f"{encode_texts(tokenizer, [_PROBE], special=True)[0].ids}".encode())
    return sha.hexdigest()


def _framed(tokenizer: Any, texts: list[str], special: bool) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """(special tokens before the text, the text's ids, special tokens after it) of each text."""
    if not hasattr(tokenizer, "is_fast"):  # mistral-common's, which reads no special tokens in a text, or a stand-in
        for row in tokenizer(texts, add_special_tokens=special)["input_ids"]:
            yield [], list(row), []
        return
    clean = _Cleaner(tokenizer)
    masked = special and tokenizer.is_fast
    encoded = tokenizer(
        texts,
        add_special_tokens=masked,
        return_special_tokens_mask=masked,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    for text, row, mask in zip(texts, encoded["input_ids"], encoded.get("special_tokens_mask") or texts, strict=True):
        if masked:
            # Ones are the tokens put around a text; a special token that was found in the text has a zero.
            start = mask.index(0) if 0 in mask else len(row)
            end = len(row) - (mask[::-1].index(0) if 0 in mask else 0)
            yield list(row[:start]), clean(text, list(row[start:end])), list(row[end:])
        else:
            ids = clean(text, list(row))
            yield _around(tokenizer.build_inputs_with_special_tokens(ids), ids) if special else ([], ids, [])


def _around(framed: list[int], ids: list[int]) -> tuple[list[int], list[int], list[int]]:
    for start in range(len(framed) - len(ids) + 1):
        if framed[start : start + len(ids)] == ids:
            return framed[:start], ids, framed[start + len(ids) :]
    return [], framed, []


@dataclass
class _Special:
    """The special and the added tokens of a tokenizer."""

    state: tuple[Any, ...]  # the tokenizer's, while the rest is valid
    tokens: dict[str, int]
    added: dict[str, int]  # to the vocabulary, and not special
    plain: Any = None  # a copy of a fast tokenizer's backend whose special tokens have other names
    names: dict[str, str] = field(default_factory=dict)  # these names


_KNOWN: WeakKeyDictionary[Any, _Special] = WeakKeyDictionary()


def _special(tokenizer: Any) -> _Special:
    state = (len(tokenizer), tuple(tokenizer.all_special_tokens))
    known = _KNOWN.get(tokenizer)
    if known is None or known.state != state:
        tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        tokens.update({str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special})
        # A single character that was made special cannot be encoded in any other way.
        tokens = {text: i for text, i in tokens.items() if i is not None and len(text) > 1}
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if str(token) not in tokens}
        known = _KNOWN[tokenizer] = _Special(state, tokens, added)
    return known


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")")


class _Cleaner:
    """Gives the ids of texts without special tokens, except those in the template of a `Prompt`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known, self.unknown = tokenizer, _special(tokenizer), tokenizer.unk_token
        self.suspects = set(self.known.tokens.values())
        self.unknown_id = self.known.tokens.get(self.unknown)

    def __call__(self, text: str, ids: list[int]) -> list[int]:
        met = self.suspects.intersection(ids)
        # The unknown token stands for a character that is not in the vocabulary, except where its name is written out.
        if not met or (met == {self.unknown_id} and self.unknown not in text):
            return ids
        template, source = (text.template, text.source) if isinstance(text, Prompt) else ("{source}", text)
        parts = _any_of(self.known.tokens).split(template)  # text, marker, text, marker, ..., text
        if not self.tokenizer.is_fast:
            return [
                token
                for place, part in enumerate(parts)
                for token in ([self.known.tokens[part]] if place % 2 else self._slow(part.replace("{source}", source)))
            ]
        if self.known.plain is None:
            self.known.plain, self.known.names = _renamed(self.tokenizer.backend_tokenizer, self.known.tokens)
        renamed = "".join(
            self.known.names[part] if place % 2 else part.replace("{source}", source)
            for place, part in enumerate(parts)
        )
        return list(self.known.plain.encode(renamed, add_special_tokens=False).ids)

    def _slow(self, text: str) -> list[int]:
        ids: list[int] = []
        # `split_special_tokens` splits all added tokens here, those that are not special too.
        for place, part in enumerate(_any_of(self.known.added).split(text)):
            if place % 2:
                ids.append(self.known.added[part])
            elif part:
                options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
                ids += self.tokenizer(part, **options)["input_ids"]
        wrong = [i for i in ids if i in self.suspects and i != self.unknown_id]
        if wrong:
            name = self.tokenizer.convert_ids_to_tokens(wrong[0])
            kind = type(self.tokenizer).__name__
            raise ArgumentError(f"tokenizer: expected one that can write {name!r} as text, {kind} cannot")
        return ids


def _renamed(backend: Any, tokens: dict[str, int]) -> tuple[Any, dict[str, str]]:
    """(A copy of a `tokenizers.Tokenizer` whose special tokens have names that no text has, these names).

    The tokenizer's own `encode_special_tokens` does not suffice: the models of T5, XLM-R and others have special tokens
    among their pieces, and find them in a text.
    """
    from tokenizers import Tokenizer

    names = {token: f"{uuid.uuid4().hex}{number}" for token, number in tokens.items()}
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [one, two] for one, two in pairs if names.keys().isdisjoint((one, two, one + two.removeprefix(prefix)))
        ]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    state.update(post_processor=None, decoder=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(state)), names


def save_tokenizers(folder: str | Path, encoder_tokenizer: Any, llm_tokenizer: Any) -> None:
    """Write both tokenizers into subfolders of a checkpoint folder, the LLM's also beside the weights, for vLLM."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with written_aside(Path(folder)) as aside:
        for part, tokenizer in (("encoder", encoder_tokenizer), ("llm", llm_tokenizer)):
            tokenizer.save_pretrained(str(aside / FOLDERS[part]))
        llm_tokenizer.save_pretrained(str(aside))


def load_tokenizers(
    checkpoint: str | Path | None = None,
    *,
    encoder: str | None = None,
    llm: str | None = None,
    config: LayAlignConfig | None = None,
) -> tuple[Any, Any]:
    """(encoder tokenizer, LLM tokenizer): those saved in the checkpoint, else those of the frozen parts by name.

    Args:
        checkpoint: folder of a model.
        encoder, llm: names or folders, as a user typed them.
        config: of the loaded model, for the names that are not given.

    Raises:
        CheckpointError: a tokenizer is not found or cannot be loaded; the text names what was looked for.
    """
    return load_tokenizer("encoder", encoder, checkpoint, config), load_tokenizer("llm", llm, checkpoint, config)


def load_tokenizer(
    part: str,
    name: str | None = None,
    checkpoint: str | Path | None = None,
    config: LayAlignConfig | None = None,
) -> Any:
    """One of the two: see :func:`load_tokenizers`."""
    from transformers import AutoTokenizer

    saved = None if checkpoint is None else Path(names.absolute(str(checkpoint))) / FOLDERS[part]
    if saved is not None and saved.is_dir():
        source = str(saved)
    elif name is not None:
        source = names.given(f"{part} tokenizer", name)
    elif config is not None and getattr(config, f"{part}_name_or_path"):
        source = names.located(config, part)
    else:
        raise CheckpointError(f"{part} tokenizer: expected {FOLDERS[part]}/ in {checkpoint}, or the {part}'s name")
    try:
        if names.gguf_parts(source)[1] is not None:
            return _from_gguf(source)
        require_files(Path(source))
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers' libraries raise anything for a damaged file
        raise CheckpointError(f"{part} tokenizer: cannot be loaded from {source}: {first_line(error)}") from error


def _from_gguf(name: str) -> Any:
    """The tokenizer that a GGUF file has in it."""
    from transformers import PreTrainedTokenizerFast

    from layalign.modeling import gguf_files
    from layalign.modeling.encoders import gguf_path

    gguf_files.require_package("llm tokenizer")
    path = gguf_path(name)
    gguf_files.read_head(path)
    # Not AutoTokenizer, which reads the file once more to choose a class, and the class makes no difference.
    return gguf_files.amend_tokenizer(PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name), path)


def first_token(tokenizer: Any) -> int | None:
    """The token with which a tokenizer begins every text; None where it adds none (Qwen, GPT-2)."""
    ids, bare = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    return ids[0] if len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id else None


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the tokenizer's, and those of the model's generation configuration."""
    ids: list[int] = []
    for value in (tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)):
        ids += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return list(dict.fromkeys(int(value) for value in ids))


def pad_id(tokenizer: Any) -> int:
    """The id that fills padding: the tokenizer's pad, else its end, else 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
