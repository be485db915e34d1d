"""Which modules are published-style, and whether ours would compute what theirs compute.

Class names and structure make a module a candidate. Its ``forward`` is then compared with the published formula on a
small random input. A look-alike that computes something else is left alone. So is an attention wrapper that holds or
takes more than the published one, unless the user allows it: no input shows what a mask does that is not set yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layalign.modeling.attention_interface import PREFIX
from layalign.modeling.decoders import head_size, key_value_maps
from layalign.nn.aligner import STRUCTURES
from layalign.nn.inspection import has_hooks
from layalign.published import swapped_modules
from layalign.utils.errors import first_line
from layalign.utils.versions import CACHE_NAMES

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # relative to the largest number; half precision: 5e-2


def has_projector(module: nn.Module) -> bool:
    """Whether ``module`` is an aligner by its own children. Those that a wrapper passes on do not count."""
    return _has_maps(module._modules.get("projector"))


def is_projector(module: nn.Module) -> bool:
    """Whether ``module`` is a projector by name and structure."""
    return "projector" in type(module).__name__.lower() and _has_maps(module)


def is_gated_attention(module: nn.Module) -> bool:
    """Whether ``module`` is a gated attention wrapper, by name or by structure."""
    return type(module).__name__ == "AdaptedAttention" or "adaption_gate" in module._parameters


def is_mapping(module: nn.Module) -> bool:
    """Whether ``module`` is the published ``Mapping`` by its structure."""
    mlp = module._modules.get("mlp")
    return hasattr(mlp, "linear1") and hasattr(mlp, "linear2") and "end_boundary" in module._parameters


def _has_maps(module: nn.Module | None) -> bool:
    return module is not None and module._modules.keys() >= {"fc1", "fc2"}


def _parts(module: nn.Module, children: set[str], parameters: set[str]) -> str | None:
    """What ``module`` has besides the published parts."""
    found = [n for n, c in module._modules.items() if n not in children and c is not None and type(c) is not nn.ReLU]
    found += [n for n, p in module._parameters.items() if n not in parameters and p is not None]
    found += [n for n, b in module._buffers.items() if b is not None]
    return f"it has parts that the published one does not have: {', '.join(found)}" if found else None


def _patched(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule"
    if "forward" in module.__dict__:
        return "its forward is patched on the instance and would hide ours"
    if type(module).forward is not type(module).forward:
        return "its forward is another object at each access (a partialmethod): a later patch could not be noticed"
    if nn.utils.parametrize.is_parametrized(module):
        return "it has parametrizations"
    return None


def reason_against_projector(projector: Any) -> str | None:
    """Why a projector's ``forward`` cannot be replaced by its maps."""
    problem = _parts(projector, {"fc1", "fc2", "fc3"}, set()) or _patched(projector)
    problem = problem or swapped_modules.reason_against_maps(projector)
    if problem is not None:
        return problem
    fc1, fc2, fc3 = projector.fc1, projector.fc2, getattr(projector, "fc3", None)
    if fc1.out_features % 2:
        return f"fc1: expected an even number of slots, a key and a value a layer, got {fc1.out_features}"
    if fc3 is not None and getattr(fc3, "in_features", None) != fc2.out_features:
        return f"fc3: expected in_features {fc2.out_features}, fc2's out_features"
    config = getattr(projector, "config", None)
    structure = getattr(projector, "structure", None) or getattr(config, "structure", None)
    if structure is not None and structure != STRUCTURES[fc3 is not None]:
        return f"its structure is {structure!r}, its maps are those of {STRUCTURES[fc3 is not None]!r}"
    return None


def reason_against_aligner(aligner: Any) -> str | None:
    """Why an aligner is left as it is; None if it can be swapped."""
    submodules = getattr(getattr(aligner, "config", None), "num_transformer_submodules", 1)
    problem = _patched(aligner) or _parts(aligner, {"projector"}, set())
    if problem is None and submodules != 1:
        problem = f"config.num_transformer_submodules is {submodules}, not 1"
    if problem is None and has_hooks(aligner.projector):
        problem = "its projector has hooks, which would not run"
    problem = problem or reason_against_projector(aligner.projector)
    if problem is not None:
        return problem
    return _try_projection(
        aligner,
        aligner.projector,
        lambda hidden: torch.cat([torch.stack(list(pair)) for pair in aligner.forward(hidden)]),
        lambda hidden: swapped_modules.slots(aligner.projector, hidden, "torch"),
    )


