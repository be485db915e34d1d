"""Training in two processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from tiny_training import save_parts


def test_both_stages_in_two_processes(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    common = dict(max_steps=2, batch_size=4, dev_size=4, eval_steps=0, save_steps=0, use_cpu=True, progress=False)
    values = dict(encoder=parts.encoder, llm=parts.llm, data=parts.data, stages={"translation": {}, "task": {}})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, **common}), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "layalign", "train", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([*torchrun, *command], capture_output=True, text=True, env=environment, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    for stage in ("translation", "task"):
        assert json.loads((tmp_path / "out" / stage / "training.json").read_text(encoding="utf-8"))["steps"] == 2
        assert (tmp_path / "out" / stage / "model.safetensors").is_file()
    assert found.stdout.count("Training") == 1  # one process tells
