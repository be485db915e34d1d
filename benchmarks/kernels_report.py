"""Compile every kernel in every shipped configuration, for GPUs that need not be present, and tabulate the results.

    python benchmarks/kernels_report.py [--targets sm_90 ...] [--files layer_mix ...] [--output report.md]

Exits with 1 if a kernel spills registers, needs more shared memory than a GPU has, or has a dot without matrix
instructions. Nothing is run, so this says nothing about speed. ``hot_loops.py`` counts what the loops do.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton
from ahead_of_time import SHIPPED, TARGETS, Inspection, inspect_entry


def inspect_all(files: list[str], targets: list[str], sample: int | None = None) -> list[Inspection]:
    """One Inspection per shipped configuration and target; with ``sample``, that many of each file, evenly spaced."""
    found = []
    for file in files:
        for target in targets:
            entries = SHIPPED[file](target)
            step = 1 if sample is None else max(1, len(entries) // sample)
            found += [inspect_entry(entry, target) for entry in entries[::step]]
    return found


def table(rows: list[Inspection]) -> str:
    """The rows as Markdown."""
    lines = [
        "| kernel and configuration | target | registers | spills | shared, bytes | matrix | widest load | problem |",
        "|---|---|---:|---:|---:|---|---:|---|",
    ]
    for row in rows:
        matrix = row.matrix or ("none" if row.dots else "-")
        load = row.vector or "-"
        lines.append(
            f"| {row.name} | {row.target} | {row.registers} | {row.spills} | {row.shared} | {matrix} | {load} "
            f"| {row.problem or '-'} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Parse arguments, compile, print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--files", nargs="+", choices=list(SHIPPED), default=list(SHIPPED))
    parser.add_argument("--sample", type=int, metavar="N", help="only N configurations of each file and target")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = inspect_all(arguments.files, arguments.targets, arguments.sample)
    problems = [row for row in rows if row.problem]
    report = "\n".join([
        "# Kernels compiled ahead of time",
        "",
        f"Triton {triton.__version__}, Python {platform.python_version()}. {len(rows)} compilations, "
        f"{len(problems)} with a problem. Compiled only, not run: no figure here says anything about speed.",
        "",
        table(rows),
        "",
    ])  # fmt: skip
    if arguments.output is None:
        print(report)
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report, encoding="utf-8")
        print(f"{len(rows)} compilations, {len(problems)} with a problem: {arguments.output}")
    for row in problems:
        print(f"{row.name} on {row.target}: {row.problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
