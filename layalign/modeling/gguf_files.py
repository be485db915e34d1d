"""GGUF files: reading their header within bounds, loading one with transformers, correcting its tokenizer.

The format is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import logging
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from layalign.modeling.claims import require_modest
from layalign.utils.errors import ArgumentError, CheckpointError, LayAlignError, shown
from layalign.utils.limits import MAX_TENSORS, MAX_TOKENIZER_BYTES
from layalign.utils.reading import Cursor, require_regular

logger = logging.getLogger("layalign")

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _MOST_DIMENSIONS, _MOST_KEYS = 8, 9, 4, 2**16
# llama.cpp's names of ways to split text. For a name that it does not know, transformers splits as GPT-2 does.
# Those that differ from GPT-2 by splitting every digit, and those that are GPT-2's:
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_AS_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2", "gigachat", "default")
# Keys of counts -> their names in a configuration, by which `require_modest` bounds them.
_COUNTS = {
    "block_count": "num_layers", "context_length": "max_position_embeddings", "expert_count": "num_experts",
    "attention.head_count": "num_heads", "attention.head_count_kv": "num_groups",
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor is in a GGUF file.

    Attributes:
        shape: in torch's order: the last dimension is contiguous.
        kind: ggml's number of its data type.
        start: offset of its bytes from the start of the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Head:
    """The header of a GGUF file: all that comes before its weights."""

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorPlace] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return str(self.metadata.get("general.architecture", ""))


def read_head(path: str | Path) -> Head:
    """The metadata and the table of tensors of a GGUF file. No length in it is trusted.

    Raises:
        CheckpointError: the file is not a GGUF file, is damaged or cut off, or claims more than any model has.
    """
    path = Path(path)
    try:
        size = require_regular(path, str(path)).st_size
        if size < 24:
            raise CheckpointError(f"{path}: expected a GGUF file, got {size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).head()
    except LayAlignError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


class _Reader(Cursor):
    """Reads the header of a GGUF file."""

    def head(self) -> Head:
        magic, version, tensors, keys = self.bytes(4), self.take("I"), self.take("Q"), self.take("Q")
        if magic != b"GGUF" or version not in (2, 3):
            raise self.error(f"expected a little-endian GGUF file of version 2 or 3, got {magic!r}, version {version}")
        if tensors > MAX_TENSORS or keys > _MOST_KEYS:
            raise self.error(f"expected at most {MAX_TENSORS} tensors and {_MOST_KEYS} keys, got {tensors} and {keys}")
        head = Head()
        for _ in range(keys):
            key = self.text("Q")
            if key in head.metadata:
                raise self.error(f"{shown(key)} is in it twice")
            head.metadata[key] = self.value(self.take("I"))
        self.check_counts(head)
        listed = [(self.text("Q"), self.shape(), self.take("I"), self.take("Q")) for _ in range(tensors)]
        alignment = head.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise self.error(f"general.alignment: expected a size in bytes, got {shown(alignment)}")
        data = -(-self.at // alignment) * alignment
        for name, shape, kind, offset in listed:
            if name in head.tensors:
                raise self.error(f"{shown(name)} is in it twice")
            # Every data type takes more than one bit a number.
            if data + offset + prod(shape) // 8 > self.size:
                raise self.error(f"{shown(name)}: reaches beyond the end of the file: it is damaged or cut off")
            head.tensors[name] = TensorPlace(shape, kind, data + offset)
        return head

    def check_counts(self, head: Head) -> None:
        of = head.architecture
        counts = {own: head.metadata.get(f"{of}.{key}") for key, own in _COUNTS.items()}
        # A list has the number of heads of each layer.
        largest = {
            own: max([v for v in value if isinstance(v, int)], default=0) if isinstance(value, list) else value
            for own, value in counts.items()
        }
        try:
            require_modest("", largest)
        except ArgumentError as error:
            raise self.error(str(error)) from None

    def shape(self) -> tuple[int, ...]:
        if (count := self.take("I")) > _MOST_DIMENSIONS:
            raise self.error(f"expected at most {_MOST_DIMENSIONS} dimensions, got {count}")
        return tuple(self.take("Q") for _ in range(count))[::-1]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text("Q")
        if kind in _FORMATS:
            return self.take(_FORMATS[kind])
        if kind != _ARRAY:
            raise self.error(f"expected a value of one of GGUF's types at {self.at}, got type {kind}")
        kind, count = self.take("I"), self.take("Q")
        if count > MAX_TOKENIZER_BYTES:
            raise self.error(f"expected at most {MAX_TOKENIZER_BYTES} values in a list, got {count}")
        if kind == _STRING:
            return [self.text("Q") for _ in range(count)]
        if kind not in _FORMATS:
            raise self.error(f"expected a list of texts or numbers at {self.at}, got type {kind}")
        form = f"<{count}{_FORMATS[kind]}"
        return list(struct.unpack(form, self.bytes(struct.calcsize(form))))


# transformers


def require_package(what: str) -> None:
    """Check that the package that reads GGUF files is installed.

    Raises:
        ArgumentError: it is not; the text says how to install it.
    """
    if find_spec("gguf") is None:
        raise ArgumentError(
            f"{what}: expected the package gguf, which reads GGUF files; pip install 'layalign[weights]' or gguf"
        )


def arguments(file: str) -> dict[str, Any]:
    """Arguments with which transformers' ``from_pretrained`` reads a GGUF file as floating weights, to be saved again.

    Without them, new releases keep the weights quantised if they find a kernel on the hub, which is code.
    """
    options: dict[str, Any] = {"gguf_file": file}
    try:
        from transformers import GgufConfig
    except ImportError:  # older releases always dequantise
        return options
    return {**options, "quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within the block, transformers puts no layers of the hub into a model that comes from a GGUF file."""
    try:
        from transformers.integrations.gguf import kernels
    except ImportError:  # releases that have no such layers
        yield
        return
    before = kernels.is_kernels_available
    kernels.is_kernels_available = lambda *args, **kwargs: False
    try:
        yield
    finally:
        kernels.is_kernels_available = before


def amend_tokenizer(tokenizer: Any, file: str | Path) -> Any:
    """Give a tokenizer that transformers made from a GGUF file the file's special tokens and splitting of text.

    transformers splits text as GPT-2 does if it does not know the file's way. Then 2019 may become one token, while the
    LLM has only seen single digits. The way of SmolLM2 and similar models is set here; for others a warning is logged.
    """
    metadata = read_head(file).metadata
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        # Old releases confuse the first token of a text with its last.
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    kind = metadata.get("tokenizer.ggml.pre", "default")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    splits_as_gpt2 = type(getattr(backend, "pre_tokenizer", None)).__name__ == "ByteLevel"
    if metadata.get("tokenizer.ggml.model") != "gpt2" or not splits_as_gpt2:  # another kind, or a known way
        return tokenizer
    if kind in _SINGLE_DIGITS:
        split_digits(tokenizer)
    elif kind not in _AS_GPT2:
        logger.warning(
            "%s: its tokenizer splits text in the way that llama.cpp calls %s, which this transformers does not have: "
            "some texts become other tokens than the LLM was trained with; give the tokenizer of the original model",
            file, shown(kind),
        )  # fmt: skip
    return tokenizer


def split_digits(tokenizer: Any) -> None:
    """Make every digit a token of its own, as in SmolLM2's tokenizer."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
