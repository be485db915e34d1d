"""The layer-wise aligner: all encoder layers in, one key state and one value state per language layer out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from layalign import ops, reference
from layalign.nn.inspection import computes, is_exactly, readable, reason_against_reading
from layalign.ops.checks import check_hidden, select_rows
from layalign.utils.errors import MAX_SIZE, ArgumentError, one_of, refuse

STRUCTURES = ("Linear", "MLP")
MIXES = ("layer-wise", "shared")


@readable
class WeightedLinearProjector(nn.Module):
    """fc1 makes 2L mixes of the encoder layers (relu follows), fc2 maps each to the LLM's width; "MLP": relu, then fc3.

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
        # How many language layers each mix serves.
        self.times = config.num_language_layers if getattr(config, "mix", MIXES[0]) == "shared" else 1
        self.fc1 = nn.Linear(config.num_encoder_layers, 2 * config.num_language_layers // self.times, bias=bias)
        self.fc2 = nn.Linear(config.encoder_hidden_dim, config.language_hidden_dim, bias=bias)
        if self.structure == "MLP":
            self.fc3 = nn.Linear(config.language_hidden_dim, config.language_hidden_dim, bias=bias)

    def forward(self, hidden_states: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """E tensors (B, S, D_e) -> (2L, B, S, D_l); with a shared mix (2, B, S, D_l).

        ``rows``: (N,) int64, the tokens to compute, in the flattened (B, S): the result is (2L, 1, N, D_l).
        """
        if self._may_be_read():
            mix, inner = (self.fc1.weight, self.fc1.bias), (self.fc2.weight, self.fc2.bias)
            y = ops.layer_projection(hidden_states, *mix, *inner, rows=rows, impl=self.impl)
        else:  # as published: sharded, quantised or wrapped weights are correct only inside their modules
            if rows is not None:
                hidden_states = select_rows(hidden_states, rows)
            mixed = torch.relu(self.fc1(torch.stack(tuple(hidden_states), dim=-1)))
            y = self.fc2(mixed.movedim(-1, 0).contiguous())
        if self.structure != "MLP":
            return y
        return self.fc3(torch.relu(y).to(self.fc3.weight.dtype)).to(y.dtype)  # fc3 may be fp32 under bf16 input

    def _may_be_read(self) -> bool:
        if torch.compiler.is_compiling():
            return type(self.fc1) is nn.Linear and type(self.fc2) is nn.Linear
        return all(reason_against_reading(linear) is None for linear in (self.fc1, self.fc2))


def _check(config: Any) -> None:
    for field in ("encoder_hidden_dim", "language_hidden_dim", "num_encoder_layers", "num_language_layers"):
        number = getattr(config, field, None)
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_SIZE:
            refuse(f"config.{field}", "a positive integer", number)
    one_of("config.structure", getattr(config, "structure", None), STRUCTURES)
    one_of("config.mix", getattr(config, "mix", MIXES[0]), MIXES)


@readable
class EncoderAligner(nn.Module):
    """The layer-wise aligner with the published constructor, parameter names and output.

    Args:
        config: any object with ``encoder_hidden_dim`` (D_e), ``language_hidden_dim`` (D_l), ``num_encoder_layers`` (E),
            ``num_language_layers`` (L) and ``structure`` ("Linear" or "MLP"). The other published fields
            (``num_attention_heads``, ``encoder_layers``, ``language_layers``, ``projector_type``, ``batch``) are not
            needed here; ``num_transformer_submodules``, where present, must be 1. ``mix``, where present, is
            "layer-wise" (published) or "shared": one mix for the keys and one for the values of all language layers.
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
        """The E tensors (B, S, D_e), checked. The published code also takes one tensor (B, E, S, D_e)."""
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
        """All states in one tensor, (2L, B, S, D_l): entry 2i is language layer i's key state, 2i + 1 its value state.

        With a shared mix (2, B, S, D_l): the key state and the value state of every language layer.
        """
        return self.projector(self.layers(hidden_states))

    def forward(
        self, hidden_states: Sequence[Tensor] | Tensor, *args: Any, rows: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """E tensors (B, S, D_e), or one (B, E, S, D_e) -> L pairs (key state, value state), each (B, S, D_l).

        ``rows``: (N,) int64, the tokens to compute, in the flattened (B, S): the states are (1, N, D_l).
        """
        layers = self.layers(hidden_states)
        states = self.projector(layers) if rows is None else self.projector(layers, rows)
        states = states.unbind(0) * self.projector.times
        return tuple(zip(states[0::2], states[1::2], strict=True))


def reason_against_passing(aligner: nn.Module) -> str | None:
    """Why an aligner must be called as a module; None if it may be bypassed. Its linear maps are checked elsewhere."""
    if not is_exactly(aligner, EncoderAligner) or type(aligner.projector) is not WeightedLinearProjector:
        return "the aligner or its projector is of another class, has hooks or an edited forward"
    if not computes_the_reference():
        return "the aligner's forward is not the documented formula"
    return None


@functools.cache
def computes_the_reference() -> bool:
    """Whether the modules above compute the documented formula, tried once on small numbers.

    The fast paths compute that formula. If a ``forward`` has been edited, the modules are called instead.
    """
    sizes = dict(encoder_hidden_dim=2, language_hidden_dim=3, num_encoder_layers=2, num_language_layers=2)

    def inputs() -> tuple[EncoderAligner, list[Tensor]]:
        aligner = EncoderAligner(SimpleNamespace(**sizes, structure="Linear"), impl="torch").double()
        for parameter in aligner.parameters():
            parameter.copy_(torch.arange(1.0, 1 + parameter.numel()).sin().view_as(parameter))
        return aligner, list(torch.arange(24.0, dtype=torch.float64).cos().view(2, 2, 3, 2))

    def expected() -> Iterable[Tensor]:
        aligner, hidden = inputs()
        fc1, fc2 = aligner.projector.fc1, aligner.projector.fc2
        return reference.layer_projection(hidden, fc1.weight, fc1.bias, fc2.weight, fc2.bias)

    def found() -> Iterable[Tensor]:
        aligner, hidden = inputs()
        return [state for pair in aligner(hidden) for state in pair]

    return computes(expected, found)
