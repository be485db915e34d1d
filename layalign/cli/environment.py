"""What is installed on this machine and what of it layalign can use."""

from __future__ import annotations

import platform
from typing import Any

from layalign.utils.versions import TESTED, package_version, tested

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "peft",
    "liger_kernel",
    "datasets",
    "tokenizers",
    "safetensors",
    "gguf",
    "tensorboard",
    "numpy",
)


def examine() -> dict[str, Any]:
    """Examine this machine. Imports torch and asks each backend; changes nothing.

    Returns:
        Plain values, ready for JSON. `versions`: version by package, None if it is not installed; `tested`: range of
        tested versions by package; `devices`: description by device name; `backends`: one dict per backend (name,
        available, reason); `extension`: what the installation compiled of the extension, by backend.
    """
    from layalign.ops import backends

    versions: dict[str, str | None] = {"layalign": package_version(), "python": platform.python_version()}
    versions.update({name: package_version(name) for name in PACKAGES})
    rows = [
        {"name": entry.name, "available": bool(entry.available), "reason": entry.reason} for entry in backends.report()
    ]
    return {
        "versions": versions,
        "tested": {name: tested(name) for name in TESTED},
        "devices": _devices(),
        "backends": rows,
        "extension": _extension(),
    }


def _extension() -> dict[str, str]:
    from layalign.ops.extension import build_notes

    return build_notes() or {
        "cpp": "not built: run from the source tree",
        "cuda": "not built: run from the source tree",
    }


def _devices() -> dict[str, str]:
    import torch

    threads = torch.get_num_threads()
    devices = {"cpu": f"{platform.machine()}, {threads} thread(s) for torch"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        built = "this torch is a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        devices["cuda"] = f"none ({built})"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices
