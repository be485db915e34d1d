"""A word about runs that cannot get anywhere, before they begin."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from layalign.training.gates import gate_values

logger = logging.getLogger("layalign.training")

# The published translation stages have 0.42 to 0.7 (4e-5, cosine, 21,024 to 35,088 steps). With SmolLM2-135M and
# multilingual-e5-small gates of 0.05 on the mean were reached after 0.27; they get no further than this sum.
LEAST_SUM = 0.05


def summed_rates(scheduler: Any, steps: int) -> float:
    """Sum of the learning rate over a run's steps from its beginning: about the most that Adam moves a parameter.

    Each step of Adam moves a parameter by about the learning rate at most (Kingma and Ba, 2015, section 2.1).

    Args:
        scheduler: of torch, or accelerate's around it. One that is no `LambdaLR` counts with its first rate throughout.
        steps: of the run.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    first: float = max(scheduler.base_lrs)
    if not isinstance(scheduler, LambdaLR):
        return first * steps
    factor = scheduler.lr_lambdas[0]
    return first * sum(factor(step) for step in range(steps))


class SmallRun(TrainerCallback):
    """Warns when gates that start at zero cannot leave it, by the steps, the schedule and the learning rate."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        gates = gate_values(model)
        if state.global_step or not state.is_world_process_zero or not gates or any(gates):
            return
        if not hasattr(getattr(lr_scheduler, "scheduler", lr_scheduler), "base_lrs"):  # an engine's own
            return
        reach = summed_rates(lr_scheduler, state.max_steps)
        if reach < LEAST_SUM:
            logger.warning(
                "learning_rate: over %d steps the rates of this schedule sum to %.2g, which is about the most that "
                "Adam moves a weight, so the gates hardly leave zero (published translation stages: 0.4 and more); "
                "raise learning_rate (1e-3 was good for 800 steps of batch 32 with an LLM of 135M) or train longer",
                state.max_steps, reach,
            )  # fmt: skip
