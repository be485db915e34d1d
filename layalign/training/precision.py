"""The precision of a run whose configuration says "auto": it depends on the processor."""

from __future__ import annotations

import logging

import torch

from layalign.training.config import TrainConfig

logger = logging.getLogger("layalign.training")


def native_bf16(use_cpu: bool = False) -> tuple[bool, str]:
    """Whether the processor that would train has native bf16, and a description of the processor.

    CUDA GPUs from compute capability 8.0, AMD's GPUs, and CPUs with AVX512_BF16 or AMX have it. Others may accept bf16
    but emulate it, slower than float32. Devices of other types count as not native.
    """
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    if not use_cpu and torch.accelerator.is_available():
        return False, f"a device of the type {torch.accelerator.current_accelerator()}"
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        native = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    else:  # torch below 2.12
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native, f"a CPU with {'' if native else 'neither '}AVX512_BF16 {'or' if native else 'nor'} AMX"


def uses_bf16(config: TrainConfig) -> bool:
    """Whether `config` trains in bf16 on this machine."""
    return native_bf16(config.use_cpu)[0] if isinstance(config.bf16, str) else config.bf16


def frozen_dtype(config: TrainConfig) -> str:
    """The dtype of the frozen parts on this machine: "stored" or the name of a dtype.

    With bf16 the frozen parts are kept in bfloat16, because autocast would cast a float32 weight again in every call.
    """
    if config.frozen_dtype != "auto":
        return config.frozen_dtype
    return "bfloat16" if uses_bf16(config) else "stored"


def tell(asked: TrainConfig, settled: TrainConfig, resumed: bool) -> None:
    """Log the chosen precision, with a warning if it will be slow.

    Args:
        asked: the configuration as it was given.
        settled: the same with every "auto" resolved.
        resumed: whether the run is resumed from a checkpoint.
    """
    native, processor = native_bf16(settled.use_cpu)
    if settled.bf16 and not native:
        began = "the run began with it and keeps it; " if resumed and asked.bf16 == "auto" else ""
        logger.warning(
            "bf16: %sthis is %s, where it may be slower than float32; bf16=false%s trains in float32",
            began, processor, " with allow_changed=bf16" if resumed else "",
        )  # fmt: skip
    elif "auto" in (asked.bf16, asked.frozen_dtype):
        frozen = "as stored" if settled.frozen_dtype == "stored" else f"in {settled.frozen_dtype}"
        why = "as the run began" if resumed else processor
        logger.info("bf16: %s (%s); frozen parts %s", str(settled.bf16).lower(), why, frozen)
