"""Count what the loops of the shipped Triton kernels do, from their compiled code, and what bounds them.

    python benchmarks/hot_loops.py [NAME ...] [--target sm_90] [--options BM=32,num_warps=4 ...] [--output PAGE]

NAME is an entry of ``ahead_of_time`` ("dkv d128 bf16", or a regular expression); without one, all that the page shows.
Each --options compiles them once more with other block sizes, warps or stages.

Nothing is run: every figure is counted from compiled code or reasoned from the rates in ``rates.py``. Exits with 1
where a kernel spills, where more than one warp (group) computes the same product, where accesses that could be 16 bytes
wide are narrower, except for what ``EXCEPTIONS`` names, and, without NAME, where an exception no longer applies.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import sass
import torch
import triton
from ahead_of_time import SHIPPED, TARGETS, Entry, cuda_usage
from layalign_kernels import gated_cross_attention as forward
from layalign_kernels import gated_cross_attention_backward as backward
from layalign_kernels import gated_cross_attention_decode as decode
from layalign_kernels import layer_mix
from layalign_kernels.common import ceil_div
from rates import RATES, Clocks, Rates, clocks
from shapes import GPU
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Size:
    """B sequences of T queries and S source tokens; H query heads, G key/value heads; E layers of D, into slots."""

    B: int
    T: int
    S: int
    G: int = 32
    H: int = 32
    E: int = 24
    slots: int = 64
    D: int = 2048
    OUT: int = 4096

    def __str__(self) -> str:
        return f"B {self.B}, T {self.T}, S {self.S}, G {self.G}" if self.T else f"B {self.B}, S {self.S}"


# mT5-xl with a 7B LLM at the sizes of the benchmarks on a GPU; 8 key/value heads (G) as well as 32.
TRAINING = [Size(b, t, s, g) for b, t, s in GPU.attention if t > 1 for g in (32, 8)]
ONE_BLOCK = [Size(8, 512, 64, g) for g in (32, 8)]
DECODING = [Size(b, t, s, g) for b, t, s in GPU.attention if t == 1 for g in (32, 8)]
MIXES = [Size(b, 0, s) for b, s in GPU.mix[1:]]


@dataclass(frozen=True)
class Work:
    """One launch at one size.

    Attributes:
        names: values of the names in the ``range`` of the kernel's loops.
        flop: what the result needs; bytes: to and from DRAM, each tensor once.
    """

    programs: int
    names: dict[str, int]
    flop: float
    bytes: float


Constants = dict[str, Any]
Worker = Callable[[Constants, Size], "Work | None"]  # None: the launcher takes another kernel at this size


def _source(c: Constants, end: int) -> dict[str, int]:
    """A source without holes."""
    whole = end - end % int(c["BN"])
    return dict(o_first=0, o_end=end, i_first=0, i_whole=whole, i_end=end, MASK_BLOCK=1024)


def _forward(c: Constants, s: Size, target: str) -> Work | None:
    if forward.configuration(c["D"], torch.bfloat16, target, s.S)["BM"] != c["BM"]:
        return None
    moved = 2 * s.B * c["D"] * (3 * s.H * s.T + 2 * s.G * s.S) + 4 * s.B * s.H * s.T + s.B * s.S
    programs = ceil_div(s.T, c["BM"]) * s.B * s.H
    return Work(programs, _source(c, s.S), 4 * s.B * s.H * s.T * s.S * c["D"], moved)


def _keeps_source(c: Constants, s: Size, target: str) -> bool:
    """Whether the backward is one kernel."""
    return backward.resident_configuration(c["D"], s.S, torch.bfloat16, target) is not None


def _dq(c: Constants, s: Size, target: str) -> Work | None:
    if c["ONE_BLOCK"] != (c["BN"] >= s.S) or _keeps_source(c, s, target):
        return None
    moved = 2 * s.B * c["D"] * (3 * s.H * s.T + 2 * s.G * s.S) + 8 * s.B * s.H * s.T + s.B * s.S
    programs = ceil_div(s.T, c["BM"]) * s.B * s.H
    return Work(programs, _source(c, s.S), 6 * s.B * s.H * s.T * s.S * c["D"], moved)


def _dkv(c: Constants, s: Size, split: bool, target: str, processors: int) -> Work | None:
    if _keeps_source(c, s, target):
        return None
    pairs = s.H // s.G * ceil_div(s.T, c["BM"])
    programs = ceil_div(s.S, c["BN"]) * s.B * s.G
    splits = backward.splits_over_rows(programs, pairs, processors)
    if split != (splits > 1):
        return None
    written = 2 * s.G * s.S * (2 if splits == 1 else 4 * splits)
    moved = s.B * c["D"] * (2 * (2 * s.H * s.T + 2 * s.G * s.S) + written) + 8 * s.B * s.H * s.T + s.B * s.S
    names = dict(i_begin=0, i_stop=ceil_div(pairs, splits))
    return Work(programs * splits, names, 8 * s.B * s.H * s.T * s.S * c["D"], moved)


def _resident(c: Constants, s: Size, split: bool, target: str, processors: int) -> Work | None:
    chosen = backward.resident_configuration(c["D"], s.S, torch.bfloat16, target)
    if chosen is None or chosen["BN"] != c["BN"]:
        return None
    pairs = s.H // s.G * ceil_div(s.T, c["BM"])
    splits = backward.splits_over_rows(s.B * s.G, pairs, processors)
    if split != (splits > 1):
        return None
    written = 2 * s.G * s.S * (2 if splits == 1 else 4 * splits)
    moved = s.B * c["D"] * (2 * (3 * s.H * s.T + 2 * s.G * s.S) + written) + 4 * s.B * s.H * s.T + s.B * s.S
    names = dict(i_begin=0, blocks=ceil_div(pairs, splits), REP=s.H // s.G, n_t=ceil_div(s.T, c["BM"]))
    return Work(s.B * s.G * splits, names, 10 * s.B * s.H * s.T * s.S * c["D"], moved)


def _splits(config: Constants, s: Size, processors: int) -> tuple[int, int]:
    """(programs of one split, splits) of decoding."""
    programs = s.B * s.G * ceil_div(s.H // s.G * s.T, config["BM"])
    room = decode.PROGRAMS_PER_PROCESSOR[config["BM"]] * processors
    return programs, decode.splits_over_source(programs, s.S, config["BN"], room)


def _decode_blocks(c: Constants, s: Size, target: str) -> Constants:
    return decode.configuration(s.H // s.G * s.T, c["D"], torch.bfloat16, target)


def _decode(c: Constants, s: Size, target: str) -> Work | None:
    programs, splits = _splits(c, s, RATES[target].processors)
    if c["SPLIT"] != (splits > 1) or c["BM"] != _decode_blocks(c, s, target)["BM"]:
        return None
    span = max(1, ceil_div(ceil_div(s.S, c["BN"]), splits)) * c["BN"]
    written = 2 * c["D"] if splits == 1 else 4 * splits * (c["D"] + 1)
    moved = s.B * (2 * c["D"] * (2 * s.G * s.S + s.H * s.T) + s.G * s.S + written * s.H * s.T)
    return Work(programs * splits, _source(c, min(span, s.S)), 4 * s.B * s.H * s.T * s.S * c["D"], moved)


def _combine(c: Constants, s: Size, target: str) -> Work | None:
    _, splits = _splits(_decode_blocks(c, s, target), s, RATES[target].processors)
    rows = s.B * s.H * s.T
    if splits == 1:
        return None
    return Work(rows, {}, 2 * rows * splits * c["D"], rows * (4 * splits * (c["D"] + 1) + 4 * c["D"]))


def _mix(c: Constants, s: Size, tensors: int, programs: int, names: dict[str, int]) -> Work:
    """``tensors``: of the size of one layer that are read or written."""
    rows = s.B * s.S
    return Work(programs, names, 2 * s.slots * s.E * rows * s.D, 2 * rows * s.D * tensors)


def _mix_forward(c: Constants, s: Size) -> Work:
    programs = ceil_div(s.B * s.S, c["ROWS"]) * ceil_div(s.D, c["BN"]) * ceil_div(s.slots, c["BJ"])
    return _mix(c, s, s.E + s.slots, programs, dict(ROWS=c["ROWS"]))


def _mix_weight(c: Constants, s: Size, processors: int) -> Work:
    tiles = s.B * s.S * ceil_div(s.D, c["BN"])
    each = max(1, ceil_div(tiles, layer_mix.PROGRAMS_PER_PROCESSOR * processors))
    return _mix(c, s, s.E + 2 * s.slots, ceil_div(tiles, each), dict(tiles_per_program=each))


def _mix_hidden(c: Constants, s: Size) -> Work:
    programs = ceil_div(s.B * s.S, c["ROWS"]) * ceil_div(s.D, c["BN"])
    return _mix(c, s, s.E + 2 * s.slots, programs, dict(ROWS=c["ROWS"]))


def _projection(c: Constants, s: Size) -> Work:
    rows = s.B * s.S
    programs = ceil_div(rows, c["BM"]) * ceil_div(s.OUT, c["BN"]) * ceil_div(s.slots, c["BJ"])
    moved = 2 * (rows * s.E * s.D + s.D * s.OUT + rows * s.slots * s.OUT)
    return Work(programs, dict(D=s.D), 2 * rows * s.slots * s.D * s.OUT, moved)


def trips(text: str, values: dict[str, Any]) -> int | None:
    """Iterations of ``for x in range(...)`` with the names' values; None where one is unknown or it is another loop."""
    found = re.fullmatch(r"for \w+ in (?:tl\.)?range\((.*)\)", text)
    if found is None:
        return None
    call = ast.parse(f"f({found[1]})", mode="eval")
    assert isinstance(call.body, ast.Call)
    tl = SimpleNamespace(minimum=min, maximum=max, cdiv=ceil_div)
    try:
        bounds = [
            eval(compile(ast.Expression(one), "range", "eval"), {"__builtins__": {}, "tl": tl}, values)
            for one in call.body.args
        ]
        return len(range(*bounds))
    except (NameError, TypeError):
        return None


