"""LayAlign in vLLM: the encoder as a multimodal encoder, adapter and aligner, and any of vLLM's decoders as the LLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from layalign.modeling import encoders
from layalign.modeling.embedding_scale import in_slots
from layalign.serving.vllm import compat
from layalign.serving.vllm.attention import attach, foldable
from layalign.serving.vllm.processor import SourceDummy, SourceInfo, SourceProcessor
from layalign.serving.vllm.weights import Checkpoint


@MULTIMODAL_REGISTRY.register_processor(SourceProcessor, info=SourceInfo, dummy_inputs=SourceDummy)
class LayAlignForCausalLM(nn.Module, SupportsMultiModal):
    """A LayAlign checkpoint as a model of vLLM.

    ``embed_multimodal`` gives one tensor (S, K * D_e) per request: the K encoder states that aligner and adapter read.
    vLLM hands it to ``forward`` in the step that prefills the request, and never again.
    """

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """No text stands for a source."""
        return None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        compat.prepare_worker(vllm_config)
        model_config = vllm_config.model_config
        self.checkpoint = Checkpoint(model_config.model, model_config.revision, vllm_config.device_config.device)
        config: Any = self.checkpoint.config
        self.config = config
        self.llm = init_vllm_registered_model(
            vllm_config=vllm_config,
            hf_config=config.llm_config,
            prefix=maybe_prefix(prefix, "llm"),
            architectures=compat.architectures(config.llm_config),
        )
        self._of_llm = {id(parameter) for parameter in self.llm.parameters()}
        modules: Any = self.checkpoint.modules()  # of adapter and aligner, either may be None
        self.encoder, self.mapping, self.encoder_aligner, gates = modules
        self.pairs = attach(self.llm, config.language_layers, self.encoder_aligner, gates, vllm_config.cache_config)
        self.secondary_weights = self.checkpoint.sources_of_llm()
        self.make_empty_intermediate_tensors = self.llm.make_empty_intermediate_tensors
        self.dtype = model_config.dtype
        aligned = config.encoder_layers if self.encoder_aligner is not None else []
        self._layers = list(dict.fromkeys([*aligned, *config.fused_layers]))
        self._aligned = [self._layers.index(layer) for layer in aligned]
        self._fused = [self._layers.index(layer) for layer in config.fused_layers]
        self._reads_last = self.mapping is not None and not self._fused
        self.requires_grad_(False)

    def get_language_model(self) -> nn.Module:
        """The LLM."""
        return self.llm

    # The source

    @torch.inference_mode()
    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """The encoder's states of sources: ``encoder_input_ids`` are B tensors (S,); B tensors (S, K * D_e)."""
        sources = kwargs.get("encoder_input_ids")
        if sources is None:
            return []
        device = next(self.encoder.parameters()).device
        rows = [source.flatten().to(device) for source in sources]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        hidden, last = encoders.encode(self.encoder, ids, mask, self._layers)
        read = [*hidden, last] if self._reads_last else hidden
        states = torch.cat(read, dim=-1)[mask.bool()] if read else last.new_zeros(sum(map(len, rows)), 1)
        return list(states.split([len(row) for row in rows]))

    # The LLM

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings: Any = None, **kwargs: Any) -> Tensor:
        """(N,) -> (N, D_l); soft tokens are put in by ``forward``."""
        return self.llm.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        encoder_outputs: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One step over N tokens of all requests; ``encoder_outputs`` are the sources of those that begin in it."""
        if not encoder_outputs:
            return self.llm(input_ids, positions, intermediate_tensors, inputs_embeds)
        size = self.checkpoint.encoder_size
        states = [each[None] for each in torch.cat(list(encoder_outputs)).split(size, dim=-1)]
        if self.mapping is not None:
            lengths = [len(each) for each in encoder_outputs]
            inputs_embeds = self._with_soft_tokens(input_ids, positions, self._soft_tokens(states), lengths)
            input_ids = None
        try:
            for _, gated in self.pairs:
                gated.hidden = [states[index] for index in self._aligned]
            return self.llm(input_ids, positions, intermediate_tensors, inputs_embeds)
        finally:
            for _, gated in self.pairs:
                gated.hidden = None

    def _soft_tokens(self, states: list[Tensor]) -> Tensor:
        """(N + 1, D_l): the soft tokens of all sources in turn, and the boundary, as they enter the LLM's layers."""
        own = self.mapping.mlp.linear1.weight.dtype
        read = [states[index].to(own) for index in self._fused]
        soft = self.mapping(read if self._fused else states[-1].to(own))[0].to(self.dtype)
        rows = torch.cat([soft, self.mapping.get_embed()[0].to(soft)])
        return in_slots(
            rows, self.config.llm_config.get_text_config(), self.config.scaled_soft_tokens, in_decoder=False
        )

    def _with_soft_tokens(self, input_ids: Any, positions: Tensor, soft: Tensor, lengths: list[int]) -> Tensor:
        """The LLM's embeddings with soft tokens and boundary in their slots.

        No prompt is split, for vLLM chunks none of an encoder-decoder model. So the rows that begin in a step are those
        of position 0, in the batch's order, as the sources are; behind the last one there may be padding.
        """
        embeds = self.llm.embed_input_ids(input_ids).clone()
        starts = (positions == 0).nonzero().flatten()[: len(lengths)].tolist()
        first, done = int(self.config.llm_bos_token_id is not None), 0
        for start, length in zip(starts, lengths, strict=True):
            begin = start + first
            embeds[begin : begin + length] = soft[done : done + length]
            embeds[begin + length] = soft[-1]
            done += length
        return embeds

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(N, D_l) -> (N, vocabulary)."""
        return self.llm.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the LLM's weights; everything else has been loaded and checked with the modules."""
        loaded = {f"llm.{name}" for name in self.llm.load_weights(self.checkpoint.weights_of_llm(weights))}
        for module, gated in self.pairs:
            if foldable(module, self.encoder_aligner, self.config.fold_projections):
                gated.source_map.fold(self.encoder.dtype)
        return loaded | {name for name, parameter in self.named_parameters() if id(parameter) not in self._of_llm}
