"""Pickling of models, for ``torch.save`` and for processes that are spawned.

transformers' recorders of hidden states are local functions, which cannot be pickled. They have no state, so pickles
leave them out, and they are installed again where they are needed. Copies keep them.
"""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from typing import Any

from torch import nn
from transformers import PreTrainedModel, modeling_utils

from layalign.nn.inspection import parts

_FLAG = "_output_capturing_hooks_installed"


def _is_recorder(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


class _Hooks(OrderedDict):
    """A module's forward hooks. A pickle leaves out the recorders."""

    def __deepcopy__(self, memo: Any) -> Any:
        return OrderedDict(self)  # copies share functions

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, ([(number, hook) for number, hook in self.items() if not _is_recorder(hook)],)


class _Installed(int):
    """True in copies, False in pickles."""

    def __deepcopy__(self, memo: Any) -> bool:
        return True

    def __reduce_ex__(self, protocol: Any) -> Any:
        return bool, ()


def _reduce(module: nn.Module) -> Any:
    reduced = module.__reduce_ex__(2)
    state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
    if not isinstance(state, dict):
        return reduced
    changed = dict(state)
    if any(map(_is_recorder, state.get("_forward_hooks", {}).values())):
        changed["_forward_hooks"] = _Hooks(state["_forward_hooks"])
    if state.get(_FLAG):
        changed[_FLAG] = _Installed(True)
    return (*reduced[:2], changed, *reduced[3:])


def leave_out_recorders(model: nn.Module) -> None:
    """From now on, pickles leave out the recorders in ``model``.

    It is registered for the classes of its modules: for a module inside another one, ``pickle`` consults nothing else.
    """
    for module in parts(model):
        recorded = module.__dict__.get(_FLAG) or any(map(_is_recorder, module._forward_hooks.values()))
        if recorded and type(module) not in copyreg.dispatch_table:
            copyreg.pickle(type(module), _reduce)  # type: ignore[arg-type]


def make_recordable(model: nn.Module) -> None:
    """Tell transformers what it can record in ``model``: constructors do that, and unpickling does not call them."""
    registry: Any = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", None)
    for module in parts(model) if registry is not None else ():
        if isinstance(module, PreTrainedModel):
            key: Any = str(type(module)) if type(registry) is dict else module  # earlier releases ask for the name
            registry[key] = getattr(module, "_can_record_outputs", None)