def reason_against_bare_projector(projector: Any) -> str | None:
    """Why a projector without an aligner is left as it is; None if it can be swapped."""
    problem = reason_against_projector(projector)
    if problem is not None:
        return problem
    return _try_projection(
        projector,
        projector,
        lambda hidden: projector.forward(torch.stack(hidden, dim=1)),
        lambda hidden: swapped_modules.slots(projector, hidden, "torch").permute(1, 2, 0, 3),
    )


def _try_projection(
    module: nn.Module,
    projector: Any,
    original: Callable[[list[Tensor]], Tensor],
    ours: Callable[[list[Tensor]], Tensor],
) -> str | None:
    """Compare with the module as it is, then with random float64 weights in training mode."""

    def compare() -> str | None:
        hidden = _hidden(projector)
        return _compare(lambda: original(hidden), lambda: ours(hidden), hidden[0])

    problem = compare()
    if problem is None and type(getattr(projector, "fc3", projector.fc1)) is nn.Linear:
        with _telling(module):
            problem = compare()
    return problem


def wrapped_attention(wrapper: nn.Module) -> str | None:
    """The name of the one child that is an attention module."""
    names = [n for n, child in wrapper._modules.items() if child is not None and key_value_maps(child) is not None]
    return names[0] if len(names) == 1 else None


def reason_against_attention(wrapper: Any, allow: Sequence[str | type] = ()) -> str | None:
    """Why a gated attention wrapper is left as it is; None if it can be swapped.

    Args:
        allow: classes, or their names, whose state beyond the published one is known to be no mask of the source.
    """
    gate, child = wrapper._parameters.get("adaption_gate"), wrapped_attention(wrapper)
    if gate is None or gate.numel() != 1:
        return "adaption_gate: expected a Parameter with one number (not sharded)"
    if child is None:
        return "expected one child that is an attention module with known key and value maps"
    if not hasattr(wrapper, "adapter_states"):
        return "it has no adapter_states: what it attends to is not set from outside"
    problem = _patched(wrapper) or _parts(wrapper, {child}, {"adaption_gate"})
    attention = getattr(wrapper, child)
    problem = problem or _reason_against_interface(attention) or swapped_modules.reason_against_output(attention)
    if problem is None and type(wrapper) not in allow and type(wrapper).__name__ not in allow:
        problem = _reason_against_state(wrapper, attention)
    return problem or _try_attention(wrapper, attention, gate)


