"""The numerics watch: runs the golden cases and all tests that depend on the numerics of transformers or torch.

``python benchmarks/watch.py benchmarks/results/watch/versions.json`` runs :data:`NUMERICS` with the installed versions
and writes a row into the file, which replaces an earlier row of the same versions. `make watch` does this for a grid of
versions (noxfile.py). ``python benchmarks/watch.py RESULTS --page docs/versions.md`` writes the rows into a page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / room) for room in ("helpers", "published"))]

NUMERICS = [
    "tests/published/test_compat.py",  # the golden cases
    "tests/modeling/test_architectures.py",
    "tests/modeling/test_model.py",
    "tests/modeling/test_generation.py",
    "tests/modeling/test_padding.py",
    "tests/ops/test_grouped_projection.py",
    "tests/modeling/test_key_values.py",
    "tests/modeling/test_checkpoint.py",
    "tests/training/test_training.py::test_loss_falls_and_only_published_parts_change",
    "tests/training/test_training.py::test_resumed_run_equals_uninterrupted_run",
    "tests/training/test_training.py::test_lora_trains_reloads_and_resumes",
    "tests/modeling/test_compiled_decoding.py::test_a_step_is_one_graph_with_the_eager_logits",
    "tests/modeling/test_compiled_decoding.py::test_generate_with_a_compiled_forward",
]
CORE = 4  # the first four are the short set: golden cases, architectures, model, generation
PACKAGES = ("transformers", "torch", "triton", "tokenizers", "huggingface_hub", "accelerate", "peft")
SECTION = re.compile(r"(<!-- watched -->\n).*?(<!-- end -->)", re.DOTALL)


class Counts:
    """A pytest plugin: how many tests passed, which failed, and why some were skipped."""

    def __init__(self) -> None:
        self.passed, self.failed, self.skipped = 0, [], {}  # type: ignore[var-annotated]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid}: cannot be collected")


def golden() -> dict[str, dict[str, float | bool]]:
    """Relative differences from the published code for each golden case: loss, worst gradient; and equality of ids."""
    import test_compat
    import torch

    found: dict[str, dict[str, float | bool]] = {}
    for case in test_compat.CASES:
        model, data, gradients = test_compat.loaded(case)
        text = dict(labels=data["labels"], mask_label=data["labels_mask"], **test_compat.prompt(data))
        loss = model(data["input_ids"], data["attention_mask"], **text)
        loss.backward()
        ours = {name: parameter.grad for name, parameter in model.published_parameters()}
        errors = [float((ours[name] - grad).norm() / grad.norm()) for name, grad in gradients.items()]
        ids = model(data["input_ids"], data["attention_mask"], **test_compat.prompt(data))
        found[case] = {
            "loss": abs(float(loss) - float(data["loss"])) / abs(float(data["loss"])),
            "gradient": max(errors),
            "ids equal": torch.equal(ids, data["generated"]),
        }
    return found


def versions() -> dict[str, str]:
    """The installed versions."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def run(core: bool) -> dict[str, Any]:
    """One row: versions, commit, counts, golden differences."""
    import pytest
    from facts import facts

    counts, begin = Counts(), time.perf_counter()
    os.chdir(ROOT)
    options = ["-q", "-p", "no:cacheprovider", "--show-capture=no", "--tb=line", "--durations=0", "--durations-min=20"]
    code = pytest.main([*options, *(NUMERICS[:CORE] if core else NUMERICS)], plugins=[counts])
    if code not in (0, 1) and not counts.failed:
        counts.failed.append(f"pytest ended with {code}")
    where = facts(gpu=False)
    return {
        "versions": versions(),
        "tests": "core" if core else "all",
        "commit": where["commit"],
        "changed files": where["changed files"],
        "passed": counts.passed,
        "failed": counts.failed,
        "skipped": counts.skipped,
        "golden": {} if counts.failed else golden(),
        "seconds": round(time.perf_counter() - begin),
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("transformers", "torch", "python")
    return tuple([int(part) for part in re.findall(r"\d+", row["versions"][name])[:3]] for name in names)


def merged(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """``rows`` with ``new``, which replaces a row of the same transformers, torch and Python."""
    return sorted([row for row in rows if _key(row) != _key(new)] + [new], key=_key)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per row."""
    lines = [
        "| transformers | torch | Python | tests | passed | failed | skipped | loss | gradient | ids |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in sorted(rows, key=_key):
        cases, found = row["golden"].values(), row["versions"]
        figures = ["-", "-", "-"]
        if cases:
            figures = [f"{max(case[name] for case in cases):.1e}" for name in ("loss", "gradient")]
            figures.append("equal" if all(case["ids equal"] for case in cases) else "**differ**")
        counts = (row["passed"], len(row["failed"]), sum(row["skipped"].values()))
        cells = [found["transformers"], found["torch"], found["python"], row["tests"], *map(str, counts), *figures]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run and record, or update the page; returns 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--core", action="store_true", help="the short set of tests")
    parser.add_argument("--page", type=Path, help="write the recorded rows into this page instead of running")
    options = parser.parse_args()
    rows = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else []
    if options.page:
        text = options.page.read_text(encoding="utf-8")
        written = SECTION.sub(lambda match: match[1] + table(rows) + match[2], text)
        options.page.write_text(written, encoding="utf-8")
        return 0
    row = run(options.core)
    # Read again, since another environment may have written in the meantime.
    rows = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else []
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(merged(rows, row), indent=1) + "\n", encoding="utf-8")
    print(table([row]))
    return 1 if row["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
