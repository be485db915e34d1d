"""The page of a check on a GPU that a person reads in a minute: ``python benchmarks/page.py FOLDER``.

One line a target: what is wanted, what was measured, the share of the roofline, the verdict. It is written to
FOLDER/page.md and printed, from what the pieces of gpu_check.py have left there. A line has the worst of its rows. The
roofline is the longer of bytes over the measured copy bandwidth and FLOP over the measured rate of a matrix product.
Plots and report.html are made too, where matplotlib is installed.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from layalign.experiments.bench.results import Results, load, quantity
from layalign.utils.errors import LayAlignError

TORCH = ("SDPA", "FlexAttention", "varlen")  # baselines that start so compute the same attention
REFERENCE, GEMM, BARE = "reference.py", "one product of as many FLOP", "bare LLM"
FOLDED = ("layalign, always folding", "layalign, never folding")


class Target(NamedTuple):
    """One line.

    Attributes:
        what: its name.
        file: the result file.
        group: the pattern of its rows' groups.
        name: what the names of its rows contain.
        baselines: the names of the baselines, or :data:`TORCH`; the fastest counts.
        must, aim: limits of ours / baseline.
    """

    what: str
    file: str
    group: str
    name: str
    baselines: tuple[str, ...]
    must: float
    aim: float


def _of_model(kind: str, name: str) -> list[Target]:
    return [
        Target(f"training step, {kind}", "model", "training step", name, (BARE,), 1.15, 1.05),
        Target(f"automatic folding, {kind}", "model", "training step", name, FOLDED, 1.05, 1.0),
        Target(f"prefill, {kind}", "model", "prefill", name, (BARE,), 1.08, 1.03),
        Target(f"captured decode, {kind}", "model", "captured decode step", name, (BARE,), 1.08, 1.03),
        Target(f"memory added, {kind}", "model", "training step memory.*", name, (REFERENCE,), 1 / 3, 1 / 6),
    ]


# Those against the bare LLM and reference.py are of docs/benchmarks.md. The others are reasoned: no slower than what
# torch has for the same work, and a projection's own product in one pass over its result.
TARGETS = (
    Target("layer mix", "operations", "layer_mix.*", "", (REFERENCE,), 1.0, 0.5),
    Target("projection", "operations", "layer_projection.*", "", (GEMM,), 1.25, 1.05),
    Target("attention, forward", "operations", ".*attention, forward", "", TORCH, 1.0, 0.8),
    Target("attention, both passes", "operations", ".*attention, forward and backward", "", TORCH, 1.0, 0.8),
    Target("attention, decode", "operations", ".*attention, decode", "", TORCH, 1.0, 0.8),
    Target("decode in a graph", "graphs", "decode in a graph", "", TORCH, 1.0, 0.8),
    *_of_model("32 key/value heads", "mha"),
    *_of_model("8 key/value heads", "gqa"),
)


def chosen_by_auto(row: dict[str, Any]) -> bool:
    """Operations have a row for each backend: the one that a user gets is judged."""
    labels = row["labels"]
    return labels.get("impl") == labels.get("auto")


def ratios(target: Target, results: Results) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """(ours / the fastest of the target's baselines, its name, row), for every row of the target."""
    for row in results.rows.values():
        own = re.fullmatch(target.group, row["group"]) and target.name in row["name"] and chosen_by_auto(row)
        if not own:
            continue
        found = {n: each["ratio"] for n, each in row.get("against", {}).items() if fits(n, target.baselines)}
        if found:
            fastest = max(found, key=lambda name: found[name])
            yield found[fastest], fastest, row


def fits(name: str, baselines: tuple[str, ...]) -> bool:
    return name in baselines or (baselines is TORCH and name.startswith(TORCH))


def line(target: Target, folder: Path) -> list[str]:
    """The cells of a target."""
    limits = f"at most {target.must:.2f}, aim {target.aim:.2f}"
    file = folder / f"{target.file}.json"
    if not file.is_file():
        return [target.what, limits, "not measured", "", "not measured"]
    found = sorted(ratios(target, load(file)), key=lambda each: each[0])
    if not found:
        return [target.what, limits, "no row", "", "not measured"]
    ratio, baseline, row = found[-1]
    shares = [row["percent of ceiling"] for *_, row in found if "percent of ceiling" in row]
    share = f"{min(shares):.0f} to {max(shares):.0f} %" if shares else ""
    verdict = "aim reached" if ratio <= target.aim else "reached" if ratio <= target.must else "MISSED"
    worst = f"{ratio:.2f} of {baseline} ({row['name']}, {quantity(row['median'], row['unit'])})"
    missed = sum(each[0] > target.must for each in found)
    return [target.what, limits, worst, share, verdict + (f" in {missed} of {len(found)} rows" if missed else "")]


def head(folder: Path) -> list[str]:
    """Where, when, with what; ceilings; the states of the pieces."""
    lines = ["# GPU check"]
    facts_file, check = folder / "facts.json", folder / "check.json"
    if facts_file.is_file():
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines.append(f"{facts['device']['name']}; {versions}; commit {facts['commit'][:12]}.")
    measured = {}
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(LayAlignError):  # not a result file
            measured[file.stem] = load(file).data
    if any(data["shapes"] == "quick" for data in measured.values()):
        lines.append("A dry run with tiny shapes: the numbers mean nothing.")
    rates = {name: data["ceilings"] for name, data in measured.items() if data["ceilings"]}
    ceilings = [f"{r['copy GB/s']:.0f} GB/s and {r['matmul TFLOP/s']:.0f} TFLOP/s ({n})" for n, r in rates.items()]
    if ceilings:
        lines.append(f"Ceilings, copy and product, before each file: {'; '.join(ceilings)}.")
    states = json.loads(check.read_text(encoding="utf-8")) if check.is_file() else {}
    ended = [f"{name} {each['state']} ({each['seconds']:.0f} s)" for name, each in states.items() if name != "page"]
    lines.append(f"Pieces: {'; '.join(ended) or 'none'}.")
    return lines + [f"FAILED: {text}" for data in measured.values() for text in data.get("failed", [])]


def stepped(folder: Path) -> list[str]:
    """Launches and waits of the profiled steps."""
    file = folder / "profile.json"
    steps = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    own = [
        f"{name} {each['seconds'] * 1e3:.2f} ms in {each['kernels']} kernels, {sum(each['waits'].values())} waits"
        for name, each in steps.items()
    ]
    return [f"Profiled, one each: {'; '.join(own)}."] if own else []


def tuned(folder: Path) -> list[str]:
    """What the sweep found."""
    lines = []
    for file in sorted((folder / "tables").glob("*.json")):
        entries = json.loads(file.read_text(encoding="utf-8"))["blocks"]
        better = {name: entry["gain"] for name, entry in entries.items() if entry["gain"] > 1.02}
        text = ", ".join(f"{name} {gain:.2f}" for name, gain in sorted(better.items(), key=lambda each: -each[1]))
        lines.append(f"Blocks of {file.stem}: {len(entries)} swept, faster than shipped: {text or 'none'}.")
    return lines


def page(folder: Path) -> str:
    rows = [line(target, folder) for target in TARGETS]
    cells = [["target", "ours / baseline", "measured, worst row", "of the roofline", "verdict"], ["---"] * 5, *rows]
    table = ["| " + " | ".join(each) + " |" for each in cells]
    lines = [*head(folder), "\n".join(table), *tuned(folder), *stepped(folder)]
    return "\n\n".join(line for line in lines if line) + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    folder = Path(sys.argv[1])
    text = page(folder)
    (folder / "page.md").write_text(text, encoding="utf-8")
    try:
        from layalign.experiments.bench.report import write_report

        write_report(folder)
    except (ImportError, LayAlignError) as why:  # no matplotlib, or no rows yet
        print(f"no report.html: {why}")
    print(text, end="")


if __name__ == "__main__":
    main()
