"""The layer-wise aligner: all encoder layers in, one key state and one value state per language layer out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layalign import ops
from layalign._plain import reason_against_reading
from layalign.errors import MAX_SIZE, ArgumentError, one_of, refuse
from layalign.ops._checks import check_hidden

STRUCTURES = ("Linear", "MLP")
MIXES = ("layer-wise", "shared")


class WeightedLinearProjector(nn.Module):
    """fc1 mixes the encoder layers into 2L slots (relu), fc2 (and, for "MLP", relu and fc3) maps to the LLM's width.

    Args:
        config: see :class:`EncoderAligner`.
        bias: whether the linear maps have biases, as published.
        impl: backend of the operations, "auto" by default.
    """

    def __init__(self, config: Any, bias: bool = True, impl: str = "auto") -> None:
        super().__init__()
        _check(config)
        self.structure = config.structure
        self.impl = impl
        # How often each slot serves: the slots of a shared mix serve every language layer.
        self.times = config.num_language_layers if getattr(config, "mix", MIXES[0]) == "shared" else 1
        self.fc1 = nn.Linear(config.num_encoder_layers, 2 * config.num_language_layers // self.times, bias=bias)
        self.fc2 = nn.Linear(config.encoder_hidden_dim, config.language_hidden_dim, bias=bias)
        if self.structure == "MLP":
            self.fc3 = nn.Linear(config.language_hidden_dim, config.language_hidden_dim, bias=bias)

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """E tensors (B, S, D_e) -> (2L, B, S, D_l); with a shared mix (2, B, S, D_l)."""
        if self._may_be_read():
            y = ops.layer_projection(
                hidden_states, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, impl=self.impl
            )
        else:  # as published: weights that are sharded, quantised or wrapped are only right inside their modules
            mixed = torch.relu(self.fc1(torch.stack(tuple(hidden_states), dim=-1)))
            y = self.fc2(mixed.movedim(-1, 0).contiguous())
        if self.structure != "MLP":
            return y
        return self.fc3(torch.relu(y).to(self.fc3.weight.dtype)).to(y.dtype)  # hidden states and masters may differ

    def _may_be_read(self) -> bool:
        if torch.compiler.is_compiling():
            return True
        return all(reason_against_reading(linear) is None for linear in (self.fc1, self.fc2))


def _check(config: Any) -> None:
    for field in ("encoder_hidden_dim", "language_hidden_dim", "num_encoder_layers", "num_language_layers"):
        number = getattr(config, field, None)
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_SIZE:
            refuse(f"config.{field}", "a positive integer", number)
    one_of("config.structure", getattr(config, "structure", None), STRUCTURES)
    one_of("config.mix", getattr(config, "mix", MIXES[0]), MIXES)


class EncoderAligner(nn.Module):
    """The layer-wise aligner with the published constructor, parameter names and output.

    Args:
        config: any object with ``encoder_hidden_dim`` (D_e), ``language_hidden_dim`` (D_l), ``num_encoder_layers`` (E),
            ``num_language_layers`` (L) and ``structure`` ("Linear" or "MLP"). The other published fields
            (``num_attention_heads``, ``encoder_layers``, ``language_layers``, ``projector_type``, ``batch``) are not
            needed here; ``num_transformer_submodules``, where present, must be 1. ``mix``, where present, is
            "layer-wise" (published) or "shared": one slot for the keys and one for the values of all language layers.
        impl: backend of the operations, "auto" by default.

    Raises:
        ArgumentError: a field is missing or has a value that is not supported.

    Source: LayAlign, layer-wise aligner.
    """

    def __init__(self, config: Any, *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__()
        if getattr(config, "num_transformer_submodules", 1) != 1:
            raise ArgumentError(
                f"config.num_transformer_submodules: expected 1, got {config.num_transformer_submodules!r}"
            )
        self.config = config
        self.projector = WeightedLinearProjector(config, impl=impl)

    def layers(self, hidden_states: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """The E tensors (B, S, D_e), checked; one tensor (B, E, S, D_e) is the published alternative."""
        if isinstance(hidden_states, Tensor):
            if hidden_states.dim() != 4:
                shape = tuple(hidden_states.shape)
                raise ArgumentError(f"hidden_states: expected a list of (B, S, D_e) or (B, E, S, D_e), got {shape}")
            hidden_states = hidden_states.unbind(1)
        hidden_states = check_hidden(hidden_states, "hidden_states")
        expected = (self.config.num_encoder_layers, self.config.encoder_hidden_dim)
        found = (len(hidden_states), hidden_states[0].shape[-1])
        if found != expected:
            raise ArgumentError(f"hidden_states: expected (layers, hidden size) = {expected}, got {found}")
        return list(hidden_states)

    def states(self, hidden_states: Sequence[Tensor] | Tensor) -> Tensor:
        """All slots in one tensor, (2L, B, S, D_l): slot 2i is the key state of language layer i, 2i + 1 its value.

        With a shared mix (2, B, S, D_l), the key state and the value state of every language layer.
        """
        return self.projector(self.layers(hidden_states))

    def forward(self, hidden_states: Sequence[Tensor] | Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """E tensors (B, S, D_e), or one (B, E, S, D_e) -> L pairs (key state, value state), each (B, S, D_l)."""
        slots = self.states(hidden_states).unbind(0) * self.projector.times
        return tuple(zip(slots[0::2], slots[1::2], strict=True))