@dataclass(frozen=True)
class Fault:
    """Something that must not ship: ``kind``, and the source line that it is at."""

    kind: str  # "spill", "repeated product", "narrow global", "narrow shared"
    text: str
    detail: str


@dataclass(frozen=True)
class Known:
    """A fault that may stay: of a kernel, of a kind, at source lines that contain ``text``."""

    kernel: str  # a regular expression for the name of the kernel's function
    kind: str
    text: str
    reason: str

    def covers(self, kernel: str, fault: Fault) -> bool:
        return fault.kind == self.kind and self.text in fault.text and bool(re.fullmatch(self.kernel, kernel))


# Known faults of sm_90, each with its reason. One that no longer occurs fails the check: this list only shrinks.
ATTENTION = r"gated_cross_attention_\w+_kernel"
EXCEPTIONS = (
    Known(
        "shared_projection_kernel", "repeated product", "b_x = tl.dot(b_mix",
        "8 warps over 64 slots: wgmma takes 64 rows, so both groups compute them",
    ),
    Known(
        "shared_projection_kernel", "narrow global", "b_h = tl.load(p_layers",
        "rows and inputs share one axis of the tile, so that Triton does not see that inputs are neighbours",
    ),
    Known("shared_projection_kernel", "narrow shared", "range(0, D, BK)", "the same tile on its way to wgmma"),
    Known(
        ATTENTION, "narrow global", "tl.load(p_mask", "the mask's strides are free, and its bytes are read one by one",
    ),
    Known(
        "gated_cross_attention_decode_combine_kernel", "narrow global", "tl.load(p_lse",
        "one number of each part, B * T * H apart",
    ),
    Known(
        "gated_cross_attention_dkv_kernel", "narrow shared", "range(i_begin, i_stop)",
        "log-sum-exp and delta in the layout of the scores: 2 neighbouring columns a thread",
    ),
    Known(
        ATTENTION, "narrow shared", "range(o_first, o_end, MASK_BLOCK)",
        "first, end and number of the attended tokens over the warps: three exchanges of one number",
    ),
    Known(
        "gated_cross_attention_resident_kernel", "narrow shared", "range(i_begin, tl.minimum",
        "log-sum-exp in the layout of the scores, and delta's sums over the warps",
    ),
    Known(
        "gated_cross_attention_decode_kernel", "narrow shared", "range(i_first, i_whole, BN)",
        "sums over the warps, which share a row",
    ),
    Known(
        "gated_cross_attention_decode_kernel", "narrow shared", "range(i_whole, i_end, BN)",
        "Triton reads keys for mma.sync by 4 neighbours a thread; sums over the warps, which share a row",
    ),
)  # fmt: skip


