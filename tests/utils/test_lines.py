"""What a newcomer reads in a terminal is this library's own, and no optional package is loaded before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_training import save_parts

OPTIONAL = (
    "bitsandbytes", "optimum", "peft", "deepspeed", "lm_eval", "liger_kernel", "fastapi", "uvicorn", "matplotlib",
    "sklearn", "datasets", "torchao", "hqq", "tensorboard",
)  # fmt: skip

_ONE_AFTER_THE_OTHER = f"""
import sys
encoder, llm, settings, run, other = sys.argv[1:]
def loaded(): return [name for name in {OPTIONAL!r} if name in sys.modules]
import layalign
assert not loaded() and "transformers" not in sys.modules and "torch" not in sys.modules, loaded()
layalign.LayAlignForCausalLM
assert not loaded(), loaded()
model = layalign.LayAlignForCausalLM.from_encoder_and_llm(encoder, llm)
import torch
source = dict(encoder_input_ids=torch.tensor([[5, 6, 7]]))
model(**source, **model.build_inputs(torch.ones(1, 3), None, [[5]])).loss.backward()
model.generate(**source, max_new_tokens=2, do_sample=False)
assert not loaded(), loaded()  # from here on transformers' Trainer loads what it likes
from layalign.training import train, load_train_config
train(load_train_config(settings))
import typer
from layalign.cli.app import app
for command in (
    ["generate", "-c", run, "-s", "eins", "--max-new-tokens", "2"],
    ["train", "--config", settings, "--stage", "translation", "--output", other, "--set", "progress=true"],
    ["--help"],
):
    for stream in (sys.stdout, sys.stderr):
        print("==", command[0], file=stream, flush=True)
    try:
        typer.main.get_command(app).main(command, prog_name="layalign", standalone_mode=False)
    except SystemExit as end:
        assert not end.code, end.code
"""


def _by_command(text: str) -> dict[str, list[str]]:
    """The lines of each command, without the bars that show how far something is."""
    found: dict[str, list[str]] = {}
    lines = found.setdefault("python", [])
    for line in map(str.strip, text.replace("\x1b[A", "").replace("\r", "\n").splitlines()):
        if line.startswith("== "):
            lines = found.setdefault(line[3:], [])
        elif line and "it/s" not in line:
            lines.append(line)
    return found


@pytest.mark.slow
def test_every_line_is_ours(tmp_path: Path) -> None:
    parts = save_parts(tmp_path / "parts")
    settings = {
        "encoder": parts.encoder, "llm": parts.llm, "data": parts.data, "batch_size": 8, "dev_size": 8, "max_steps": 1,
        "use_cpu": True, "progress": False, "output_dir": str(tmp_path / "run"), "lora": {"r": 2},
        "learning_rate": 0.1, "warmup_ratio": 0.0, "llm_bos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    places = parts.encoder, parts.llm, tmp_path / "train.yaml", tmp_path / "run", tmp_path / "other"
    done = subprocess.run(
        [sys.executable, "-c", _ONE_AFTER_THE_OTHER, *map(str, places)], capture_output=True, text=True, timeout=400,
        env={**os.environ, "COLUMNS": "200"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = _by_command(done.stderr)
    train = [line.split(": ")[0].split() for line in said.pop("train")]
    assert said == {"python": [], "--help": [], "generate": []}
    assert ["INFO", "translation"] in train and ["INFO", "bf16"] in train
    assert {tuple(start) for start in train} <= {("INFO", key) for key in ("translation", "bf16", "dev_cut")}
    found = _by_command(done.stdout)
    assert [line.split()[:2] for line in found["python"]] == [["step", "0:"], ["step", "1/1:"]]
    assert found["--help"][0].startswith("Usage: ") and len(found["generate"]) <= 1
    reported = [line for line in found["train"] if line.startswith("{")]  # the Trainer's, for `progress` asks for them
    assert len(reported) == 2 and "eval_loss" in reported[0] and "train_loss" in reported[1]
    table = found["train"][2:]
    assert table[0] == "Training" and table[-1] == f"translation: saved in {tmp_path / 'other'}" and len(table) == 5


@pytest.mark.parametrize(("name", "text", "passes"), [
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no", False),
    ("bitsandbytes.backends.cpu.ops", "another line", True),
])  # fmt: skip
def test_one_line_is_left_out_and_only_within_the_call(
    name: str, text: str, passes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    from layalign.utils.quiet import importing_peft

    with importing_peft():
        logging.getLogger(name).warning(text)
    assert (text in caplog.text) is passes
    logging.getLogger(name).warning(text)
    assert text in caplog.text


def test_only_reports_of_too_many_or_too_few_weights_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from layalign.utils.quiet import without_reports

    caplog.set_level("WARNING", "transformers.modeling_utils")  # other tests have made it quieter
    head = "MT5EncoderModel LOAD REPORT from: x\nKey | Status |\n---+---+-\n"
    logging.getLogger("transformers").propagate, before = True, logging.getLogger("transformers").propagate
    try:
        with without_reports():
            logging.getLogger("transformers.modeling_utils").warning(head + "decoder.block.0 | UNEXPECTED |")
            assert not caplog.text
            logging.getLogger("transformers.modeling_utils").warning(
                head + "decoder.block.0 | UNEXPECTED |\nencoder.block.0 | MISMATCH |"
            )
            logging.getLogger("transformers.modeling_utils").warning("something else")
        assert "encoder.block.0 | MISMATCH" in caplog.text and "something else" in caplog.text
    finally:
        logging.getLogger("transformers").propagate = before