def _reason_against_state(wrapper: Any, attention: Any) -> str | None:
    """Why ``forward`` may know which tokens of the source are padding: where a mask is not set yet, no trial tells."""
    _, *arguments = inspect.signature(type(wrapper).forward).parameters.values()
    named = {one.name for one in arguments if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    keywords = swapped_modules.known_keywords(attention.__class__)
    more = swapped_modules.unknown_state(wrapper, attention) | (named - keywords)
    if not more:
        return None
    return (
        f"it has {', '.join(sorted(more))} beyond the published one, which knows no mask of the source; "
        f"if that is no mask, allow=[{type(wrapper).__name__!r}] has it swapped"
    )


def _reason_against_interface(attention: Any) -> str | None:
    name = type(attention).__name__
    config: Any = getattr(attention, "config", None)
    if not hasattr(config, "_attn_implementation_internal"):
        return f"{name} has no config._attn_implementation: it does not go through transformers' attention interface"
    if not isinstance(getattr(attention, "layer_idx", None), int):
        return f"{name} has no layer_idx"
    if (config._attn_implementation or "").startswith(PREFIX):
        return f"{name} already goes through layalign's attention function"
    return None


def can_be_tried(attention: nn.Module) -> bool:
    """Whether ``attention`` can run now. Sharded weights run only in a real step, meta weights never."""
    kinds = ("ds_id", "placements")  # DeepSpeed's, and a DTensor's
    weights = attention.parameters()
    odd = (w.is_meta or w.numel() == 0 or any(hasattr(w, kind) for kind in kinds) for w in weights)
    return not any(odd)


def _try_attention(wrapper: Any, attention: Any, gate: Tensor) -> str | None:
    """Compare with an open gate, on two rows with padded tokens and with source states whose last position is zero.

    A forward that takes either as padding of the source gives another result.
    """
    if not can_be_tried(attention):
        return None
    weights = list(attention.parameters())
    dtype = next((w.dtype for w in weights if w.is_floating_point()), gate.dtype)
    like = torch.empty(0, dtype=dtype, device=weights[0].device if weights else gate.device)
    config, tokens = attention.config, 4
    rope = getattr(config, "rope_parameters", None) or {}
    angles = 3 * _random((1, tokens, int(head_size(attention) * rope.get("partial_rotary_factor", 1.0)) // 2), like)
    angles = torch.cat([angles, angles], dim=-1)
    arguments = dict(
        hidden_states=_random((2, tokens, config.hidden_size), like),
        attention_mask=_causal(tokens, like) if config._attn_implementation in (None, "sdpa", "eager") else None,
        position_ids=torch.arange(tokens, device=like.device)[None],
        use_cache=False,
        position_embeddings=(angles.cos(), angles.sin()),
        **dict.fromkeys(CACHE_NAMES & inspect.signature(type(wrapper).forward).parameters.keys()),
    )
    pair = tuple(_random((2, 3, config.hidden_size), like, seed) for seed in (1, 2))
    for state in pair:
        state[:, -1] = 0
    child = wrapped_attention(wrapper)
    assert child is not None
    original = type(wrapper)

    def swapped() -> Tensor:
        state = swapped_modules.attention_state(wrapper, child, "torch")
        with swapped_modules.swapped_within(wrapper, swapped_modules.SwappedAttention, state):
            return swapped_modules.attend(wrapper, attention, **arguments)[0]  # type: ignore[no-any-return]

    gate = nn.Parameter(torch.full_like(gate, 0.7), requires_grad=False)  # at zero every formula would look alike
    with _set(vars(wrapper), "adapter_states", pair), _set(wrapper._parameters, "adaption_gate", gate):
        bound = max(_tolerance(like.dtype), 1e-6)  # the published softmax is in float32, whatever the weights are
        return _compare(lambda: original.forward(wrapper, **arguments)[0], swapped, like, bound)


@contextmanager
def _set(entries: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Replace one entry within the block. The old value itself is not changed."""
    before = dict(entries)
    entries[name] = value
    try:
        yield
    finally:
        del entries[name]
        entries.update(before)


@contextmanager
def _telling(module: nn.Module) -> Iterator[None]:
    """Random float64 weights and training mode within the block. The Parameters are not changed.

    Zeros, half precision and inactive dropout would hide a difference.
    """
    before = [(part, part.training, dict(part._parameters)) for part in module.modules()]
    for part, _, own in before:
        part.training = True
        for name, weight in own.items():
            if weight is not None:
                like = torch.empty(0, dtype=torch.float64, device="cpu")
                random = _random(tuple(weight.shape), like) / weight.shape[-1] ** 0.5
                part._parameters[name] = nn.Parameter(random, requires_grad=False)
    try:
        yield
    finally:
        for part, training, own in before:
            part.training = training
            part._parameters.update(own)


def _random(shape: tuple[int, ...], like: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(dtype=like.dtype, device=like.device)


def _causal(tokens: int, like: Tensor) -> Tensor:
    """An additive mask (2, 1, T, T); the second row's first token is padding."""
    smallest = torch.finfo(like.dtype).min
    mask = torch.full((2, 1, tokens, tokens), smallest, dtype=like.dtype, device=like.device).triu(1)
    mask[1, :, 1:, 0] = smallest
    return mask


def _hidden(projector: Any) -> list[Tensor]:
    shape = (2, 3, projector.fc2.in_features)
    return [_random(shape, projector.fc1.weight, seed) for seed in range(projector.fc1.in_features)]


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, 5e-2)


def _compare(
    original: Callable[[], Tensor], ours: Callable[[], Tensor], like: Tensor, bound: float | None = None
) -> str | None:
    devices = [like.device] if like.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            state = torch.random.get_rng_state()
            expected = original()
            torch.random.set_rng_state(state)  # the same dropout for both
            found = ours()
    except Exception as error:  # whatever a stranger's forward may raise
        return f"it could not be tried on a small input: {type(error).__name__}: {first_line(error, 200)}"
    if not isinstance(expected, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        return "its result has another type, shape or dtype than the published one"
    largest = expected.abs().max().clamp(min=1e-6)
    off = float((expected - found).abs().max() / largest)
    if not off <= (_tolerance(like.dtype) if bound is None else bound):
        return f"its result differs from the published formula, by {off:.1e} of the largest number on a random input"
    return None
