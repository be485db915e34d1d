"""Tabulate registers, spills, shared memory and hot loops of the CUDA kernels in a compiled extension.

    python benchmarks/cuda_report.py [path/to/_C.so] [--output report.md]

The numbers, and whether tensor cores are used, come from the machine code in the module. Exits with 1 if a kernel
spills registers, or if a kernel for half precision multiplies without tensor cores. Nothing is run, so this says
nothing about speed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import sass
from rates import RATES, clocks

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


@functools.cache
def _sections(module: Path, option: str) -> list[tuple[str, str]]:
    """(architecture, text) of each piece of machine code in the module."""
    text = subprocess.run([cuobjdump(), option, str(module)], capture_output=True, text=True, check=True).stdout
    found = []
    for section in re.split(r"\nFatbin elf code:\n", text)[1:]:
        arch = re.search(r"^arch = (sm_\d+\w*)$", section, re.MULTILINE)
        if arch is not None:
            found.append((arch.group(1), section))
    return found


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


LIMITS = ("tensor", "issue", "MUFU", "shared")


def hot_loops(module: Path) -> list[list[str]]:
    """A row for each bf16 kernel of sm_90: the loop with most tensor instructions, or most of all, of one warp."""
    parts: dict[str, str] = {}
    for of, section in _sections(module, "-sass"):
        if of == "sm_90":
            parts |= {part.split("\n", 1)[0].strip(): part for part in section.split("Function : ")[1:]}
    rows = []
    for name, symbol in zip(demangle(list(parts)), parts, strict=True):
        if "BFloat" not in name:
            continue
        code = sass.parse(parts[symbol])
        found = [sass.count(code[i] for i in sorted(loop.own)) for loop in sass.loops(code)]
        if found:
            c = max(found, key=lambda c: (c.mma_flop, c.issued))
            limits = clocks(c, 4, RATES["sm_90"])
            each = [f"{limits.limits()[limit]:.0f}" for limit in LIMITS]
            kinds = [str(n) for n in (c.issued, c.mufu, c.fp32, c.shuffles, c.barriers, c.rest)]
            reads = c.accesses(sass.GLOBAL), c.accesses(sass.SHARED)
            rows.append([f"`{name}`", c.tensor, *reads, *kinds, *each, limits.bound])
    return sorted(rows)


def compiler() -> str:
    """Version of the toolkit on the PATH, which is assumed to have compiled the module."""
    nvcc = shutil.which("nvcc")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout if nvcc else ""
    found = re.search(r"release ([\d.]+)", text)
    return f"nvcc {found.group(1)}" if found else "nvcc of unknown version"


HOT = """
## Hot loops on sm_90

Of each bf16 kernel the loop with most tensor instructions, or else most instructions: what a warp issues in an
iteration, and the clocks of four warps by each limit alone. Counted, not measured: `hot_loops_sm_90.md` has the terms
and rates. Code under a condition counts as run, such as the narrow accesses beside wide ones.
"""


def report(rows: list[Kernel], hot: list[list[str]]) -> str:
    """The rows, and those of ``hot_loops``, as Markdown."""
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
    if hot:
        numbers = ["issued", "MUFU", "FP32", "shuffles", "barriers", "rest", *LIMITS]
        head = ["kernel", "tensor", "global, bytes a thread", "shared, bytes a thread", *numbers, "bound"]
        lines += [HOT, "| " + " | ".join(head) + " |", "|" + "---|" * 4 + "---:|" * len(numbers) + "---|"]
        lines += ["| " + " | ".join(row) + " |" for row in hot]
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
    module = arguments.module or installed()
    rows, hot = inspect(module), hot_loops(module)
    if not rows:
        raise SystemExit("no CUDA machine code in this module")
    if arguments.output is None:
        print(report(rows, hot))
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report(rows, hot), encoding="utf-8")
    problems = [row for row in rows if row.problem]
    for row in problems:
        print(f"{row.name} on {row.arch}: {row.problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
