"""What a GPU does in a clock, from its maker's documents and published measurements, and what that says of a loop."""

from __future__ import annotations

from dataclasses import dataclass

import sass


@dataclass(frozen=True)
class Rates:
    """What one processor (SM) does in a clock, and what it holds."""

    device: str
    processors: int
    wgmma: float  # dense bf16 FLOP
    mma: float  # the same by mma.sync
    issue: float  # instructions of a warp
    mufu: float  # lanes
    shared: float  # bytes
    memory: float  # bytes of DRAM, its share
    registers: int
    shared_size: int  # bytes, of which each block takes 1024 more than it asks for from sm_80 on
    threads: int
    blocks: int
    sources: tuple[str, ...]


RATES = {
    "sm_90": Rates(
        "H100 SXM or H200", 132, 4096, 0.629 * 4096, 4, 16, 128, 18, 65536, 228 * 1024, 2048, 32,
        (
            "4096 dense bf16 FLOP by wgmma: NVIDIA H100 whitepaper, 989.4 TFLOP/s over 132 SMs at 1.83 GHz",
            "mma.sync at 62.9 % of that: the mean that Luo et al. measured on an H800 (arXiv 2501.12084, section 6.2)",
            "4 instructions, 16 MUFU lanes, 32 lanes of shuffle: CUDA C++ Programming Guide, throughput at 9.0",
            "128 bytes of shared memory, wgmma's operands there included: 64x32x16, 64x16x16 and 64x8x16 with both "
            "there take 24, 20 and 18 clocks (the same paper, table 9), which is their bytes / 128",
            "18 bytes of DRAM: 4.8 TB/s (H200) over 132 SMs at 1.98 GHz; an H100 SXM has 13. At 656 clocks of latency "
            "(the same paper, table 3) an SM needs 12 KB under way for it",
            "65536 registers, 228 KB of shared memory, 2048 threads, 32 blocks: Hopper Tuning Guide",
        ),
    ),
    "sm_80": Rates(
        "A100", 108, 2048, 2048, 4, 16, 128, 13, 65536, 164 * 1024, 2048, 32,
        (
            "2048 dense bf16 FLOP: NVIDIA A100 whitepaper, 312 TFLOP/s over 108 SMs at 1.41 GHz",
            "4 instructions, 16 MUFU lanes, 32 lanes of shuffle: CUDA C++ Programming Guide, throughput at 8.0",
            "13 bytes of DRAM: 2.04 TB/s (80 GB) over 108 SMs at 1.41 GHz",
            "65536 registers, 164 KB of shared memory, 2048 threads, 32 blocks: Ampere Tuning Guide",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Clocks:
    """Clocks of one processor that a block, or a launch, takes by each limit alone."""

    tensor: float = 0.0
    issue: float = 0.0
    MUFU: float = 0.0
    shared: float = 0.0
    memory: float = 0.0
    apart: float = 0.0  # where products, other instructions and memory never overlap

    def plus(self, other: Clocks, times: float) -> Clocks:
        return Clocks(*(a + b * times for a, b in zip(self.all(), other.all(), strict=True)))

    def all(self) -> tuple[float, ...]:
        return self.tensor, self.issue, self.MUFU, self.shared, self.memory, self.apart

    def limits(self) -> dict[str, float]:
        return dict(zip(("tensor", "issue", "MUFU", "shared", "memory"), self.all(), strict=False))

    @property
    def least(self) -> float:
        return max(self.limits().values())

    @property
    def bound(self) -> str:
        return max(self.limits(), key=lambda one: self.limits()[one])


def clocks(counts: sass.Counts, warps: int, rates: Rates) -> Clocks:
    """The least clocks of one iteration of a block of ``warps``, if it had a processor to itself."""
    groups = warps / 4
    tensor = counts.wgmma_flop * groups / rates.wgmma + counts.mma_flop * warps / rates.mma
    operands = counts.wgmma_bytes * groups / rates.shared
    others = counts.shared_bytes * 32 * warps / rates.shared
    issue, mufu = counts.issued * warps / rates.issue, counts.mufu * 32 * warps / rates.mufu
    return Clocks(tensor, issue, mufu, operands + others, 0.0, max(tensor, operands) + max(issue, mufu, others))
