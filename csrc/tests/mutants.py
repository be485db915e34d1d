# ruff: noqa: E501  (a fault is a row of a table)
"""Puts faults into copies of the CUDA kernels, one at a time, and says which check sees each of them.

    python csrc/tests/mutants.py [WORD ...]        # all faults, or those whose text has one of the words

Only the kernels that a check needs are compiled: seconds for each fault. Faults in the PTX are looked for in the machine
code, where there is an nvcc. Prints a row of a table for each. Exits with 1 if a check passes in spite of a fault, or
fails without one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import compiled_ptx

SOURCES = Path(__file__).resolve().parents[1]
TILES, STREAM, PTX = "cuda/tiles.cuh", "cuda/gated_cross_attention.cuh", "cuda/ptx.cuh"
FORWARD, BACKWARD = "cuda/gated_cross_attention_forward.cuh", "cuda/gated_cross_attention_backward.cuh"
HEADER, DEVICE = "cuda/emulate.h", "cuda/emulate.cpp"
KERNELS = {
    "attention fp32": ("gated_cross_attention", "gated_cross_attention_forward_float", "gated_cross_attention_backward_float"),
    "attention fp16": ("gated_cross_attention", "gated_cross_attention_forward_half", "gated_cross_attention_backward_half"),
    "layer_mix fp32": ("layer_mix", "layer_mix_float"),
    "layer_mix fp16": ("layer_mix", "layer_mix_half"),
}  # fmt: skip
# What the checks say.
WRONG, RACE, BANKS, OUTSIDE = " at ", "without a barrier between", "bank conflicts", "outside of shared memory"


class Mutant(NamedTuple):
    """A fault: ``old`` becomes ``new`` in ``file``; ``check`` must then say ``says``."""

    fault: str
    file: str
    old: str
    new: str
    check: str
    says: str


MUTANTS = [
    # The three that the software device once did not see.
    Mutant("tiles of fp32 are not swizzled", TILES, "^ (row & 7)", "^ (sizeof(T) == 4 ? 0 : row & 7)", "attention fp32", BANKS),
    Mutant("first barrier of SourceStream::begin", STREAM, "ahead = flag(0);\n    sync_threads();", "ahead = flag(0);", "attention fp16", RACE),
    Mutant("mma's fragments of A in another order", DEVICE, "a[g + 8][t + i] = convert(call.a[1]", "a[g + 8][t + i] = convert(call.a[2]", "ptx", "mma of Half"),
    # Shared memory: barriers, waits, banks, sizes.
    Mutant("tiles of fp16 are not swizzled", TILES, "^ (row & 7)", "^ (sizeof(T) == 2 ? 0 : row & 7)", "attention fp16", "rows of ldmatrix wait"),
    Mutant("sync_warp before probabilities are read", TILES, "  }\n  sync_warp();\n  LAYALIGN_NO_UNROLL\n  for (int s", "  }\n  LAYALIGN_NO_UNROLL\n  for (int s", "attention fp32", RACE),
    Mutant("sync_warp before probabilities are written", TILES, "column = lane % 4 * 2;\n  sync_warp();", "column = lane % 4 * 2;", "attention fp32", RACE),
    Mutant("second barrier of SourceStream::begin", STREAM, "store_flag(0);\n    sync_threads();", "store_flag(0);", "attention fp16", RACE),
    Mutant("barrier of SourceStream::arrive", STREAM, "store_flag(j + 1);\n    sync_threads();", "store_flag(j + 1);", "attention fp16", RACE),
    Mutant("wait of SourceStream::arrive", STREAM, "    cp_async_wait();\n    store_flag(j + 1);", "    store_flag(j + 1);", "attention fp16", RACE),
    Mutant("barrier before results are staged", FORWARD, "  cp_async_wait();\n  sync_threads();\n  float* staged", "  cp_async_wait();\n  float* staged", "attention fp16", RACE),
    Mutant("barrier of QueryStream::next", BACKWARD, "      cp_async_wait();\n      sync_threads();\n      if (j + 1", "      cp_async_wait();\n      if (j + 1", "attention fp16", RACE),
    Mutant("16 bytes of shared memory too few", FORWARD, "kBytes = kFlags + 16 * kTile;", "kBytes = kFlags + 16 * kTile - 16;", "attention fp16", OUTSIDE),
    Mutant("layer mix: barrier before tiles are overwritten", "cuda/layer_mix_float.cu", "          sync_threads();\n          for (int k", "          for (int k", "layer_mix fp32", RACE),
    Mutant("layer mix: weight's rows without padding", "cuda/layer_mix_half.cu", "return columns + 8; }", "return columns; }", "layer_mix fp16", "rows of ldmatrix wait"),
    # Arithmetic.
    Mutant("a token after the source's end is attended", STREAM, "BN && s < end &&", "BN && s <= end &&", "attention fp16", WRONG),
    Mutant("the mask is ignored", STREAM, "(!mask || mask[s * mask_s])", "true", "attention fp16", WRONG),
    Mutant("B's fragments swapped", TILES, "mma(acc[2 * n], a, b[0], b[1], T{});\n      mma(acc[2 * n + 1], a, b[2], b[3], T{});\n    }\n  }\n}\n\ntemplate <typename T, int D, int N>\nDEVICE void tensor_multiply(", "mma(acc[2 * n], a, b[0], b[2], T{});\n      mma(acc[2 * n + 1], a, b[1], b[3], T{});\n    }\n  }\n}\n\ntemplate <typename T, int D, int N>\nDEVICE void tensor_multiply(", "attention fp16", WRONG),
    Mutant("ldmatrix without transposition", TILES, "ldmatrix_transposed(b", "ldmatrix(b", "attention fp16", WRONG),
    Mutant("the running maximum rescales half of the columns", FORWARD, "      acc[n][2 * r + 1] *= before;\n", "", "attention fp16", WRONG),
    Mutant("half of the lanes of a row are summed", FORWARD, "    sum[r] += shuffle_xor(sum[r], 2);\n", "", "attention fp16", WRONG),
    Mutant("numbers of rows that do not exist", BACKWARD, "numbers[k * kRows] = 0.0f;", "(void)numbers;", "attention fp16", WRONG),
    # The software device's own model of the instructions.
    Mutant("ldmatrix transposed the wrong way", DEVICE, "transposed ? rows[minor + 1][major]", "transposed ? rows[minor][major + 1 & 7]", "ptx", "ldmatrix_transposed"),
    Mutant("an absent copy leaves what was there", DEVICE, "  memset(to, 0, 16);\n", "", "ptx", "cp_async16"),
    Mutant("two numbers packed in the other order", HEADER, "emulation::float_to_half(first) | static_cast<uint32_t>(emulation::float_to_half(second)) << 16", "emulation::float_to_half(second) | static_cast<uint32_t>(emulation::float_to_half(first)) << 16", "ptx", "pack of Half"),
    Mutant("bf16 truncates", DEVICE, "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16", "ptx", "BFloat"),
    Mutant("a product rounds before the sum", HEADER, "return std::fma(a, b, c);", "volatile float product = a * b; return product + c;", "ptx", "WRONG fused"),
    Mutant("shuffle with the wrong lane", DEVICE, "(i ^ call->mask) & 31", "(i + call->mask) & 31", "ptx", "shuffle_xor"),
    # ptx.cuh itself.
    Mutant("PTX: ldmatrix without transposition", PTX, "x4.trans.shared", "x4.shared", "sass", "ldmatrix_transposed: LDSM"),
    Mutant("PTX: registers of A in another order", PTX, "bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}", "bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%6,%5,%7}", "sass", "mma_bfloat_operands"),
    Mutant("PTX: registers of B in another order", PTX, "f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}", "f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%9,%8}", "sass", "mma_half_operands"),
    Mutant("PTX: bf16 multiplied as fp16", PTX, "f32.bf16.bf16.f32", "f32.f16.f16.f32", "sass", "mma_bfloat: HMMA"),
    Mutant("PTX: two numbers packed in the other order", PTX, '"cvt.rn.bf16x2.f32 %0, %1, %2;"', '"cvt.rn.bf16x2.f32 %0, %2, %1;"', "sass", "pack_bfloat_operands"),
    Mutant("PTX: no wait for copies", PTX, 'asm volatile("cp.async.wait_all;" ::: "memory");', "", "sass", "DEPBAR"),
    Mutant("PTX: an absent copy leaves what was there", PTX, '"@!there st.shared.v4.u32 [%0], {%3, %3, %3, %3};\\n}"', '"}"', "sass", "STS.128"),
]  # fmt: skip


def load_builder(sources: Path) -> ModuleType:
    """The builder of a copy of csrc, which compiles that copy."""
    spec = importlib.util.spec_from_file_location("builder_of_mutants", sources / "builder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def machine_code() -> bool:
    """Whether nvcc and cuobjdump are here."""
    try:
        return bool(load_builder(SOURCES).nvcc() and compiled_ptx.cuobjdump())
    except RuntimeError:
        return False


def failure(builder: ModuleType, check: str, folder: Path) -> str:
    """Build and run one check; its output where it fails, else nothing."""
    here, objects = builder.HERE, folder / check.replace(" ", "_")
    if check == "sass":
        tool = compiled_ptx.cuobjdump()
        assert tool is not None
        os.environ["LAYALIGN_CUDA_ARCHS"] = "90"
        return "\n".join(compiled_ptx.missing(builder.ptx_program(objects, "1")[0], tool))
    if check == "ptx":
        program, arguments = builder.ptx_program(objects, "emulate")[0], []
    else:
        plan = builder.Plan(defines=["-DLAYALIGN_HAVE_CUDA", "-DLAYALIGN_EMULATE_CUDA", "-DLAYALIGN_WATCH_SHARED"])
        kernels = [here / "cuda" / f"{name}.cu" for name in KERNELS[check]] + [here / "tests" / "probes.cpp"]
        plan.objects = [("cxx", source, f"-x c++ {builder.KERNEL_FLAGS['watch']}") for source in kernels]
        plan.objects += [("cxx", here / "cuda" / "emulate.cpp", ""), ("cxx", here / "tests" / "cuda_check.cpp", "")]
        program, arguments = objects / "check", ["0", "1", check]
        # The kernels of other types are not there, nor called.
        builder.run_ninja(plan, program, objects, "-O2 -no-pie -Wl,--unresolved-symbols=ignore-all", shared=False)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=300)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def main() -> None:
    """Run the faults that the command line names."""
    chosen = [one for one in MUTANTS if not sys.argv[1:] or any(word in one.fault for word in sys.argv[1:])]
    if not machine_code():
        chosen = [one for one in chosen if one.check != "sass"]
    survivors = []
    print("| fault | file | check | what it says |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, sources = Path(name), Path(name) / "csrc"
        shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
        builder = load_builder(sources)
        for check in sorted({mutant.check for mutant in chosen}):
            if output := failure(builder, check, folder):
                sys.exit(f"{check} fails without a fault:\n{output}")
        for mutant in chosen:
            file = sources / mutant.file
            text = file.read_text(encoding="utf-8")
            if text.count(mutant.old) != 1:
                sys.exit(f"{mutant.fault}: {mutant.file} has its text {text.count(mutant.old)} times")
            file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            output = failure(builder, mutant.check, folder)
            file.write_text(text, encoding="utf-8")
            line = next(
                (line for line in output.splitlines() if mutant.says in line and not line.endswith("right")), ""
            )
            if not line:
                survivors.append(f"{mutant.fault}: {output.strip() or 'passed'}")
            print(f"| {mutant.fault} | `{mutant.file}` | {mutant.check} | {line[:110] or 'NOT SEEN'} |", flush=True)
    if survivors:
        sys.exit("\n".join(["", *survivors]))


if __name__ == "__main__":
    main()
