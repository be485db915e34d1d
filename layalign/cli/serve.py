"""`layalign serve`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from layalign.cli.common import Device, Dtype
from layalign.cli.generate import Checkpoint

KEY = "LAYALIGN_API_KEY"
Host = Annotated[str, typer.Option("--host", help="Address to listen on. The default accepts this machine only.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one and prints it.")]
Name = Annotated[str, typer.Option("--model-name", help="Name of the model in requests.")]
Task = Annotated[str, typer.Option("--task", help="Default prompt of requests: none, math or source.")]
Language = Annotated[str, typer.Option("--language", "-l", help="Default language of requests.")]
Rows = Annotated[int, typer.Option("--max-batch", min=1, help="Maximum number of sequences in a batch.")]
Cache = Annotated[int, typer.Option("--max-batch-tokens", min=1, help="Maximum number of cache entries of a batch.")]
Queue = Annotated[int, typer.Option("--max-queue", min=0, help="Maximum number of waiting requests; others get 429.")]
Characters = Annotated[int, typer.Option("--max-characters", min=1, help="Maximum length of a text in a request.")]
Source = Annotated[int, typer.Option("--max-source-tokens", min=1, help="Maximum length of a text in encoder tokens.")]
Prompt = Annotated[int, typer.Option("--max-prompt-tokens", min=1, help="Maximum length of a prompt in LLM tokens.")]
New = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer in tokens.")]
Default = Annotated[int, typer.Option("--default-new-tokens", min=1, help="Default length limit of an answer.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds until an answer must be complete.")]
Step = Annotated[float, typer.Option("--step-timeout", min=0.001, help="Seconds after which a step counts as hung.")]
Idle = Annotated[int, typer.Option("--max-idle", min=1, help="Maximum number of connections waiting for a client.")]
Body = Annotated[int, typer.Option("--max-body-bytes", min=1, help="Maximum size of a request body.")]
Grace = Annotated[float, typer.Option("--grace", min=0.001, help="Seconds for running requests after SIGTERM.")]


def serve(
    checkpoint: Checkpoint,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    model_name: Name = "layalign",
    task: Task = "none",
    language: Language = "English",
    max_batch: Rows = 16,
    max_batch_tokens: Cache = 32768,
    max_queue: Queue = 64,
    max_characters: Characters = 8000,
    max_source_tokens: Source = 512,
    max_prompt_tokens: Prompt = 512,
    max_new_tokens: New = 512,
    default_new_tokens: Default = 256,
    timeout: Timeout = 120.0,
    step_timeout: Step = 60.0,
    max_body_bytes: Body = 256 * 1024,
    max_idle: Idle = 1024,
    grace: Grace = 30.0,
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
    settings = ServeSettings(
        model_name=model_name,
        task=task,
        language=language,
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        max_queue=max_queue,
        max_characters=max_characters,
        max_source_tokens=max_source_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        default_new_tokens=min(default_new_tokens, max_new_tokens),
        timeout=timeout,
        step_timeout=step_timeout,
        max_body_bytes=max_body_bytes,
        max_idle=max_idle,
        grace=grace,
    )
    key = os.environ.get(KEY)
    if key is not None:
        key = checked_key(KEY, key)  # before the model is loaded
    from layalign.modeling.loading import load_model

    model = load_model(checkpoint, device, dtype)
    from layalign.serving.http.server import run
    from layalign.serving.http.service import Service

    run(Service(*model, settings), host, port, key)
