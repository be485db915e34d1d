"""Compile kernels for chips that are not in this machine, and inspect the result.

:data:`SHIPPED` lists what each kernel file ships for a chip: one :data:`Entry` per configuration. ``inspect_entry``
compiles an entry for a chip and reports registers, spills, shared memory and matrix instructions. It does not work
under ``TRITON_INTERPRET=1``: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sass
import torch
import triton
import triton.language as tl
from layalign_kernels import gated_cross_attention as forward
from layalign_kernels import gated_cross_attention_backward as backward
from layalign_kernels import gated_cross_attention_decode as decode
from layalign_kernels import layer_mix, layer_projection
from layalign_kernels.gated_cross_attention import gated_cross_attention_forward_kernel as forward_kernel
from layalign_kernels.gated_cross_attention_backward import gated_cross_attention_dkv_kernel as dkv_kernel
from layalign_kernels.gated_cross_attention_backward import gated_cross_attention_dq_kernel as dq_kernel
from layalign_kernels.gated_cross_attention_backward import gated_cross_attention_resident_kernel as resident_kernel
from layalign_kernels.gated_cross_attention_common import padded_head_size
from layalign_kernels.gated_cross_attention_decode import gated_cross_attention_decode_combine_kernel as combine_kernel
from layalign_kernels.gated_cross_attention_decode import gated_cross_attention_decode_kernel as decode_kernel
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
    registers, spills = cuda_usage(compiled.asm["cubin"]) if backend == "cuda" else _hip_usage(listing)
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


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a compiled kernel."""
    text = sass.tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["LOCAL"] + numbers["STACK"]


def _hip_usage(listing: str) -> tuple[int, int]:
    """(vector registers, spills to memory) from the code object's metadata; scalar spills go to vector registers."""
    found = re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", listing)
    numbers = {key: int(value) for key, value in found}
    return numbers["vgpr_count"], numbers["vgpr_spill_count"] + numbers["private_segment_fixed_size"]


TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
HALVES = (torch.float16, torch.bfloat16)
# Compiled ahead of time: (head size, type, precision of products). 16 uses the blocks of 64, and 80 is padded to 128.
# Rows of 59, 123 and 251 do not start on 16 bytes.
ATTENTION: list[tuple[int, torch.dtype, str]] = [
    *((size, dtype, "ieee") for size in (16, 64, 80, 128, 256) for dtype in (*HALVES, torch.float32)),
    *((size, torch.float32, "tf32") for size in (64, 128, 256)),
    *((size, dtype, "ieee") for size in (59, 123, 251) for dtype in (torch.float16, torch.float32)),
]


def shipped_entry(
    label: str, kernel: Any, config: dict[str, int], shipped: tuple[int, torch.dtype, str], constants: dict[str, Any],
    types: dict[str, str] | None = None,
) -> Entry:  # fmt: skip
    """An ahead-of-time entry of an attention kernel with 32 heads in groups of 4 and every optional tensor given.

    Pointers have the query's type, except the mask and the fp32 statistics. ``types`` and ``constants`` override.
    """
    size, dtype, precision = shipped
    name = TYPE_NAMES[dtype]
    known = {argument: f"*{name}" for argument in kernel.arg_names if argument.startswith("p_")}
    known |= dict.fromkeys(("p_gate", "p_lse", "p_delta", "p_dgate", "p_part"), "*fp32")
    known["p_mask"] = "*i1"
    known |= dict.fromkeys(("scale", "dq_scale", "dk_scale", "grad_scale"), "fp32")
    blocks = dict(config)
    options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
    flags: dict[str, Any] = dict(
        H=32, REP=4, D=size, BD=padded_head_size(size), PRECISION=precision, NEGATIVE=False, **blocks
    )
    values = {key: value for key, value in (flags | constants).items() if key in kernel.arg_names}
    aligned = size * torch.finfo(dtype).bits // 8 % 16 == 0
    text = f"{label} d{size} {name}" + (" tf32" if precision == "tf32" else "")
    return entry(text, kernel, known | (types or {}), values, options, aligned=aligned)


def _mix_types(target: str) -> list[tuple[Any, str, int]]:
    """Triton's type, its name and its bytes, of the kernels of the layers' mix that ship for ``target``."""
    halves = [(tl.float16, "fp16", 2), (tl.bfloat16, "bf16", 2)]
    # Not shipped: Triton 3.7 would compute float32 in TF32 there.
    return halves if target == "sm_100" else [*halves, (tl.float32, "fp32", 4)]


