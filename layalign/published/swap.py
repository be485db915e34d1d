"""The one-line swap: makes the published-style modules of a tree fast in place, and restores them.

    report = layalign.swap_modules(model)  # same parameters, same state dict, same numbers
    print(report)
    layalign.restore_modules(model)        # the exact classes and config objects from before

Nothing is imported from the user's code, and nothing global is patched. A module's ``forward`` is compared with the
published formula on a small random input (:mod:`layalign.published.match`). If they agree, this instance gets a
subclass of its own class (:mod:`layalign.published.swapped_modules`).
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layalign.modeling.key_values import CHOICES
from layalign.modeling.model import LayAlignForCausalLM
from layalign.nn import EncoderAligner, GatedCrossAttention, WeightedLinearProjector
from layalign.ops import backends
from layalign.published import match, swapped_modules
from layalign.utils.errors import ArgumentError, one_of, refuse
from layalign.utils.moved import renamed

logger = logging.getLogger("layalign")

LOOKED_FOR = (
    "an aligner (a child projector with fc1 and fc2), a projector (fc1 and fc2), a gated attention wrapper "
    "(adaption_gate, adapter_states and a wrapped attention module), a Mapping, or layalign's own modules"
)
_SETTINGS = "layalign_settings"  # on our own modules: name and value of the setting before the first swap


@dataclass
class SwapReport:
    """What :func:`swap_modules` or :func:`restore_modules` did.

    Attributes:
        swapped: (module name, what is different now). The name of the tree's root is empty.
        left: (module name, reason) of every candidate that was left alone.
        notes: further remarks.
    """

    swapped: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, rows in (("swapped", self.swapped), ("left as they are", self.left)):
            lines.append(f"{title}: {len(rows) or 'none'}")
            names: dict[str, list[str]] = {}
            for name, text in rows:
                names.setdefault(text, []).append(name or "(the model itself)")
            for text, same in names.items():
                many = f"{same[0]} ... {same[-1]} ({len(same)} modules)"
                lines.append(f"  {', '.join(same) if len(same) < 3 else many}: {text}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def swap_modules(
    model: nn.Module, *, impl: str = "auto", fold_projections: str = "auto", allow: Sequence[str | type] = ()
) -> SwapReport:
    """Make the published-style modules of a tree fast: same parameters, same state dict, same results.

    - An aligner or a bare projector reads the encoder's layers in place, in one operation. Format and shapes are those
      of the original: L pairs of (B, S, D_l), or (B, S, 2L, D_l).
    - A gated attention wrapper runs the wrapped attention once. The gated term is added inside it, before its one
      output projection, and what the wrapped attention returns is returned. As published, padding of the source is
      attended to, and scores are scaled by 1 / sqrt(d).
    - layalign's own models get ``impl`` and ``fold_projections``.

    A module is swapped only if its ``forward`` agrees with the published formula on a small random input, in the
    module's own dtype. A wrapper that holds or takes more than the published one is left alone unless `allow` names its
    class: it may be a mask of the source, which no trial shows before it is set. A mask that ``forward`` reads from a
    global variable or from the config is not seen: do not swap such wrappers.

    A swapped module runs its own ``forward`` again in a call where the swap would not be safe:

    - weights can no longer be read (wrapped by LoRA, or sharded later);
    - the attention's output projection has a bias or hooks;
    - the wrapper is given an unknown keyword or more than two ``adapter_states``, or has got a new attribute or buffer.

    Keys and values of the source are kept while ``adapter_states`` and the key and value maps do not change, no
    gradient is wanted and the module is in eval mode. They are computed at every call if the maps are neither plain
    ``nn.Linear`` nor peft's LoRA around one, have hooks, or were made in inference mode. Three changes cannot be seen:
    writing through ``.data`` (``p.data.mul_(2)``), in-place changes of states made in inference mode, and all in-place
    changes in compiled calls, which use what others have kept (``generate`` compiles decoding only). After those, set
    ``adapter_states`` again, to other tensor objects.

    Hooks of swapped modules run as before. Hooks of the wrapped attention run in the trial too; they see
    ``layalign_source`` and the sum with the gated term.

    Gradient checkpointing works with ``use_reentrant=False``. Re-entrant checkpoints fail with the swap as without it:
    ``adapter_states`` is an attribute, so every layer's backward runs through the aligner's graph again.

    Args:
        model: any tree of torch modules: a model, its wrapper (DDP, torch.compile, peft), or a single module.
        impl: backend of the operations, "auto" or a name from :func:`layalign.ops.backends.names`.
        fold_projections: "auto", "always" or "never", for layalign's own models (:mod:`layalign.modeling.key_values`).
            Published-style modules have nothing to fold.
        allow: classes of attention wrappers, or their names. What they hold or take beyond the published one is no mask
            of the source. They are compared with the formula all the same.

    Returns:
        What was swapped, and what was left alone for which reason. A second call only changes ``impl`` and
        ``fold_projections``.

    Raises:
        ArgumentError: an argument has a wrong value, or the tree has none of the modules looked for.

    Source: LayAlign's published code; :mod:`layalign.reference` has the mathematics.
    """
    _check(model)
    backends.check_impl(impl)
    one_of("fold_projections", fold_projections, CHOICES)
    if not isinstance(allow, list | tuple) or not all(isinstance(each, str | type) for each in allow):
        refuse("allow", "a list of classes or their names", allow)
    report = SwapReport()
    for name, module in _candidates(model):
        _swap(name, module, impl, fold_projections, allow, report)
    if not report.swapped and not report.left:
        raise ArgumentError(f"model: {type(model).__name__} has nothing to swap; looked for {LOOKED_FOR}")
    _finish(model, report)
    logger.log(logging.INFO if report.swapped else logging.WARNING, "layalign.swap_modules: %s", report)
    return report


def restore_modules(model: nn.Module) -> SwapReport:
    """Undo :func:`swap_modules`: every module gets its class, its config object and its settings back.

    A forward that was put on an instance after the swap (by a timer, or ``torch.compile(module.forward)``) stays. It
    then calls the module's own forward, and the report has a note.

    Returns:
        The restored modules, under ``swapped``.

    Raises:
        ArgumentError: nothing in the tree is swapped, or a module cannot be restored. All others have been by then.
    """
    _check(model)
    report = SwapReport()
    failed: ArgumentError | None = None
    for name, module in list(model.named_modules()):
        if isinstance(module, swapped_modules.Swapped):
            try:
                swapped_modules.restore_one(module)
            except ArgumentError as error:
                failed = failed or error
                continue
            report.swapped.append((name, f"{type(module).__name__} runs its own forward again"))
            if "forward" in module.__dict__:
                report.notes.append(f"{name}: the forward put on this instance after the swap stays")
        elif _SETTINGS in module.__dict__:
            for attribute, value in module.__dict__.pop(_SETTINGS).items():
                setattr(_settings_of(module), attribute, value)
            report.swapped.append((name, f"{type(module).__name__} has its own settings back"))
    if failed is not None:
        raise failed
    if not report.swapped:
        raise ArgumentError(f"model: nothing in this {type(model).__name__} is swapped; call swap_modules first")
    _finish(model, report)
    return report


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch module, got {type(model).__name__}")


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, outermost first. Modules inside one that is handled as a whole are left out."""
    inside: set[int] = set()
    for name, module in list(model.named_modules()):
        if id(module) in inside:
            continue
        yield name, module
        whole = isinstance(module, LayAlignForCausalLM | EncoderAligner | swapped_modules.Swapped)
        if whole:
            inside.update(id(part) for part in module.modules())


