"""Source distribution and wheel: what is in them, that they install, and an installation without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("pybind11")
pytest.importorskip("ninja")

ROOT = Path(__file__).parents[2]
PROBE = "import layalign; from layalign.ops import backends as b; print(layalign.__file__, b.capability('cpp', 'cpu'))"
WHEEL = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w"]


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(folder), str(ROOT)], folder)
    (found,) = folder.glob("layalign-*.tar.gz")
    return found


def wheel_of(source: Path, folder: Path, **environment: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    run(command, folder, **environment)
    (found,) = folder.glob("layalign-*.whl")
    return found


def import_from(wheel: Path, folder: Path) -> str:
    """Install the wheel alone into a folder, and what its package says of the C++ kernels."""
    target = folder / "installed"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], folder)
    # -S: an editable installation's import hook would find its own modules beside the ones under test.
    return run([sys.executable, "-S", "-c", PROBE], folder, PYTHONPATH=os.pathsep.join([str(target), *sys.path])).stdout


@pytest.mark.slow
def test_the_source_distribution_has_what_the_build_needs(source: Path) -> None:
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.*") if "__pycache__" not in file.parts}
    assert tracked <= names
    assert {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_from_the_source_distribution_installs_and_has_the_extension(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"  # unoptimised, in less than half the time: what it computes is tested elsewhere
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    wheel = wheel_of(source, tmp_path, LAYALIGN_CUDA="0", LAYALIGN_EXTENSION="1", CXX=str(compiler))
    assert "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"layalign", "layalign_kernels", next(top for top in tops if top.endswith(".dist-info"))}
    assert len([name for name in names if name.startswith("layalign/_C.")]) == 1
    said = import_from(wheel, tmp_path)
    assert str(tmp_path) in said and "C++ kernels with" in said


@pytest.mark.slow
def test_without_a_compiler_the_installation_works_and_says_why(source: Path, tmp_path: Path) -> None:
    wheel = wheel_of(source, tmp_path, CXX="no-such-compiler")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith("layalign/_C.")]
    said = import_from(wheel, tmp_path)
    assert str(tmp_path) in said
    assert "layalign._C is not installed: not built: CXX=no-such-compiler is not a program here" in said


@pytest.mark.slow
def test_a_demanded_part_that_cannot_be_built_is_an_error(source: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    environment = {**os.environ, "CXX": "no-such-compiler", "LAYALIGN_CUDA": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    assert "the extension cannot be built: CXX=no-such-compiler" in done.stdout + done.stderr
    environment = {**os.environ, "LAYALIGN_CUDA": "yes"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0 and "LAYALIGN_CUDA: expected 0 or 1, got 'yes'" in done.stdout + done.stderr
