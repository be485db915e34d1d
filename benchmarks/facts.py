"""Where a measurement was made: device, driver, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    """The model of the CPU, if the system reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def facts(gpu: bool | None = None) -> dict[str, Any]:
    """Device, versions and commit of a measurement. `gpu`: describe the GPU or the CPU; default: a GPU if available.

    LAYALIGN_COMMIT names the commit of a checkout without .git.
    """
    versions = {}
    for package in ("layalign", "torch", "triton", "transformers", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    device: dict[str, Any] = {
        "type": "cpu",
        "name": _processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available() if gpu is None else gpu:
        properties = torch.cuda.get_device_properties(0)
        query = "driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem"
        device = {
            "type": "cuda",
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver and clocks (MHz: max sm, max memory, sm, memory)": _run(
                "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"
            ),
            "cuda": torch.version.cuda,
        }
    return {
        "device": device,
        "python": platform.python_version(),
        "versions": versions,
        "commit": os.environ.get("LAYALIGN_COMMIT") or _run("git", "rev-parse", "HEAD"),
        "changed files": _run("git", "status", "--porcelain", "--untracked-files=no").splitlines(),
    }


if __name__ == "__main__":
    text = json.dumps(facts(), indent=2)
    print(text)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            file.write(text + "\n")
