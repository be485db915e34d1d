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
    return load_tokenizer("encoder", encoder, checkpoint), load_tokenizer("llm", llm, checkpoint)


def load_tokenizer(part: str, name: str | None = None, checkpoint: str | Path | None = None) -> Any:
    """One of the two: see :func:`load_tokenizers`."""
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


def first_token(tokenizer: Any) -> int | None:
    """The token with which a tokenizer begins every text; None where it adds none (Qwen, GPT-2)."""
    ids, bare = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    return ids[0] if len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id else None
