"""Which modules are published-style, and whether another ``forward`` would give what theirs gives.

Class names and structure make a module a candidate. What its ``forward`` computes is then compared with the published
formula on a small random input, so that a look-alike with other mathematics is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from layalign.modeling.attention_interface import PREFIX
from layalign.modeling.decoders import head_size, key_value_maps
from layalign.nn.aligner import STRUCTURES
from layalign.nn.inspection import has_hooks
from layalign.published import swapped_modules
from layalign.utils.versions import CACHE_NAMES

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # relative to the largest number; half precision: 5e-2


def has_projector(module: nn.Module) -> bool:
    """Whether ``module`` is an aligner by its structure: its own children, not those a wrapper passes on."""
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
    """What ``module`` has beside the published parts."""
    found = [n for n, c in module._modules.items() if n not in children and c is not None and type(c) is not nn.ReLU]
    found += [n for n, p in module._parameters.items() if n not in parameters and p is not None]
    found += [n for n, b in module._buffers.items() if b is not None]
    return f"it has parts that the published one has not: {', '.join(found)}" if found else None


def _patched(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule"
    if "forward" in module.__dict__:
        return "its forward is patched on the instance, which would hide ours"
    if nn.utils.parametrize.is_parametrized(module):
        return "it has parametrizations"
    return None


def reason_against_projector(projector: Any) -> str | None:
    """Why a projector's maps cannot take the place of its ``forward``."""
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
        problem = "its projector has hooks, which want to see it called"
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
    """Compare as the module is, and with weights and in a mode that hide nothing."""

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


def reason_against_attention(wrapper: Any) -> str | None:
    """Why a gated attention wrapper is left as it is; None if it can be swapped."""
    gate, child = wrapper._parameters.get("adaption_gate"), wrapped_attention(wrapper)
    if gate is None or gate.numel() != 1:
        return "adaption_gate: expected a Parameter with one number (not sharded)"
    if child is None:
        return "expected one child that is an attention module with known key and value maps"
    if not hasattr(wrapper, "adapter_states"):
        return "it has no adapter_states: what it attends to is not set from outside"
    problem = _patched(wrapper) or _parts(wrapper, {child}, {"adaption_gate"})
    if problem is not None:
        return problem
    problem = _reason_against_masks(type(wrapper)) or _reason_against_interface(getattr(wrapper, child))
    problem = problem or swapped_modules.reason_against_output(getattr(wrapper, child))
    return problem or _try_attention(wrapper, getattr(wrapper, child), gate)


def _reason_against_masks(cls: type) -> str | None:
    """Why ``forward`` may know which tokens of the source are padding: the trial has no mask, and would not tell.

    Looked through are ``forward`` and what it names of its classes and its file, decorators and inner functions.
    """
    own = [vars(base) for base in cls.__mro__ if base not in (nn.Module, object)]
    waiting: list[Any] = [names["forward"] for names in own if "forward" in names][:1]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        code = function if isinstance(function, CodeType) else getattr(function, "__code__", None)
        if code is None:
            return f"{cls.__name__}.forward is not a plain function: it cannot be looked through for masks"
        if id(code) in seen:
            continue
        seen.add(id(code))
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        texts = [text for text in code.co_consts if isinstance(text, str) and text.isidentifier()]
        for name in (*code.co_names, *(name for name in (*arguments, *texts) if name != "attention_mask")):
            if "mask" in name:
                return f"its forward uses {name}: the published one knows no mask of the source"
        waiting += [const for const in code.co_consts if isinstance(const, CodeType)]
        if function is not code:
            waiting += _named(function, code, own)
    return None


def _named(function: Any, code: CodeType, own: list[Any]) -> Iterator[FunctionType]:
    """The functions that ``function`` may call: what it is wrapped around, those of its classes and of its file."""
    found = [getattr(function, "__wrapped__", None)]
    found += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # not an empty one
    found += [names[name] for names in own for name in code.co_names if name in names]
    beside = [function.__globals__.get(name) for name in code.co_names]
    found += [each for each in beside if getattr(each, "__module__", None) == function.__globals__.get("__name__")]
    for each in found:
        each = getattr(each, "fget", None) or getattr(each, "__func__", each)  # of a property; of a static method
        if isinstance(each, FunctionType):
            yield each


