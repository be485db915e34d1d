"""Several processes, started by torchrun, answer one test set. Each has the full model or a shard of it."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from layalign.utils.lock import held

T = TypeVar("T")


class Processes:
    """The processes of this run; one if there is no process group. Every process calls the methods named "all_..."."""

    def __init__(self) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)

    @property
    def main(self) -> bool:
        """Whether this process is the one that reads and writes files."""
        return self.rank == 0

    def all_get(self, make: Callable[[], T]) -> T:
        """Run ``make`` in the main process alone; all processes return its result or raise its error."""
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]  # type: ignore[no-any-return]

    @contextmanager
    def all_held(self, folder: str | Path) -> Iterator[None]:
        """Within the block, the main process holds the folder (`layalign.utils.lock.held`); if it cannot, all raise."""
        with ExitStack() as stack:
            self.all_get(lambda: stack.enter_context(held(folder)))
            yield

    def all_gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def deal(self, batches: Sequence[T]) -> list[list[T]]:
        """Rounds of batches, one batch for each process in a round; the last round may be short."""
        return [list(batches[start : start + self.world]) for start in range(0, len(batches), self.world)]


def join(device: str | None) -> str | None:
    """Join the processes that torchrun started, over gloo, and return the device of this one.

    Args:
        device: the device asked for. None or "cuda" gives each process a GPU of its own, if there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if device in (None, "cuda") and torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(number)
        return f"cuda:{number}"
    return device


def leave() -> None:
    """Leave the process group together: a process that exits while its group is alive may end the others."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # A gloo thread that still frees a tensor when Python ends aborts the process. These threads end with the group.
        # A trained model in a reference cycle may hold the group, so collect it; the wait is for other holders (FSDP2).
        gc.collect()
        time.sleep(0.1)
