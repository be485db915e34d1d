"""The gated term inside any decoder of vLLM: a module that stands where the layer's `Attention` stood.

A step that begins requests gives each module the encoder's states of their sources. The module makes the layer's keys
and values of them, and vLLM's cross-attention writes these into its paged cache, from which later steps read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention, CrossAttention
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from layalign import ops
from layalign.modeling.key_values import break_even_rows, fold
from layalign.nn import EncoderAligner, GatedCrossAttention
from layalign.utils.errors import ArgumentError


class SourceMap(nn.Module):
    """One layer's keys and values of source tokens, for the heads of this rank: the LLM's maps on the aligner's states.

    The aligner's projection and the LLM's maps are folded into one where that takes less work
    (:mod:`layalign.modeling.key_values`). Otherwise the LLM's map is called as a module, as quantised weights need it.

    Args:
        attention: the layer's self-attention, whose ``qkv_proj`` is used.
        inner: its `Attention`.
        aligner: of the model.
        index: the layer's place among the language layers.
    """

    def __init__(self, attention: Any, inner: Attention, aligner: EncoderAligner, index: int) -> None:
        super().__init__()
        self.qkv_proj, self.aligner, self._index = attention.qkv_proj, aligner, index
        self.width = inner.num_kv_heads * inner.head_size
        self.folded: tuple[Tensor, Tensor | None] | None = None

    @property
    def _mixes(self) -> slice:
        """The layer's two rows of fc1."""
        return slice(0, 2) if self.aligner.projector.times > 1 else slice(2 * self._index, 2 * self._index + 2)

    @torch.no_grad()
    def fold(self, dtype: torch.dtype) -> None:
        """Fold the weights, for encoder states of ``dtype``. Must come before vLLM packs the LLM's weights anew."""
        qkv, projector = self.qkv_proj, self.aligner.projector
        maps = []
        for start in (-2 * self.width, -self.width):
            rows = slice(start, start + self.width or None)
            linear = nn.Linear(projector.fc2.out_features, self.width, bias=qkv.bias is not None, device="meta")
            linear.weight = nn.Parameter(qkv.weight[rows], requires_grad=False)
            if qkv.bias is not None:
                linear.bias = nn.Parameter(qkv.bias[rows], requires_grad=False)
            maps.append(linear)
        self.folded = fold(projector.fc2, maps, dtype)

    def forward(self, hidden: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """E encoder states (1, N, D_e) -> key and value, both (N, G * d), in ``dtype``."""
        projector, rows = self.aligner.projector, self._mixes
        fc1, fc2 = projector.fc1, projector.fc2
        mix = fc1.weight[rows], None if fc1.bias is None else fc1.bias[rows]
        inner = self.folded or (fc2.weight, fc2.bias)
        states = ops.layer_projection(hidden, *mix, *inner, impl=projector.impl)
        if self.folded is not None:
            key, value = states.to(dtype)[:, 0]
            return key.contiguous(), value.contiguous()
        if projector.structure == "MLP":
            states = projector.fc3(torch.relu(states).to(projector.fc3.weight.dtype))
        outputs = (self.qkv_proj(state) for state in states.to(dtype)[:, 0])
        key, value = (each[0] if isinstance(each, tuple) else each for each in outputs)  # some give (output, bias)
        return key[:, -2 * self.width : -self.width].contiguous(), value[:, -self.width :].contiguous()


def foldable(attention: Any, aligner: EncoderAligner, choice: str) -> bool:
    """Whether a layer's weights are folded: they can be, and ``choice`` (``fold_projections``) does not forbid it.

    Raises:
        ArgumentError: the choice is "always", and they cannot be.
    """
    projector, qkv = aligner.projector, attention.qkv_proj
    against = None
    if projector.structure != "Linear" or projector.times > 1:
        against = f"structure {projector.structure!r} and a mix for {projector.times} layer(s) leave nothing to fold"
    elif not isinstance(qkv.quant_method, UnquantizedLinearMethod) or not qkv.weight.is_floating_point():
        against = "the LLM is quantised"
    if choice == "always" and against is not None:
        raise ArgumentError(f"fold_projections: expected 'auto' or 'never': {against}")
    width = int(qkv.num_kv_heads * qkv.head_size)
    pays = break_even_rows(projector.fc2.in_features, projector.fc2.out_features, width) < float("inf")
    return against is None and (choice == "always" or (choice == "auto" and pays))


class GatedSourceAttention(nn.Module):
    """self-attention + gate * attention to the source, before the output map. The query is self-attention's, rotated.

    Args:
        inner: the layer's `Attention`, which stays the first term.
        cache_config: of vLLM.
        prefix: name of the cross-attention, unique in the model.
        source_map: makes the keys and values.
        gated: holds the gate.
    """

    def __init__(
        self, inner: Attention, cache_config: Any, prefix: str, source_map: SourceMap, gated: GatedCrossAttention
    ) -> None:
        super().__init__()
        self.inner, self.has_sink = inner, inner.has_sink
        cache_config = copy.copy(cache_config)
        cache_config.sliding_window = None  # all of the source is attended to, whatever window the layer has
        self.cross = CrossAttention(
            inner.num_heads, inner.head_size, inner.impl.scale, num_kv_heads=inner.num_kv_heads,
            cache_config=cache_config, prefix=prefix,
        )  # fmt: skip
        self.source_map = source_map
        self.gated = gated
        self.hidden: Sequence[Tensor] | None = None  # the encoder's states, in a step that begins requests

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The scales of quantised keys and values, in files that have them, are the inner attention's."""
        places = dict(self.inner.named_parameters())
        loaded = set()
        for name, tensor in weights:
            if name in places:
                default_weight_loader(places[name], tensor)
                loaded.add(f"inner.{name}")
        return loaded

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `Attention`'s."""
        out = self.inner(query, key, value, *args, **kwargs)
        source = (None, None) if self.hidden is None else self.source_map(self.hidden, out.dtype)
        attended = self.cross(query, *source)
        return out + self.gated.effective_gate().to(out.dtype) * attended.view_as(out)


def _reason_against(inner: Any) -> str | None:
    """Why an `Attention` of vLLM cannot stand beside attention to a source; None if it can."""
    if type(inner) is not Attention or inner.attn_type != AttentionType.DECODER:
        return f"is a {type(inner).__name__} of type {inner.attn_type}, which is not supported"
    if inner.kv_sharing_target_layer_name is not None:
        return "shares another layer's keys and values"
    if inner.head_size_v != inner.head_size:
        return "has values of another size than keys, which is not supported"
    if getattr(inner.impl, "alibi_slopes", None) is not None:
        return "adds biases by position (ALiBi), which a source does not have"
    return None


def attach(
    llm: nn.Module, layers: Sequence[int], aligner: EncoderAligner | None, gates: Any, cache_config: Any
) -> list[tuple[nn.Module, GatedSourceAttention]]:
    """Put the gated term into the LLM's layers.

    Args:
        llm: a causal LM of vLLM.
        layers: the language layers, in the order of ``gates``.
        aligner: None if there are no layers.
        gates: L `GatedCrossAttention`.
        cache_config: of vLLM.

    Returns:
        (self-attention, what stands in it now) in the order of ``layers``.

    Raises:
        ArgumentError: a layer's attention is not of the kind that keys and values of a source can be put into.
    """
    found: dict[int, nn.Module] = {}
    module: Any
    inner: Any
    for module in llm.modules():
        inner = module._modules.get("attn")
        if isinstance(inner, Attention) and isinstance(module._modules.get("qkv_proj"), QKVParallelLinear):
            found[extract_layer_index(inner.layer_name)] = module
    pairs = []
    for place, layer in enumerate(layers):
        module = found.get(layer)
        if module is None or aligner is None:
            raise ArgumentError(
                f"llm: expected layer {layer} of {type(llm).__name__} to have self-attention with attn and qkv_proj; "
                "this architecture of vLLM is not supported"
            )
        inner = module.attn
        if (against := _reason_against(inner)) is not None:
            raise ArgumentError(f"llm: the attention of layer {layer} of {type(llm).__name__} {against}")
        source_map = SourceMap(module, inner, aligner, place)
        gated = GatedSourceAttention(inner, cache_config, f"{inner.layer_name}_source", source_map, gates[place])
        module.attn = gated
        pairs.append((module, gated))
    return pairs
