"""Weights that are sharded over processes by FSDP2, FSDP1 or ZeRO-3. An engine is imported only if it is in use."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is spread over a device mesh (FSDP2, tensor parallelism)."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def is_partitioned(parameter: Any) -> bool:
    """Whether ``parameter`` belongs to ZeRO-3: outside its module's call it is empty."""
    return hasattr(parameter, "ds_id")


def reason_whole_is_not_here(parameter: Any) -> str | None:
    """Why the data of ``parameter`` must not be read as the full weight; None if they may."""
    if is_partitioned(parameter):
        return "its weight is partitioned by ZeRO-3"
    if is_dtensor(parameter):
        return "its weight is sharded (DTensor)"
    if getattr(parameter, "_is_flat_param", False):
        return "its weight is one flat parameter of FSDP"
    return None


def engine_of(model: nn.Module) -> str | None:
    """The engine that shards all of ``model``: "FSDP2", "ZeRO-3", or None.

    While a module runs, FSDP2 replaces its sharded parameters by ordinary ones, in memory that it reuses. So the
    parameters alone do not tell.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(model, fsdp.FSDPModule):
        return "FSDP2"
    first = next(model.parameters(), None)
    if is_partitioned(first):
        return "ZeRO-3"
    return "FSDP2" if is_dtensor(first) else None


def full_shape(parameter: Any) -> torch.Size:
    """The shape of the full parameter."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def gathered(parameters: Iterable[Any], writer: int | None = None) -> AbstractContextManager[Any]:
    """Within the block, ZeRO-3's ``parameters`` are gathered in every process; what process ``writer`` writes stays."""
    wanted = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not wanted:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(wanted, modifier_rank=writer)
    return context


@torch.no_grad()
def whole(parameter: Any) -> Tensor:
    """A copy of the full parameter in every process. All processes call this together."""
    if is_dtensor(parameter):
        return parameter.detach().full_tensor()  # type: ignore[no-any-return]
    with gathered([parameter]):
        return parameter.detach().clone()  # type: ignore[no-any-return]


def like(parameter: Any, value: Tensor) -> Tensor:
    """``value`` (full, the same in every process) sharded as ``parameter`` is, without communication."""
    if not is_dtensor(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def put(parameter: Any, value: Tensor) -> None:
    """Write the full ``value`` into the parameter in place. All processes call this together with the same value."""
    with gathered([parameter], writer=0):
        parameter.copy_(like(parameter, value))
