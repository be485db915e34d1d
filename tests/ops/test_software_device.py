"""The software CUDA device: what it takes the instructions to be, what nvcc makes of them, and which faults it sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc"))
sys.path.insert(0, str(Path(__file__).parents[2] / "csrc" / "tests"))

import builder
import compiled_ptx
import mutants

pytestmark = pytest.mark.slow


def without(find) -> str:
    """Why a tool is missing, or nothing."""
    try:
        return "" if find() else "cuobjdump is not here"
    except builder.BuildError as error:
        return str(error)


needs_nvcc = pytest.mark.skipif(bool(without(builder.nvcc)), reason=without(builder.nvcc))
needs_sass = pytest.mark.skipif(bool(without(compiled_ptx.cuobjdump)), reason=without(compiled_ptx.cuobjdump))


def test_the_software_device_agrees_with_plain_arithmetic(tmp_path: Path) -> None:
    program, _ = builder.ptx_program(tmp_path, "emulate")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("all right\n"), done.stdout
    assert done.stdout.startswith("device: emulated on the CPU\n")


@needs_nvcc
@needs_sass
def test_every_check_of_an_instruction_contains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every architecture that is shipped, with operands in the order of memory."""
    monkeypatch.setenv("LAYALIGN_WERROR", "1")
    monkeypatch.delenv("LAYALIGN_CUDA_ARCHS", raising=False)
    program, note = builder.ptx_program(tmp_path, "1")
    tool = compiled_ptx.cuobjdump()
    assert tool is not None and "emulated" not in note
    found = compiled_ptx.kernels(program, tool)
    assert {arch for arch, _ in found} == {f"sm_{arch}" for arch in builder.ARCHS}
    assert not compiled_ptx.missing(program, tool)


@pytest.mark.timeout(900)
def test_faults_are_seen() -> None:
    """The three that once were not; `make mutants` puts in all."""
    faults = ["fp32 are not swizzled", "first barrier", "fragments of A"]
    if not without(builder.nvcc) and not without(compiled_ptx.cuobjdump):
        faults.append("PTX: registers of A")
    done = subprocess.run([sys.executable, mutants.__file__, *faults], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 2 + len(faults)
