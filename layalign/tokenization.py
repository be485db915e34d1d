"""The two tokenizers of a model: saved beside its weights, found again when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layalign.errors import CheckpointError, first_line

FOLDERS = {"encoder": "encoder_tokenizer", "llm": "llm_tokenizer"}


def save_tokenizers(folder: str | Path, encoder_tokenizer: Any, llm_tokenizer: Any) -> None:
    """Write both tokenizers into subfolders of a checkpoint folder."""
    for part, tokenizer in (("encoder", encoder_tokenizer), ("llm", llm_tokenizer)):
        tokenizer.save_pretrained(str(Path(folder) / FOLDERS[part]))


def load_tokenizers(
    checkpoint: str | Path | None = None, *, encoder: str | None = None, llm: str | None = None
) -> tuple[Any, Any]:
    """(encoder tokenizer, LLM tokenizer): those saved in the checkpoint, else those of the frozen parts by name.

    Raises:
        CheckpointError: neither is there; the text names what was looked for.
    """
    return _load("encoder", checkpoint, encoder), _load("llm", checkpoint, llm)


def _load(part: str, checkpoint: str | Path | None, name: str | None) -> Any:
    from transformers import AutoTokenizer

    source = name
    if checkpoint is not None:
        saved = Path(checkpoint) / FOLDERS[part]
        if saved.is_dir():
            source = str(saved)
    if source is None:
        raise CheckpointError(f"{part} tokenizer: expected {FOLDERS[part]}/ in {checkpoint}, or the {part}'s name")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the libraries of the tokenizers raise what they like for a damaged file
        raise CheckpointError(f"{part} tokenizer: cannot be loaded from {source}: {first_line(error)}") from error
