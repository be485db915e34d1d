"""What several commands share. Heavy imports stay inside the functions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Of the frozen parts: auto (as stored), float32, bfloat16 or float16.")
]


def listed(text: str | None) -> list[str] | None:
    """The names in a text with commas between them; None where the option was not given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def quiet_transformers() -> None:
    """Leave out transformers' loading reports and bars; warnings of ours still show."""
    from rich.console import Console
    from rich.logging import RichHandler
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    ours = logging.getLogger("layalign")
    if not ours.handlers:
        ours.addHandler(RichHandler(console=Console(stderr=True), show_time=False, show_path=False))


def load_model(checkpoint: str, device: str | None, dtype: str) -> tuple[Any, Any, Any]:
    """(model, encoder tokenizer, LLM tokenizer) of a checkpoint, ready to generate."""
    import torch

    from layalign import LayAlignForCausalLM
    from layalign.modeling.names import is_path
    from layalign.modeling.tokenization import load_tokenizers
    from layalign.utils.errors import ArgumentError

    quiet_transformers()
    dtypes = ("auto", "float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise ArgumentError(f"dtype: expected one of {', '.join(dtypes)}, got {dtype!r}")
    if not Path(checkpoint).expanduser().exists() and (is_path(checkpoint) or "/" not in checkpoint):
        raise ArgumentError(f"checkpoint: no such folder: {checkpoint}")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device: {device!r} cannot be used here: {error}") from error
    kwargs = {"dtype": dtype}
    model = LayAlignForCausalLM.from_pretrained(checkpoint, encoder_kwargs=kwargs, llm_kwargs=kwargs)
    if dtype != "auto":
        for part in (model.encoder, model.llm):  # also where the checkpoint itself holds them
            part.to(getattr(torch, dtype))
    model.to(place).eval()
    return model, *load_tokenizers(checkpoint, config=model.config)
