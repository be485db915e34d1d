"""One of several processes started by torchrun: runs the jobs of a plan one after another, as its tests ask for.

    torchrun ... distributed_worker.py PLAN RESULTS

PLAN is a JSON list of {"name", "kind", ...}; the main process writes {name: what came of it} to RESULTS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from layalign import LayAlignForCausalLM
from layalign.cli.evaluate import evaluate as command
from layalign.evaluation import evaluate
from layalign.modeling.tokenization import load_tokenizers
from layalign.training import load_train_config, run, train
from layalign.utils.errors import ArgumentError, StoppedError


class Bytes(TorchDispatchMode):
    """Counts the bytes of the whole tensors in collective calls, by their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d"):
            if "allgather_base" in name or "allgather_into_tensor_coalesced" in name:
                self._add("all-gather", args[0])
            elif "reduce_scatter" in name:
                self._add("reduce-scatter", args[1])
            elif "allreduce" in name:
                self._add("all-reduce", args[0])
            elif "barrier" not in name and "broadcast" not in name:
                self._add(name, args[0])
        return function(*args, **(kwargs or {}))

    def _add(self, kind: str, tensors: Any) -> None:
        for tensor in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
            self.counts[kind] += tensor.numel() * tensor.element_size()


class Watch(TrainerCallback):
    """What moves in every step, and what kinds of parameters there are."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.kinds: dict[str, int] = {}
        self.folding = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mode = Bytes()
        self.mode.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.mode.__exit__(None, None, None)
        self.steps.append(dict(self.mode.counts))
        self.kinds = dict(Counter("ZeRO-3" if hasattr(p, "ds_id") else type(p).__name__ for p in model.parameters()))
        self.folding = model.key_values.last


class InOneProcess(TrainerCallback):
    """A NaN in the third step, or SIGTERM in the second, of the second process alone."""

    def __init__(self, what: str) -> None:
        self.what, self.second = what, os.environ["RANK"] == "1"

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.second and self.what == "nan" and state.global_step == 2:
            hook = model.mapping.register_forward_hook(lambda module, arguments, output: output * float("nan"))
            self.remove = hook.remove
        if self.second and self.what == "sigterm" and state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.second and self.what == "nan" and state.global_step == 3:
            self.remove()


def run_trouble(job: dict[str, Any]) -> dict[str, Any]:
    fresh_engine()
    try:
        summary = train(load_train_config(job["config"]), callbacks=[InOneProcess(job["what"])])
    except StoppedError as error:
        return {"stopped": str(error)}
    return {"skipped": summary.skipped_steps, "after": summary.loss_after}


class Killed(TrainerCallback):
    """SIGKILL for every process, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run_killed(job: dict[str, Any]) -> None:
    train(load_train_config(job["config"]), callbacks=[Killed(job["step"])])


def run_refused(job: dict[str, Any]) -> dict[str, Any]:
    """Every process raises what the main one does, and none waits for it."""
    try:
        train(load_train_config(job["config"]))
    except ArgumentError as error:
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, str(error))
        return {"refused": told}
    return {}


def fresh_engine() -> None:
    """accelerate keeps its engine for the whole process; each job has its own."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_USE", "FSDP_"))]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_training(job: dict[str, Any]) -> dict[str, Any]:
    if not job.get("goes_on"):
        fresh_engine()
    watch = Watch()
    summary = train(load_train_config(job["config"]), callbacks=[watch])
    return {
        "log": summary.log_history, "before": summary.loss_before, "after": summary.loss_after, "kinds": watch.kinds,
        "steps": watch.steps, "folding": watch.folding, "resumed": summary.resumed_from,
    }  # fmt: skip


def run_evaluation(job: dict[str, Any]) -> dict[str, Any]:
    model = LayAlignForCausalLM.from_pretrained(job["model"])
    config = model.config
    tokenizers = load_tokenizers(job["model"], encoder=config.encoder_name_or_path, llm=config.llm_name_or_path)
    options = {"batch_size": 2, "max_new_tokens": 6, **job.get("options", {})}
    evaluate(model, *tokenizers, job.get("task", "mgsm"), job["data"], job["output"], **options)
    return {}


def run_command(job: dict[str, Any]) -> None:
    """`layalign evaluate`, which leaves the process group."""
    command(job["model"], "mgsm", job["data"], Path(job["output"]), batch_size=2, max_new_tokens=6, device="cpu")


def no_extension() -> None:
    """DeepSpeed would compile a shared-memory extension for CPUs on the first use."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plain = run.sharding_arguments

    def partition_all(config: Any, world_size: int) -> dict[str, Any]:
        found = plain(config, world_size)
        if "deepspeed" in found:  # else ZeRO-3 leaves parameters of this size whole
            found["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    run.sharding_arguments = partition_all


def main(plan: str, results: str) -> None:
    torch.manual_seed(0)
    jobs = json.loads(Path(plan).read_text(encoding="utf-8"))
    if any(str(job.get("config", {}).get("sharding")).startswith("zero") for job in jobs):
        no_extension()
    found = {}
    for job in jobs:
        kinds = {"train": run_training, "evaluate": run_evaluation, "command": run_command, "trouble": run_trouble}
        kinds |= {"killed": run_killed, "refused": run_refused}
        found[job["name"]] = kinds[job["kind"]](job)
        if os.environ["RANK"] == "0":
            Path(results).write_text(json.dumps(found), encoding="utf-8")
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(*sys.argv[1:])
