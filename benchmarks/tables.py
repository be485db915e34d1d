"""The measured tables of the documentation, made from a committed result file only.

``python benchmarks/tables.py benchmarks/results/cpu docs/benchmarks.md docs/backends.md`` replaces the text between
``<!-- measured: NAME -->`` and ``<!-- end -->`` in the pages; a name is a key of :data:`TABLES`. ``NAME, FOLDER`` takes
the results from a sibling of the given folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from layalign.experiments.bench.plots import OPERATIONS
from layalign.experiments.bench.results import Results, interval_text, load, quantity, ratio_text, rough

SECTION = re.compile(r"(<!-- measured: (?P<name>\w+)(, (?P<folder>[\w-]+))? -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_or_fill(kind: str, tables: Mapping[str, Callable[[], str]]) -> None:
    """Print the tables, or write each into the named pages, between ``<!-- KIND: NAME -->`` and ``<!-- end -->``."""
    if len(sys.argv) == 1:
        print("\n".join(make() for make in tables.values()), end="")
    section = re.compile(rf"(<!-- {kind}: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    for path in map(Path, sys.argv[1:]):
        page = path.read_text(encoding="utf-8")
        path.write_text(section.sub(lambda m: m[1] + tables[m["name"]]() + m[3], page), encoding="utf-8")


def provenance(results: Results) -> str:
    """A line with device, versions, commit and ceilings of the measurements."""
    data = results.data
    versions = data["facts"]["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    rates = data["ceilings"]
    return (
        f"{results.device}; {data['dtype']}; {names}; commit {results.commit}; measured ceilings "
        f"{rates['copy GB/s']:.1f} GB/s (copy) and {1e3 * rates['matmul TFLOP/s']:.0f} GFLOP/s (product).\n\n"
    )


def targets(results: Results) -> str:
    """Every row that has a target."""
    lines = []
    for row in results.rows.values():
        target = row.get("target")
        if target:
            found = row["against"][target["baseline"]]
            ratio, aim = found["ratio"], target.get("aim")
            reached = "aim" if aim is not None and ratio <= aim else "yes" if ratio <= target["must"] else "no"
            limits = f"{target['must']:.3g}", "" if aim is None else f"{aim:.3g}"
            about = row["id"].replace(" / ", ", "), target["baseline"]
            lines.append([*about, f"{ratio:.3f}", interval_text(found), *limits, reached])
    head = ["row", "baseline", "ours / baseline", "95 % interval", "must", "aim", "reached"]
    return provenance(results) + table(head, lines)


def models(results: Results) -> str:
    """The rows of the whole model, against every baseline."""
    rows = [r for r in results.rows.values() if r["group"] != "scaling" and not r["group"].startswith(OPERATIONS)]
    names = list(dict.fromkeys(name for row in rows for name in row["against"]))
    lines = []
    for row in rows:
        ratios = [ratio_text(row["against"][name]) if name in row["against"] else "" for name in names]
        lines.append([row["id"].replace(" / ", ", "), quantity(row["median"], row["unit"]), *ratios])
    return provenance(results) + table(["row", "ours", *(f"/ {name}" for name in names)], lines)


def operations(results: Results) -> str:
    """The rows of the operations: speed as a multiple of the baselines'."""
    rows = [r for r in results.rows.values() if r["group"].startswith(OPERATIONS)]
    names = list(dict.fromkeys(name for row in rows for name in row["against"]))
    lines = []
    for row in rows:
        found = [row["against"].get(name) for name in names]
        ratios = ["" if each is None else f"{rough(each)}{1 / each['ratio']:.2f}" for each in found]
        shape = row["name"].removesuffix(f" {row['labels']['impl']}")
        what = [f"{row['group']}: {shape}", f"`{row['labels']['impl']}`", f"`{row['labels']['auto']}`"]
        lines.append([*what, quantity(row["median"], row["unit"]), *ratios, f"{row['percent of ceiling']:.0f} %"])
    head = ["operation", "backend", "auto takes", "time", *(f"times {name}" for name in names), "of ceiling"]
    return provenance(results) + table(head, lines)


TABLES: dict[str, Callable[[Results], str]] = {"targets": targets, "models": models, "operations": operations}


def written_into(page: str, results: Results) -> str:
    """``page`` with every measured section replaced."""

    def section(match: re.Match[str]) -> str:
        source = results if match["folder"] is None else load(results.path.parent.parent / match["folder"])
        return str(match[1] + TABLES[match["name"]](source) + match["end"])

    return SECTION.sub(section, page)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} RESULTS PAGE...")
    measured = load(Path(sys.argv[1]))
    for name in sys.argv[2:]:
        path = Path(name)
        path.write_text(written_into(path.read_text(encoding="utf-8"), measured), encoding="utf-8")
