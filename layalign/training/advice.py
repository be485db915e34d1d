"""A warning at the start of a run that is too short for its gates to leave zero."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from layalign.training.gates import gate_values

logger = logging.getLogger("layalign.training")

# The published translation stages sum to 0.42 to 0.7 (4e-5, cosine, 21,024 to 35,088 steps). With SmolLM2-135M and
# multilingual-e5-small the mean gate reached 0.05 after a sum of 0.27. No gate can grow beyond the sum.
LEAST_SUM = 0.05


def summed_rates(scheduler: Any, steps: int) -> float:
    """Sum of the learning rate over all steps of a run: about the farthest that Adam can move a parameter.

    Each step of Adam moves a parameter by about the learning rate at most (Kingma and Ba, 2015, section 2.1).

    Args:
        scheduler: a torch scheduler, or accelerate's wrapper of one. For one other than `LambdaLR` the initial rate is
            assumed at every step.
        steps: number of steps of the run.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    first: float = max(scheduler.base_lrs)
    if not isinstance(scheduler, LambdaLR):
        return first * steps
    factor = scheduler.lr_lambdas[0]
    return first * sum(factor(step) for step in range(steps))


class SmallRun(TrainerCallback):
    """Warns when the gates start at zero and the schedule is too short or too small to move them."""

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
                "learning_rate: the rates of this schedule sum to %.2g over %d steps. Adam moves a weight by about "
                "that much at most, so the gates stay close to zero (published translation stages: 0.4 and more); "
                "raise learning_rate (1e-3 worked for 800 steps of batch 32 with a 135M LLM) or train longer",
                reach, state.max_steps,
            )  # fmt: skip
