"""The classes that :func:`layalign.swap_modules` gives to published-style modules, and what an instance keeps.

Each is a subclass of the module's own class with another ``forward``. Parameters, state-dict keys, hooks and
``isinstance`` stay the same. Copies and pickles are swapped too.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layalign import ops
from layalign.modeling.attention_interface import PREFIX, register
from layalign.modeling.decoders import OUTPUT_MAPS, key_value_states
from layalign.nn.inspection import is_altered, is_intercepted, is_repatched, parts, readable, reason_against_reading
from layalign.ops import cached_launch
from layalign.ops.cached_launch import CachedDecode, side_by_side
from layalign.ops.gated_cross_attention import MAX_DECODE_ROWS
from layalign.published.kept import KeptStates
from layalign.utils.errors import ArgumentError
from layalign.utils.versions import CACHE_NAMES, importing

with importing():
    from transformers.utils.generic import TransformersKwargs


class Swapped:
    """Comes before a module's own class; ``layalign_swap`` holds what the instance needs."""

    layalign_swap: Any
    layalign_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(protocol, 2))  # the same form for all protocols
        made_here = original_class(type(self)) is not None
        if not made_here or not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        mixin, original = type(self).__bases__  # pickle cannot find a class made here, but these two
        return (_empty, (mixin, original), *reduced[2:])


@functools.cache
def swapped_class(mixin: type, original: type) -> type:
    """The class of ``original``'s swapped instances, under the original's name."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    readable(original)  # a later patch of its forward is noticed
    return type(original.__name__, (mixin, original), {**names, "layalign_original": original})


def original_class(cls: type) -> type | None:
    """The class that ``cls`` was made from. None if the instance got another class since, as FSDP gives it."""
    return cls.__bases__[1] if Swapped in cls.__bases__[0].__bases__ else None


def own_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``module`` does without the swap.

    This is called after :func:`layalign.restore_modules` too, by a wrapper that was put around our ``forward`` before.
    """
    if isinstance(module, Swapped):
        return super(Swapped, module).forward(*args, **kwargs)  # type: ignore[misc]
    return type(module).forward(module, *args, **kwargs)


def _empty(mixin: type, original: type) -> Any:
    cls: Any = swapped_class(mixin, original)
    return cls.__new__(cls)


# The aligner


@dataclass
class ProjectionSwap:
    """What a swapped aligner or projector keeps: the backend of its operation, and the projector an aligner had."""

    impl: str
    projector: nn.Module | None = None


def reason_against_maps(projector: Any) -> str | None:
    """Why fc1 and fc2 cannot be read now, or the relu not left out. fc3 is called if there is one."""
    for name, part in projector._modules.items():
        problem = None
        if name in ("fc1", "fc2"):
            problem = reason_against_reading(part)
        elif name != "fc3" and part is not None and (type(part) is not nn.ReLU or is_intercepted(part)):
            problem = f"expected a ReLU without hooks or a patched forward, got {type(part).__name__}"
        if problem is not None:
            return f"{name}: {problem}"
    return None


def slots(projector: Any, hidden: Sequence[Tensor], impl: str) -> Tensor:
    """E tensors (B, S, D_e) -> (2L, B, S, D_l)."""
    fc1, fc2 = projector.fc1, projector.fc2
    y = ops.layer_projection(hidden, fc1.weight, fc1.bias, fc2.weight, fc2.bias, impl=impl)
    return projector.fc3(torch.relu(y)) if hasattr(projector, "fc3") else y


