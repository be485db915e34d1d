"""The table of a soak test, from its result file: ``python benchmarks/soak_report.py soak.json docs/serving.md``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from layalign.utils.pages import replaced

BEGIN, END = "<!-- soak -->", "<!-- end of soak -->"


def _slope(samples: list[list[float]], seconds: float) -> float:
    """MiB per hour over the last `seconds`."""
    times, sizes = np.array([sample for sample in samples if sample[0] >= samples[-1][0] - seconds]).T
    return float(np.polyfit(times, sizes, 1)[0] * 3600)


def markdown(result: dict[str, Any]) -> str:
    """The numbers of both phases."""
    phases = [result["saturation"], result["kills"]]
    counts = [phase["counts"] for phase in phases]
    memory, versions, facts = phases[0]["memory MiB"], result["facts"]["versions"], result["facts"]

    def line(name: str, *values: Any) -> str:
        return f"| {name} | " + " | ".join(f"{value:,}" if isinstance(value, int) else value for value in values) + " |"

    def each(name: str) -> list[int]:
        return [count.get(name, 0) for count in counts]

    def triple(name: str) -> list[str]:
        return [" / ".join(f"{phase[name][q]:.2f}" for q in ("p50", "p90", "p99")) for phase in phases]

    asked = [phase["health"]["answers"] for phase in phases]
    lying = [phase["idle connections"] for phase in phases]
    left = [sum(value for key, value in count.items() if key.startswith("left over")) for count in counts]
    recovery = phases[1]["seconds from kill to a right answer"]
    rows = [
        line("", "at saturation", "killed and restarted"),
        "|---|---:|---:|",
        line("minutes", *(f"{phase['seconds'] / 60:.1f}" for phase in phases)),
        line("answers, each compared with the single request's", *each("checked")),
        line("of them streamed", *each("streamed")),
        line("**wrong or crossed**", *each("wrong")),
        line("**lost** (no answer and no error within a minute)", *each("lost")),
        line("refused with 429", *each("429")),
        line("malformed requests, each with its 4xx", *each("4xx")),
        line("malformed requests let through", *each("4xx missing")),
        line("clients that disconnected: in a stream", *each("left in the middle")),
        line("clients that disconnected: while waiting", *each("left while waiting")),
        line("places still taken afterwards", *left),
        line("SIGKILL", *each("kills")),
        line(
            "connections refused or closed, including streams",
            *map(sum, zip(each("connection errors"), each("streams cut"), strict=True)),
        ),
        line(
            "idle connections at the same time, a third each: silent, a header byte per second, kept alive",
            *(found["wanted"] for found in lying),
        ),
        line("of them open, mean", *(f"{found['open']['mean']:.0f}" for found in lying)),
        line(
            "closed by the server and reopened",
            *(sum(value for key, value in found["counts"].items() if key.startswith("closed")) for found in lying),
        ),
        line("`/health` requested, once per second", *(sum(found.values()) for found in asked)),
        line("**answered with 200**", *(found.get("200", 0) for found in asked)),
        line(
            "seconds to `/health`, p50 / p90 / p99 / longest",
            *(
                " / ".join(f"{phase['health']['seconds'][q]:.2f}" for q in ("p50", "p90", "p99", "p100"))
                for phase in phases
            ),
        ),
        line("answers per second", *(f"{phase['answers per second']:.1f}" for phase in phases)),
        line("seconds to an answer, p50 / p90 / p99", *triple("answer seconds")),
        line("seconds to the first piece, p50 / p90 / p99", *triple("first piece seconds")),
    ]
    where = (
        f"{facts['device']['name']}, one thread; torch {versions['torch']}, transformers {versions['transformers']}; "
        f"layalign/serve as of git tree {result['tree of layalign/serve'][:7]}; {result['clients']} clients, "
        f"`--max-batch {result['limits']['--max-batch']}`, "
        f"`--max-queue {result['limits']['--max-queue']}`; {result['questions']} questions. "
        f"{result['cores']} cores, shared with other work: load average {result['load average']:.1f} over "
        "the last 15 minutes of saturation.\n\n"
    )
    text = (
        f"\nMemory of the server: {memory['after warm-up']:.0f} MiB after three minutes, {memory['last']:.0f} at the "
        f"end, {memory['largest']:.0f} at most. A line fitted after the first three minutes rises by "
        f"{memory['MiB per hour']:.1f} MiB per hour, one fitted to the last ten minutes by "
        f"{_slope(memory['samples'], 600):.1f}. From a kill to the next right answer: "
        f"{min(recovery):.0f} to {max(recovery):.0f} s, including its start. Errors in the server's log: "
        f"{result['errors in the log']}. SIGTERM at the end: exit code {result['SIGTERM']['exit code']} after "
        f"{result['SIGTERM']['seconds']:.1f} s.\n"
    )
    return where + "\n".join(rows) + "\n" + text


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    page = Path(sys.argv[2])
    page.write_text(replaced(page.read_text(encoding="utf-8"), BEGIN, END, markdown(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
