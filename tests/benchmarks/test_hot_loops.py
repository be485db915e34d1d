"""benchmarks/hot_loops.py and sass.py: counts known by construction, faults that must be found, stale pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("layalign_kernels.common", reason="the kernels are not installed")

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "kernels"
sys.path.insert(0, str(ROOT / "benchmarks"))

import sass  # noqa: E402

OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)

# In a process of its own, because kernels imported for the interpreter cannot be compiled.
SCRIPT = """
import json
import counted_kernels
import hot_loops
from ahead_of_time import SHIPPED, TARGETS, entry

def compiled(name, kernel, aligned=True, **options):
    types = dict(p_w="*bf16", p_x="*bf16", p_out="*fp32")
    what = entry(name, kernel, types, {}, dict(num_warps=4, num_stages=2) | options)
    return hot_loops.read(what if aligned else (*what[:4], {}, what[5]), "sm_90")

one, two = counted_kernels.one_product, counted_kernels.two_products
kernels = dict(
    plain=compiled("plain", one),
    unrolled=compiled("unrolled", one, num_stages=1),
    narrow=compiled("narrow", one, aligned=False),
    two=compiled("two", two),
    repeated=compiled("repeated", two, num_warps=8),
    spill=compiled("spill", two, maxnreg=96),
)
found = {}
for name, kernel in kernels.items():
    (loop, outside), rates = kernel.regions, kernel.rates
    found[name] = dict(
        text=loop.text, warps=loop.warps, unrolled=loop.unrolled, products=dict(loop.counts.products),
        memory=[[*key, n] for key, n in loop.counts.memory.items()], mufu=loop.counts.mufu, fp32=loop.counts.fp32,
        issued=loop.counts.issued, clocks=hot_loops.clocks(loop.counts, loop.warps, rates).limits(),
        useful=loop.useful_flop, done=loop.counts.flop(loop.warps), blocks=kernel.blocks(),
        faults=[fault.kind for fault in kernel.faults()], page=hot_loops.section(kernel),
        launch=kernel.launch(hot_loops.Work(133, dict(N=1600), 1.0, 0.0))[0].tensor,
        unknown=kernel.launch(hot_loops.Work(133, {}, 1.0, 0.0))[1],
    )
reasons = [known.reason for known in hot_loops.EXCEPTIONS]
repeated = kernels["repeated"]
known = hot_loops.Known("two_products", "repeated product", "b_s = tl.dot", "a test")
gone = hot_loops.Known("two_products", "spill", "", "a test")
problems = {}
for name, exceptions in dict(none=(), known=(known,), gone=(known, gone)).items():
    hot_loops.EXCEPTIONS = exceptions
    problems[name] = hot_loops.problems([repeated], complete=True)
calls = {
    "for o in range(first, last, BN)": dict(first=3, last=100, BN=32),
    "for o in range(first, tl.minimum(last, first + 1))": dict(first=3, last=100),
    "for o in range(unknown)": {},
    "while True": {},
}
errors = []
for options in (dict(BX=1), dict(num_warps=4)):
    try:
        hot_loops.changed(entry("plain", one, {}, {}, dict(num_warps=4)), options)
    except SystemExit as error:
        errors.append(str(error))
print(json.dumps(dict(
    kernels=found, problems=problems, trips=[hot_loops.trips(text, values) for text, values in calls.items()],
    shown=[what[0] for what in hot_loops.shown("sm_90")], reasons=reasons, errors=errors,
    shipped={target: [what[0] for ship in SHIPPED.values() for what in ship(target)] for target in TARGETS},
)))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, str(ROOT / "benchmarks")])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    done = python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


compiles = [
    pytest.mark.slow,
    pytest.mark.skipif(OLD, reason="written for the code that Triton 3.7 makes"),
]


