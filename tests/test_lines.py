"""What a newcomer reads in a terminal is this library's own, and no optional package is loaded before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_training import save_parts

OPTIONAL = (
    "bitsandbytes", "optimum", "peft", "deepspeed", "lm_eval", "liger_kernel", "fastapi", "uvicorn", "matplotlib",
    "sklearn", "datasets", "torchao", "hqq", "tensorboard",
)  # fmt: skip

_IN_PYTHON = f"""
import sys
def loaded(): return [name for name in {OPTIONAL!r} if name in sys.modules]
import layalign
assert not loaded() and "transformers" not in sys.modules and "torch" not in sys.modules, loaded()
layalign.LayAlignForCausalLM
assert not loaded(), loaded()
model = layalign.LayAlignForCausalLM.from_encoder_and_llm(sys.argv[1], sys.argv[2])
import torch
source = dict(encoder_input_ids=torch.tensor([[5, 6, 7]]))
model(**source, **model.pack(torch.ones(1, 3), None, [[5]])).loss.backward()
model.generate(**source, max_new_tokens=2, do_sample=False)
assert not loaded(), loaded()
from layalign.training import train, load_train_config
assert not loaded(), loaded()
train(load_train_config(sys.argv[3]))
print("trained")
"""


def _lines(*command: Any, **environment: str) -> tuple[list[str], list[str]]:
    """Lines of stdout and stderr, without the bars that show how far something is."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "200", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    both = []
    for text in (done.stdout, done.stderr):
        lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
        both.append([line for line in lines if line and "it/s]" not in line and "?it/s" not in line])
    return both[0], both[1]


def test_every_line_is_ours(tmp_path: Path) -> None:
    parts = save_parts(tmp_path / "parts")
    settings = {
        "encoder": parts.encoder, "llm": parts.llm, "data": parts.data, "batch_size": 8, "dev_size": 8, "max_steps": 2,
        "use_cpu": True, "progress": False, "output_dir": str(tmp_path / "run"), "lora": {"r": 2},
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    out, err = _lines(sys.executable, "-c", _IN_PYTHON, parts.encoder, parts.llm, tmp_path / "train.yaml")
    assert out == ["trained"] and err == []
    command = sys.executable, "-m", "layalign"
    out, err = _lines(*command, "--help")
    assert out[0].startswith("Usage: ") and err == []
    out, err = _lines(*command, "generate", "-c", tmp_path / "run", "-s", "eins", "--max-new-tokens", "2")
    assert len(out) <= 1 and err == []
    settings.update(progress=True, output_dir=str(tmp_path / "other"))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    out, err = _lines(*command, "train", "--config", tmp_path / "train.yaml", "--stage", "translation")
    reported = [line for line in out if line.startswith("{")]  # the Trainer's, for `progress` asks for them
    assert len(reported) == 2 and "eval_loss" in reported[0] and "train_loss" in reported[1]
    assert [line for line in out if "saved in" in line] == [f"translation: saved in {tmp_path / 'other'}"]
    assert err == []


@pytest.mark.parametrize(("name", "text", "passes"), [
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no", False),
    ("bitsandbytes.backends.cpu.ops", "another line", True),
])  # fmt: skip
def test_one_line_is_left_out_and_only_within_the_call(
    name: str, text: str, passes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    from layalign._quiet import importing_peft

    with importing_peft():
        logging.getLogger(name).warning(text)
    assert (text in caplog.text) is passes
    logging.getLogger(name).warning(text)
    assert text in caplog.text


def test_a_report_that_names_more_than_a_decoder_shows(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from layalign._quiet import loading_encoder

    head = "MT5EncoderModel LOAD REPORT from: x\nKey | Status |\n---+---+-\n"
    logging.getLogger("transformers").propagate, before = True, logging.getLogger("transformers").propagate
    try:
        with loading_encoder():
            logging.getLogger("transformers.modeling_utils").warning(head + "decoder.block.0 | UNEXPECTED |")
            assert not caplog.text
            logging.getLogger("transformers.modeling_utils").warning(
                head + "decoder.block.0 | UNEXPECTED |\nencoder.block.0 | MISSING |"
            )
        assert "encoder.block.0 | MISSING" in caplog.text
    finally:
        logging.getLogger("transformers").propagate = before
