"""SIGTERM, which clusters send before they reclaim a machine: the run finishes its step, saves it and stops."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger("layalign")


class StopOnSignal(TrainerCallback):
    """Stops training after the step in which any process gets SIGTERM, with a checkpoint of that step.

    Attributes:
        requested: this process got the signal.
        agreed: some process got it, and all of them know; set by the trainer once per optimizer step.
    """

    def __init__(self) -> None:
        self.requested, self.agreed = False, False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.requested = self.agreed = False
        # Only the main thread may set signal handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.requested = True
        logger.warning("SIGTERM: this step is finished and saved, then the run stops")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Restore the previous signal handler."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
