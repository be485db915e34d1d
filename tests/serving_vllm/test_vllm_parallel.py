"""Several processes: tensor parallelism, alone and with compiled decoding, and Ray as the executor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
from vllm_case import cases, checkpoint

HELPERS = Path(__file__).parents[1] / "helpers"
WAYS = {
    "two ranks": dict(tensor_parallel_size=2),
    "two ranks, compiled": dict(tensor_parallel_size=2, enforce_eager=False),
    "ray": dict(tensor_parallel_size=2, distributed_executor_backend="ray"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fold", ["auto", "never"])
def test_the_same_answers(way, fold, tmp_path):
    if way == "ray" and find_spec("ray") is None:
        pytest.skip("ray is not installed")
    if way != "two ranks" and fold == "never":
        pytest.skip("once is enough")
    checkpoint(tmp_path / "model", llm="qwen3", fold_projections=fold)
    asked = cases(tmp_path / "model")
    file = tmp_path / "asked.json"
    file.write_text(
        json.dumps(
            {"folder": str(tmp_path / "model"), "settings": WAYS[way], "cases": [asdict(each) for each in asked]}
        )
    )
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(HELPERS)}
    subprocess.run(
        [sys.executable, HELPERS / "vllm_worker.py", file], env=environment, cwd=tmp_path, check=True, timeout=280
    )
    assert json.loads(file.read_text()) == [each.answer for each in asked]