@dataclass
class Kernel:
    """One entry, compiled and counted."""

    name: str
    function: str
    target: str
    constants: Constants
    options: dict[str, int]
    warps: int
    registers: int
    spills: int
    shared: int
    regions: list[sass.Region]
    needed: dict[sass.Place, int]  # FLOP of the products by source line, each once
    folder: Path

    @property
    def rates(self) -> Rates:
        return RATES[self.target]

    def blocks(self) -> dict[str, int]:
        """Blocks that fit on a processor by each limit."""
        rates = self.rates
        registers = ceil_div(max(1, self.registers) * 32, 256) * 256 * ceil_div(self.warps, 4) * 4
        return {
            "registers": rates.registers // registers,
            "shared memory": rates.shared_size // (self.shared + 1024),
            "threads": min(rates.threads // (32 * self.warps), rates.blocks),
        }

    def label(self, region: sass.Region) -> str:
        """The region in words; loops of one source line are told apart by a number."""
        same = [one for one in self.regions if one.text == region.text]
        number = f" ({[one is region for one in same].index(True) + 1})" if len(same) > 1 else ""
        notes = number + ("" if region.parent is None else " (inner)")
        notes += f" (unrolled {region.unrolled} times)" if region.unrolled > 1 else ""
        notes += " (another copy, not counted)" if region.copy else ""
        return f"`{region.text}`{notes}" if region.text else "outside of loops"

    def launch(self, work: Work) -> tuple[Clocks, list[str]]:
        """(clocks of the busiest processor and of the memory, loops whose iterations are unknown)."""
        rates = self.rates
        values = {**self.constants, **work.names}
        total, unknown, iterations = Clocks(), [], []
        for region in self.regions:
            own = 0 if region.copy else trips(region.text, values) if region.text else 1
            if own is None:
                unknown.append(region.text)
                own = 1
            iterations.append(own / region.unrolled)
        for region, own in zip(self.regions, iterations, strict=True):
            times, parent = own, region.parent
            while parent is not None:
                times, parent = times * iterations[parent], self.regions[parent].parent
            total = total.plus(clocks(region.counts, region.warps, rates), times)
        total = Clocks().plus(total, ceil_div(work.programs, rates.processors))
        memory = work.bytes / rates.memory / rates.processors
        return Clocks(*total.all()[:4], memory, total.apart + memory), unknown

    def hot(self) -> sass.Region:
        """The loop with most tensor work or, where there is none, most instructions."""
        return max(self.regions, key=lambda r: (bool(r.text), r.counts.flop(r.warps), r.counts.issued))

    def faults(self) -> list[Fault]:
        """What the check is for, without regard to exceptions."""
        found = []
        local = sum(n for r in self.regions for (base, _), n in r.counts.memory.items() if base in sass.LOCAL)
        if self.spills or local:
            found.append(Fault("spill", "", f"{self.spills} bytes of local memory, {local} accesses"))
        for place, needed in self.needed.items():
            loops = [r for r in self.regions if r.text and any(p.place == place for p in r.products)]
            products = [p for r in loops or self.regions[-1:] for p in r.products if p.place == place]
            times = sum(product.flop * product.copies for product in products) / needed
            if times > 1:
                shapes = " and ".join(sorted({f"{p.m}x{p.n}x{p.k}" for p in products}))
                text = sass.source_line(place, self.folder)
                found.append(Fault("repeated product", text, f"{shapes} is computed {times:g} times"))
        for region in self.regions:
            found += self._narrow(region)
        return list(
            {(one.kind, one.text): one for one in found}.values()
        )  # of several loops the last, which is hottest

    def _narrow(self, region: sass.Region) -> list[Fault]:
        """Where a thread's accesses of one kind in an iteration make up one of 16 bytes, or are several below 4.

        Global accesses count by source line. Shared ones count by loop: compilers name their lines loosely.
        """
        if not aligned(self.name) or not (region.text or len(self.regions) == 1):
            return []
        narrow: dict[tuple[str, str], Counter[tuple[str, int]]] = {}
        for one in region.code:
            if 0 < one.width < 16 and not one.never and one.base not in sass.LOCAL:
                if one.base in sass.SHARED:
                    at = "narrow shared", region.text
                else:
                    at = "narrow global", sass.source_line(one.place, self.folder)
                narrow.setdefault(at, Counter())[one.base, one.width] += 1
        found = []
        for (kind, text), each in narrow.items():
            least = {1: 2, 2: 4, 4: 16, 8: 16}  # bytes
            if kind == "narrow shared":
                least[4] = 20  # the exchange of one sum over the warps is no fault
            many = ", ".join(
                f"{n} {base} of {w}" for (base, w), n in each.items() if n * w >= least[w] * region.unrolled
            )
            if many:
                found.append(Fault(kind, text, f"{many} bytes a thread in an iteration"))
        return found


def works(kernel: Kernel) -> list[tuple[Size, Work]]:
    """The launches at the paper's sizes, as far as the launcher takes this kernel; none for an unknown kernel."""
    target, processors = kernel.target, kernel.rates.processors
    table: dict[str, tuple[list[Size], Worker]] = {
        "gated_cross_attention_forward_kernel": (ONE_BLOCK + TRAINING, lambda c, s: _forward(c, s, target)),
        "gated_cross_attention_dq_kernel": (ONE_BLOCK + TRAINING, lambda c, s: _dq(c, s, target)),
        "gated_cross_attention_dkv_kernel": (
            ONE_BLOCK + TRAINING,
            lambda c, s: _dkv(c, s, "split" in kernel.name, target, processors),
        ),
        "gated_cross_attention_resident_kernel": (
            ONE_BLOCK + TRAINING,
            lambda c, s: _resident(c, s, "split" in kernel.name, target, processors),
        ),
        "gated_cross_attention_decode_kernel": (DECODING, lambda c, s: _decode(c, s, target)),
        "gated_cross_attention_decode_combine_kernel": (DECODING, lambda c, s: _combine(c, s, target)),
        "layer_mix_forward_kernel": (MIXES, _mix_forward),
        "layer_mix_weight_kernel": (MIXES, lambda c, s: _mix_weight(c, s, processors)),
        "layer_mix_hidden_kernel": (MIXES, _mix_hidden),
        "shared_projection_kernel": (MIXES, _projection),
    }
    sizes, work = table.get(kernel.function, ([], lambda c, s: None))
    return [(size, one) for size in sizes if (one := work(kernel.constants, size)) is not None]


def aligned(name: str) -> bool:
    """Whether the entry's rows start on 16 bytes: not those of head sizes that are no multiple of 8."""
    size = re.search(r" d(\d+) ", name)
    return size is None or int(size[1]) % 8 == 0


def changed(entry: Entry, options: dict[str, int]) -> Entry:
    """The entry with other constants, warps or stages."""
    name, kernel, signature, constants, attrs, launch = entry
    launch, constants = dict(launch), dict(constants)
    for key, value in options.items():
        if key in ("num_warps", "num_stages"):
            launch[key] = value
        elif key in kernel.arg_names and (kernel.arg_names.index(key),) in constants:
            constants[kernel.arg_names.index(key),] = value
        else:
            known = [kernel.arg_names[place[0]] for place in constants]
            raise SystemExit(f"--options: {name} has no {key}; expected num_warps, num_stages or one of {known}")
    extra = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"{name}, {extra}" if extra else name, kernel, signature, constants, attrs, launch


def read(entry: Entry, target: str) -> Kernel:
    """Compile an entry for a chip in RATES and count."""
    name, kernel, signature, constants, attrs, options = entry
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=dict(options))
    cubin = compiled.asm["cubin"]
    registers, spills = cuda_usage(cubin)
    threads = re.search(r"\.(?:req|max)ntid (\d+)", compiled.asm["ptx"])
    ir, source_ir = (sass.Ir(compiled.asm[stage], int(threads[1])) for stage in ("ttgir", "ttir"))  # type: ignore[index]
    needed: Counter[sass.Place] = Counter()
    for product in (*source_ir.outside, *(product for loop in source_ir.loops for product in loop.products)):
        needed[product.place] += product.flop
    folder = Path(kernel.fn.__code__.co_filename).parent
    return Kernel(
        name=name,
        function=kernel.fn.__name__,
        target=target,
        constants={kernel.arg_names[place[0]]: value for place, value in constants.items()},
        options=dict(options),
        warps=ir.total_warps,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        regions=sass.regions(sass.parse(sass.tool("nvdisasm", "-c", "-g", cubin=cubin)), ir, folder),
        needed=dict(needed),
        folder=folder,
    )


