"""SIGTERM, which clusters send before they take a machine back: the step ends, is saved, and the run stops."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger("layalign")


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which a process of the run gets SIGTERM, with a checkpoint of that step.

    Attributes:
        requested: this process got the signal.
        agreed: some process did, as all of them know; set once per optimizer step by the trainer.
    """

    def __init__(self) -> None:
        self.requested, self.agreed = False, False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.requested = self.agreed = False
        # Only a program's main thread may set handlers; elsewhere the program's own stays.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.requested = True
        logger.warning("SIGTERM: this step is finished and saved, then the run stops")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signal back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
