"""Whether a module's weight may be read instead of calling the module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layalign.nn.rows import patched_forward
from layalign.nn.sharding import reason_whole_is_not_here
from layalign.utils.errors import ArgumentError

Module = TypeVar("Module", bound=nn.Module)

# Hooks from these modules only read parameters, move them or sum over processes; transformers' collect the outputs that
# a call asks for. Our own act within one pass of the LLM.
ENGINES = ("torch.distributed", "deepspeed", "accelerate", "transformers.utils", "layalign.nn.rows")


def parts(module: nn.Module) -> list[nn.Module]:
    """``module`` and all modules in it; faster than ``modules()``, which builds a name for each."""
    if torch.compiler.is_compiling():
        return list(module.modules())
    found, seen = [module], {module}
    for each in found:  # it grows meanwhile
        for part in each._modules.values():
            if part is not None and part not in seen:
                seen.add(part)
                found.append(part)
    return found


def trains(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` requires a gradient."""
    return any(p is not None and p.requires_grad for each in parts(module) for p in each._parameters.values())


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has forward or backward hooks."""
    own = module.__dict__  # faster than attributes: a decode step asks every layer
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks)


# Classes whose forward may be bypassed -> their forward when they were decorated.
_FORWARDS: dict[type, Any] = {}


def readable(cls: type[Module]) -> type[Module]:
    """Class decorator: the parameters of a module of :func:`is_exactly` this class may be read instead of calling it.

    A forward that is assigned to the class later is noticed.
    """
    _FORWARDS[cls] = cls.forward
    return cls


def is_repatched(cls: type[nn.Module]) -> bool:
    """Whether another forward has been assigned to a :func:`readable` class."""
    known = _FORWARDS.get(cls)
    return known is not None and cls.forward is not known


def is_intercepted(module: nn.Module) -> bool:
    """Whether a call of ``module`` does more or else than its class was written to do: hooks, or a patched forward."""
    return has_hooks(module) or patched_forward(module) is not None or is_repatched(type(module))


def is_exactly(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` is of a :func:`readable` class, not of a subclass, and nothing intercepts its call."""
    return type(module) is cls and not is_intercepted(module)


def is_watched(module: nn.Module) -> bool:
    """Whether ``module`` has hooks that are not an engine's."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        for hook in hooks.values():
            function = getattr(hook, "func", hook)
            if not str(getattr(function, "__module__", "")).startswith(ENGINES):
                return True
    return False


def computes(expected: Callable[[], Iterable[Tensor]], found: Callable[[], Iterable[Tensor]]) -> bool:
    """Whether two computations of float64 tensors agree, outside all modes of the caller.

    They run in a separate thread, because fake tensors, transforms and autocast belong to a thread. The random state
    stays unchanged.
    """

    def agree() -> bool:
        with torch.random.fork_rng([]), torch.no_grad(), torch.device("cpu"):
            try:
                pairs = zip(expected(), found(), strict=True)
                return all(one.shape == two.shape and torch.allclose(one, two, 1e-9, 1e-12) for one, two in pairs)
            except Exception:  # whatever an edited forward may raise
                return False

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(agree).result()


def is_altered(module: nn.Module) -> bool:
    """Whether a call may return something else than the forward of the module's class."""
    if (patched := patched_forward(module)) is not None:
        function = getattr(patched, "func", None)
        return not str(getattr(function, "__module__", "")).startswith(ENGINES)
    return has_hooks(module) and is_watched(module)


def require_input(name: str, value: Any, linear: Any) -> None:
    """Check the input of a linear map; for one that is wrapped, quantised or sharded, its size only.

    Raises:
        ArgumentError: ``value`` is not a floating tensor of the right size, or its dtype is not that of the weight.
    """
    from layalign.ops.checks import autocast_dtype, describe, is_floating

    size = getattr(linear, "in_features", None)
    if not is_floating(value) or value.dim() == 0 or (size is not None and value.shape[-1] != size):
        raise ArgumentError(f"{name}: expected a floating tensor (..., {size}), got {describe(value)}")
    weight = getattr(linear, "weight", None)
    if type(linear) is not nn.Linear or type(weight) is not nn.Parameter or weight.dtype == value.dtype:
        return
    if autocast_dtype(value) is None:
        raise ArgumentError(f"{name}: expected the weights' dtype {weight.dtype}, got {describe(value)}")


def device_of(module: Any) -> torch.device:
    """The device on which ``module`` takes its input: accelerate keeps the weights of an offloaded one elsewhere."""
    device = module.weight.device
    if (
        device.type == "meta"
        and (place := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None
    ):
        return torch.device(place)
    return device


def brought(module: nn.Module) -> AbstractContextManager[None]:
    """Within the block, the parameters of ``module`` itself are in memory, also where accelerate offloads them."""
    if torch.compiler.is_compiling() or not any(p is not None and p.is_meta for p in module._parameters.values()):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def reason_against_reading(linear: Any) -> str | None:
    """Why a linear map's weight must not be read directly; None if it may."""
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is not a plain Linear (quantised, LoRA-wrapped, or fused with others)"
    if is_intercepted(linear):  # parametrizations change the class
        return "Linear has hooks, a patched forward or parametrizations, which reading its weight would bypass"
    for parameter in linear._parameters.values():  # attribute access would make ZeRO-3 gather them
        if parameter is not None and (against := reason_whole_is_not_here(parameter)) is not None:
            return against
    weight = linear._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_meta or weight.shape != (linear.out_features, linear.in_features):
        return "its weight is sharded or of a tensor subclass"
    return None
