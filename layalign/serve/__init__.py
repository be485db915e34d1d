"""`layalign serve`: one model behind OpenAI-compatible endpoints. Needs the optional packages of `layalign[serve]`."""

from layalign.serve.settings import ServeSettings

__all__ = ["ServeSettings"]
