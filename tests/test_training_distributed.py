"""Training in two processes, as accelerate starts them with a configuration that ships with the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from tiny_training import save_parts

from layalign.training.launch import preset_file


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
