"""A checkpoint's weights for vLLM: ours are loaded and checked by the library, the LLM's by vLLM's own loader."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from layalign.modeling import encoders, fingerprint, loading, lora
from layalign.modeling.configuration import hidden_size
from layalign.modeling.model import LayAlignForCausalLM
from layalign.modeling.names import gguf_parts
from layalign.modeling.parts import build_trainable_modules
from layalign.nn import Adapter, EncoderAligner
from layalign.utils.errors import CheckpointError

logger = logging.getLogger("layalign")
_LLM = "llm."


class Checkpoint:
    """A LayAlign checkpoint, read for vLLM.

    Args:
        place: folder or hub name.
        revision: branch, tag or commit on the hub.
        device: where the modules go.

    Attributes:
        config: of the checkpoint.
        encoder_size: D_e.

    Raises:
        CheckpointError: as `LayAlignForCausalLM.from_pretrained` raises it.
    """

    def __init__(self, place: str, revision: str | None, device: Any) -> None:
        self.place, self.revision, self.device = place, revision, device
        with torch.device("cpu"):
            self.config, self._encoder, self._weights = loading.load_all_but_llm(place, revision)
        self._fingerprints = (self.config.frozen_fingerprints or {}).get("llm", {})
        self.encoder_size = hidden_size(self.config.encoder_config)

    def modules(self) -> tuple[PreTrainedModel, Adapter | None, EncoderAligner | None, nn.ModuleList]:
        """Encoder, adapter, aligner and gates with their weights, in the dtypes in which they were stored."""
        with torch.device("meta"):
            parts = build_trainable_modules(self.config)
        for name, part in zip(("mapping", "encoder_aligner", "cross_attention"), parts, strict=True):
            own = {key.removeprefix(f"{name}."): self._weights.pop(key).to(self.device)
                   for key in list(self._weights) if key.startswith(f"{name}.")}  # fmt: skip
            if part is not None:
                part.load_state_dict(own, assign=True)
                part.eval()
        encoder = self._encoder.to(self.device).eval()
        encoders.record_layers(encoder)
        return (encoder, *parts)

    @property
    def _through_transformers(self) -> bool:
        """Whether vLLM's loader cannot read the LLM: it is to be merged with LoRA, or a GGUF file."""
        named = None if "llm" in self.config.saved_parts else str(self.config.llm_name_or_path)
        return self.config.lora is not None or (named is not None and gguf_parts(named)[1] is not None)

    def sources_of_llm(self) -> list[DefaultModelLoader.Source]:
        """Where vLLM's loader finds the LLM, besides the checkpoint itself."""
        if "llm" in self.config.saved_parts or self._through_transformers:
            return []
        return [DefaultModelLoader.Source(str(self.config.llm_name_or_path), revision=None, prefix=_LLM)]

    def weights_of_llm(self, read: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Names and weights of the LLM, each compared with what the checkpoint was saved with.

        Args:
            read: what vLLM's loader reads: the checkpoint, then :meth:`sources_of_llm`.

        Raises:
            CheckpointError: the LLM is not the one that the checkpoint was saved with.
        """
        if self._through_transformers:
            yield from self._merged()
            return
        if "llm" in self.config.saved_parts:
            # The file was read and compared with its SHA-256; vLLM would read it once more.
            for name in [name for name in self._weights if name.startswith(_LLM)]:
                yield name.removeprefix(_LLM), self._weights.pop(name)
            return
        unseen, problems = dict(self._fingerprints), []
        for name, tensor in read:
            if not name.startswith(_LLM):
                continue
            name = name.removeprefix(_LLM)
            entry = unseen.pop(name, None)
            if entry is not None and tensor.dtype in fingerprint.NUMBERS:
                problem = fingerprint.difference(entry, tensor)
                problems += [] if problem is None else [f"{name}: {problem}"]
            yield name, tensor
        if problems:
            raise CheckpointError(
                f"{self.place}: the llm ({self.config.llm_name_or_path}) is not the one that the checkpoint was saved "
                f"with: {fingerprint.summary(problems)}"
            )
        if unseen:
            logger.warning(
                "%s: %d of the LLM's %d weights have other names or are quantised in its files, and were not compared",
                self.place, len(unseen), len(self._fingerprints),
            )  # fmt: skip

    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        """The LLM as this library loads it, with LoRA merged into its weights."""
        with torch.device("cpu"):
            hub = {} if self.revision is None else {"revision": self.revision}
            model = LayAlignForCausalLM.from_pretrained(self.place, **hub)
        yield from lora.merged(model.llm)
