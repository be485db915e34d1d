"""The CUDA kernels as nvcc compiled them into this installation: no spills, tensor cores for half precision."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from layalign.ops import extension

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cuda_report

BUILT = "sm_" in extension.build_notes().get("cuda", "")
pytestmark = pytest.mark.skipif(not BUILT, reason=f"CUDA kernels: {extension.build_notes().get('cuda', 'not built')}")


@pytest.mark.slow
def test_no_kernel_spills_and_half_precision_uses_tensor_cores() -> None:
    try:
        cuda_report.cuobjdump()
    except SystemExit as error:
        pytest.skip(str(error))
    rows = cuda_report.inspect(cuda_report.installed())
    assert {row.arch for row in rows} >= {"sm_80", "sm_90", "sm_100"}
    names = {row.name.split("_kernel")[0] for row in rows}
    assert {"forward", "hidden", "weight", "rows", "dquery", "dsource"} <= names
    assert not [f"{row.name} on {row.arch}: {row.problem}" for row in rows if row.problem]
    assert any(row.tensor_cores for row in rows) and not all(row.tensor_cores for row in rows)
    hot = cuda_report.hot_loops(cuda_report.installed())
    assert {row[0] for row in hot} <= {f"`{row.name}`" for row in rows if "BFloat" in row.name and row.arch == "sm_90"}
    assert all("HMMA" in row[1] for row in hot if cuda_report.MULTIPLIES.search(row[0]))
