"""All that is known of decoder architectures: where their maps are, by name, and what they do to embeddings and logits.

Everything else finds its way by these tables. :func:`register_decoder` adds to them.
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
    """The modules by which a self-attention makes its keys and values.

    Attributes:
        names: of two modules, the key's and the value's map; or of one that makes both, and perhaps the queries.
        split: for one module: (attention, its output for the key state, that for the value state, d) -> key, value
            (B, S, G * d).
    """

    names: tuple[str, ...]
    split: Split | None = None

    def __post_init__(self) -> None:
        if len(self.names) != (2 if self.split is None else 1) or not all(isinstance(n, str) for n in self.names):
            refuse("key_value", "names of two modules, or of one with a split", self.names)


def _behind_the_queries(attention: Any, key_out: Tensor, value_out: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[q | k | v] side by side in one matrix."""
    width = (key_out.shape[-1] - int(attention.config.num_attention_heads) * size) // 2
    return key_out[..., -2 * width : -width], value_out[..., -width:]


def _head_by_head(attention: Any, key_out: Tensor, value_out: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """q, k and v of a head side by side, then those of the next."""
    key, value = (out.unflatten(-1, (-1, 3, size)) for out in (key_out, value_out))
    return key[..., 1, :].flatten(-2), value[..., 2, :].flatten(-2)


KEY_VALUE_MAPS = [
    KeyValueMaps(("k_proj", "v_proj")),  # Llama, Mistral, Qwen, Gemma, OLMo, ...
    KeyValueMaps(("qkv_proj",), _behind_the_queries),  # Phi-3
    KeyValueMaps(("c_attn",), _behind_the_queries),  # GPT-2
    KeyValueMaps(("query_key_value",), _head_by_head),  # GPT-NeoX
]
QUERY_MAPS = ["q_proj"]  # of a self-attention; without one the queries are made for all positions
OUTPUT_MAPS = ["o_proj", "out_proj", "dense", "c_proj", "wo"]  # of a self-attention
FEED_FORWARD_BLOCKS = ["mlp", "feed_forward", "ffn"]  # of a layer
# What decoders do to their logits after the head, and the value that means nothing.
AFTER_THE_HEAD = {
    "final_logit_softcapping": None,  # Gemma
    "logits_soft_cap": None,  # RecurrentGemma
    "logit_scale": 1,  # Cohere
    "logits_scaling": 1,  # Granite
    "lm_head_multiplier": 1,  # Falcon-H1
}
# Model types that multiply their text's embeddings, in the decoder or in the embedding module by version of
# transformers: see layalign.modeling.embedding_scale.
SCALED_IN_DECODER = ("gemma", "gemma2", "vaultgemma")


def register_decoder(
    *,
    key_value: KeyValueMaps | None = None,
    query: str | None = None,
    output: str | None = None,
    feed_forward: str | None = None,
) -> None:
    """Make names of a decoder's modules known, beside those that are.

    A decoder needs ``key_value`` to be used at all. The others save the last layer's positions that nobody reads, and
    :func:`layalign.swap_modules` needs ``output``.

    Args:
        key_value: how its self-attention makes keys and values.
        query, output: names of its self-attention's query and output map.
        feed_forward: name of a layer's feed-forward block.

    Raises:
        ArgumentError: one is of another type.
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
    """How ``attention`` makes its keys and values; None when it is unknown."""
    for maps in KEY_VALUE_MAPS:
        if all(isinstance(getattr(attention, name, None), nn.Module) for name in maps.names):
            return maps
    return None


def known_maps() -> str:
    """Names of all maps that make keys and values, for a message."""
    return " or ".join(" and ".join(maps.names) for maps in KEY_VALUE_MAPS)


def key_value_modules(attention: Any) -> list[nn.Module]:
    """The modules that :func:`key_value_states` calls."""
    maps = key_value_maps(attention)
    return [] if maps is None else [getattr(attention, name) for name in maps.names]


def key_value_states(attention: Any, key_state: Tensor, value_state: Tensor) -> tuple[Tensor, Tensor]:
    """k_i and v_i: the LLM's own projections of the aligner's states, no rotation, as heads.

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
        raise ArgumentError(f"llm: {type(attention).__name__} has not {known_maps()}; see register_decoder")
    modules = [getattr(attention, name) for name in maps.names]
    key, value = modules[0](key_state), modules[-1](value_state)
    if maps.split is not None:
        key, value = maps.split(attention, key, value, size)
    return heads(key, size), heads(value, size)


def head_size(attention: nn.Module) -> int:
    """d of a self-attention module."""
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
