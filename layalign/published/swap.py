"""The one-line swap: published-style modules anywhere in a module tree, made fast in place and put back again.

    report = layalign.swap_modules(model)  # same parameters, same state dict, same numbers
    print(report)
    layalign.restore_modules(model)        # the exact classes and config objects from before

Nothing is imported from the user's code and nothing global is patched: single instances get a subclass of their own
class (:mod:`layalign.published.swapped_modules`), after their ``forward`` was compared with the published formula on a
small random input (:mod:`layalign.published.match`).
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
_SETTINGS = "layalign_settings"  # on our own modules: name and value of what was set, before the first time


@dataclass
class SwapReport:
    """What :func:`swap_modules` or :func:`restore_modules` did.

    Attributes:
        swapped: (module name, what is different now); the name of the tree's root is empty.
        left: (module name, reason) of every candidate that stays as it is.
        notes: what else there is to know.
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
    - A gated attention wrapper runs the wrapped attention once, with the gated term inside it, before its one output
      projection. It returns what the wrapped attention returns; padding is attended to, and scores are scaled by
      1 / sqrt(d), as published. The source's keys and values are kept for as long as ``adapter_states`` and the key and
      value maps do not change, no gradient is wanted and the module is in eval mode. They are computed at every call
      where the maps are neither plain ``nn.Linear`` nor peft's LoRA around one, have hooks, or were made in inference
      mode. Three changes cannot be seen: writing through ``.data`` (``p.data.mul_(2)``), in-place changes of states
      made in inference mode, and all in-place changes in compiled calls, which use what others have kept
      (``generate`` compiles decoding only). Set the adapter states anew after those, as other tensor objects.
    - layalign's own models get ``impl`` and ``fold_projections``.

    A module is swapped only if its ``forward`` agrees with the published formula on a small random input; dtypes are
    the module's own. Weights that can no longer be read (wrapped by LoRA or sharded later on), and output projections
    that get a bias or hooks, are called through the original ``forward`` again. Hooks of swapped modules run as before;
    those of the wrapped attention run in the trial too, and see ``layalign_source`` and the sum with the gated term.

    Gradient checkpointing: ``adapter_states`` is an attribute, not an argument. ``use_reentrant=False`` works.
    Re-entrant checkpoints fail as they do without the swap: every layer's backward walks the aligner's graph again.

    Args:
        model: any tree of torch modules: a model, its wrapper (DDP, torch.compile, peft), or a single module.
        impl: backend of the operations, "auto" or a name from :func:`layalign.ops.backends.names`.
        fold_projections: "auto", "always" or "never", for layalign's own models (:mod:`layalign.modeling.key_values`);
            published-style modules keep aligner and attention apart, so there is nothing to fold.
        allow: classes of attention wrappers, or their names, to swap although an instance holds more than the
            published one. What it holds is then taken to be no mask of the source. The trial is made all the same.

    Returns:
        What was swapped and what was left, with the reasons. Calling again only changes ``impl`` and
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

    A forward that was wrapped on an instance after the swap (by a timer, ``torch.compile(module.forward)``) stays, and
    calls the module's own through the one it took hold of; the report has a note on it.

    Returns:
        The modules that were put back, under ``swapped``.

    Raises:
        ArgumentError: nothing in the tree is swapped; or a module cannot be put back, and then all others have been.
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
    """Every module once, outermost first; nothing from inside what is dealt with as a whole."""
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
    """Deal with one module."""
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
        text = "the gated term is added inside the one attention; keys and values of the source are kept"
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
    """What :func:`_set_own` writes to for ``module``, which is layalign's own; None where there is nothing."""
    if isinstance(module, LayAlignForCausalLM):
        return module.key_values
    return module if isinstance(module, WeightedLinearProjector | GatedCrossAttention) else None


def _set_own(module: nn.Module, impl: str, fold_projections: str) -> str:
    """Both settings for one of our modules and the parts of it; each remembers what it had at first."""
    for part in module.modules():
        target = _settings_of(part)
        if target is not None:
            attribute, value = ("choice", fold_projections) if isinstance(part, LayAlignForCausalLM) else ("impl", impl)
            part.__dict__.setdefault(_SETTINGS, {attribute: getattr(target, attribute)})
            setattr(target, attribute, value)
    folding = f", fold_projections {fold_projections!r}" if isinstance(module, LayAlignForCausalLM) else ""
    return f"already layalign's: now impl {impl!r}{folding}"


def _finish(model: nn.Module, report: SwapReport) -> None:
    """Drop compiled graphs of the old modules."""
    if "torch._dynamo" not in sys.modules or not report.swapped:
        return
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None)]
    torch.compiler.reset()  # also for a compiled module above this tree, which cannot be seen from here
    if compiled:
        report.notes.append("torch.compile: the graphs compiled so far were dropped; the next call compiles anew")


def __getattr__(name: str) -> Any:
    return renamed(__name__, name, {"accelerate": "swap_modules", "restore": "restore_modules"})
