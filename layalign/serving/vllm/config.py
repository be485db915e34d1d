"""A checkpoint's configuration as vLLM reads it."""

from __future__ import annotations

from typing import Any, ClassVar

from layalign.modeling.configuration import LayAlignConfig
from layalign.serving.http.settings import ServeSettings
from layalign.serving.vllm import ARCHITECTURE
from layalign.utils.errors import ArgumentError, refuse, shown


class ServedLayAlignConfig(LayAlignConfig):
    """`LayAlignConfig` that says encoder-decoder: vLLM then keeps a paged cache of each request's source.

    Attributes:
        serve: settings of `ServeSettings` that hold for requests: task, language, max_source_tokens, ... They are set
            by ``--hf-overrides '{"serve": {"task": "math"}}'``.
        max_source_positions: the longest source in tokens; vLLM profiles its memory with it.
    """

    # vLLM reads these before the model is built.
    is_encoder_decoder = True
    _fields: ClassVar[tuple[str, ...]] = (
        "task", "language", "max_characters", "max_source_tokens", "max_prompt_tokens", "max_new_tokens",
        "default_new_tokens",
    )  # fmt: skip

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("is_encoder_decoder", None)
        self.serve = kwargs.pop("serve", {})
        super().__init__(**kwargs)
        self.is_encoder_decoder = True
        self.architectures = [ARCHITECTURE]
        self.decoder_start_token_id = self.source_token_id  # vLLM asks for it, and does not use it here

    @property
    def serve_settings(self) -> ServeSettings:
        """The settings of requests.

        Raises:
            ArgumentError: a setting is unknown or out of range.
        """
        if not isinstance(self.serve, dict):
            refuse("serve", "a mapping of settings", self.serve)
        unknown = sorted(set(self.serve) - set(self._fields))
        if unknown:
            raise ArgumentError(f"serve: expected some of {', '.join(self._fields)}, got {shown(unknown[0])}")
        return ServeSettings(**self.serve)

    @property
    def max_source_positions(self) -> int:
        """Longest source in tokens."""
        return self.serve_settings.max_source_tokens
