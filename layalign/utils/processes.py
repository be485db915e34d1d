"""Several processes answer one test set: started by torchrun, each with the whole model or a share of it."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from layalign.utils.lock import held

T = TypeVar("T")


class Processes:
    """The processes of this run, one where there is no process group. Calls with "all" are made by all of them."""

    def __init__(self) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)

    @property
    def main(self) -> bool:
        """Whether this process is the one that reads and writes files."""
        return self.rank == 0

    def all_get(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the main process, which alone runs it; what it raises, all raise."""
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
        """The main process holds the folder in the block; where it cannot, all raise (`layalign.utils.lock.held`)."""
        with ExitStack() as stack:
            self.all_get(lambda: stack.enter_context(held(folder)))
            yield

    def all_gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def deal(self, batches: Sequence[T]) -> list[list[T]]:
        """Rounds of batches, one for each process; the last round may be short."""
        return [list(batches[start : start + self.world]) for start in range(0, len(batches), self.world)]


def join(device: str | None) -> str | None:
    """Join the processes that torchrun started, over gloo; the device of this one.

    Args:
        device: what was asked for; None takes a GPU of this process's own where there is one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    import torch

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if device in (None, "cuda") and torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(number)
        return f"cuda:{number}"
    return device


def leave() -> None:
    """End in step: a process that exits with its group alive may take the others down with it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # A gloo thread that still frees a tensor when Python ends aborts the process. They end with the group, which a
        # trained model in a reference cycle holds; where more than that holds it (FSDP2), they get time to be done.
        gc.collect()
        time.sleep(0.1)
