"""`layalign serve`."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Annotated

import typer

from layalign.cli.common import Checkpoint, Device, Dtype

KEY = "LAYALIGN_API_KEY"


def serve(
    context: typer.Context,
    checkpoint: Checkpoint,
    host: Annotated[
        str, typer.Option(help="Address to listen on. The default accepts this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one and prints it.")] = 8000,
    model_name: Annotated[str, typer.Option(help="Name of the model in requests.")] = "layalign",
    task: Annotated[str, typer.Option(help="Default prompt of requests: none, math or source.")] = "none",
    language: Annotated[str, typer.Option("--language", "-l", help="Default language of requests.")] = "English",
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum number of sequences in a batch.")] = 16,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of cache entries of a batch.")] = 32768,
    max_queue: Annotated[int, typer.Option(min=0, help="Maximum number of waiting requests; others get 429.")] = 64,
    max_characters: Annotated[int, typer.Option(min=1, help="Maximum length of a text in a request.")] = 8000,
    max_source_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a text in encoder tokens.")] = 512,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a prompt in LLM tokens.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 512,
    default_new_tokens: Annotated[int, typer.Option(min=1, help="Default length limit of an answer.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until an answer must be complete.")] = 120.0,
    step_timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a step counts as hung.")] = 60.0,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Maximum size of a request body.")] = 256 * 1024,
    max_idle: Annotated[int, typer.Option(min=1, help="Maximum number of connections waiting for a client.")] = 1024,
    grace: Annotated[float, typer.Option(min=0.001, help="Seconds for running requests after SIGTERM.")] = 30.0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve a model over HTTP with OpenAI's completions endpoints. Needs the extra "serve".

    If the environment variable LAYALIGN_API_KEY is set, requests must carry it (Authorization: Bearer).
    """
    from layalign.serving.http import ServeSettings
    from layalign.serving.http.settings import checked_key
    from layalign.utils.errors import ArgumentError

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"serve: {error.name} is not installed; pip install 'layalign[serve]'") from None
    names = [field.name for field in fields(ServeSettings)]
    limits = {name: value for name, value in context.params.items() if name in names}
    limits["default_new_tokens"] = min(default_new_tokens, max_new_tokens)
    settings = ServeSettings(**limits)
    key = os.environ.get(KEY)
    if key is not None:
        key = checked_key(KEY, key)  # before the model is loaded
    from layalign.modeling.loading import load_model

    model = load_model(checkpoint, device, dtype)
    from layalign.serving.http.server import run
    from layalign.serving.http.service import Service

    run(Service(*model, settings), host, port, key)
