"""The published LayAlign data flow in plain PyTorch on today's transformers: the baseline of the benchmarks.

It has the class names, parameter names, results and costs of the authors' code, but is written for this project. All
encoder layers are stacked and permuted. Keys and values of the source are projected again in every call of every layer.
The query is projected and rotated a second time. The gated term has its own call of the output projection. Encoder
padding is attended to. Nothing here imports layalign.

Source: Ruan et al., "LayAlign", Findings of NAACL 2025, and the code published with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightedLinearProjector(nn.Module):
    """(B, E, S, D_e) -> (B, S, 2L, D_l): mix the layers, relu, map to the LLM's width ("MLP": relu, a second map)."""

    def __init__(self, config: Any, bias: bool = True) -> None:
        super().__init__()
        self.config = config
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(config.num_encoder_layers, 2 * config.num_language_layers, bias=bias)
        self.fc2 = nn.Linear(config.encoder_hidden_dim, config.language_hidden_dim, bias=bias)
        if config.structure == "MLP":
            self.fc3 = nn.Linear(config.language_hidden_dim, config.language_hidden_dim, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        layers_last = hidden_states.permute(0, 2, 3, 1)  # (B, S, D_e, E)
        slots = self.relu(self.fc1(layers_last).transpose(2, 3))  # (B, S, 2L, D_e)
        slots = self.fc2(slots)
        return self.fc3(self.relu(slots)) if self.config.structure == "MLP" else slots


class EncoderAligner(nn.Module):
    """E tensors (B, S, D_e), or one (B, E, S, D_e) -> L pairs (key state, value state) of (B, S, D_l)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        self.projector = WeightedLinearProjector(config)

    def forward(self, hidden_states: Sequence[Tensor] | Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if not isinstance(hidden_states, Tensor):
            hidden_states = torch.stack(list(hidden_states)).permute(1, 0, 2, 3)
        expected = (self.config.num_encoder_layers, self.config.encoder_hidden_dim)
        assert (hidden_states.shape[1], hidden_states.shape[3]) == expected, (hidden_states.shape, expected)
        slots = self.projector.forward(hidden_states).permute(2, 0, 1, 3)  # (2L, B, S, D_l)
        return tuple(tuple(state.squeeze(0) for state in pair.split(1)) for pair in slots.split(2))


class MLP(nn.Module):
    """linear1, relu, linear2."""

    def __init__(self, mt_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(mt_dim, 2 * mt_dim)
        self.linear2 = nn.Linear(2 * mt_dim, llm_dim)
        self.relu = nn.ReLU()

    def forward(self, states: Tensor) -> Tensor:
        return self.linear2(self.relu(self.linear1(states)))


class Mapping(nn.Module):
    """The encoder's last states as soft tokens, and the boundary after them."""

    def __init__(self, mt_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.mlp = MLP(mt_dim, llm_dim)
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.mlp(hidden_states)

    def get_embed(self) -> Tensor:
        return self.end_boundary


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, H, T, d), the two halves of d forming the pairs; cos and sin are (B, T, d)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class AdaptedAttention(nn.Module):
    """A decoder's attention module, with gated attention to states that are set from outside.

    Args:
        model: an attention module with separate q, k, v and o projections and half-rotated positions (Llama, Mistral,
            Qwen2).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.adapter_states: Any = torch.empty(1)
        self.adaption_gate = nn.Parameter(torch.zeros(1))

    def update_adapter_states(self, adapter_states: Any) -> None:
        self.adapter_states = adapter_states

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], -1, self.model.head_dim).transpose(1, 2)

    def forward(self, **kwargs: Any) -> tuple[Tensor, None]:
        attention = self.model
        output, *_ = attention(**kwargs)
        key = self._heads(attention.k_proj(self.adapter_states[0]))
        value = self._heads(attention.v_proj(self.adapter_states[1]))
        query = rotate(self._heads(attention.q_proj(kwargs["hidden_states"])), *kwargs["position_embeddings"])
        dtype, copies = query.dtype, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
        scores = query @ key.transpose(2, 3).to(dtype) / math.sqrt(attention.head_dim)
        weights = self.adaption_gate * F.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
        extra = (weights @ value).transpose(1, 2).reshape(*output.shape[:2], -1)
        return (output + attention.o_proj(extra)).to(dtype), None


class AdaptedLLM(nn.Module):
    """The LLM as the published fork of peft wraps it: one level deeper, its attention modules replaced."""

    def __init__(self, llm: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.model: Any = llm
        llm.requires_grad_(False)
        decoder = [layer for layer in llm.modules() if hasattr(layer, "self_attn")]
        for index in layers:
            decoder[index].self_attn = AdaptedAttention(decoder[index].self_attn)
        self.layers = tuple(layers)

    def set_states(self, pairs: Sequence[Any]) -> None:
        decoder = [layer for layer in self.model.modules() if hasattr(layer, "self_attn")]
        for index, pair in zip(self.layers, pairs, strict=True):
            decoder[index].self_attn.update_adapter_states(pair)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def squeeze_padding(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move each row's padding to its left and drop the columns that are padding everywhere.

    Args:
        states: (B, T, D); mask: (B, T), 0/1.

    Returns:
        states (B, T', D), mask (B, T'), and which of the T columns stay.
    """
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    order = (mask.ne(0) * places).argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    states = states.gather(1, order[..., None].expand_as(states))
    stays = mask.sum(dim=0) > 0
    return states[:, stays], mask[:, stays], stays


class PublishedLayAlign(nn.Module):
    """The published model with given parts. It returns the loss with labels, and the newly generated ids without.

    Args:
        config: any object with ``encoder_aligner_config`` (encoder_layers, language_layers, structure and the sizes),
            ``max_gen_len``, ``llm_bos_token_id`` and ``llm_pad_token_id``.
        encoder, llm: transformers models; both are frozen, and the LLM's attention modules are wrapped.
    """

    def __init__(self, config: Any, encoder: Any, llm: Any) -> None:
        super().__init__()
        self.config = config
        self.encoder_mt = encoder.requires_grad_(False)
        self.model_llm = AdaptedLLM(llm, config.encoder_aligner_config.language_layers)
        self.llm_embedding_layer = llm.get_input_embeddings()
        self.mapping = Mapping(encoder.config.hidden_size, llm.config.hidden_size)
        self.encoder_aligner = EncoderAligner(config.encoder_aligner_config)

    def _source(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The start of the LLM's input, [bos][soft tokens][boundary]; sets the states of all wrapped layers."""
        output = self.encoder_mt(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        layers = [output.hidden_states[layer] for layer in self.config.encoder_aligner_config.encoder_layers]
        self.model_llm.set_states(self.encoder_aligner(layers))
        bos = self.llm_embedding_layer(ids.new_full((len(ids), 1), self.config.llm_bos_token_id))
        boundary = self.mapping.get_embed().expand(len(ids), -1, -1)
        one = mask.new_ones(len(ids), 1)
        return torch.cat([bos, self.mapping(output[0]), boundary], dim=1), torch.cat([one, mask, one], dim=1)

    def forget(self) -> None:
        """Drop the states of the last source, which the wrapped layers hold until the next one."""
        self.model_llm.set_states([None] * len(self.model_llm.layers))

    def forward(
        self,
        input_ids_mt: Tensor,
        attention_mask_mt: Tensor,
        labels: Tensor | None = None,
        mask_label: Tensor | None = None,
        input_ids_prompt: Tensor | None = None,
        mask_prompt: Tensor | None = None,
    ) -> Tensor:
        """All ids and masks (B, length) int64; labels padded on the left, as the published collator does."""
        embeds, mask = self._source(input_ids_mt, attention_mask_mt)
        if input_ids_prompt is not None and mask_prompt is not None:
            embeds = torch.cat([embeds, self.llm_embedding_layer(input_ids_prompt)], dim=1)
            mask = torch.cat([mask, mask_prompt], dim=1)
        if labels is None or mask_label is None:
            embeds, mask, _ = squeeze_padding(embeds, mask)
            return self.model_llm.model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=self.config.max_gen_len,
                pad_token_id=self.config.llm_pad_token_id,
                do_sample=False,
            )
        targets = torch.cat([torch.full_like(mask, -100), labels.masked_fill(mask_label == 0, -100)], dim=1)
        embeds = torch.cat([embeds, self.llm_embedding_layer(labels)], dim=1)
        embeds, mask, stays = squeeze_padding(embeds, torch.cat([mask, mask_label], dim=1))
        return self.model_llm(inputs_embeds=embeds, attention_mask=mask, labels=targets[:, stays]).loss
