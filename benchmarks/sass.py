"""Read a compiled NVIDIA kernel: the instructions of each loop (SASS) and the products of each loop (Triton's GPU IR).

Used by ``hot_loops.py``. The tools are those in Triton's package; no GPU is needed.
"""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

Place = tuple[str, int]  # file and line of the source, ("", 0) where unknown
WGMMA = ("HGMMA", "QGMMA", "IGMMA")
HMMA_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32)}
SHARED = ("LDS", "LDSM", "STS", "STSM", "ATOMS")
GLOBAL = ("LDG", "STG", "LDGSTS", "RED", "ATOM", "ATOMG", "REDG", "UTMALDG", "UTMASTG", "UBLKCP")
LOCAL = ("LDL", "STL")
BARRIERS = ("BAR", "SYNCS")
FP32 = re.compile(r"(F(FMA|MUL|ADD|MNMX|SEL|SETP|SET|CHK)[23]?|F2FP?|F2I|I2FP?|H(FMA|ADD|MUL|MNMX|SETP|SET)2)$")


@dataclass(frozen=True)
class Instruction:
    """One instruction of one warp."""

    address: int
    predicate: str
    opcode: str  # with its modifiers
    operands: str
    place: Place

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def never(self) -> bool:
        """Whether its predicate is the constant false: the compiler's padding."""
        return self.predicate == "@!PT"

    @property
    def width(self) -> int:
        """Bytes a thread of an access to memory (1, 2, 4, 8 or 16), 0 for other instructions and for bulk copies."""
        if self.base not in (*SHARED, *GLOBAL, *LOCAL) or self.base.startswith("U"):
            return 0
        parts = self.opcode.split(".")[1:]
        if self.base in ("LDSM", "STSM"):
            return 4 * next((int(part) for part in parts if part in ("2", "4")), 1)
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[part] for part in parts if part in sizes), 4)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, n, k) of a product by tensor cores, (0, 0, 0) for others, and where the code does not say it."""
        parts = self.opcode.split(".")
        if self.base in WGMMA:
            m, n, k = map(int, parts[1].split("x"))
            return m, n, k
        if self.base == "HMMA":
            return HMMA_SHAPES[parts[1]]
        return 0, 0, 0

    @property
    def tensor(self) -> bool:
        """Whether the tensor cores do it."""
        return "MMA" in self.base

    @property
    def operand_bytes(self) -> int:
        """Bytes that a warp group's wgmma reads from shared memory: the left operand may be in registers."""
        if self.base not in WGMMA:
            return 0
        m, n, k = self.shape
        size = 1 if self.base in ("QGMMA", "IGMMA") else 2
        left = 0 if re.match(r"\s*R\d+\s*,\s*R\d+", self.operands) else m * k * size
        return left + n * k * size


LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
PLACE = re.compile(r'\s*//## File "(.*?)", line (\d+)')