def _layer_mix(target: str) -> list[Entry]:
    """What ships for ``target`` ("sm_90", ...): the paper's shape (24 layers, 64 slots), a small one, the largest."""
    found = []
    for dtype, kind, itemsize in _mix_types(target):
        for layers, slots in ((24, 64), (8, 24), (64, 256)):
            shape = f"{layers}x{slots} {kind}"
            types = dict(pointers=(f"*{kind}",) * layers, grad=f"*{kind}", x=f"*{kind}", out=f"*{kind}")
            types |= dict(weight="*fp32", bias="*fp32", partial_weight="*fp32", partial_bias="*fp32")
            flags = dict(E=layers, DTYPE=dtype, PRECISION="ieee")
            for kernel, label, extra in (
                (layer_mix.layer_mix_forward_kernel, "forward", dict(HAS_BIAS=True, ALIGNED=True, index=None)),
                (layer_mix.layer_mix_weight_kernel, "weight", dict(ALIGNED=True, index=None)),
                (layer_mix.layer_mix_hidden_kernel, "hidden", {}),
            ):
                blocks = layer_mix.configuration(layers, slots, 2048, itemsize, label, target.startswith("gfx"))
                options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
                constants = flags | extra | blocks
                found.append(entry(f"layer_mix_{label} {shape}", kernel, types, constants, options))
                if "index" in constants and slots == 64:  # some tokens alone
                    given = {key: value for key, value in constants.items() if key != "index"}
                    indexed = types | dict(index="*i64")
                    found.append(entry(f"layer_mix_{label} rows {shape}", kernel, indexed, given, options))
    return found


def _layer_projection(target: str) -> list[Entry]:
    """What ships, the same for every ``target``: 24 layers into 64 slots, and a small shape."""
    found = []
    for dtype, kind, itemsize in _mix_types(target):
        for layers, slots in ((24, 64), (8, 24)):
            types = dict(pointers=(f"*{kind}",) * layers, out=f"*{kind}", weight=f"*{kind}", bias="*fp32")
            types |= dict(mix_weight="*fp32", mix_bias="*fp32")
            flags = dict(E=layers, DTYPE=dtype, PRECISION="ieee", HAS_MIX_BIAS=True, HAS_BIAS=True)
            blocks = layer_projection.configuration(layers, slots, 4096, itemsize)
            options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
            name = f"layer_projection_shared {layers}x{slots} {kind}"
            found.append(entry(name, layer_projection.shared_projection_kernel, types, flags | blocks, options))
    return found


def _forward(arch: str) -> list[Entry]:
    """Every shipped configuration of the forward on ``arch``, a key of TARGETS."""
    found = []
    for shipped in ATTENTION:
        size, dtype, _ = shipped
        config = forward.configuration(size, dtype, arch, forward.SHORT + 1)
        short = forward.configuration(size, dtype, arch, forward.SHORT)
        found.append(shipped_entry("forward", forward_kernel, config, shipped, {}))
        if short != config:
            found.append(shipped_entry("forward short", forward_kernel, short, shipped, {}))
        if size == 128:
            bare: dict[str, None] = dict(p_mask=None, p_residual=None)
            found.append(shipped_entry("forward bare", forward_kernel, config, shipped, bare))
    return found


def _backward(arch: str) -> list[Entry]:
    """Every shipped configuration of the backward on ``arch``, a key of TARGETS."""
    found = []
    for shipped in ATTENTION:
        size, dtype, _ = shipped
        dq, dkv = (backward.configuration(kernel, size, dtype, arch) for kernel in ("dq", "dkv"))
        for label, one_block in (("dq", False), ("dq one block", True)):
            found.append(shipped_entry(label, dq_kernel, dq, shipped, dict(ONE_BLOCK=one_block, NEED_DQ=True)))
        flags = dict(NEED_DK=True, NEED_DV=True)
        found.append(shipped_entry("dkv", dkv_kernel, dkv, shipped, flags))
        partial = dict(p_dk="*fp32", p_dv="*fp32")
        if size == 128:
            found.append(shipped_entry("dkv split", dkv_kernel, dkv, shipped, flags, partial))
        for source in (64, 128):
            whole = backward.resident_configuration(size, source, dtype, arch)
            if whole is not None:
                label, all_flags = f"resident {source} tokens", flags | dict(NEED_DQ=True)
                found.append(shipped_entry(label, resident_kernel, whole, shipped, all_flags))
                found.append(shipped_entry(f"{label} split", resident_kernel, whole, shipped, all_flags, partial))
    return found


def _decode(arch: str) -> list[Entry]:
    """Every shipped configuration of decoding on ``arch``, a key of TARGETS."""
    found = []
    for shipped in ATTENTION:
        size, dtype, _ = shipped
        whole: dict[str, Any] = dict(SPLIT=False, p_part=None, p_lse=None)
        split = dict(SPLIT=True, p_out=None, p_residual=None)
        for rows in (16, 32, 64):
            config = decode.configuration(rows, size, dtype, arch)
            if config["BM"] == rows:
                found.append(shipped_entry(f"decode {rows} rows", decode_kernel, config, shipped, whole))
                found.append(shipped_entry(f"decode split {rows} rows", decode_kernel, config, shipped, split))
    for kind in TYPE_NAMES.values():
        types = dict(p_part="*fp32", p_lse="*fp32", p_gate="*fp32", p_residual=f"*{kind}", p_out=f"*{kind}")
        constants, options = dict(H=32, BP=16, D=128, BD=128), dict(num_warps=1, num_stages=1)
        found.append(entry(f"decode combine d128 {kind}", combine_kernel, types, constants, options))
    return found


SHIPPED: dict[str, Callable[[str], list[Entry]]] = {
    "layer_mix": _layer_mix,
    "layer_projection": _layer_projection,
    "gated_cross_attention": _forward,
    "gated_cross_attention_backward": _backward,
    "gated_cross_attention_decode": _decode,
}
