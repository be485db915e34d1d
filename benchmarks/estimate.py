"""Estimated size, memory and time of the paper's set-ups. Everything is computed; nothing is measured.

``python benchmarks/estimate.py`` prints the tables. With pages as arguments, it replaces the text between
``<!-- estimated: NAME -->`` and ``<!-- end -->`` in them. ``docs/reproduce.md`` explains the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tables import print_or_fill, table

# mT5-xl's encoder and Llama-2-7B; the aligner reads as many states as the encoder has layers.
ENCODER = dict(vocab=250112, width=2048, inner=32 * 64, mlp=5120, layers=24, heads=32, buckets=32)
LLM = dict(vocab=32000, width=4096, kv=4096, mlp=11008, layers=32)
E, L, D_E, D_L, D_KV = ENCODER["layers"], LLM["layers"], ENCODER["width"], LLM["width"], LLM["kv"]
ENCODER_BLOCK = 4 * D_E * ENCODER["inner"] + 3 * D_E * ENCODER["mlp"]  # weights of the products
LLM_BLOCK = 2 * D_L * D_L + 2 * D_L * D_KV + 3 * D_L * LLM["mlp"]

UTILISATION = (0.4, 0.2)  # assumed shares of the peak rate, good and poor
BANDWIDTH_SHARE = 0.6  # assumed share of the peak bandwidth in decoding
GPUS = {"L40": (181e12, 864e9), "A100 80 GB": (312e12, 2039e9), "H100 SXM": (989e12, 3350e9)}  # dense bf16, bytes/s
DEV, BATCH, EPOCHS = 3000, 128, 3
Lengths = tuple[int, int, int]  # tokens of source, prompt, target


@dataclass(frozen=True)
class Stage:
    """Samples (without the dev split), micro batch, mean lengths (assumed) and longest ones (truncated there)."""

    name: str
    samples: int
    micro: int
    mean: Lengths
    longest: Lengths
    eval_steps: int = 0  # 0: once per epoch

    @property
    def steps(self) -> int:
        return math.ceil(self.samples / BATCH) * EPOCHS


STAGES = (
    Stage("math, translation", 9 * 100_000 - DEV, 8, (40, 0, 40), (200, 0, 200), 200),
    Stage("math, task", 9 * 30_000 - DEV, 2, (80, 160, 200), (512, 512, 512)),
    Stage("X-CSQA, translation", 15 * 100_000 - DEV, 8, (40, 0, 40), (200, 0, 200), 200),
    Stage("XNLI, translation", 14 * 100_000 - DEV, 8, (40, 0, 40), (200, 0, 200), 200),
    Stage("XNLI, task", 15 * 2490 - DEV, 8, (60, 100, 4), (200, 200, 5)),
)
# Questions a language, languages, tokens of source and prompt and of a batch's longest answer (lengths assumed).
TESTS = {"MGSM": (250, 10, 80, 160, 300), "MSVAMP": (1000, 10, 60, 120, 200)}
TESTS |= {"X-CSQA (dev)": (1000, 16, 50, 80, 2), "XNLI (test)": (5010, 15, 60, 100, 5)}


def parameters() -> dict[str, int]:
    """Parameters by part."""
    tables = ENCODER["vocab"] * D_E + ENCODER["buckets"] * ENCODER["heads"]
    adapter = (D_E + 1) * 2 * D_E + (2 * D_E + 1) * D_L + D_L  # two products and the boundary
    return {
        "encoder": tables + E * (ENCODER_BLOCK + 2 * D_E) + D_E,
        "LLM": 2 * LLM["vocab"] * D_L + L * (LLM_BLOCK + 2 * D_L) + D_L,
        "trained": adapter + (E + 1) * 2 * L + (D_E + 1) * D_L + L,  # and the aligner's two, and the gates
        "adapter (of these)": adapter,
    }


def flops(lengths: Lengths, *, backward: bool = True, logits: int | None = None) -> dict[str, float]:
    """Floating-point operations of one sample by part; the backward pass goes through the frozen LLM to its inputs."""
    s, prompt, target = lengths
    t, back = s + 2 + prompt + target, int(backward)
    products = 2 * t * L * LLM_BLOCK + 2 * (target if logits is None else logits) * D_L * LLM["vocab"]
    keys = 2 * s * 2 * L * D_L * D_KV  # the LLM's frozen key and value maps
    trained = 2 * s * (2 * L * D_E * (E + D_L) + 2 * D_E * (D_E + D_L))  # aligner, adapter
    attention, cross = 2 * t * t * D_L * L, 4 * t * s * D_L * L  # the first is causal
    return {
        "encoder": 2 * s * E * ENCODER_BLOCK + 4 * s * s * ENCODER["inner"] * E,
        "LLM": products * (1 + back) + attention * (1 + 2.5 * back),
        "LayAlign": keys * (1 + back) + trained * (1 + 2 * back) + cross * (1 + 2.5 * back),
    }


def training_flops(stage: Stage) -> float:
    """Operations of a stage at mean lengths: its steps, and the forward passes over the dev split."""
    one, dev = (sum(flops(stage.mean, backward=backward).values()) for backward in (True, False))
    runs = 2 + (stage.steps // stage.eval_steps if stage.eval_steps else EPOCHS)  # before, between, at the end
    return stage.samples * EPOCHS * one + DEV * runs * dev


def peak_bytes(stage: Stage, *, checkpointing: bool = False) -> dict[str, float]:
    """Peak bytes of a training step with the longest texts, by part."""
    s, prompt, target = stage.longest
    rows, tokens, size = stage.micro * s, stage.micro * (s + 2 + prompt + target), parameters()
    layer = 14 * D_L + 4 * D_KV + 6 * LLM["mlp"]  # two norms in float32; q, k, v, both attentions; the gated MLP
    return {
        "frozen": 2 * (size["encoder"] + size["LLM"]),
        "trained": 16 * size["trained"],  # float32: weight, gradient, two moments
        "folded": 8 * L * D_KV * D_E,  # key and value weights of all layers and their gradient, bf16
        "LLM": tokens * (2 * D_L * L + layer if checkpointing else layer * L),
        "source": rows * (4 * L * (D_E + D_L + D_KV) + 2 * (E + 1) * D_E + 8 * D_E),
        "logits": 10 * stage.micro * target * LLM["vocab"],  # bf16, float32 and its gradient
    }


def sizes_table() -> str:
    """Parameters, and bytes in bf16."""
    rows = [[part, f"{count:,}", f"{count / 5e8:.2f}"] for part, count in parameters().items()]
    return table(["part", "parameters", "GB in bf16"], rows)


def training_table() -> str:
    """Work, GPU-hours (from good to poor utilisation) and memory of every stage."""
    rows = []
    for stage in STAGES:
        work, tokens = training_flops(stage), " + ".join(map(str, stage.mean))
        hours = [" to ".join(f"{work / rate / u / 3600:.2g}" for u in UTILISATION) for rate, _ in GPUS.values()]
        peaks = [f"{sum(peak_bytes(stage, checkpointing=c).values()) / 1e9:.0f}" for c in (False, True)]
        counts = [f"{stage.samples:,}", f"{stage.steps:,}", tokens, f"{work / 1e18:.2f}"]
        rows.append([stage.name, *counts, *hours, *peaks])
    head = ["stage", "samples", "steps", "mean tokens", "EFLOP", *(f"{gpu}, hours" for gpu in GPUS)]
    return table([*head, "peak GB", "peak GB, checkpointing"], rows)


def evaluation_table() -> str:
    """Hours of the test sets on one GPU, 8 questions a batch: reading by operations, writing by the LLM's bytes."""
    rows = []
    for name, (questions, languages, source, prompt, answer) in TESTS.items():
        read = sum(flops((source, prompt, 0), backward=False, logits=1).values()) * questions * languages
        moved = 2 * parameters()["LLM"] * math.ceil(questions / 8) * languages * answer
        hours = [(read / r / UTILISATION[1] + moved / b / BANDWIDTH_SHARE) / 3600 for r, b in GPUS.values()]
        rows.append([name, f"{questions * languages:,}", str(answer), *(f"{hour:.1f}" for hour in hours)])
    return table(["test set", "questions", "longest answer", *(f"{gpu}, hours" for gpu in GPUS)], rows)


TABLES: dict[str, Callable[[], str]] = dict(sizes=sizes_table, training=training_table, evaluation=evaluation_table)


if __name__ == "__main__":
    print_or_fill("estimated", TABLES)