def shown(target: str) -> list[Entry]:
    """The entries of the page: bf16, head sizes 64 and 128, the paper's number of layers and slots."""
    pattern = re.compile(r"(layer_\w+ 24x64|.* d(64|128)) bf16")
    return [entry for entries in SHIPPED.values() for entry in entries(target) if pattern.fullmatch(entry[0])]


def table(head: list[str], rows: list[list[Any]], left: int = 1) -> list[str]:
    """A Markdown table whose first ``left`` columns are text."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def section(kernel: Kernel) -> list[str]:
    """The part of the page about one kernel."""
    rates, blocks = kernel.rates, kernel.blocks()
    sizes = {k: v for k, v in kernel.constants.items() if re.fullmatch(r"B[A-Z]|ROWS", k)} | kernel.options
    lines = [
        f"### {kernel.name}",
        "",
        ", ".join(f"{key} {value}" for key, value in sizes.items()) + ". "
        f"{kernel.registers} registers a thread, {kernel.shared} bytes of shared memory, "
        f"{kernel.spills} bytes spilled. Blocks per SM: {min(blocks.values())} ("
        + ", ".join(f"{value} by {key}" for key, value in blocks.items())
        + ").",
        "",
        "What a warp issues in one iteration:",
        "",
    ]
    rows = []
    for region in kernel.regions:
        c = region.counts
        reads = c.accesses(sass.GLOBAL), c.accesses(sass.SHARED)
        rows.append([kernel.label(region), c.tensor, *reads, c.issued, c.mufu, c.fp32, c.shuffles, c.barriers, c.rest])
    head = ["loop", "tensor", "global, bytes a thread", "shared, bytes a thread"]
    lines += table([*head, "issued", "MUFU", "FP32", "shuffles", "barriers", "rest"], rows, 4)
    lines += ["", "Clocks of a block in one iteration, by each limit alone:", ""]
    rows = []
    for region in kernel.regions:
        if region.text:
            c = clocks(region.counts, region.warps, rates)
            useful, done = region.useful_flop, region.counts.flop(region.warps)
            moved = region.counts.global_bytes * 32 * region.warps
            limits = [f"{value:.0f}" for value in list(c.limits().values())[:4]]
            wasted = percent(done - useful, done)
            share = percent(useful / rates.wgmma, c.least)
            rows.append([kernel.label(region), *limits, c.bound, share, wasted, moved, f"{moved / c.least:.0f}"])
    head = ["loop", "tensor", "issue", "MUFU", "shared", "bound", "best share of the tensor rate"]
    if rows:
        lines += table([*head, "tensor work wasted", "global bytes", "a clock"], rows)
    else:
        lines[-1:] = []
        lines[-1] = "There is no loop."
    found = works(kernel)
    if found:
        lines += ["", "A launch at the paper's sizes, in thousands of clocks of one SM:", ""]
        rows = []
        unknown: set[str] = set()
        for size, work in found:
            c, missing = kernel.launch(work)
            unknown |= set(missing)
            ideal = roofline(work, rates)
            waves = work.programs / rates.processors / max(1, min(blocks.values()))
            rows.append(
                [
                    size, work.programs, f"{waves:.2f}", *(f"{value / 1e3:.1f}" for value in c.limits().values()),
                    c.bound, f"{ideal / 1e3:.1f}", percent(ideal, c.least), percent(ideal, c.apart),
                ]
            )  # fmt: skip
        head = ["size", "programs", "waves", "tensor", "issue", "MUFU", "shared", "memory", "bound", "roofline"]
        lines += table([*head, "best share", "without overlap"], rows)
        if unknown:
            names = ", ".join(f"`{text}`" for text in sorted(unknown))
            lines += ["", f"Counted once, because the page does not know their iterations: {names}."]
    faults = kernel.faults()
    if faults:
        lines += ["", "Faults:", ""]
        for fault in faults:
            known = next((one for one in EXCEPTIONS if one.covers(kernel.function, fault)), None)
            at = f" at `{fault.text}`" if fault.text else ""
            lines.append(f"- {fault.kind}{at}: {fault.detail}. " + (f"Known: {known.reason}." if known else "**New.**"))
    return [*lines, ""]


def roofline(work: Work, rates: Rates) -> float:
    """Clocks in which the device could do the work: its products at the full rate, or its bytes."""
    return max(work.flop / rates.wgmma, work.bytes / rates.memory) / rates.processors


def verdict(kernel: Kernel) -> list[Any]:
    """One row of the page's first table."""
    hot = kernel.hot()
    c = clocks(hot.counts, hot.warps, kernel.rates)
    useful, done = hot.useful_flop, hot.counts.flop(hot.warps)
    found = works(kernel)
    bound, share = c.bound, "-"
    if found:
        work = found[-1][1]
        launch, ideal = kernel.launch(work)[0], roofline(work, kernel.rates)
        bound, share = launch.bound, f"{percent(ideal, launch.apart)} to {percent(ideal, launch.least)}"
    faults = kernel.faults()
    new = [one for one in faults if not any(known.covers(kernel.function, one) for known in EXCEPTIONS)]
    words = f"{len(new)} new" if new else f"{len(faults)} known" if faults else "-"
    return [
        kernel.name, bound, words, kernel.registers, min(kernel.blocks().values()),
        f"{c.least:.0f}", percent(useful / kernel.rates.wgmma, c.least), percent(done - useful, done), share,
    ]  # fmt: skip