def parse(listing: str) -> list[Instruction]:
    """Instructions of the only kernel in a listing of ``nvdisasm -c -g``; branch targets become addresses."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    found: list[Instruction] = []
    place: Place = ("", 0)
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            pending.append(label.group(1))
        elif at := PLACE.match(line):
            place = at.group(1), int(at.group(2))
        elif code := LINE.match(line):
            address = int(code.group(1), 16)
            labels.update(dict.fromkeys(pending, address))
            pending = []
            found.append(Instruction(address, code.group(2) or "", code.group(3), code.group(4), place))
    named = re.compile(r"`\((\.L_x_\d+)\)")
    return [
        Instruction(
            one.address, one.predicate, one.opcode, named.sub(lambda m: hex(labels[m[1]]), one.operands), one.place
        )
        for one in found
    ]


@dataclass
class Loop:
    """A loop: its instructions, without and with those of the loops in it.

    Attributes:
        own: indices of the instructions that belong to no inner loop.
        place: source of the branch back to the start.
        parent: index of the loop around it, None for an outer one.
    """

    own: set[int]
    body: set[int]
    place: Place
    parent: int | None = None


def _target(one: Instruction) -> int | None:
    found = re.search(r"\b0x([0-9a-f]+)", one.operands) if one.base in ("BRA", "JMP") else None
    return int(found.group(1), 16) if found else None


def _waits(body: Iterable[Instruction]) -> bool:
    """Whether a loop only waits for a barrier in memory, or is the trap after the end."""
    counts = count(body)
    return counts.issued < 8 and counts.issued == counts.rest + counts.barriers


def loops(code: list[Instruction]) -> list[Loop]:
    """The natural loops, in the order of their starts: of each branch back to a block that dominates it.

    Those that only wait are left out.
    """
    index = {one.address: i for i, one in enumerate(code)}
    starts = {0}
    for i, one in enumerate(code):
        if one.base in ("BRA", "JMP", "EXIT", "RET", "BRX"):
            starts.add(i + 1)
        if (target := _target(one)) is not None:
            starts.add(index[target])
    order = sorted(start for start in starts if start < len(code))
    block_of = {start: b for b, start in enumerate(order)}
    ends = [*order[1:], len(code)]
    after: list[list[int]] = []
    for end in ends:
        last = code[end - 1]
        target = _target(last)
        following = [] if target is None else [block_of[index[target]]]
        stops = last.base in ("EXIT", "RET", "BRX") or target is not None
        always = last.predicate in ("", "@PT", "@UPT") and not (target is not None and "UP" in last.operands)
        if end < len(code) and not (stops and always):
            following.append(block_of[end])
        after.append(following)
    before: list[list[int]] = [[] for _ in order]
    for b, following in enumerate(after):
        for other in following:
            before[other].append(b)
    everything = set(range(len(order)))
    dominators = [everything if before[b] else {b} for b in range(len(order))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in range(1, len(order)):
            if before[b]:
                new = set.intersection(*(dominators[p] for p in before[b])) | {b}
                changed |= new != dominators[b]
                dominators[b] = new
    bodies: dict[int, set[int]] = {}
    places: dict[int, Place] = {}
    for b, following in enumerate(after):
        for head in following:
            if head in dominators[b]:
                body, todo = bodies.setdefault(head, {head}), [b]
                while todo:
                    one = todo.pop()
                    if one not in body:
                        body.add(one)
                        todo += before[one]
                places[head] = code[ends[b] - 1].place
    found = []
    for head in sorted(bodies):
        instructions = {i for b in bodies[head] for i in range(order[b], ends[b])}
        if not _waits(code[i] for i in instructions):
            found.append(Loop(set(instructions), instructions, places[head]))
    for i, loop in enumerate(found):
        around = [k for k, other in enumerate(found) if k != i and loop.body < other.body]
        loop.parent = min(around, key=lambda k: len(found[k].body), default=None)
    for loop in found:
        for other in found:
            if other.body < loop.body:
                loop.own -= other.body
    return found


@dataclass
class Counts:
    """What one warp issues.

    Attributes:
        products: tensor instructions by name and shape.
        memory: accesses to global, shared and local memory by instruction and bytes a thread.
        rest: integer work, moves, branches, waits.
    """

    issued: int
    products: Counter[str]
    mufu: int
    fp32: int
    memory: Counter[tuple[str, int]]
    shuffles: int
    barriers: int
    rest: int
    wgmma_flop: int  # a warp group
    wgmma_bytes: int  # a warp group, from shared memory
    mma_flop: int  # a warp

    def flop(self, warps: int) -> int:
        """Of all warps of a block."""
        return self.wgmma_flop * warps // 4 + self.mma_flop * warps

    @property
    def shared_bytes(self) -> int:
        """Bytes a thread through shared memory, shuffles as 4, without those of wgmma."""
        moved = sum(n * width for (base, width), n in self.memory.items() if base in SHARED or base == "LDGSTS")
        return moved + 4 * self.shuffles

    @property
    def tensor(self) -> str:
        """The tensor instructions in words."""
        return ", ".join(f"{n} {name}" for name, n in self.products.items()) or "-"

    def accesses(self, bases: tuple[str, ...]) -> str:
        """Accesses by ``bases`` (GLOBAL, SHARED) in words, with their bytes, widest first."""
        found = sorted(((w, base, n) for (base, w), n in self.memory.items() if base in bases), reverse=True)
        return ", ".join(f"{n} {base} {w}" if w else f"{n} {base}" for w, base, n in found) or "-"

    @property
    def global_bytes(self) -> int:
        """Bytes a thread to and from global memory, without bulk copies."""
        return sum(n * width for (base, width), n in self.memory.items() if base in GLOBAL)


def count(code: Iterable[Instruction]) -> Counts:
    """Count instructions by kind; those that never run are ``rest``."""
    found = Counts(0, Counter(), 0, 0, Counter(), 0, 0, 0, 0, 0, 0)
    for one in code:
        found.issued += 1
        flop = 2 * prod(one.shape)
        if one.never:
            found.rest += 1
        elif one.tensor:
            shape = "x".join(map(str, one.shape)) if flop else ""
            found.products[f"{one.base} {shape}".strip()] += 1
            if one.base in WGMMA:
                found.wgmma_flop += flop
                found.wgmma_bytes += one.operand_bytes
            else:
                found.mma_flop += flop
        elif one.base == "MUFU":
            found.mufu += 1
        elif FP32.match(one.base):
            found.fp32 += 1
        elif one.base in (*SHARED, *GLOBAL, *LOCAL):
            found.memory[one.base, one.width] += 1
        elif one.base == "SHFL":
            found.shuffles += 1
        elif one.base in BARRIERS:
            found.barriers += 1
        else:
            found.rest += 1
    return found


@dataclass(frozen=True)
class Product:
    """A product in Triton's IR after layouts are chosen; ``copies``: how often its tile is computed."""

    m: int
    n: int
    k: int
    copies: int
    place: Place

    @property
    def flop(self) -> int:
        return 2 * self.m * self.n * self.k


