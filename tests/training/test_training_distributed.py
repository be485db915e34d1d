"""Training in two processes, as accelerate starts them with a configuration that ships with the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_training import save_parts, training_config
from transformers import TrainerCallback

from layalign.training import train
from layalign.training.checkpoints import checkpoints
from layalign.training.launch import preset_file
from layalign.utils.lock import held


@pytest.mark.slow
def test_both_stages_in_two_processes(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    common = dict(max_steps=2, batch_size=4, dev_size=4, eval_steps=0, save_steps=0, use_cpu=True, progress=False)
    values = dict(encoder=parts.encoder, llm=parts.llm, data=parts.data, stages={"translation": {}, "task": {}})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, **common}), encoding="utf-8")
    file = str(preset_file("accelerate", "fsdp2.yaml"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2"]
    launch += ["--main_process_port", "0"]
    command = ["-m", "layalign", "train", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    for stage in ("translation", "task"):
        assert json.loads((tmp_path / "out" / stage / "training.json").read_text(encoding="utf-8"))["steps"] == 2
        assert (tmp_path / "out" / stage / "model.safetensors").is_file()
    assert found.stdout.count("Training") == 1  # one process tells


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Crash(TrainerCallback):
    """The end in the middle of the sixth step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_killed_runs_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    # 41 examples: the sixth step is the last of the first epoch, and has one of them.
    changes = dict(max_steps=9, batch_size=8, micro_batch_size=2, dev_size=7, save_steps=2, save_total_limit=None)
    names = ("whole", "one", "two", "refused")
    configs = {name: training_config(parts, tmp_path / name, **changes) for name in names}
    whole = train(configs["whole"])
    with pytest.raises(KeyboardInterrupt):
        train(configs["one"], callbacks=[Crash()])
    kinds = {"one": "train", "refused": "refused", "two": "killed"}
    jobs = [{"name": name, "kind": kind, "config": configs[name].to_dict(), "step": 5} for name, kind in kinds.items()]
    plan, results = tmp_path / "plan.json", tmp_path / "told.json"
    plan.write_text(json.dumps(jobs), encoding="utf-8")
    command = [*TORCHRUN, str(Path(__file__).parents[1] / "helpers" / "distributed_worker.py"), str(plan), str(results)]
    with held(configs["refused"].output_dir):
        ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert ended.returncode != 0 and "SIGKILL" in ended.stderr, ended.stderr[-3000:]
    told = json.loads(results.read_text(encoding="utf-8"))
    assert told["one"]["resumed"] == str(tmp_path / "one" / "checkpoint-4")
    assert [f"is in use by process {os.getpid()}" in text for text in told["refused"]["refused"]] == [True, True]
    assert [path.name for path in checkpoints(tmp_path / "two")] == ["checkpoint-2", "checkpoint-4"]
    again = train(configs["two"])
    assert again.resumed_from == str(tmp_path / "two" / "checkpoint-4")
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    for name, after in (("one", told["one"]["after"]), ("two", again.loss_after)):
        assert after == pytest.approx(whole.loss_after, rel=1e-5), name
        found = load_file(tmp_path / name / "model.safetensors")
        for key, weight in wanted.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_second_run_in_two_processes_is_refused_and_ends(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    training_config(parts, tmp_path / "run").save(tmp_path / "run.yaml")
    command = [*TORCHRUN, "-m", "layalign", "train", "--config", str(tmp_path / "run.yaml")]
    with held(tmp_path / "run"):
        ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert ended.returncode != 0
    assert ended.stderr.count(f"run is in use by process {os.getpid()} on") == 1