class TestCounts:
    """Of small kernels whose loops are known: see tests/helpers/counted_kernels.py."""

    pytestmark = compiles

    def test_one_access_and_one_product_an_iteration(self, facts: dict[str, Any]) -> None:
        plain = facts["kernels"]["plain"]
        assert plain["text"] == "for i in range(0, N, 16)"
        assert plain["products"] == {"HGMMA 64x64x16": 1}
        assert plain["memory"] == [["LDGSTS", 16, 1]]
        assert (plain["warps"], plain["unrolled"], plain["mufu"], plain["fp32"]) == (4, 1, 0, 0)
        assert plain["useful"] == plain["done"] == 2 * 64 * 64 * 16
        assert plain["faults"] == []

    def test_clocks_follow_from_the_counts(self, facts: dict[str, Any]) -> None:
        plain = facts["kernels"]["plain"]
        clocks = plain["clocks"]
        assert clocks["tensor"] == 2 * 64 * 64 * 16 / 4096
        assert clocks["shared"] == (64 * 16 * 2 + 16 * 64 * 2 + 16 * 64 * 2) / 128  # both operands, and the copy
        assert clocks["issue"] == plain["issued"]  # 4 warps, 4 instructions a clock
        assert clocks["MUFU"] == 0

    def test_an_exponential_for_each_score(self, facts: dict[str, Any]) -> None:
        two = facts["kernels"]["two"]
        assert two["mufu"] == 64 * 64 / 128
        assert two["fp32"] == two["mufu"] / 2  # one conversion makes two bf16
        assert two["memory"] == [["LDGSTS", 16, 64 * 128 * 2 // 16 // 128]]
        assert two["products"] == {"HGMMA 64x64x16": 8, "HGMMA 64x128x16": 4}

    def test_an_unrolled_loop_is_recognised(self, facts: dict[str, Any]) -> None:
        plain, unrolled = facts["kernels"]["plain"], facts["kernels"]["unrolled"]
        assert unrolled["unrolled"] == unrolled["products"]["HGMMA 64x64x16"] > 1
        assert unrolled["launch"] == plain["launch"] + (unrolled["unrolled"] - 1) * 32 * 2  # the remainder, outside

    def test_a_launch_takes_as_long_as_the_busiest_processor(self, facts: dict[str, Any]) -> None:
        plain = facts["kernels"]["plain"]
        assert plain["launch"] == 2 * 100 * 32  # 133 programs on 132 processors, 100 iterations
        assert plain["unknown"] == ["for i in range(0, N, 16)"]

    def test_blocks_of_a_processor(self, facts: dict[str, Any]) -> None:
        blocks = facts["kernels"]["plain"]["blocks"]
        assert blocks["threads"] == 2048 // 128
        assert blocks["shared memory"] == 228 * 1024 // (64 * 64 * 4 + 1024)  # the result on its way out is largest

    def test_iterations_of_a_range(self, facts: dict[str, Any]) -> None:
        assert facts["trips"] == [4, 1, None, None]


class TestCheck:
    pytestmark = compiles

    @pytest.mark.parametrize(
        ("name", "kinds"),
        [
            ("two", []),
            ("spill", ["spill"]),
            ("narrow", ["narrow global", "narrow shared"]),
            ("repeated", ["repeated product"]),
        ],
    )
    def test_faults_are_found(self, facts: dict[str, Any], name: str, kinds: list[str]) -> None:
        kernel = facts["kernels"][name]
        assert kernel["faults"] == kinds
        assert len(re.findall(r"\*\*New\.\*\*", "\n".join(kernel["page"]))) == len(kinds)

    def test_a_repeated_product_is_seen_in_both_listings(self, facts: dict[str, Any]) -> None:
        """Triton's layouts say that one of two products is computed twice, and the machine code has as much work."""
        repeated = facts["kernels"]["repeated"]
        assert repeated["done"] == 1.5 * repeated["useful"]

    def test_exceptions_cover_faults_and_must_be_needed(self, facts: dict[str, Any]) -> None:
        problems = facts["problems"]
        assert len(problems["none"]) == 1 and "repeated: repeated product at `b_s" in problems["none"][0]
        assert problems["known"] == []
        assert problems["gone"] == ["the exception no longer applies: two_products, spill, ``"]

    def test_an_unknown_option_is_refused(self, facts: dict[str, Any]) -> None:
        assert facts["errors"] == ["--options: plain has no BX; expected num_warps, num_stages or one of []"]


@pytest.mark.slow
@pytest.mark.skipif(not RESULTS.is_dir(), reason="a source distribution has no results")
class TestPages:
    """``make kernels-report`` writes them all again."""

    @pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
    def test_the_page_lists_what_ships(self, facts: dict[str, Any], target: str) -> None:
        page = (RESULTS / f"{target}.md").read_text(encoding="utf-8")
        assert re.findall(rf"^\| (.*?) \| {target} \|", page, re.MULTILINE) == facts["shipped"][target]

    def test_the_page_of_hot_loops_shows_what_ships(self, facts: dict[str, Any]) -> None:
        page = (RESULTS / "hot_loops_sm_90.md").read_text(encoding="utf-8")
        assert re.findall(r"^### (.*)$", page, re.MULTILINE) == facts["shown"]
        assert "**New.**" not in page
        known = page.split("## Known faults")[1].split("## Kernels")[0]
        assert re.findall(r"\| ([^|]*) \|$", known, re.MULTILINE)[1:] == facts["reasons"]


LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   FADD R1, R1, R2 ;
.L_x_2:
        //## File "kernel.py", line 7
        /*0020*/                   LDG.E.LTC128B.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/               @P1 BRA `(.L_x_4) ;
.L_x_3:
        //## File "kernel.py", line 8
        /*0050*/               @P0 BRA `(.L_x_2) ;
        //## File "kernel.py", line 9
        /*0060*/              @!P2 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_4:
        /*0080*/                   STS.U16 [R4+0x10], R5 ;
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00a0*/                   BRA `(.L_x_5);
        /*00b0*/                   NOP;
"""


def test_loops_of_a_listing() -> None:
    """Two nested loops; a block after the end that jumps back into the inner one belongs to it, and is no loop."""
    code = sass.parse(LISTING)
    outer, inner = sass.loops(code)
    assert (outer.place, outer.parent, inner.place, inner.parent) == (("kernel.py", 9), None, ("kernel.py", 8), 0)
    assert [code[i].base for i in sorted(outer.own)] == ["FADD", "BRA"]
    assert [code[i].base for i in sorted(inner.own)] == ["LDG", "LDS", "BRA", "BRA", "STS", "BRA"]
    counts = sass.count(code[i] for i in inner.own)
    assert counts.memory == {("LDG", 16): 1, ("STS", 2): 1}  # the access that never runs is not among them
    assert (counts.issued, counts.rest) == (6, 4)


@pytest.mark.parametrize(
    ("opcode", "operands", "shape", "operand_bytes"),
    [
        ("HGMMA.64x32x16.F32.BF16", "R104, gdesc[UR52], RZ, !UPT", (64, 32, 16), 64 * 16 * 2 + 32 * 16 * 2),
        ("HGMMA.64x64x16.F32.BF16", "R24, R128, gdesc[UR12].tnspB, R24", (64, 64, 16), 64 * 16 * 2),
        ("HMMA.16816.F32.BF16", "R4, R8, R12, R4", (16, 8, 16), 0),
        ("FFMA", "R4, R8, R12, R4", (0, 0, 0), 0),
    ],
)
def test_products(opcode: str, operands: str, shape: tuple[int, ...], operand_bytes: int) -> None:
    one = sass.Instruction(0, "", opcode, operands, ("", 0))
    assert (one.shape, one.operand_bytes) == (shape, operand_bytes)
    assert one.tensor == (shape != (0, 0, 0))


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E.128", 16),
        ("LDGSTS.E.BYPASS.LTC128B.64", 8),
        ("LDG.E.LTC128B", 4),
        ("LDG.E.U8", 1),
        ("STS.U16", 2),
        ("LDSM.16.MT88.4", 16),
        ("STSM.16.M88", 4),
        ("UTMALDG.2D", 0),
        ("MOV", 0),
    ],
)
def test_bytes_of_an_access(opcode: str, width: int) -> None:
    assert sass.Instruction(0, "", opcode, "", ("", 0)).width == width
