"""Where a step's time goes: kernels, launches and waits of the host, from torch.profiler.

``python benchmarks/kernel_times.py FILE`` writes them for a training step, a prefill and a decoding step of the model
of test_full_size.py with grouped queries, a step at a time: those that FILE has are left out. ``--once`` runs the
operations at the paper's shapes once each, for ncu.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import operations
import shapes as shapes_
import torch
from torch.profiler import ProfilerActivity, profile

from layalign.ops import backends

KEPT = 25  # kernels that take the most time
# Events of the host: those that launch, and those for which it waits.
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def profiled(call: Callable[[], Any], gpu: bool) -> dict[str, Any]:
    """Kernels with their calls and seconds, launches, waits and copies of one call, after two to warm up."""
    for _ in range(2):
        call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    if gpu:
        torch.cuda.synchronize()
    with profile(activities=activities) as recorded:
        call()
        if gpu:
            torch.cuda.synchronize()
    found = recorded.key_averages()
    # Ranges that torch names, such as the optimizer's step, have the kernels' time a second time.
    named = [event for event in found if not getattr(event, "is_user_annotation", False)]
    on_device = [event for event in named if str(event.device_type).endswith("CUDA") == gpu]
    own = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in on_device}
    counts = {event.key: event.count for event in found}
    kernels = sorted(on_device, key=lambda event: -own[event.key])
    return {
        "seconds": sum(own.values()) / 1e6,
        "kernels": sum(event.count for event in kernels),
        "launches": sum(counts.get(name, 0) for name in LAUNCHES),
        # One of them is the wait at the end, which is ours.
        "waits": {name: counts[name] for name in WAITS if name in counts},
        "copies": sum(count for name, count in counts.items() if name.startswith("Memcpy ")),
        "by kernel": [
            {"name": event.key[:160], "calls": event.count, "seconds": own[event.key] / 1e6} for event in kernels[:KEPT]
        ],
    }


def steps(shapes: shapes_.Shapes) -> dict[str, Callable[[], Any]]:
    """The steps to profile, by name."""
    import workloads
    from models import Models
    from test_full_size import loss_calls, static_step

    models = Models(shapes.full[-1], shapes)
    train, decode = shapes.full_train[0], shapes.full_decode[0]
    training = loss_calls(models, train, "training step")
    data = workloads.Data(models, decode, labels=False)

    @torch.no_grad()
    def prefill() -> Any:
        return models.ours(**data.packed, **data.encoder, use_cache=True, logits_to_keep=1)

    return {
        "training step": training[workloads.OURS],
        "training step, bare LLM": training[workloads.BARE],
        "prefill": prefill,
        "decode step": static_step(models, decode, workloads.OURS),
        "decode step, bare LLM": static_step(models, decode, workloads.BARE),
    }


def once(shapes: shapes_.Shapes) -> None:
    """Every operation with every backend, without and with gradients."""
    device, dtype = shapes.device, shapes.dtype
    heads, size = shapes.attention_heads
    cases = [operations.layers("layer_mix", *shapes.mix[len(shapes.mix) // 2], shapes.mix_sizes, device, dtype)]
    for groups in (heads, heads // 4):
        cases += [operations.attention(*shape, heads, groups, size, device, dtype) for shape in shapes.attention]
    for case in cases:
        for impl in backends.names():
            if impl == "torch" or not backends.serves(case.name, impl, device)[0]:
                continue
            for call in [
                case.passes(impl, False),
                *([case.passes(impl, True)] if case.labels.get("queries", 2) > 1 else []),
            ]:
                call[impl]()
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--once", action="store_true", help="run the operations once, profile nothing")
    arguments = parser.parse_args()
    shapes = shapes_.chosen()
    if arguments.once:
        return once(shapes)
    file = arguments.file or parser.error("expected a file")
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, call in steps(shapes).items():
        if name in found:
            continue
        found[name] = own = profiled(call, shapes.device == "cuda")
        part = file.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(part, file)
        print(f"{name}: {own['seconds'] * 1e3:.2f} ms in kernels, {own['launches']} launches, waits {own['waits']}")
        for kernel in own["by kernel"][:8]:
            print(f"  {kernel['seconds'] * 1e3:9.3f} ms {kernel['calls']:5d} x {kernel['name'][:90]}")


if __name__ == "__main__":
    main()
