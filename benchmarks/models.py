"""The models of the benchmarks: random weights, non-zero gates, and one set of frozen weights shared by all."""

from __future__ import annotations

import copy
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import published
import torch
from shapes import Shapes, Size
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

import layalign
from layalign import LayAlignForCausalLM

BOS, PAD = 1, 0
GATE = 0.3


def shared(module: Any) -> Any:
    """A copy of the module tree that shares the parameters."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def frozen_parts(size: Size, shapes: Shapes) -> tuple[Any, Any]:
    """(mT5-like encoder, Llama-like LLM), made on the device in their dtype: 7B in float32 on a CPU takes minutes."""
    torch.manual_seed(0)
    with torch.device(shapes.device):
        return _frozen_parts(size, shapes.dtype)


def _frozen_parts(size: Size, dtype: torch.dtype) -> tuple[Any, Any]:
    encoder = MT5EncoderModel._from_config(
        MT5Config(
            vocab_size=size.vocabulary,
            d_model=size.encoder_width,
            d_kv=min(64, size.encoder_width // 4),
            d_ff=size.encoder_inner,
            num_layers=size.encoder_layers,
            num_heads=size.encoder_heads,
        ),
        dtype=dtype,
    )
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=None,  # every generation has its full length
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    llm = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    llm.generation_config.eos_token_id = None
    return encoder, llm


def published_from(ours: LayAlignForCausalLM, encoder: Any, llm: Any) -> published.PublishedLayAlign:
    """The published data flow with the weights of ``ours``; modifies ``llm``."""
    source = ours.config
    aligner = SimpleNamespace(
        encoder_hidden_dim=encoder.config.hidden_size,
        language_hidden_dim=llm.config.hidden_size,
        num_encoder_layers=len(source.encoder_layers),
        num_language_layers=len(source.language_layers),
        encoder_layers=source.encoder_layers,
        language_layers=source.language_layers,
        structure=source.structure,
    )
    config = SimpleNamespace(encoder_aligner_config=aligner, max_gen_len=1, llm_bos_token_id=BOS, llm_pad_token_id=PAD)
    like = ours.mapping.end_boundary
    model = published.PublishedLayAlign(config, encoder, llm).to(like.device, like.dtype)
    model.mapping.load_state_dict(ours.mapping.state_dict())
    model.encoder_aligner.load_state_dict(ours.encoder_aligner.state_dict())
    for wrapper in (m for m in model.modules() if isinstance(m, published.AdaptedAttention)):
        nn.init.constant_(wrapper.adaption_gate, GATE)
    return model.eval()


class Models:
    """All models of one size.

    Attributes:
        ours: LayAlignForCausalLM with default settings.
        published: the published data flow, with the same weights.
        encoder, bare: only the frozen parts.
    """

    def __init__(self, size: Size, shapes: Shapes) -> None:
        self.size, self.device = size, shapes.device
        encoder, llm = (
            part.to(shapes.device, shapes.dtype).eval().requires_grad_(False) for part in frozen_parts(size, shapes)
        )
        self.encoder, self.bare = encoder, llm
        torch.manual_seed(1)
        self.ours = LayAlignForCausalLM.from_encoder_and_llm(shared(encoder), shared(llm), llm_bos_token_id=BOS)
        self.ours.to(shapes.device, shapes.dtype).eval()
        with torch.no_grad():
            self.ours.mapping.end_boundary.normal_()
            for module in self.ours.cross_attention:
                module.adaption_gate.fill_(GATE)
        self.published = published_from(self.ours, shared(encoder), shared(llm))
        self._prompted: dict[int, Any] = {}

    @functools.cached_property
    def accelerated(self) -> published.PublishedLayAlign:
        """The published data flow with the same weights, after :func:`layalign.swap_modules`."""
        model = published_from(self.ours, shared(self.encoder), shared(self.bare))
        layalign.swap_modules(model)
        return model

    def prompted(self, length: int) -> Any:
        """peft's adaption_prompt on the same LLM, with as many prompt tokens per layer as the source has tokens.

        None if peft is not installed.
        """
        if importlib.util.find_spec("peft") is None:
            return None
        if length not in self._prompted:
            from peft import AdaptionPromptConfig, get_peft_model

            config = AdaptionPromptConfig(adapter_len=length, adapter_layers=self.size.layers, task_type="CAUSAL_LM")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(shared(self.bare), config).eval()
            like = self.bare.get_input_embeddings().weight
            for name, parameter in model.named_parameters():
                if "adaption" in name:
                    parameter.data = parameter.data.to(like.device, like.dtype)
                    if name.endswith("adaption_gate"):
                        nn.init.constant_(parameter, GATE)
            self._prompted = {length: model}
        return self._prompted[length]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within the block, ``ours`` computes all operations with layalign/reference.py, without folding or pruning."""
        model = self.ours
        assert model.encoder_aligner is not None
        places = [model.encoder_aligner.projector, *model.cross_attention]
        before = [place.impl for place in places], model.key_values.choice, model.last_layer.choice
        for place in places:
            place.impl = "torch"
        model.key_values.choice, model.last_layer.choice = "never", "never"
        try:
            yield
        finally:
            for place, impl in zip(places, before[0], strict=True):
                place.impl = impl
            model.key_values.choice, model.last_layer.choice = before[1:]
