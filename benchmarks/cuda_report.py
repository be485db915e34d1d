"""Tabulate registers, spills and shared memory of the CUDA kernels in a compiled extension.

    python benchmarks/cuda_report.py [path/to/_C.so] [--output report.md]

The numbers, and whether tensor cores are used, come from the machine code in the module. Exits with 1 if a kernel
spills registers, or if a kernel for half precision multiplies without tensor cores. Nothing is run, so this says
nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Kernels that multiply matrices; in half precision they must use tensor cores.
MULTIPLIES = re.compile(r"(forward|hidden|weight|rows|dquery|dsource)_kernel")
HALF = re.compile(r"\b(Half|BFloat)\b")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str
    arch: str
    registers: int
    spills: int
    shared: int
    tensor_cores: bool

    @property
    def problem(self) -> str:
        """What is wrong; empty if nothing is."""
        if self.spills:
            return f"spills {self.spills}"
        if MULTIPLIES.search(self.name) and HALF.search(self.name) and not self.tensor_cores:
            return "a product without tensor cores"
        return ""


def cuobjdump() -> str:
    """The toolkit's disassembler, or the copy in Triton's package."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        tool = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.is_file():
            return str(tool)
    raise SystemExit("cuobjdump is neither on the PATH nor in an installed Triton")


def _sections(module: Path, option: str) -> Iterator[tuple[str, str]]:
    """(architecture, text) of each piece of machine code in the module."""
    text = subprocess.run([cuobjdump(), option, str(module)], capture_output=True, text=True, check=True).stdout
    for section in re.split(r"\nFatbin elf code:\n", text)[1:]:
        arch = re.search(r"^arch = (sm_\d+\w*)$", section, re.MULTILINE)
        if arch is not None:
            yield arch.group(1), section


def demangle(names: list[str]) -> list[str]:
    """C++ names, without the namespaces that they share."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"^void |layalign::cuda::|\(anonymous namespace\)::", "", name) for name in text.splitlines()]
    return [re.sub(r"\(layalign.*|\((?:Mix|Attention|Combine|Sum)\w*\)$", "", name) for name in short]


def inspect(module: Path) -> list[Kernel]:
    """Every kernel of every architecture in a compiled module."""
    multiply: dict[tuple[str, str], bool] = {}
    for arch, section in _sections(module, "-sass"):
        for part in section.split("Function : ")[1:]:
            multiply[arch, part.split("\n", 1)[0].strip()] = re.search(r"\b[HQ]G?MMA\b", part) is not None
    found = []
    for arch, section in _sections(module, "--dump-resource-usage"):
        pattern = r"Function (\S+):\s*\n\s*(REG:\S+.*)"
        for name, line in re.findall(pattern, section):
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            spills = numbers["STACK"] + numbers["LOCAL"]
            found.append(
                Kernel(name, arch, numbers["REG"], spills, numbers["SHARED"], multiply.get((arch, name), False))
            )
    names = demangle([kernel.name for kernel in found])
    rows = [Kernel(name, *list(vars(kernel).values())[1:]) for name, kernel in zip(names, found, strict=True)]
    return sorted(rows, key=lambda kernel: (kernel.name, int(re.sub(r"\D", "", kernel.arch))))


def compiler() -> str:
    """Version of the toolkit on the PATH, which is assumed to have compiled the module."""
    nvcc = shutil.which("nvcc")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout if nvcc else ""
    found = re.search(r"release ([\d.]+)", text)
    return f"nvcc {found.group(1)}" if found else "nvcc of unknown version"


def report(rows: list[Kernel]) -> str:
    """The rows as Markdown."""
    problems = sum(bool(row.problem) for row in rows)
    lines = [
        "# CUDA kernels of the compiled extension",
        "",
        f"{compiler()}. {len(rows)} kernels over all architectures, {problems} with a problem. Compiled only, not run: "
        "no figure here says anything about speed. Shared memory is the static part; tiles are asked for at launch.",
        "",
        "| kernel | target | registers | spills | shared, bytes | tensor cores | problem |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        cores = "yes" if row.tensor_cores else "-"
        figures = f"{row.registers} | {row.spills} | {row.shared} | {cores} | {row.problem or '-'}"
        lines.append(f"| `{row.name}` | {row.arch} | {figures} |")
    return "\n".join(lines) + "\n"


def installed() -> Path:
    """The extension of this installation."""
    spec = importlib.util.find_spec("layalign._C")
    if spec is None or spec.origin is None:
        raise SystemExit("layalign._C is not installed; name a module")
    return Path(spec.origin)


def main() -> int:
    """Parse arguments, read the module, print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", type=Path, nargs="?", help="default: the installed layalign._C")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = inspect(arguments.module or installed())
    if not rows:
        raise SystemExit("no CUDA machine code in this module")
    if arguments.output is None:
        print(report(rows))
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report(rows), encoding="utf-8")
    problems = [row for row in rows if row.problem]
    for row in problems:
        print(f"{row.name} on {row.arch}: {row.problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
