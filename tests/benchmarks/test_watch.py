"""The numerics watch: training curves against float64, and the recorded rows behind the ranges in the metadata."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from layalign.nn import GatedCrossAttention

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import across  # noqa: E402
import curves  # noqa: E402
import watch  # noqa: E402

pytestmark = pytest.mark.slow  # its fixtures train

RESULTS = ROOT / "benchmarks" / "results" / "watch"
ROWS = json.loads((RESULTS / "versions.json").read_text(encoding="utf-8"))
CPP = curves.OURS[0]


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], list[float]]:
    """The oracle's losses, and what each step may be off by."""
    oracle = curves.train(curves.ORACLE)
    return oracle, curves.budget([curves.train(run) for run in curves.PLAIN[:3]], oracle)


def share(losses: list[float], plain: tuple[list[float], list[float]]) -> float:
    return max(distance / allowed for distance, allowed in zip(curves.off(losses, plain[0]), plain[1], strict=False))


def test_the_oracle_is_float64_and_learns(plain: tuple[list[float], list[float]]) -> None:
    oracle, allowed = plain
    assert len(oracle) == curves.STEPS and sum(oracle[-20:]) / 20 < oracle[0] - 0.3
    assert max(allowed) < 1e-3  # a budget that means something
    model = curves.model(curves.ORACLE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    ids, mask, targets = next(curves.batches(0))
    packed = model.build_inputs(mask, targets=targets)
    assert model(**packed, encoder_input_ids=ids, encoder_attention_mask=mask).loss.dtype == torch.float64


@pytest.mark.skipif(curves.usable(CPP) is not None, reason=str(curves.usable(CPP)))
def test_200_steps_of_the_cpp_kernels_stay_within_the_budget(plain: tuple[list[float], list[float]]) -> None:
    assert share(curves.train(CPP), plain) <= 1


def test_a_term_that_is_off_by_a_ten_thousandth_leaves_the_budget(
    plain: tuple[list[float], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = GatedCrossAttention.forward

    def off(self, *args, residual, **kwargs):
        return torch.lerp(residual, exact(self, *args, residual=residual, **kwargs), 1 + 1e-4)

    monkeypatch.setattr(GatedCrossAttention, "forward", off)
    assert share(curves.train(curves.PLAIN[0]), plain) > 1


def test_rows_of_the_same_versions_are_replaced_and_the_others_kept_in_order() -> None:
    def row(transformers: str, passed: int) -> dict:
        versions = dict(transformers=transformers, torch="2.13.0+cpu", python="3.11.7")
        return dict(versions=versions, tests="all", passed=passed, failed=[], skipped={"why": 2}, golden={})

    rows = watch.merged(watch.merged(watch.merged([], row("5.10.4", 1)), row("5.9.0", 2)), row("5.10.4", 3))
    assert [(each["versions"]["transformers"], each["passed"]) for each in rows] == [("5.9.0", 2), ("5.10.4", 3)]
    assert watch.table(rows).splitlines()[-1] == "| 5.10.4 | 2.13.0+cpu | 3.11.7 | all | 3 | 0 | 2 | - | - | - |"


def test_every_listed_test_exists() -> None:
    for name in watch.NUMERICS:
        file, _, function = name.partition("::")
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8"), name


def test_the_ranges_in_the_metadata_are_what_was_run() -> None:
    """Every minor from the lowest allowed to the newest pinned, the lowest torch; nothing failed, golden ids equal."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def run(package: str) -> set[tuple[int, int]]:
        return {tuple(map(int, row["versions"][package].split(".")[:2])) for row in ROWS}  # type: ignore[misc]

    def lowest(package: str) -> tuple[int, ...]:
        found = re.search(rf'"{package}>=(\d+)\.(\d+)', text)
        assert found is not None
        return tuple(map(int, found.groups()))

    pinned = dict(re.findall(r"^(\w+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    newest = int(pinned["transformers"].split(".")[1])
    left_out = {int(minor) for minor in re.findall(r"!=5\.(\d+)\.\*", text)}
    allowed = {(5, minor) for minor in range(lowest("transformers")[1], newest + 1) if minor not in left_out}
    assert run("transformers") == allowed
    assert min(run("transformers")) == lowest("transformers") and min(run("torch")) == lowest("torch")
    pythons = {f"{major}.{minor}" for major, minor in run("python")}
    assert pythons == set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text))
    assert all(not row["failed"] and row["passed"] > 150 for row in ROWS)
    assert all(case["ids equal"] and case["loss"] < 1e-6 for row in ROWS for case in row["golden"].values())
    assert all(row["golden"] for row in ROWS)


def test_the_page_shows_the_recorded_rows_and_curves() -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert watch.table(ROWS) in page
    pairs = json.loads((RESULTS / "across.json").read_text(encoding="utf-8"))
    assert across.table(pairs) in page and all(max(row["logits"], row["loss"]) <= across.BOUND for row in pairs)
    recorded = json.loads((RESULTS / "curves.json").read_text(encoding="utf-8"))
    assert curves.table(recorded) in page
    assert all(row["share"] <= 1 for row in curves.rows(recorded))
    assert all(row["steps"] == curves.STEPS for row in curves.rows(recorded))