def problems(kernels: list[Kernel], complete: bool) -> list[str]:
    """Faults that no exception names; with ``complete``, also exceptions that no fault needs."""
    found, used = [], set()
    for kernel in kernels:
        for fault in kernel.faults():
            known = [one for one in EXCEPTIONS if one.covers(kernel.function, fault)]
            used |= set(known)
            if not known:
                found.append(f"{kernel.name}: {fault.kind} at `{fault.text}`: {fault.detail}")
    if complete:
        found += [
            f"the exception no longer applies: {one.kernel}, {one.kind}, `{one.text}`"
            for one in EXCEPTIONS
            if one not in used
        ]
    return found


def whole_backward(kernels: list[Kernel]) -> list[list[Any]]:
    """Rows for the backward of the attention in bf16, d 128: all of its launches, against its five products."""
    total: dict[Size, list[Clocks]] = {}
    for kernel in kernels:
        if kernel.name.endswith(" d128 bf16") and re.search(r"_(dq|dkv|resident)_kernel", kernel.function):
            for size, work in works(kernel):
                total.setdefault(size, []).append(kernel.launch(work)[0])
    rows = []
    for size in [size for size in (*ONE_BLOCK, *TRAINING) if size in total]:
        flop = 10 * size.B * size.H * size.T * size.S * 128
        moved = 2 * size.B * 128 * (3 * size.H * size.T + 4 * size.G * size.S)
        ideal = roofline(Work(0, {}, flop, moved), kernels[0].rates)
        least, apart = sum(one.least for one in total[size]), sum(one.apart for one in total[size])
        figures = [f"{value / 1e3:.1f}" for value in (least, ideal)]
        rows.append([size, len(total[size]), *figures, percent(ideal, least), percent(ideal, apart)])
    return rows


