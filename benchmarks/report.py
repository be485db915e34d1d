"""Plots and a page from the result files of a folder: ``python benchmarks/report.py benchmarks/results/cpu``.

The same as ``layalign bench --report DIR``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from layalign.experiments.bench.report import write_report
from layalign.utils.errors import LayAlignError

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    try:
        print(write_report(Path(sys.argv[1])))
    except LayAlignError as error:
        sys.exit(f"error: {error}")
