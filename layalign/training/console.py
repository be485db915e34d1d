"""Progress of a run as plain lines, for log files and consoles without a progress bar."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from layalign.training.gates import gate_values

if TYPE_CHECKING:
    from layalign.training.trainer import LayAlignTrainer


class ConsoleLines(TrainerCallback):
    """One line to stdout per logging step and per evaluation, from the main process.

        step 25/800: loss 3.412, learning rate 0.000998, gates 0.0042, 10.3 examples/s, 1:12:05 left
        step 25/800: dev loss 3.2914

    "gates" is the mean absolute gate, left out if this process does not hold the gates. "examples/s" counts the time
    within steps only. The time left assumes the pace so far, including evaluations and checkpoints.

    Args:
        trainer: the trainer, which counts the examples.
        has_dev: whether evaluations use a dev split; otherwise they use some of the training examples.
    """

    def __init__(self, trainer: LayAlignTrainer, has_dev: bool) -> None:
        self._trainer, self._what = trainer, "dev loss" if has_dev else "loss of some training examples"
        self._begun, self._first_step = 0.0, 0
        self._step_begun, self._in_steps, self._counted = 0.0, 0.0, 0
        self._evaluated = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._first_step = time.perf_counter(), state.global_step
        self._in_steps, self._counted = 0.0, self._trainer.examples_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_steps += time.perf_counter() - self._step_begun

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        # The first loss is measured before the Trainer has counted its steps.
        at = f"step {state.global_step}/{state.max_steps}" if state.max_steps else f"step {state.global_step}"
        if "loss" in logs:
            parts = [f"loss {logs['loss']:.4g}"]
            if "learning_rate" in logs:
                parts.append(f"learning rate {logs['learning_rate']:.3g}")
            gates = gate_values(model)
            if gates:
                parts.append(f"gates {sum(map(abs, gates)) / len(gates):.3g}")
            parts += self._pace(state)
            print(f"{at}: {', '.join(parts)}", flush=True)
        elif "eval_loss" in logs:
            line = f"{at}: {self._what} {logs['eval_loss']:.4f}"
            if line != self._evaluated:  # training ends with one more evaluation
                print(line, flush=True)
            self._evaluated = line

    def _pace(self, state: Any) -> list[str]:
        seen, seconds = self._trainer.examples_seen - self._counted, self._in_steps
        self._counted, self._in_steps = self._trainer.examples_seen, 0.0
        done = state.global_step - self._first_step
        if not seconds or done <= 0:
            return []
        left = (time.perf_counter() - self._begun) / done * (state.max_steps - state.global_step)
        return [f"{seen / seconds:.1f} examples/s", f"{timedelta(seconds=round(left))} left"]
