"""Shapes of the benchmarks: ``LAYALIGN_BENCH=quick|cpu|gpu``; the default depends on the machine.

``quick`` is a smoke test of seconds, whose numbers mean nothing. ``cpu`` takes minutes on two cores. ``gpu`` has the
operations in the paper's shapes (mT5-xl with Llama-2-7B), and the whole model in small sizes and at 7B.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

CHOICES = ("quick", "cpu", "gpu")


@dataclass(frozen=True)
class Size:
    """Sizes of the two frozen parts; ``groups`` is the number of key/value heads, and E is ``encoder_layers``."""

    name: str
    layers: int
    width: int
    heads: int
    groups: int
    inner: int
    encoder_layers: int
    encoder_width: int
    encoder_heads: int
    encoder_inner: int
    vocabulary: int = 8192


@dataclass(frozen=True)
class Work:
    """B sequences of S source tokens; T labels, or T new tokens. Padded: S / 4 to S real source tokens."""

    batch: int
    source: int
    length: int
    padded: bool = False


@dataclass(frozen=True)
class Shapes:
    """One set of shapes."""

    name: str
    dtype: torch.dtype
    sizes: tuple[Size, ...]
    generate: tuple[Work, ...]
    train: tuple[Work, ...]
    forward: tuple[Work, ...]
    decode: tuple[Work, ...]
    mix: tuple[tuple[int, int], ...]  # (B, S)
    mix_sizes: tuple[int, int, int, int]  # E, 2L, D_e, D_l
    attention: tuple[tuple[int, int, int], ...]  # (B, T, S)
    attention_heads: tuple[int, int]  # H, d
    scaling: tuple[int, ...]  # the multiples over which a dimension grows
    scaling_sizes: dict[str, int]  # B, S, T, E, L, and the fixed D_e, D_l, H, d
    seconds: float  # for the rounds of one row
    patience: float  # the same for a whole model's row with a target
    full: tuple[Size, ...] = ()  # of test_full_size.py
    full_train: tuple[Work, ...] = ()
    full_decode: tuple[Work, ...] = ()  # also of prefill
    graph_layers: int = 0  # of test_graphs.py

    @property
    def device(self) -> str:
        """Device of the tensors."""
        return "cuda" if self.name == "gpu" else "cpu"


_SMALL = Size("mha", 12, 768, 12, 12, 2048, 8, 512, 6, 1024)
_GROUPED = Size("gqa", 12, 768, 12, 4, 2048, 8, 512, 6, 1024)
_LARGER = Size("1.3b-gqa", 24, 2048, 32, 8, 5632, 24, 1024, 16, 2816, 32000)
# mT5-xl's encoder with the shapes of Llama-2-7B and, but for its vocabulary, of Llama-3-8B.
_FULL = Size("7b-mha", 32, 4096, 32, 32, 11008, 24, 2048, 32, 5120, 32000)
_FULL_GROUPED = Size("8b-gqa", 32, 4096, 32, 8, 14336, 24, 2048, 32, 5120, 32000)

QUICK = Shapes(
    name="quick",
    dtype=torch.float32,
    sizes=(Size("mha", 2, 64, 4, 4, 96, 3, 48, 4, 64, 128), Size("gqa", 2, 64, 4, 2, 96, 3, 48, 4, 64, 128)),
    generate=(Work(2, 6, 3),),
    train=(Work(2, 6, 5),),
    forward=(Work(2, 6, 5), Work(2, 8, 5, padded=True)),
    decode=(Work(2, 6, 4),),
    mix=((2, 8),),
    mix_sizes=(3, 4, 48, 64),
    attention=((2, 1, 8), (2, 20, 8)),
    attention_heads=(4, 16),
    scaling=(1, 2, 4),
    scaling_sizes=dict(B=1, S=16, T=16, E=3, L=2, De=48, Dl=64, H=4, d=16),
    seconds=0.05,
    patience=0.05,
    full=(Size("mha", 2, 64, 4, 4, 96, 3, 48, 4, 64, 128), Size("gqa", 2, 64, 4, 2, 96, 3, 48, 4, 64, 128)),
    full_train=(Work(2, 6, 5),),
    full_decode=(Work(2, 6, 4),),
    graph_layers=2,
)
CPU = Shapes(
    name="cpu",
    dtype=torch.float32,
    sizes=(_SMALL, _GROUPED),
    generate=(Work(8, 64, 64), Work(1, 128, 32)),
    train=(Work(8, 64, 64), Work(1, 128, 32)),
    forward=(Work(1, 128, 32), Work(4, 64, 16, padded=True)),
    decode=(Work(8, 64, 64), Work(1, 128, 32)),
    mix=((1, 16), (1, 64), (8, 64), (4, 256)),
    mix_sizes=(8, 24, 512, 768),
    attention=tuple((2, length, source) for length in (1, 64, 512) for source in (16, 64, 512)),
    attention_heads=(12, 64),
    scaling=(1, 2, 4, 8),
    scaling_sizes=dict(B=1, S=64, T=64, E=4, L=2, De=512, Dl=768, H=12, d=64),
    seconds=0.5,
    patience=10.0,
)
GPU = Shapes(
    name="gpu",
    dtype=torch.bfloat16,
    sizes=(_SMALL, _GROUPED, _LARGER),
    generate=(Work(8, 64, 64), Work(1, 128, 32)),
    train=(Work(8, 64, 64), Work(16, 128, 256)),
    forward=(Work(16, 128, 256), Work(16, 256, 64, padded=True)),
    decode=(Work(8, 64, 64), Work(1, 128, 32)),
    mix=((4, 128), (16, 256), (32, 512)),
    mix_sizes=(24, 64, 2048, 4096),
    attention=((8, 512, 128), (4, 2048, 512), (32, 1, 256), (8, 1, 1024)),
    attention_heads=(32, 128),
    scaling=(1, 2, 4, 8),
    scaling_sizes=dict(B=4, S=256, T=512, E=6, L=8, De=2048, Dl=4096, H=32, d=128),
    seconds=1.0,
    patience=4.0,
    full=(_FULL, _FULL_GROUPED),
    full_train=(Work(8, 64, 64), Work(16, 200, 200)),  # the first stage: usual texts, and the longest
    full_decode=(Work(8, 128, 128), Work(1, 128, 32)),
    graph_layers=32,
)


def chosen() -> Shapes:
    """The shapes of this run."""
    name = os.environ.get("LAYALIGN_BENCH") or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in CHOICES:
        raise ValueError(f"LAYALIGN_BENCH: expected one of {', '.join(CHOICES)}, got {name!r}")
    if name == "gpu" and not torch.cuda.is_available():
        raise ValueError("LAYALIGN_BENCH=gpu: torch sees no GPU here")
    return {"quick": QUICK, "cpu": CPU, "gpu": GPU}[name]
