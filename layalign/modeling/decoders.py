"""All that the library knows of decoder architectures: the names of their maps, how they scale embeddings and logits.

Everything else uses these tables. :func:`register_decoder` adds to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from layalign.ops.grouped_projection import heads
from layalign.utils.errors import ArgumentError, refuse

Split = Callable[[Any, Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KeyValueMaps:
    """The modules with which a self-attention computes its keys and values.

    Attributes:
        names: names of two modules, the key map and the value map; or of one that computes both, and perhaps the
            queries.
        split: for one module: (attention, its output for the key state, its output for the value state, d) -> key,
            value (B, S, G * d).
    """

    names: tuple[str, ...]
    split: Split | None = None

    def __post_init__(self) -> None:
        if len(self.names) != (2 if self.split is None else 1) or not all(isinstance(n, str) for n in self.names):
            refuse("key_value", "names of two modules, or of one with a split", self.names)


def _after_the_queries(attention: Any, key_out: Tensor, value_out: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[q | k | v] side by side in one matrix."""
    width = (key_out.shape[-1] - int(attention.config.num_attention_heads) * size) // 2
    return key_out[..., -2 * width : -width], value_out[..., -width:]


def _head_by_head(attention: Any, key_out: Tensor, value_out: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """q, k and v of one head side by side, then those of the next head."""
    key, value = (out.unflatten(-1, (-1, 3, size)) for out in (key_out, value_out))
    return key[..., 1, :].flatten(-2), value[..., 2, :].flatten(-2)


KEY_VALUE_MAPS = [
    KeyValueMaps(("k_proj", "v_proj")),  # Llama, Mistral, Qwen, Gemma, OLMo, ...
    KeyValueMaps(("qkv_proj",), _after_the_queries),  # Phi-3
    KeyValueMaps(("c_attn",), _after_the_queries),  # GPT-2
    KeyValueMaps(("query_key_value",), _head_by_head),  # GPT-NeoX
]
QUERY_MAPS = ["q_proj"]  # of a self-attention; if none is found, queries are computed for all positions
OUTPUT_MAPS = ["o_proj", "out_proj", "dense", "c_proj", "wo"]  # of a self-attention
FEED_FORWARD_BLOCKS = ["mlp", "feed_forward", "ffn"]  # of a layer
# Settings by which decoders change their logits after the head, and the value that has no effect.
AFTER_THE_HEAD = {
    "final_logit_softcapping": None,  # Gemma
    "logits_soft_cap": None,  # RecurrentGemma
    "logit_scale": 1,  # Cohere
    "logits_scaling": 1,  # Granite
    "lm_head_multiplier": 1,  # Falcon-H1
}
# Model types that multiply their text's embeddings, in the decoder or in the embedding module depending on the version
# of transformers: see layalign.modeling.embedding_scale.
SCALED_IN_DECODER = ("gemma", "gemma2", "vaultgemma")


def register_decoder(
    *,
    key_value: KeyValueMaps | None = None,
    query: str | None = None,
    output: str | None = None,
    feed_forward: str | None = None,
) -> None:
    """Register the names of a decoder's modules, in addition to the known ones.

    A decoder needs ``key_value`` to be used at all. The others save the last layer's positions that nobody reads, and
    :func:`layalign.swap_modules` needs ``output``.

    Args:
        key_value: how its self-attention computes keys and values.
        query, output: names of its self-attention's query and output map.
        feed_forward: name of a layer's feed-forward block.

    Raises:
        ArgumentError: an argument is of another type.
    """
    if key_value is not None and not isinstance(key_value, KeyValueMaps):
        refuse("key_value", "KeyValueMaps or None", key_value)
    for argument, name, known in (
        ("query", query, QUERY_MAPS),
        ("output", output, OUTPUT_MAPS),
        ("feed_forward", feed_forward, FEED_FORWARD_BLOCKS),
    ):
        if name is not None and not isinstance(name, str):
            refuse(argument, "a module's name or None", name)
        if name is not None and name not in known:
            known.append(name)
    if key_value is not None and key_value not in KEY_VALUE_MAPS:
        KEY_VALUE_MAPS.append(key_value)


def key_value_maps(attention: nn.Module) -> KeyValueMaps | None:
    """How ``attention`` computes its keys and values; None if it is unknown."""
    for maps in KEY_VALUE_MAPS:
        if all(isinstance(getattr(attention, name, None), nn.Module) for name in maps.names):
            return maps
    return None


def known_maps() -> str:
    """Names of all known key and value maps, for an error's text."""
    return " or ".join(" and ".join(maps.names) for maps in KEY_VALUE_MAPS)


def key_value_modules(attention: Any) -> list[nn.Module]:
    """The modules that :func:`key_value_states` calls."""
    maps = key_value_maps(attention)
    return [] if maps is None else [getattr(attention, name) for name in maps.names]


def key_value_states(attention: Any, key_state: Tensor, value_state: Tensor) -> tuple[Tensor, Tensor]:
    """k_i and v_i: the LLM's own projections of the aligner's states, split into heads, without rotary embedding.

    Args:
        attention: the LLM layer's self-attention module; its projections are called as modules, so LoRA, quantised and
            sharded weights work.
        key_state, value_state: (B, S, D_l).

    Returns:
        key, value: (B, G, S, d).

    Raises:
        ArgumentError: no map of the attention has a known name.
    """
    maps, size = key_value_maps(attention), head_size(attention)
    if maps is None:
        raise ArgumentError(f"llm: {type(attention).__name__} has no {known_maps()}; see register_decoder")
    modules = [getattr(attention, name) for name in maps.names]
    key, value = modules[0](key_state), modules[-1](value_state)
    if maps.split is not None:
        key, value = maps.split(attention, key, value, size)
    return heads(key, size), heads(value, size)


def head_size(attention: nn.Module) -> int:
    """The head size d of a self-attention module."""
    for name in ("head_dim", "head_size"):
        if isinstance(getattr(attention, name, None), int):
            return int(getattr(attention, name))
    config: Any = attention.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def attention_modules(llm: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Layer index -> (name, module) of the decoder's self-attention modules: those with a layer index and k, v maps."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in llm.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int) and key_value_maps(module) is not None:
            found.setdefault(int(module.layer_idx), (name, module))  # type: ignore[arg-type]
    return found