def pairs(projector: Any, hidden: Sequence[Tensor], impl: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """E tensors (B, S, D_e) -> L pairs (B, S, D_l)."""
    states = slots(projector, hidden, impl).unbind(0)
    return tuple(zip(states[0::2], states[1::2], strict=True))


def _layers(projector: Any, hidden: Any) -> Sequence[Tensor] | None:
    """The E tensors (B, S, D_e) of an aligner's argument; None if it has another format."""
    if isinstance(hidden, Tensor) and hidden.dim() == 4:
        hidden = hidden.unbind(1)
    elif not isinstance(hidden, list | tuple) or not all(isinstance(h, Tensor) and h.dim() == 3 for h in hidden):
        return None
    if len(hidden) != projector.fc1.in_features or hidden[0].shape[-1] != projector.fc2.in_features:
        return None
    return hidden if all(h.dtype == hidden[0].dtype for h in hidden) else None  # the original promotes them


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument, the encoder's layers. None if there are others, or if it has another name."""
    if len(args) + len(kwargs) != 1:
        return None
    return args[0] if args else kwargs.get("hidden_states")


class SwappedAligner(Swapped):
    """Reads all layers in place, in one operation. Calls the original for anything else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        swap, projector = self.__dict__.get("layalign_swap"), self.projector  # type: ignore[attr-defined]
        if swap is None or is_repatched(self.layalign_original):
            return own_forward(self, *args, **kwargs)
        if projector is not swap.projector or is_intercepted(projector):
            return own_forward(self, *args, **kwargs)
        layers = _layers(projector, _argument(args, kwargs))
        if layers is None or reason_against_maps(projector) is not None:
            return own_forward(self, *args, **kwargs)
        return pairs(projector, layers, swap.impl)


class SwappedProjector(Swapped):
    """The projector alone: (B, E, S, D_e) -> (B, S, 2L, D_l), a view of what the operation returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        swap, stacked = self.__dict__.get("layalign_swap"), _argument(args, kwargs)
        layers = _layers(self, stacked) if isinstance(stacked, Tensor) else None
        if swap is None or is_repatched(self.layalign_original):
            return own_forward(self, *args, **kwargs)
        if layers is None or reason_against_maps(self) is not None:
            return own_forward(self, *args, **kwargs)
        return slots(self, layers, swap.impl).permute(1, 2, 0, 3)


# The attention


@dataclass
class AttentionSwap:
    """What a swapped attention wrapper keeps.

    Attributes:
        impl: backend of the operation.
        child: name of the wrapped attention module.
        config: the config object that module had: the LLM's.
        own: the copy of it that the module has now, which names another attention function.
        keywords: names that the attention may be called with.
        state: what the wrapper held beyond the published one when it was swapped.
        size: how many entries wrapper and attention held when that was last looked at.
        kept: keys and values of the last source.
        again: a decoding step with them that can be repeated.
    """

    impl: str
    child: str
    config: Any
    own: Any
    keywords: frozenset[str]
    state: frozenset[str] = frozenset()
    size: int = -1
    kept: KeptStates | None = None
    again: CachedDecode | None = None

    def __post_init__(self) -> None:
        register(self.config._attn_implementation or "sdpa")

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles do not carry what can be computed again
        return {**self.__dict__, "kept": None, "again": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # another process has nothing registered yet

    def follow(self) -> None:
        """Use the attention function that the LLM's own config names now."""
        name = PREFIX + (self.config._attn_implementation_internal or "sdpa")  # quicker than the property
        if self.own._attn_implementation_internal != name:
            self.own._attn_implementation_internal = register(name.removeprefix(PREFIX))

    def states(self, attention: nn.Module, pair: Any, query: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, G, S, d) of the source for a query (B, H, T, d). One source serves all B rows, as published.

        They are computed once per pair while :class:`layalign.published.kept.KeptStates` may keep them.
        """
        if (isinstance(pair, Tensor) and pair.shape[0] != 2) or not isinstance(pair, Tensor | list | tuple):
            raise ArgumentError(f"adapter_states: expected a pair of tensors (B, S, D_l), got {type(pair).__name__}")
        whole = (pair,) if isinstance(pair, Tensor) else tuple(pair)
        kept = self.kept  # another thread may replace it
        if kept is not None and kept.hold(attention, whole, query):
            return kept.key, kept.value
        self.again = None
        if attention.training:  # dropout in LoRA, checkpoints: nothing is kept
            self.kept = None
        key, value = key_value_states(attention, pair[0].to(query.device), pair[1].to(query.device))
        if key.shape[0] == 1 != query.shape[0]:
            key, value = (each.expand(query.shape[0], -1, -1, -1) for each in (key, value))
        if not torch.compiler.is_compiling():
            self.kept = KeptStates.of(attention, whole, key, value, query)
        return key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, residual: Tensor, overwrite: bool
    ) -> Tensor:
        """``residual`` (B, T, H, d) plus the gated term. ``residual`` may be overwritten if `overwrite` is set."""
        scale = query.shape[-1] ** -0.5  # as published, whatever the LLM's own
        compiling, again = torch.compiler.is_compiling(), self.again
        if again is not None and not compiling and cached_launch.possible():
            ready = again.prepare(key, value, gate, None, self.impl)
            if ready and (found := again(query, residual, scale, overwrite)) is not None:
                return found
        if not compiling and query.shape[2] <= MAX_DECODE_ROWS and (kept := self.kept) is not None and kept.key is key:
            key, value = side_by_side(key, value)
            self.kept = replace(kept, key=key, value=value)
        found = ops.gated_cross_attention(query, key, value, gate, residual, scale=scale, impl=self.impl)
        if not compiling:
            self.again = CachedDecode.after((query, key, value, gate, residual, None), scale, self.impl)
        return found


def reason_against_output(attention: nn.Module) -> str | None:
    """Why one projection of attention plus gated term differs from the published sum of two projections."""
    modules = attention._modules
    linear = next((modules[name] for name in OUTPUT_MAPS if name in modules), None)
    if linear is None:
        return f"{type(attention).__name__} has no output projection by a known name ({', '.join(OUTPUT_MAPS)})"
    for part in (linear,) if type(linear) is nn.Linear else parts(linear):
        if part._parameters.get("bias") is not None or part._buffers.get("bias") is not None:
            return "its output projection has a bias, which the published formula adds twice"
        if is_altered(part):
            return "its output projection has hooks or a patched forward: it may not be linear"
    return None


_KEYWORDS = {
    "hidden_states", "attention_mask", "position_embeddings", "use_cache", "cache_position", "past_key_value",
    *CACHE_NAMES, *TransformersKwargs.__annotations__,
}  # fmt: skip
_PUBLISHED = {"adapter_states", "adaption_gate", *dir(nn.Module), *vars(nn.Module())}
_OTHERS = {"layalign_swap", "layalign_original", "_hf_hook", "_old_forward", "_abc_impl"}  # ours, accelerate's, abc's
_SETTINGS = (int, float, str, torch.dtype, torch.device)


@functools.cache
def known_keywords(kind: Any) -> frozenset[str]:
    """What an attention of this class may be called with: what it names, and what transformers' decoders pass on."""
    return frozenset({*inspect.signature(kind.forward).parameters, *_KEYWORDS})


def unknown_state(wrapper: Any, attention: Any) -> frozenset[str]:
    """Names of what a wrapper holds beyond the published one: each may be a mask of the source, or become one.

    Left out are methods, settings that are neither zero nor empty, and whatever the attention has too. Of the attention
    itself, tensors count that are neither parameters nor buffers.
    """
    own = [base for base in reversed(type(wrapper).__mro__) if base not in nn.Module.__mro__]
    held = {n: v for base in own for n, v in vars(base).items() if not callable(v) and not hasattr(v, "__func__")}
    held |= {**vars(wrapper), **wrapper._buffers, **wrapper._parameters}
    more = {
        n for n, v in held.items() if not ((type(v) in _SETTINGS and v) or n.startswith("__") or hasattr(attention, n))
    }
    tensors = {n for n, v in vars(attention).items() if isinstance(v, Tensor)}
    return frozenset(more - _PUBLISHED - _OTHERS | tensors)


def _size(wrapper: nn.Module, attention: nn.Module) -> int:
    return len(wrapper.__dict__) + len(wrapper._buffers) + len(attention.__dict__)


class _Term:
    """Stands for the source in one call of the attention function: see :mod:`layalign.modeling.attention_interface`."""

    def __init__(self, wrapper: Any, attention: nn.Module) -> None:
        self.wrapper, self.attention, self.attended = wrapper, attention, False

    def attend(
        self, layer: int, query: Tensor, residual: Tensor, scale: float | None, *, overwrite: bool = False
    ) -> Tensor:
        """``residual`` (B, T, H, d) plus the gated term; see `layalign.modeling.attention_interface.register`."""
        self.attended = True
        swap = self.wrapper.layalign_swap
        key, value = swap.states(self.attention, self.wrapper.adapter_states, query)
        return swap.attend(query, key, value, self.wrapper.adaption_gate.to(query.device), residual, overwrite)


def attend(wrapper: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
    """What the wrapped attention returns, with the gated term in it.

    Raises:
        ArgumentError: the attention did not pass the source on.
    """
    term = _Term(wrapper, attention)
    out = attention(*args, layalign_source=term, **kwargs)
    if not term.attended:
        raise ArgumentError(
            f"model: {type(attention).__name__} does not hand its keywords to transformers' attention interface; "
            "restore_modules(model) undoes the swap"
        )
    return out


def _is_unknown(wrapper: Any, swap: AttentionSwap, attention: Any, given: dict[str, Any]) -> bool:
    """Whether this call has what the trial had not: a keyword, a third state, an attribute set since the swap."""
    for name in given:
        if name not in swap.keywords and given[name] is not None:
            return True
    states: Any = wrapper.adapter_states
    if isinstance(states, list | tuple) and len(states) != 2:
        return True
    size = _size(wrapper, attention)
    if size != swap.size and unknown_state(wrapper, attention) - swap.state:
        return True
    swap.size = size
    return False


class SwappedAttention(Swapped):
    """Runs the wrapped attention once and adds the gated term before its one output projection."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        swap = self.__dict__.get("layalign_swap")
        if swap is None or is_repatched(self.layalign_original):
            return own_forward(self, *args, **kwargs)
        attention: Any = self._modules.get(swap.child)  # type: ignore[attr-defined]
        if getattr(attention, "config", None) is not swap.own:
            return own_forward(self, *args, **kwargs)  # an attention put in after the swap: its config is not ours
        swap.follow()
        if reason_against_output(attention) or _is_unknown(self, swap, attention, kwargs):
            return own_forward(self, *args, **kwargs)
        return attend(self, attention, *args, **kwargs)


# Swapping one module


def attention_state(wrapper: Any, child: str, impl: str) -> AttentionSwap:
    """What a wrapper that is to be swapped will keep."""
    config = getattr(wrapper, child).config
    # A copy that shares everything but the attention's name: other modules use the same object.
    return AttentionSwap(impl, child, config, copy.copy(config), known_keywords(getattr(wrapper, child).__class__))


def swap_one(module: Any, mixin: type, state: Any) -> None:
    """Swap one module.

    Raises:
        ArgumentError: its class cannot have this subclass.
    """
    original: Any = type(module)
    try:
        module.__class__ = swapped_class(mixin, original)
    except Exception as error:  # __init_subclass__, metaclasses, slots: whatever a stranger's class may raise
        raise ArgumentError(f"its class cannot be extended: {type(error).__name__}: {error}") from error
    for part in (original, type(getattr(state, "projector", None))):
        if issubclass(part, nn.Module):
            readable(part)  # its present forward is the one that was compared
    module.__dict__["layalign_swap"] = state
    if isinstance(state, AttentionSwap):
        attention = getattr(module, state.child)
        attention.config = state.own
        state.state, state.size = unknown_state(module, attention), _size(module, attention)
        state.follow()


def restore_one(module: Any) -> None:
    """Undo :func:`swap_one`.

    Raises:
        ArgumentError: the module got another class after the swap.
    """
    original = original_class(type(module))
    if original is None:
        name = type(module).__name__
        raise ArgumentError(
            f"model: a {name} got another class after it was swapped (FSDP does so); call restore_modules before that"
        )
    state = module.__dict__.pop("layalign_swap")
    module.__class__ = original
    if isinstance(state, AttentionSwap):
        attention: Any = getattr(module, state.child, None)
        if getattr(attention, "config", None) is state.own:  # not of an attention put in since
            attention.config = state.config


@contextmanager
def swapped_within(module: nn.Module, mixin: type, state: Any) -> Iterator[None]:
    """Swap one module within the block only."""
    swap_one(module, mixin, state)
    try:
        yield
    finally:
        restore_one(module)
