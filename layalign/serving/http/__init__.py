"""`layalign serve`: one model with OpenAI-compatible endpoints. Needs the optional packages of `layalign[serve]`."""

from layalign.serving.http.settings import ServeSettings

__all__ = ["ServeSettings"]