def _reason_against_interface(attention: Any) -> str | None:
    name = type(attention).__name__
    config: Any = getattr(attention, "config", None)
    if not hasattr(config, "_attn_implementation_internal"):
        return f"{name} has no config._attn_implementation: it does not go through transformers' attention interface"
    if not isinstance(getattr(attention, "layer_idx", None), int):
        return f"{name} has no layer_idx"
    code = getattr(inspect.unwrap(type(attention).forward), "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names or not code.co_flags & inspect.CO_VARKEYWORDS:
        return f"{name}.forward does not hand its keywords to transformers' attention interface"
    if (config._attn_implementation or "").startswith(PREFIX):
        return f"{name} already goes through layalign's attention function"
    return None


def can_be_tried(attention: nn.Module) -> bool:
    """Whether ``attention`` can run now: sharded weights cannot be tried outside a real step, meta weights never."""
    kinds = ("ds_id", "placements")  # DeepSpeed's, and a DTensor's
    weights = attention.parameters()
    odd = (w.is_meta or w.numel() == 0 or any(hasattr(w, kind) for kind in kinds) for w in weights)
    return not any(odd)


def _try_attention(wrapper: Any, attention: Any, gate: Tensor) -> str | None:
    """Compare with an open gate, on states of random numbers."""
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
        hidden_states=_random((1, tokens, config.hidden_size), like),
        attention_mask=None,
        position_ids=torch.arange(tokens, device=like.device)[None],
        use_cache=False,
        position_embeddings=(angles.cos(), angles.sin()),
        **dict.fromkeys(CACHE_NAMES & inspect.signature(type(wrapper).forward).parameters.keys()),
    )
    pair = tuple(_random((1, 3, config.hidden_size), like, seed) for seed in (1, 2))
    child = wrapped_attention(wrapper)
    assert child is not None
    original = type(wrapper)

    def swapped() -> Tensor:
        state = swapped_modules.attention_state(wrapper, child, "torch")
        with swapped_modules.swapped_within(wrapper, swapped_modules.SwappedAttention, state):
            return wrapper.forward(**arguments)[0]  # type: ignore[no-any-return]

    with _set(wrapper, "adapter_states", pair), _open(wrapper, gate):
        bound = max(_tolerance(like.dtype), 1e-6)  # the published softmax is in float32, whatever the weights are
        return _compare(lambda: original.forward(wrapper, **arguments)[0], swapped, like, bound)


@contextmanager
def _set(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    had, before = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            module.__dict__[name] = before
        else:
            del module.__dict__[name]


@contextmanager
def _telling(module: nn.Module) -> Iterator[None]:
    """Random weights in float64 and training mode within the block.

    Zeros, half precision and dropout that is off would let other formulas pass. The Parameters are not touched.
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


@contextmanager
def _open(wrapper: nn.Module, gate: Any) -> Iterator[None]:
    """A gate of 0.7 within the block: at zero every formula would look alike. The Parameter itself is not touched."""
    wrapper._parameters["adaption_gate"] = nn.Parameter(torch.full_like(gate, 0.7), requires_grad=False)
    try:
        yield
    finally:
        wrapper._parameters["adaption_gate"] = gate


def _random(shape: tuple[int, ...], like: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(dtype=like.dtype, device=like.device)


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
        text = (str(error).strip().splitlines() or [""])[0][:120]
        return f"it could not be tried on a small input: {type(error).__name__}: {text}"
    if not isinstance(expected, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        return "its result has another format than the published one"
    largest = expected.abs().max().clamp(min=1e-6)
    off = float((expected - found).abs().max() / largest)
    if not off <= (_tolerance(like.dtype) if bound is None else bound):
        return f"its result differs from the published formula, by {off:.1e} of the largest number on a random input"
    return None