def _swap(
    name: str, module: nn.Module, impl: str, fold_projections: str, allow: Sequence[str | type], report: SwapReport
) -> None:
    """Swap one module, or report why not."""
    if isinstance(module, swapped_modules.Swapped):
        module.layalign_swap.impl = impl
        report.swapped.append((name, f"already swapped (impl {impl!r})"))
    elif isinstance(module, LayAlignForCausalLM | EncoderAligner | WeightedLinearProjector | GatedCrossAttention):
        report.swapped.append((name, _set_own(module, impl, fold_projections)))
    elif match.has_projector(module):
        text = "the encoder's layers are read in place, by layalign.ops.layer_projection"
        _try(name, module, match.reason_against_aligner, swapped_modules.SwappedAligner, impl, text, report)
    elif match.is_projector(module):
        text = "layalign.ops.layer_projection; its result is a view"
        _try(name, module, match.reason_against_bare_projector, swapped_modules.SwappedProjector, impl, text, report)
    elif match.is_gated_attention(module):
        text = "the gated term is added inside the wrapped attention; keys and values of the source are kept"
        against = functools.partial(match.reason_against_attention, allow=allow)
        _try(name, module, against, swapped_modules.SwappedAttention, impl, text, report)
    elif match.is_mapping(module):
        report.left.append((name, "two plain linear maps, nothing to fuse"))


def _try(name: str, module: nn.Module, against: Any, mixin: type, impl: str, text: str, report: SwapReport) -> None:
    reason = against(module)
    if reason is not None:
        report.left.append((name, reason))
        return
    state: Any = swapped_modules.ProjectionSwap(impl, module._modules.get("projector"))
    if mixin is swapped_modules.SwappedAttention:
        child = str(match.wrapped_attention(module))
        state = swapped_modules.attention_state(module, child, impl)
        if not match.can_be_tried(getattr(module, child)):
            text += " (not tried on a small input: its weights are sharded or on the meta device)"
    try:
        swapped_modules.swap_one(module, mixin, state)
    except ArgumentError as error:
        report.left.append((name, str(error)))
    else:
        report.swapped.append((name, text))


def _settings_of(module: nn.Module) -> Any:
    """The object that holds ``impl`` or ``fold_projections`` of a module of ours; None if there is none."""
    if isinstance(module, LayAlignForCausalLM):
        return module.key_values
    return module if isinstance(module, WeightedLinearProjector | GatedCrossAttention) else None


def _set_own(module: nn.Module, impl: str, fold_projections: str) -> str:
    """Set ``impl`` and ``fold_projections`` of one of our modules and its parts. Each remembers its first setting."""
    for part in module.modules():
        target = _settings_of(part)
        if target is not None:
            attribute, value = ("choice", fold_projections) if isinstance(part, LayAlignForCausalLM) else ("impl", impl)
            part.__dict__.setdefault(_SETTINGS, {attribute: getattr(target, attribute)})
            setattr(target, attribute, value)
    folding = f", fold_projections {fold_projections!r}" if isinstance(module, LayAlignForCausalLM) else ""
    return f"already layalign's: now impl {impl!r}{folding}"


def _finish(model: nn.Module, report: SwapReport) -> None:
    """Drop the compiled graphs of the modules as they were."""
    if "torch._dynamo" not in sys.modules or not report.swapped:
        return
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None)]
    torch.compiler.reset()  # also for a compiled module above this tree, which cannot be seen from here
    if compiled:
        report.notes.append("torch.compile: the graphs compiled so far were dropped; the next call compiles again")


def __getattr__(name: str) -> Any:
    return renamed(__name__, name, {"accelerate": "swap_modules", "restore": "restore_modules"})