HOW_TO_READ = """\
Counted from the compiled code and reasoned from the rates at the end. Nothing was run: no figure here was measured.

- *bound*: the limit that takes longest. *tensor*: matrix instructions; *issue*: all instructions; *MUFU*: exponentials,
  reciprocals; *shared*: bytes through shared memory, operands that wgmma reads there included; *memory*: DRAM.
- *clocks an iteration*: of the hottest loop, for one block that has an SM to itself. *Best share of the tensor rate*:
  what its products, each counted once, leave of it. *Wasted*: matrix instructions beyond these products.
- *share of the roofline*: at the largest of the paper's sizes below. From what remains if products, other instructions
  and DRAM follow one another, to what remains if they overlap fully. The roofline is the products at the full rate, or
  each tensor once through DRAM. Latencies, bank conflicts and L2 are left out: no kernel reaches the second figure.
- A launch takes as long as the SM with most programs. Code under a condition counts as run.
"""


def page(kernels: list[Kernel], target: str) -> str:
    """The page as Markdown."""
    rates = RATES[target]
    lines = [
        f"# Hot loops of the Triton kernels on {target}",
        "",
        f"Triton {triton.__version__}, bf16. `make kernels-report` writes this page; `python benchmarks/hot_loops.py "
        "'dkv d128 bf16'` prints one kernel.",
        "",
        *HOW_TO_READ.splitlines(),
        "",
        *table(VERDICT, [verdict(one) for one in kernels], 3),
        "",
        "## Backward of the attention",
        "",
        "All of its launches together in bf16 at d 128, in thousands of clocks. The roofline has five products.",
        "",
        *table(
            ["size", "launches", "clocks", "roofline", "best share", "without overlap"],
            whole_backward(kernels),
        ),
        "",
        "## Known faults",
        "",
        "The check fails on every other fault, and on each of these that no longer occurs.",
        "",
    ]
    lines += table(
        ["kernel", "fault", "where", "reason"],
        [[f"`{k.kernel}`", k.kind, f"`{k.text}`" if k.text else "-", k.reason] for k in EXCEPTIONS],
        4,
    )
    lines += ["", "## Kernels", ""]
    lines += [line for kernel in kernels for line in section(kernel)]
    lines += ["## Rates", "", f"One SM of {rates.processors} ({rates.device}), a clock:", ""]
    return "\n".join([*lines, *(f"- {source}" for source in rates.sources), ""])


