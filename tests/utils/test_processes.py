"""The group of processes that `layalign train` and `layalign evaluate` leave."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from layalign.utils.processes import leave


def gloo_threads() -> int:
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_groups_threads_end_with_the_group(tmp_path: Path) -> None:
    """One that frees a tensor while Python ends aborts the process, after all its work is done."""
    before = gloo_threads()  # of groups that other tests have left behind
    gc.disable()
    try:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        cycle = [dist.group.WORLD]
        cycle.append(cycle)  # as a model that was trained in the group holds it
        del cycle
        dist.barrier()
        assert gloo_threads() > before
        leave()
    finally:
        gc.enable()
    assert not dist.is_initialized()
    assert gloo_threads() == before
