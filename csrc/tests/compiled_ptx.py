"""Whether each kernel of a compiled ptx_check contains the instruction that it checks, its operands in order.

    python csrc/tests/compiled_ptx.py PROGRAM

Reads the machine code with cuobjdump, the toolkit's or the one in Triton's package; nothing runs. Exits with 1, the
kernels' names and the architectures where an instruction is missing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Regular expressions, by the name of a kernel. log2_of, infinity, sync_warp and bf16 to fp32 have no instruction of
# their own.
INSTRUCTIONS = {
    "indices": ("SR_TID.X", "SR_CTAID.X"),
    "sync_threads": ("BAR.SYNC",),
    "shuffle_int": ("SHFL.BFLY",),
    "shuffle_float": ("SHFL.BFLY",),
    "shared_memory": ("STS ", "LDS ", "BAR.SYNC"),
    "cp_async16": ("LDGSTS.E.BYPASS.128 ", r"STS.128 \S+ RZ ", "LDGDEPBAR", "DEPBAR.LE"),
    "cp_async4": ("LDGSTS.E ", "LDGDEPBAR", "DEPBAR.LE"),
    "ldmatrix": ("LDSM.16.M88.4 ",),
    "ldmatrix_transposed": ("LDSM.16.MT88.4 ",),
    "mma_half": ("HMMA.16816.F32 ",),
    "mma_bfloat": ("HMMA.16816.F32.BF16 ",),
    "from_float_half": ("F2F.F16.F32 ",),
    "from_float_bfloat": ("F2F.BF16.F32 ",),
    "pack_half": ("F2FP.F16.F32.PACK_AB ",),
    "pack_bfloat": ("F2FP.BF16.F32.PACK_AB ",),
    "to_float_half": ("HADD2.F32 ",),
    "halves": ("PRMT ",),
    "exp2": ("MUFU.EX2 ",),
    "maximum": ("FMNMX ",),
    "fused": ("FFMA ",),
    "load_words": ("LDG.E.NA.128.CONSTANT ",),
    "load_words_cached": ("LDG.E.128.CONSTANT ",),
    "store_words": ("STG.E.128 ",),
    "store_pair": ("STG.E.64 ",),
    "float4": ("STS.128 ", "LDS.128 "),
    "float2": ("STS.64 ", "LDS.64 "),
}
OPERANDS = (
    "mma_half_operands",
    "mma_bfloat_operands",
    "pack_half_operands",
    "pack_bfloat_operands",
    "ldmatrix",
    "ldmatrix_transposed",
)


def cuobjdump() -> str | None:
    """The disassembler, where there is one."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(place) / "backends/nvidia/bin" for place in (triton and triton.submodule_search_locations) or ()]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("cuobjdump", path=path)


def kernels(program: Path, tool: str) -> dict[tuple[str, str], str]:
    """Machine code by architecture and name of the kernel."""
    text = subprocess.run([tool, "-sass", str(program)], capture_output=True, text=True, check=True).stdout
    found = {}
    for section in re.split(r"\nFatbin elf code:\n", text)[1:]:
        arch = re.search(r"^arch = (sm_\d+)", section, re.MULTILINE)
        for function in section.split("Function : ")[1:]:
            name = re.search(r".*\d([a-z]\w*?)_kernel", function.splitlines()[0])
            assert arch is not None and name is not None
            # On sm_80 the conversion to fp16 does not name its types.
            code = re.sub(r"F2FP\.(BF16\.)?PACK", lambda m: f"F2FP.{m[1] or 'F16.'}F32.PACK", function)
            found[arch.group(1), name.group(1)] = code
    return found


def operands(name: str, code: str) -> bool:
    """Whether operands that memory has side by side are side by side, in the same order, in the instruction."""
    code = code.replace(".reuse", "")
    loaded = set(re.findall(r"LDG\.E\S*\.(?:64|128)\S* R(\d+),", code))  # the first of 2 or 4 registers
    stored = set(re.findall(r"STG\.E\.128 .*\], R(\d+) ;", code))
    if name.startswith("mma"):
        products = re.findall(r"HMMA\S+ R(\d+), R(\d+), R(\d+), R(\d+) ;", code)
        return len(products) == 1 and products[0][0] in stored and set(products[0][1:]) == loaded
    if name.startswith("ldmatrix"):
        return not stored.isdisjoint(re.findall(r"LDSM\S+ R(\d+),", code))
    packs = re.findall(r"F2FP\S+ R\d+, R(\d+), R(\d+) ;", code)
    return any((str(int(first) + 1), first) in packs for first in loaded)


def missing(program: Path, tool: str) -> list[str]:
    """What a kernel does not contain: "architecture kernel: instruction"."""
    found = kernels(program, tool)
    problems = []
    for arch in sorted({arch for arch, _ in found}):
        for name, instructions in INSTRUCTIONS.items():
            code = found.get((arch, name), "")
            problems += [f"{arch} {name}: {text.strip()}" for text in instructions if not re.search(text, code)]
        problems += [f"{arch} {name}: operands" for name in OPERANDS if not operands(name, found.get((arch, name), ""))]
    return problems or ([] if found else ["no machine code"])


def main() -> None:
    """Check the program that the command line names."""
    tool = cuobjdump()
    if tool is None:
        sys.exit("cuobjdump is neither on the PATH nor in an installed Triton")
    if problems := missing(Path(sys.argv[1]), tool):
        sys.exit("\n".join(problems))
    print("every kernel contains its instruction")


if __name__ == "__main__":
    main()