def parse_options(text: str) -> dict[str, int]:
    """``BM=32,num_warps=4`` as a dictionary."""
    try:
        return {key: int(value) for key, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise SystemExit(f"--options: expected NAME=NUMBER,..., got {text!r}") from None


VERDICT = ["kernel", "bound", "faults", "registers", "blocks per SM", "clocks an iteration"]
VERDICT += ["best share of the tensor rate", "tensor work wasted", "share of the roofline"]


def main() -> int:
    """Parse arguments, compile, print or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--target", choices=sorted(RATES), default="sm_90")
    parser.add_argument("--options", nargs="+", type=parse_options, default=[{}], metavar="NAME=NUMBER,...")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    target = arguments.target
    if arguments.names:
        pattern = re.compile("|".join(f"(?:{name})" for name in arguments.names))
        entries = [e for ship in SHIPPED.values() for e in ship(target) if pattern.fullmatch(e[0])]
        if not entries:
            raise SystemExit(f"no entry for {target} is named {arguments.names}; see benchmarks/ahead_of_time.py")
    else:
        entries = shown(target)
    kernels = [read(changed(entry, options), target) for entry in entries for options in arguments.options]
    if arguments.output is None and not arguments.names:
        print(page(kernels, target))
    elif arguments.output is None:
        print("\n".join([*table(VERDICT, [verdict(one) for one in kernels], 3), ""]))
        print("\n".join(line for one in kernels for line in section(one)))
    else:
        arguments.output.write_text(page(kernels, target), encoding="utf-8")
    found = problems(kernels, complete=not arguments.names and target == "sm_90")
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
