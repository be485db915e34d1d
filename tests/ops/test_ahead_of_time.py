"""Every kernel compiles for every chip: no spills, shared memory within its limit, matrix instructions for its dots.

A sample of each kernel's configurations, because all of them take long: `make kernels-report`, or here
LAYALIGN_ALL_KERNELS=1, compiles every one. In processes of their own, because kernels imported for the interpreter
cannot be compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("layalign_kernels.common", reason="the kernels are not installed")

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "benchmarks" / "kernels_report.py"
FILES = ["layer_mix", "layer_projection", *(f"gated_cross_attention{part}" for part in ("", "_backward", "_decode"))]
OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, whose kernels are not the interpreter's."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, str(REPORT.parent)])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python(str(REPORT), *arguments)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(OLD, reason="the configurations were chosen with the assembler that Triton 3.7 brings")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("file", FILES)
def test_compiles_without_a_problem(file: str, target: str) -> None:
    sample = [] if os.environ.get("LAYALIGN_ALL_KERNELS") else ["--sample", "5"]
    done = run("--files", file, "--targets", target, *sample)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"| {target} |" in done.stdout


def test_every_kernel_file_is_reported() -> None:
    launch = re.compile(r"_kernel\[.+\]\(|\b[Ll]aunch\(\s*\w+_kernel\b")
    launchers = [path for path in (ROOT / "kernels").glob("*.py") if launch.search(path.read_text(encoding="utf-8"))]
    source = (REPORT.parent / "ahead_of_time.py").read_text(encoding="utf-8")
    assert {path.stem for path in launchers} == set(FILES)
    for file in FILES:
        assert f'    "{file}": _' in source, f"{file}.py launches kernels, and the report does not know what it ships"


@pytest.mark.slow
def test_a_kernel_that_spills_is_reported(tmp_path: Path) -> None:
    """The check itself: the same kernel with far too few threads for its tile."""
    code = (
        "from ahead_of_time import SHIPPED, inspect_entry\n"
        "name, kernel, signature, constants, attrs, options = next(\n"
        "    e for e in SHIPPED['layer_mix']('sm_90') if e[0] == 'layer_mix_forward 24x64 fp32')\n"
        "bad = inspect_entry((name, kernel, signature, constants, attrs, {**options, 'num_warps': 1}), 'sm_90')\n"
        "print(bad.problem)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("spills "), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", ["layer_mix", "layer_projection"])
def test_the_relu_of_the_kernels_keeps_nan(file: str) -> None:
    """A GPU's plain maximum turns NaN into zero; the interpreter has only numpy's, which does not."""
    code = (
        "import triton\n"
        "from ahead_of_time import SHIPPED, TARGETS\n"
        f"what = next(e for e in SHIPPED['{file}']('sm_80') if 'backward' not in e[0] and 'fp32' not in e[0])\n"
        "source = triton.compiler.ASTSource(what[1], what[2], constexprs=what[3], attrs=what[4])\n"
        "text = triton.compile(source, target=TARGETS['sm_80'], options=dict(what[5])).asm['ptx']\n"
        "print(text.count('max.NaN.'), text.count('max.f32') + text.count('max.f16'))\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    kept, dropped = map(int, done.stdout.split())
    assert kept and not dropped
