"""A decoder whose modules have names that nobody knows: once registered, the same numbers as with the usual ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import batch, open_gates, tiny_encoder, tiny_llm
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from layalign import ArgumentError, LayAlignForCausalLM
from layalign.modeling import decoders
from layalign.modeling.decoders import KeyValueMaps, register_decoder
from layalign.utils.versions import CACHE_NAMES


class OddAttention(nn.Module):
    """Llama's with other names, and perhaps one map for values and keys."""

    def __init__(self, own: Any, joined: bool) -> None:
        super().__init__()
        for name in ("config", "layer_idx", "head_dim", "scaling", "num_key_value_groups", "is_causal"):
            setattr(self, name, getattr(own, name))
        self.asks, self.gives, self.joined = own.q_proj, own.o_proj, joined
        if joined:
            self.holds = nn.Linear(own.k_proj.in_features, 2 * own.k_proj.out_features, bias=False)
            self.holds.weight.data = torch.cat([own.v_proj.weight.data, own.k_proj.weight.data])
        else:
            self.finds, self.tells = own.k_proj, own.v_proj

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Any:
        shape = *hidden_states.shape[:-1], -1, self.head_dim
        pair = self.holds(hidden_states).chunk(2, -1)[::-1] if self.joined else None
        key, value = pair or (self.finds(hidden_states), self.tells(hidden_states))
        states = (each.view(shape).transpose(1, 2) for each in (self.asks(hidden_states), key, value))
        query, key, value = states
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        for name in CACHE_NAMES:
            if (cache := kwargs.pop(name, None)) is not None:
                key, value = cache.update(key, value, self.layer_idx)
        attend = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.gives(out.reshape(*shape[:-2], -1)), weights


class OddLayer(nn.Module):
    """Llama's with another name for the feed-forward block."""

    def __init__(self, own: Any, joined: bool) -> None:
        super().__init__()
        self.self_attn, self.thinks = OddAttention(own.self_attn, joined), own.mlp
        self.before, self.after = own.input_layernorm, own.post_attention_layernorm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.before(hidden_states), **kwargs)[0]
        return hidden_states + self.thinks(self.after(hidden_states))


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    known = decoders.KEY_VALUE_MAPS, decoders.QUERY_MAPS, decoders.OUTPUT_MAPS, decoders.FEED_FORWARD_BLOCKS
    before: Any = [list(table) for table in known]
    yield
    for table, entries in zip(known, before, strict=True):
        table[:] = entries


def model_of(odd: bool, joined: bool = False, **config: Any) -> LayAlignForCausalLM:
    llm: Any = tiny_llm("llama_gqa_wide_heads")
    if odd:
        llm.model.layers = nn.ModuleList(OddLayer(layer, joined) for layer in llm.model.layers)
    torch.manual_seed(2)
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), llm, **config)
    open_gates(model)
    return model.eval()


def split(attention: Any, key_out: Tensor, value_out: Tensor, size: int) -> tuple[Tensor, Tensor]:
    width = key_out.shape[-1] // 2
    return key_out[..., width:], value_out[..., :width]


@pytest.mark.parametrize("joined", [False, True], ids=["two maps", "one map"])
def test_the_same_numbers_by_the_same_short_ways(joined: bool) -> None:
    maps = KeyValueMaps(("holds",), split) if joined else KeyValueMaps(("finds", "tells"))
    register_decoder(key_value=maps, query="asks", output="gives", feed_forward="thinks")
    usual, odd = model_of(False), model_of(True, joined)
    inputs = batch(model=usual)
    done = []
    for model in (usual, odd):
        loss = model(**inputs).loss
        loss.backward()
        trained = [p.grad for p in model.parameters() if p.grad is not None]
        prompt = {name: tensor for name, tensor in batch(model=model, targets=None).items() if name != "labels"}
        answer = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            model(**inputs)
        done.append((loss.detach(), *trained, answer))
        assert model.last_layer.last.endswith(" positions") and not model.last_layer.last.startswith("in full")
        assert len(model.last_layer.maps()) == 3
    for one, other in zip(*done, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert usual.key_values.last == "folded"
    assert odd.key_values.last == ("not folded: OddAttention has no k_proj of its own" if joined else "folded")


def test_unregistered_names_are_said() -> None:
    with pytest.raises(ArgumentError, match="llm: no attention of LlamaForCausalLM has k_proj and v_proj or"):
        model_of(True)
    llm: Any = tiny_llm("llama_gqa_wide_heads")
    attention = OddAttention(llm.model.layers[0].self_attn, False)
    with pytest.raises(ArgumentError, match="OddAttention has no k_proj and v_proj or qkv_proj or .*register_decoder"):
        decoders.key_value_states(attention, torch.zeros(1, 2, 32), torch.zeros(1, 2, 32))


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: register_decoder(query=3), "query: expected a module's name or None, got 3"),  # type: ignore[arg-type]
        (lambda: register_decoder(key_value="k"), "key_value: expected KeyValueMaps or None, got 'k'"),  # type: ignore[arg-type]
        (lambda: KeyValueMaps(("one",)), "key_value: expected names of two modules, or of one with a split"),
        (lambda: KeyValueMaps(("one", "two"), split), "key_value: expected names of two modules"),
    ],
)
def test_what_cannot_be_registered_is_named(wrong: Any, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        wrong()