@dataclass
class SourceLoop:
    """A loop of Triton's IR, with the products that are in it and in no inner loop; ``warps`` run it."""

    place: Place
    warps: int
    products: list[Product]


class Ir:
    """Loops and products of ``ttir`` or ``ttgir`` text, in their order; ``outside``: products outside of loops.

    Args:
        threads: of a block, more than those of ``num_warps`` where warps are specialised.
    """

    def __init__(self, text: str, threads: int) -> None:
        self._locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
        layouts = re.findall(r"^(#\w+) = #ttg\.nvidia_mma<\{(.*)\}>", text, re.MULTILINE)
        self._layouts = {name: self._tile(fields) for name, fields in layouts}
        self.total_warps = threads // 32
        warps = re.search(r'"ttg.num-warps" = (\d+)', text)
        self.warps = int(warps[1]) if warps else self.total_warps
        self.loops: list[SourceLoop] = []
        self.outside: list[Product] = []
        self._read(text)

    @staticmethod
    def _tile(fields: str) -> tuple[int, ...]:
        """Rows and columns that all warps compute together with one instruction each."""
        warps, shape = (
            [int(n) for n in re.search(rf"{name} = \[([\d, ]+)\]", fields)[1].split(",")]  # type: ignore[index]
            for name in ("warpsPerCTA", "instrShape")
        )
        return warps[0] * shape[0], warps[1] * shape[1]

    def place(self, reference: str) -> Place:
        """The innermost source line of a location such as ``#loc12``."""
        text = self._locations.get(reference, reference)
        while not (file := re.match(r'"([^"]+)":(\d+):\d+', text)):
            following = re.search(r"#loc\d*", text)
            if following is None:
                return "", 0
            text = self._locations.get(following.group(0), "")
        return file.group(1), int(file.group(2))

    def _read(self, text: str) -> None:
        warps = self.warps
        stack: list[SourceLoop | int | None] = []  # a loop, the warps around a partition, or another region
        for line in text.splitlines():
            end = re.search(r"loc\((#loc\d*)\)$", line)
            here = next((one for one in reversed(stack) if isinstance(one, SourceLoop)), None)
            if stack and re.match(r"\s*\}", line):
                closed = stack.pop()
                if isinstance(closed, SourceLoop) and end:
                    closed.place = self.place(end.group(1))
                elif isinstance(closed, int):
                    warps = closed
            if re.search(r"\bscf\.(for|while)\b", line):
                loop = SourceLoop(("", 0), warps, [])
                self.loops.append(loop)
                stack.append(loop)
            elif partition := re.match(r"\s*partition\d+\(.*num_warps\((\d+)\)", line):
                stack.append(warps)
                warps = int(partition[1])
            elif re.search(r"\{$", line):
                stack.append(None)
            elif re.search(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ", line):
                product = self._product(line, self.place(end.group(1)) if end else ("", 0))
                (self.outside if here is None else here.products).append(product)

    def _product(self, line: str, place: Place) -> Product:
        types = line[line.rindex(" : ") :]
        dimensions = re.findall(r"(?:tensor|memdesc)<((?:\d+x)+)", types)
        shapes = [tuple(map(int, one.rstrip("x").split("x"))) for one in dimensions]
        (m, k), (_, n) = shapes[0][-2:], shapes[1][-2:]
        layout = re.search(r"-> tensor<[^#]*(#\w+)>", types)
        rows, columns = self._layouts.get(layout.group(1), (m, n)) if layout else (m, n)
        return Product(m, n, k, max(1, rows // m) * max(1, columns // n), place)


@dataclass
class Region:
    """The instructions of one loop without its inner ones, or all outside of loops.

    Attributes:
        text: its line of the source, "" outside of loops.
        unrolled: iterations of the source in one of the compiled loop, as its products show.
        copy: whether it is one more loop that the compiler made of the same source, such as that of a remainder.
    """

    text: str
    place: Place
    parent: int | None
    warps: int
    code: list[Instruction]
    counts: Counts
    products: list[Product]
    unrolled: int = 1
    copy: bool = False

    @property
    def useful_flop(self) -> int:
        """Of a block: its products, each once."""
        return sum(product.flop for product in self.products) * self.unrolled


def source_line(place: Place, folder: Path) -> str:
    """The text of a source line, without its comment. Files of ``folder`` are found wherever they were compiled."""
    file, line = place
    here = folder / Path(file).name
    return re.sub(r"\s+#.*", "", linecache.getline(str(here) if here.is_file() else file, line)).strip().rstrip(":")


def regions(code: list[Instruction], ir: Ir, folder: Path) -> list[Region]:
    """The regions of a kernel, that outside of all loops last. Loops are matched with the IR's by their source line."""
    inner = loops(code)
    in_order = len(inner) == len(ir.loops)
    left = list(ir.loops)
    matches: dict[int, SourceLoop] = {}
    # The largest compiled loop of a source line is the one that counts.
    for i in sorted(range(len(inner)), key=lambda i: -len(inner[i].own)):
        tensor = any(code[k].tensor for k in inner[i].own)
        alike = sorted(
            (one for one in left if one.place == inner[i].place), key=lambda one, t=tensor: bool(one.products) != t
        )
        match = alike[0] if alike else None
        if match is None and in_order and ir.loops[i] in left:
            match = ir.loops[i]
        if match is not None:
            left.remove(match)
            matches[i] = match
    found = []
    for i, loop in enumerate(inner):
        own = [code[k] for k in sorted(loop.own)]
        counts, source = count(own), matches.get(i)
        place = source.place if source else loop.place
        region = Region(
            text=source_line(place, folder) or f"loop at {code[min(loop.body)].address:#x}",
            place=place,
            parent=loop.parent,
            warps=source.warps if source else ir.total_warps,
            code=own,
            counts=counts,
            products=source.products if source else [],
            copy=source is None and any(place == one.place for one in ir.loops),
        )
        expected = sum(product.flop * product.copies for product in region.products)
        if expected:
            region.unrolled = max(1, round(counts.flop(region.warps) / expected))
        found.append(region)
    inside = set().union(*(loop.body for loop in inner))
    rest = [one for i, one in enumerate(code) if i not in inside]
    while rest and rest[-1].base in ("NOP", "BRA"):  # padding after the end
        rest.pop()
    found.append(Region("", ("", 0), None, ir.total_warps, rest, count(rest), ir.outside))
    return found


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    """The output of ``cuobjdump`` or ``nvdisasm`` in Triton's package for a compiled kernel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout
