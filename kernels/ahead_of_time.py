"""Compile kernels for chips that are not in this machine, and inspect the result.

The function ``ahead_of_time(target)`` of a kernel file lists what it ships: one :data:`Entry` per configuration.
``inspect_entry`` compiles an entry for a chip and reports registers, spills, shared memory and matrix instructions. It
does not work under ``TRITON_INTERPRET=1``: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# (name, kernel, signature, constexprs, attrs, options), as triton.compile and ASTSource take them.
Entry = tuple[str, Any, dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any], dict[str, int]]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory one program may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX = {"cuda": r"\b(wgmma|tcgen05\.mma\S*?kind::\w+|mma\.sync)", "hip": r"\b(v_mfma)"}


@dataclass(frozen=True)
class Inspection:
    """One kernel compiled for one chip.

    Attributes:
        registers: registers per thread.
        spills: bytes of local memory (NVIDIA), or spilled registers (AMD).
        shared: bytes of shared memory per program.
        dots: whether it has products for matrix instructions (full-precision fp32 has none on NVIDIA).
        matrix: the matrix instruction found, "" for none.
        vector: widest global load in bits, 0 where the listing does not show it.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    dots: bool
    matrix: str
    vector: int

    @property
    def problem(self) -> str:
        """Why this must not ship, or ""."""
        if self.spills:
            return f"spills {self.spills}"
        if self.shared > SHARED_LIMIT[self.target]:
            return f"{self.shared} bytes of shared memory, the limit is {SHARED_LIMIT[self.target]}"
        if "kind::tf32" in self.matrix and "tf32" not in self.name:
            return "full-precision fp32 became TF32"
        if self.dots and not self.matrix:
            return "a dot without matrix instructions"
        return ""


def entry(
    name: str,
    kernel: Any,
    types: dict[str, Any],
    constants: dict[str, Any],
    options: dict[str, int],
    aligned: bool = True,
) -> Entry:
    """An entry from a kernel's argument names.

    Args:
        types: Triton type of arguments, a tuple for a tuple of pointers. Arguments without one are i32.
        constants: values of the constexpr arguments, None for absent tensors.
        options: num_warps, num_stages.
        aligned: whether D, OUT and strides, except those of masks and biases, are multiples of 16. Pointers always are.
    """
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    divisible = [["tt.divisibility", 16]]
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        kind = signature[argument] = types.get(argument, "i32")
        wide = argument.startswith("stride_") and not argument.startswith(("stride_m", "stride_a"))
        if isinstance(kind, tuple):
            attrs.update({(i, place): divisible for place in range(len(kind))})
        elif kind.startswith("*") or (aligned and (wide or argument in ("D", "OUT"))):
            attrs[(i,)] = divisible
    values = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    return name, kernel, signature, values, attrs, options


def inspect_entry(what: Entry, target: str) -> Inspection:
    """Compile ``what`` for ``target`` (a key of TARGETS) and read the result."""
    name, kernel, signature, constants, attrs, options = what
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=dict(options))
    backend = TARGETS[target].backend
    listing = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    registers, spills = _cuda_usage(compiled.asm["cubin"]) if backend == "cuda" else _hip_usage(listing)
    ir = compiled.asm["ttir"]
    found = re.search(MATRIX[backend], listing)
    widths = [int(n) * int(bits) for n, bits in re.findall(r"ld\.global\S*?\.v(\d)\.b(\d+)", listing)]
    widths += [
        int(size, 16) * 8 for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?0x([0-9a-f]+)", listing)
    ]
    return Inspection(
        name=name,
        target=target,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        dots=any("tt.dot " in line and ("xf32> *" not in line or "tf32" in line) for line in ir.split("\n")),
        matrix=found.group(1) if found else "",
        vector=max(widths, default=0),
    )


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) by the cuobjdump in Triton's package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["LOCAL"] + numbers["STACK"]


def _hip_usage(listing: str) -> tuple[int, int]:
    """(vector registers, spills to memory) from the code object's metadata; scalar spills go to vector registers."""
    found = re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", listing)
    numbers = {key: int(value) for key, value in found}
    return numbers["vgpr_count"], numbers["vgpr_spill_count"] + numbers["private_segment_fixed_size"]
