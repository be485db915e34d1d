"""Estimates for training on 8 to 512 GPUs: bytes that the engines send, and the time of a step.

``python benchmarks/scale.py`` prints the tables. With pages as arguments, it replaces the text between ``<!-- scale:
NAME -->`` and ``<!-- end -->`` in them. ``docs/scale.md`` explains the formulas. The bytes are checked against what two
processes send for a small model (``tests/training/test_distributed.py``); times are not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import estimate
from tables import print_or_fill, table

GPUS = (8, 16, 32, 64, 128, 256, 512)
NODE = 8
RATE = 989e12  # H100 SXM, dense bf16
INSIDE, BETWEEN = 200e9, 25e9  # assumed bytes/s of one GPU inside a node, and between nodes
BATCH, MICRO = 128, 8
STAGE = estimate.STAGES[0]


@dataclass(frozen=True)
class Units:
    """Number of parameters by FSDP2 unit.

    Attributes:
        encoder: the encoder's layers and its embeddings.
        encoder_last: of these, the last layer; prefetched in the backward pass, although nothing needs it there.
        key_value: key and value projections of the language layers.
        layers: the rest of the LLM's layers.
        embeddings: the LLM's input embeddings; also prefetched in the backward pass.
        head: the LLM's output head.
        root: everything else, including the trained parameters.
        trained: parameters with gradients.
    """

    encoder: int
    encoder_last: int
    key_value: int
    layers: int
    embeddings: int
    head: int
    root: int
    trained: int

    @property
    def all(self) -> int:
        return self.encoder + self.key_value + self.layers + self.embeddings + self.head + self.root

    def gathered(self) -> dict[str, int]:
        """How often each unit is gathered for one micro batch, forward and backward."""
        # Keys and values of the source, then the layers, and both again in the backward. The frozen encoder has none.
        return dict(encoder=1, encoder_last=1, key_value=4, layers=2, embeddings=2, head=1, root=1)

    def gathered_bytes(self, size: dict[str, int]) -> int:
        """Bytes of the gathered units for one micro batch; ``size``: bytes of a parameter by unit."""
        return sum(times * getattr(self, name) * size[name] for name, times in self.gathered().items())


def units_of(model: Any, gpus: int = 1) -> Units:
    """The units of a T5-like encoder with a Llama-like LLM; parameters are padded to equal shards."""

    def padded(parameter: Any) -> int:
        first = parameter.shape[0]
        return math.ceil(first / gpus) * gpus * parameter.numel() // first

    def count(*modules: Any) -> int:
        return sum(padded(p) for module in modules for p in module.parameters())

    maps = [m for attention in model.source_attentions for m in (attention.k_proj, attention.v_proj)]
    base, encoder, key_value = model.llm.model, model.encoder, count(*maps)
    parts = dict(
        encoder=count(encoder.block, encoder.embed_tokens),
        key_value=key_value,
        layers=count(base.layers) - key_value,
        embeddings=count(base.embed_tokens),
        head=count(model.llm.lm_head),
    )
    trained = sum(padded(p) for p in model.parameters() if p.requires_grad)
    root = count(model) - sum(parts.values())
    return Units(**parts, encoder_last=count(encoder.block[-1]), root=root, trained=trained)


def published_units() -> Units:
    """mT5-xl's encoder and Llama-2-7B."""
    size, llm = estimate.parameters(), estimate.LLM
    key_value = 2 * estimate.L * estimate.D_L * estimate.D_KV
    return Units(
        encoder=size["encoder"] - estimate.D_E,  # without its last norm
        encoder_last=estimate.ENCODER_BLOCK + 2 * estimate.D_E,
        key_value=key_value,
        layers=estimate.L * (estimate.LLM_BLOCK + 2 * estimate.D_L) - key_value,
        embeddings=llm["vocab"] * estimate.D_L,
        head=llm["vocab"] * estimate.D_L,
        root=size["trained"] + estimate.D_E + estimate.D_L,
        trained=size["trained"],
    )


def step_bytes(units: Units, gpus: int, micro_batches: int) -> dict[str, float]:
    """Bytes that one GPU sends in a step, by engine: ring collectives, frozen parts in bf16, trained ones in fp32."""
    share = (gpus - 1) / gpus
    size = dict.fromkeys(units.gathered(), 2) | {"root": 4}
    reduce = 4 * units.trained * share
    sharded = micro_batches * (units.gathered_bytes(size) * share + reduce)
    return {"DDP": 2 * reduce, "ZeRO-2": 2 * reduce, "FSDP2": sharded}


def weight_bytes(units: Units, gpus: int) -> dict[str, float]:
    """Bytes of weights, gradients and AdamW's moments on one GPU; for FSDP2 with the two largest units gathered."""
    frozen, trained = 2 * (units.all - units.trained), units.trained
    largest = 2 * max(units.layers / estimate.L, units.embeddings, estimate.ENCODER["vocab"] * estimate.D_E)
    return {
        "DDP": frozen + 16 * trained,
        "ZeRO-2": frozen + 4 * trained + 12 * trained / gpus,
        "FSDP2": (frozen + 16 * trained) / gpus + 4 * trained + 2 * largest,
    }


def _row(units: Units, gpus: int, samples: int) -> list[str]:
    micro = math.ceil(samples / MICRO)
    work = samples * sum(estimate.flops(STAGE.mean).values()) / (RATE * estimate.UTILISATION[0])
    band = INSIDE if gpus <= NODE else BETWEEN
    cells = [str(gpus), f"{samples * gpus:,}", f"{samples}", f"{1e3 * work:.0f}"]
    for name in ("DDP", "FSDP2"):
        moved = step_bytes(units, gpus, micro)[name]
        wait = moved / band
        cells += [f"{moved / 1e9:.2f}", f"{1e3 * wait:.0f}"]
        cells.append(f"{100 * work / (work + wait):.0f} to {100 * min(1.0, work / max(work, wait)):.0f}")
    return cells


_HEAD = ["GPUs", "samples a step", "a GPU", "computing, ms"]
_HEAD += [f"{name}{what}" for name in ("DDP", "FSDP2") for what in (", GB", ", ms", ", % computing")]


def fixed_table() -> str:
    """The published 128 samples a step."""
    units = published_units()
    return table(_HEAD, [_row(units, gpus, BATCH // gpus) for gpus in GPUS if gpus <= BATCH])


def growing_table() -> str:
    """16 samples a GPU."""
    units = published_units()
    return table(_HEAD, [_row(units, gpus, BATCH // GPUS[0]) for gpus in GPUS])


def memory_table() -> str:
    """GB of one GPU, activations not counted."""
    units = published_units()
    rows = [[str(g), *(f"{count / 1e9:.1f}" for count in weight_bytes(units, g).values())] for g in GPUS]
    return table(["GPUs", *(f"{name}, GB" for name in weight_bytes(units, 8))], rows)


def units_table() -> str:
    """How often each unit is gathered."""
    units = published_units()
    names = dict(encoder="encoder", encoder_last="its last layer once more", key_value="key and value maps")
    names |= dict(layers="the rest of the LLM's layers", embeddings="LLM embeddings", head="output head")
    names |= dict(root="trained, and the rest")
    rows = [[names[name], f"{getattr(units, name):,}", str(times)] for name, times in units.gathered().items()]
    return table(["unit", "parameters", "gathered per micro batch"], rows)


TABLES: dict[str, Callable[[], str]] = dict(
    units=units_table, fixed=fixed_table, growing=growing_table, memory=memory_table
)


if __name__ == "__main__":
    print_or_fill("scale", TABLES)
