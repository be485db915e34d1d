"""The loss by Liger's fused linear cross-entropy, which never holds the logits of all labels at once.

Liger-Kernel (the extra ``liger``) takes hidden states and the output head's weight. It computes the logits in chunks,
and the gradient in the same pass. So the head must not run: :func:`layalign.modeling.loss.passing_on` makes it return
the hidden states that it gets. This is correct only if the LLM returns the head's output unchanged as its logits.
:func:`reason_against` says why Liger cannot be used. The package is imported by the first call that could use it.

Source: Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, 2024.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from layalign.modeling.decoders import AFTER_THE_HEAD
from layalign.modeling.loss import divided, label_loss, passing_on, with_loss
from layalign.nn.inspection import reason_against_reading
from layalign.nn.rows import KEYWORD, Rows, only_rows_leave
from layalign.ops.backends.triton import interpreting
from layalign.utils.errors import ArgumentError, BackendError
from layalign.utils.versions import CACHE_NAMES

logger = logging.getLogger("layalign")

_CHANGES_ITS_LOGITS: WeakSet[nn.Module] = WeakSet()  # LLMs that their first call has shown to do so


def reason_against(llm: Any, keep: int | Tensor | None = None, device: str | None = None) -> str | None:
    """Why Liger cannot compute this call's loss; None if it can.

    Args:
        llm: the causal LM.
        keep: the call's ``logits_to_keep``.
        device: type of the device to check, by default the one that holds the output head.
    """
    if keep is not None:
        return "logits_to_keep asks for logits, which it does not return"
    if torch.compiler.is_compiling():
        return "the call is compiled, and it reads the number of labels back"
    head = llm.get_output_embeddings()
    against = reason_against_reading(head)
    if against is not None:
        return f"the output head: {against}"
    device = head.weight.device.type if device is None else device
    if device != "cuda" and not interpreting():
        return f"its kernels need a GPU, the output head is on {device}"
    if head.weight.dtype == torch.float64:
        return "it computes in fp32, the output head is float64"
    config = llm.config.get_text_config(decoder=True)
    for name, nothing in AFTER_THE_HEAD.items():
        value = getattr(config, name, None)
        if value is not None and value != nothing:
            return f"the LLM's {name} = {value} changes the logits after the head"
    if llm in _CHANGES_ITS_LOGITS:
        return f"{type(llm).__name__} changes the logits after its head"
    return _load()[1]


def chosen(choice: str, llm: Any, keep: int | Tensor | None = None, device: str | None = None) -> bool:
    """Whether a call's loss is computed by Liger.

    Args:
        choice: "always", "never", or "auto": with gradients, on a GPU, if there is no reason against it.
        llm, keep, device: see :func:`reason_against`.

    Raises:
        ArgumentError: the choice is "always", and there is a reason against it.
    """
    if choice == "never" or (choice == "auto" and (interpreting() or not torch.is_grad_enabled())):
        return False
    against = reason_against(llm, keep, device)
    if against is not None and choice == "always":
        raise ArgumentError(f"fused_loss: expected 'auto' or 'never' for this call, got 'always': {against}")
    return against is None


@functools.cache
def _load() -> tuple[Callable[..., Tensor] | None, str | None]:
    """(Liger's function, None) or (None, why it is not available)."""
    try:
        module = importlib.import_module("liger_kernel.transformers.functional")
        return module.liger_fused_linear_cross_entropy, None
    except (ImportError, AttributeError) as error:
        return None, f"liger-kernel >= 0.5 is not installed, see the extra layalign[liger] ({error})"


def fused_label_loss(rows: Tensor, head: nn.Linear, targets: Tensor, divisor: Tensor | int | None) -> Tensor:
    """:func:`layalign.modeling.loss.label_loss` of ``head(rows)``, without the logits.

    Args:
        rows: (N, D) hidden states of the positions that have a label, in the head's dtype or under autocast.
        head: a plain output head (V, D), with or without bias; frozen, it gets no gradient.
        targets: (N,) int64, all of them labels.
        divisor: of the summed loss; None for N.

    Returns:
        The loss, fp32. It can be differentiated once: Liger's backward scales its saved gradient in place.

    Raises:
        BackendError: in a second backward.
    """
    if len(rows) == 0:  # Liger divides by the number of rows
        return label_loss(head(rows), targets, divisor)
    function = _load()[0]
    assert function is not None
    with torch.cuda.device_of(rows):  # Liger launches on the current device, the head may be on another
        total = function(rows, head.weight, targets.to(rows.device), head.bias, reduction="sum")
    if total.requires_grad:
        total.register_hook(_once())
    return divided(total, targets, divisor)


def _once() -> Callable[[Tensor], None]:
    """A hook that refuses a second backward, whose gradients would silently be wrong."""
    calls = []

    def hook(grad: Tensor) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise BackendError("liger: its loss can go backward once; set fused_loss='never' to retain the graph")

    return hook


def labelled_output(
    llm: Any,
    inputs: dict[str, Any],
    targets: Tensor,
    rows: Rows,
    divisor: Tensor | int | None,
    choice: str,
    bodies: Sequence[nn.Module],
) -> Any:
    """One pass of ``llm`` that returns the loss and no logits, by Liger if it is :func:`chosen`.

    Args:
        llm: the causal LM.
        inputs: its keyword arguments.
        targets: (B, T) int64, the label of each position, -100 where there is none.
        rows: the positions that have a label.
        divisor: of the summed loss; None for the number of labels.
        choice: see :func:`chosen`.
        bodies: see :func:`layalign.nn.rows.only_rows_leave`.

    Returns:
        The LLM's output object.

    Raises:
        ArgumentError: the choice is "always", and there is a reason against it.
    """
    head, labels = llm.get_output_embeddings(), targets.flatten().index_select(0, rows.index)
    if chosen(choice, llm):
        _say(choice)
        with only_rows_leave(bodies, rows, inputs[KEYWORD]) as selected, passing_on(head, selected) as passed_on:
            output = llm(**inputs, return_dict=True)
            head_ran = bool(selected) and not passed_on  # for the labelled rows alone
        if passed_on and output.logits is passed_on[-1]:
            return with_loss(output, fused_label_loss(passed_on[-1].flatten(0, -2), head, labels, divisor), None)
        if head_ran:
            return with_loss(output, label_loss(output.logits, labels, divisor), None)
        logger.info("layalign: %s changes the logits after its head; Liger is not used", type(llm).__name__)
        _CHANGES_ITS_LOGITS.add(llm)
        if any(inputs.get(name) is not None for name in CACHE_NAMES):  # a second pass would fill it twice
            raise ArgumentError(f"fused_loss: expected 'never' for {type(llm).__name__}, which changes its logits")
        chosen(choice, llm)  # raises for "always"
    with only_rows_leave(bodies, rows, inputs[KEYWORD]) as selected:
        output = llm(**inputs, return_dict=True)
    logits = output.logits if selected else rows.select(output.logits)
    return with_loss(output, label_loss(logits, labels, divisor), None)


@functools.cache  # once
def _say(choice: str) -> None:
    logger.info("layalign: loss by Liger's fused linear cross-entropy (fused_loss=%r)", choice)
