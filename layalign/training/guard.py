"""Checks every step for NaN, infinity and loss spikes; names the step and the tensor; stops or skips the step.

The check runs between the backward pass and gradient clipping, because clipping by a NaN norm would spread the NaN to
every gradient. It costs one norm over the trained gradients, one number from each process, and one wait for the device.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from layalign.nn.sharding import is_dtensor, whole
from layalign.utils.errors import NonFiniteError

logger = logging.getLogger("layalign")

WINDOW = 100
_SEEN_AT_LEAST = 20  # a median of fewer losses says little


class StepGuard(TrainerCallback, ExportableState):
    """Checks each optimizer step before it is taken.

    Args:
        max_skipped: how many steps may be skipped in the whole run, including the parts before it was resumed. A
            skipped step changes neither weights nor optimizer state; the learning rate schedule advances.
        spike_factor: a loss above this times the median of the last `WINDOW` losses is a spike; 0 disables the check.

    Attributes:
        skipped: steps skipped so far.
        spikes: steps whose loss was a spike.
        losses: losses of the last `WINDOW` steps taken.
    """

    def __init__(self, max_skipped: int = 0, spike_factor: float = 0.0) -> None:
        self.max_skipped, self.spike_factor = max_skipped, spike_factor
        self.skipped: list[int] = []
        self.spikes: list[int] = []
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self._seen: list[tuple[Tensor, Mapping[str, Any]]] = []

    # Saved in checkpoints, so that a resumed run decides like an uninterrupted one.

    def state(self) -> dict[str, Any]:
        """The state in the form that transformers saves in `trainer_state.json`."""
        return {"args": {}, "attributes": {"skipped": self.skipped, "spikes": self.spikes, "losses": [*self.losses]}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        kept = saved.get("attributes", {}) if isinstance(saved, dict) and state.global_step else {}
        self.skipped, self.spikes = list(kept.get("skipped", ())), list(kept.get("spikes", ()))
        self.losses = deque(kept.get("losses", ()), maxlen=WINDOW)
        self._seen = []

    # One step

    def saw(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Keep the loss of a micro batch and its inputs until the end of the step, without waiting for the device."""
        self._seen.append((loss, inputs))

    def check(
        self,
        step: int,
        model: nn.Module,
        mean: Callable[[Tensor], Tensor],
        rerun: Callable[[Mapping[str, Any]], Any] | None,
    ) -> None:
        """Check the step whose gradients have been computed, and drop the gradients if it has to be skipped.

        Args:
            step: its number, from 1.
            model: the model that holds the gradients.
            mean: returns the mean of a number over all processes.
            rerun: runs the forward pass of a micro batch again, to find where a NaN comes from; None if it cannot.

        Raises:
            NonFiniteError: NaN or infinity, and no more steps may be skipped.
        """
        seen, self._seen = self._seen, []
        losses = torch.stack([loss for loss, _ in seen])
        # DeepSpeed does not expose its gradients; its own overflow check covers them.
        loss, norm, *own = _numbers(mean(losses.sum()), gradient_norm(model), losses)
        suspect = next((inputs for (_, inputs), part in zip(seen, own, strict=True) if not math.isfinite(part)), None)
        if math.isfinite(loss) and math.isfinite(norm):
            median = statistics.median(self.losses) if len(self.losses) >= _SEEN_AT_LEAST else None
            if not self.spike_factor or median is None or loss <= self.spike_factor * median:
                self.losses.append(loss)
                return
            self.spikes.append(step)
            found = (
                f"step {step}: the loss {loss:.4g} is {loss / median:.1f} times the median of the last "
                f"{len(self.losses)} steps; largest gradient: {largest_gradient(model)}"
            )
            if len(self.skipped) >= self.max_skipped:
                logger.warning("%s (the step is taken)", found)
                self.losses.append(loss)
                return
        else:
            found = f"step {step}: {self._origin(loss, norm, model, suspect, rerun)}"
            if len(self.skipped) >= self.max_skipped:
                raise NonFiniteError(
                    f"{found}; {len(self.skipped)} steps were skipped before (max_skipped_steps {self.max_skipped}). "
                    "The last checkpoint is from before this step: resume from it with a smaller learning_rate, "
                    "another dtype (see allow_changed) or a larger max_skipped_steps"
                )
        self.skipped.append(step)
        logger.warning("%s; the step is skipped, %d of at most %d", found, len(self.skipped), self.max_skipped)
        for parameter in model.parameters():
            parameter.grad = None

    @staticmethod
    def _origin(
        loss: float, norm: float, model: nn.Module, suspect: Mapping[str, Any] | None, rerun: Callable[..., Any] | None
    ) -> str:
        bad = [name for name, parameter in model.named_parameters() if _broken(parameter.detach())]
        if bad:
            return f"the loss is {loss:g}; weights not finite: {_some(bad)}"
        if not math.isfinite(loss):
            if suspect is None:
                return f"the loss is {loss:g}, from a batch of another process"
            if rerun is None:
                return f"the loss is {loss:g}, from a batch of this process; not traced further in a sharded model"
            return f"the loss is {loss:g}; first not finite: {first_broken(model, lambda: rerun(suspect))}"
        bad = [name for name, parameter in model.named_parameters() if _broken(parameter.grad)]
        what = f"gradients not finite: {_some(bad)}" if bad else f"the norm of the gradients is {norm:g}"
        return f"the loss is {loss:.4g}; {what}"


def _numbers(*tensors: Tensor) -> list[float]:
    """All numbers of the tensors, in one transfer, in a dtype that holds those of each tensor."""
    return torch.cat([each.detach().flatten().to(tensors[0].device) for each in tensors]).tolist()


def gradient_norm(model: nn.Module) -> Tensor:
    """Norm of all gradients, including all shards; 0 without gradients. The device is not waited for."""
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms: list[Tensor] = []
    for sharded in (False, True):  # torch cannot stack the norms of both kinds
        group = [gradient for gradient in found if is_dtensor(gradient) == sharded]
        if group:
            norm: Any = torch.nn.utils.get_total_norm(group)
            norms.append(norm.full_tensor() if sharded else norm)
    if not norms:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm()


def largest_gradient(model: nn.Module) -> str:
    """Name and norm of the parameter with the largest gradient."""
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    norms = [(float(whole(gradient.norm())), name) for name, gradient in gradients if gradient is not None]
    if not norms:
        return "not available"
    norm, name = max(norms)
    return f"{name} ({norm:.3g})"


def first_broken(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Name of the first module in a forward pass whose output is not finite."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and any(isinstance(leaf, Tensor) and _broken(leaf) for leaf in tree_leaves(output)):
                found.append(f"output of {name}")

        return look

    # Children come before their parents. Not the outermost module: its output is the loss itself.
    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "nothing in a second forward pass"


def _broken(tensor: Tensor | None) -> bool:
    """Whether a tensor, or the shard of it on this process, holds a NaN or an infinity."""
    if tensor is None or not tensor.is_floating_point():
        return False
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return not bool(torch.isfinite(local).all())


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
