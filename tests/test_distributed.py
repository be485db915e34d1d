"""Two gloo processes against one: losses, weights, evaluation, resuming with another number of processes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TinyParts, save_parts, training_config

from layalign.training import train

HERE = Path(__file__).parent
TOLERANCE = 1e-5
STEPS, MICRO, BATCH, DEV, SAVED = 8, 2, 8, 7, 3  # 41 examples: the last step of the epoch, the sixth, has one


def settings(parts: TinyParts, output: Path, **changes: Any) -> dict[str, Any]:
    common = dict(max_steps=STEPS, micro_batch_size=MICRO, eval_batch_size=MICRO, batch_size=BATCH, dev_size=DEV)
    common |= dict(eval_steps=2, save_steps=SAVED, save_total_limit=None)
    return training_config(parts, output, **{**common, **changes}).to_dict()


def launch(folder: Path, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the jobs in two processes; what their main one found."""
    plan, results = folder / "plan.json", folder / "results.json"
    plan.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [*command, str(HERE / "distributed_worker.py"), str(plan), str(results)],
        capture_output=True, text=True, env=environment, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return found


def losses(log: list[dict[str, Any]], key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in log if key in entry}


def assert_same_log(found: list[dict[str, Any]], wanted: list[dict[str, Any]], after: int = 0) -> None:
    for key in ("loss", "grad_norm", "eval_loss", "learning_rate"):
        one, two = (
            {step: value for step, value in losses(log, key).items() if step > after} for log in (wanted, found)
        )
        assert one.keys() == two.keys() and one, key
        for step, value in one.items():
            assert two[step] == pytest.approx(value, rel=TOLERANCE, abs=1e-12), (key, step)


def assert_same_weights(found: Path, wanted: Path) -> None:
    one, two = load_file(wanted / "model.safetensors"), load_file(found / "model.safetensors")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert weight.dtype == two[name].dtype
        torch.testing.assert_close(
            two[name], weight, rtol=TOLERANCE, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def cut_off(run: Path, folder: Path) -> None:
    """A run as if it had been stopped behind its first checkpoint."""
    shutil.copytree(run / f"checkpoint-{SAVED}", folder / f"checkpoint-{SAVED}")
    for name in ("train_config.yaml", "training.json"):
        shutil.copy(run / name, folder / name)


def run_engine(tmp_path: Path, engines: list[str | None]) -> None:
    """Every engine against one process, and resuming from one to two processes and back."""
    parts = save_parts(tmp_path)
    whole = train(training_config(parts, tmp_path / "one", **_own(settings(parts, tmp_path / "one"))))
    wanted = json.loads(json.dumps(whole.log_history))
    jobs = []
    for engine in engines:
        name = str(engine)
        jobs.append({"name": name, "kind": "train", "config": settings(parts, tmp_path / name, sharding=engine)})
        cut_off(tmp_path / "one", tmp_path / f"{name}-on")
        # The micro batch is left open: the run's own is kept.
        config = settings(parts, tmp_path / f"{name}-on", sharding=engine)
        jobs.append({"name": f"{name}-on", "kind": "train", "config": config})
    found = launch(tmp_path, jobs)
    for engine in engines:
        name = str(engine)
        assert_same_log(found[name]["log"], wanted)
        assert found[name]["before"] == pytest.approx(whole.loss_before, rel=TOLERANCE)
        assert found[name]["after"] == pytest.approx(whole.loss_after, rel=TOLERANCE)
        assert_same_weights(tmp_path / name, tmp_path / "one")
        # One to two.
        assert found[f"{name}-on"]["resumed"] is not None
        assert_same_log(found[f"{name}-on"]["log"][1:], wanted, after=SAVED)
        assert_same_weights(tmp_path / f"{name}-on", tmp_path / "one")
        # Two to one.
        cut_off(tmp_path / name, tmp_path / f"{name}-back")
        config = training_config(parts, tmp_path / f"{name}-back", **_own(settings(parts, tmp_path / f"{name}-back")))
        back = train(config)
        assert back.resumed_from is not None
        assert_same_log(json.loads(json.dumps(back.log_history))[1:], wanted, after=SAVED)
        assert_same_weights(tmp_path / f"{name}-back", tmp_path / "one")
    (tmp_path / "found.json").write_text(json.dumps(found), encoding="utf-8")


def _own(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("encoder", "llm", "data", "output_dir")}


def test_ddp_and_fsdp2_equal_one_process(tmp_path: Path) -> None:
    run_engine(tmp_path, [None, "fsdp2"])
    print(
        json.loads((tmp_path / "found.json").read_text())["fsdp2"]["steps"][:2],
        json.loads((tmp_path / "found.json").read_text())["fsdp2"]["kinds"],
        json.loads((tmp_path / "found.json").read_text())["None"]["steps"][:2],
    )


def test_zero_equals_one_process(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the package deepspeed (the extra layalign[deepspeed]), which is not installed")
    run_engine(tmp_path, ["zero2", "zero3"])
