"""The same 200 training steps with every backend; the losses must stay within a budget around those in float64.

``python benchmarks/curves.py --output benchmarks/results/watch`` trains a tiny model on the same data from the same
weights with each backend that this machine has, writes ``curves.json`` and ``curves.png`` and prints the table.
``--page docs/versions.md`` writes the recorded table into a page instead.

The oracle is the whole model in float64. Rounding makes float32 losses drift away from it with every step, since each
step starts from the weights of the last one. The budget for this drift is measured: plain PyTorch trains in float32
with the samples of each batch in several orders, which changes only the order of sums. A backend may be off by
:data:`FACTOR` times the largest error of any of those runs up to that step, plus :data:`FLOOR` units in the last place
of a float32 loss. The latter is for the first steps, in which plain PyTorch may be exact by chance.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, XLMRobertaConfig, XLMRobertaModel

from layalign import LayAlignForCausalLM
from layalign.ops import backends

STEPS = 200
FACTOR = 2.0  # the project's error budget for kernels, here for whole runs
FLOOR = 4  # units in the last place
ORDERS = 4  # plain float32 runs
VOCABULARY, BATCH = 24, 2
SECTION = re.compile(r"(<!-- curves -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Run:
    """One training run: how the operations are computed, and the order of the samples in a batch."""

    name: str
    impl: str = "torch"
    fold_projections: str = "never"
    dtype: torch.dtype = torch.float32
    order: int = 0
    environment: str = ""


ORACLE = Run("float64", dtype=torch.float64)
PLAIN = [Run("torch" if order == 0 else f"torch, order {order}", order=order) for order in range(ORDERS)]
OURS = [
    Run("cpp", impl="cpp"),
    Run("cpp, folded", impl="cpp", fold_projections="always"),
    Run("cuda, emulated", impl="cuda", environment="LAYALIGN_EMULATE_CUDA"),
    Run("triton, interpreted", impl="triton", environment="TRITON_INTERPRET"),
]


class _Normed(nn.RMSNorm):
    """Llama's norm without its cast to float32, which a float64 run must avoid."""


def model(run: Run) -> LayAlignForCausalLM:
    """The tiny model in the run's dtype; the same weights for every run, zero gates as published."""
    torch.manual_seed(0)
    encoder = XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=40, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():  # as large as trained weights, so that the frozen parts matter
        for parameter in (*encoder.parameters(), *llm.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for name, module in list(llm.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = _Normed(32, eps=module.variance_epsilon)
            norm.weight = module.weight
            llm.set_submodule(name, norm)
    options = dict(impl=run.impl, fold_projections=run.fold_projections, fused_loss="never")
    built = LayAlignForCausalLM.from_encoder_and_llm(encoder.eval(), llm, **options)
    return built.to(run.dtype).train()


def batches(order: int) -> Iterator[tuple[Tensor, Tensor, list[list[int]]]]:
    """(encoder ids, encoder mask, targets): sentences of 3 to 8 tokens, each translated token by token."""
    draw = torch.Generator().manual_seed(1)
    words = torch.randperm(VOCABULARY - 4, generator=draw) + 4
    shuffle = torch.Generator().manual_seed(order)
    while True:
        lengths = torch.randint(3, 9, (BATCH,), generator=draw)
        rows = [torch.randint(4, VOCABULARY, (int(length),), generator=draw) for length in lengths]
        if order:
            rows = [rows[i] for i in torch.randperm(BATCH, generator=shuffle)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        targets = [[*words[row - 4].tolist(), 2] for row in rows]
        yield ids, (ids != 0).long(), targets


def train(run: Run, steps: int = STEPS, seconds: float | None = None) -> list[float]:
    """The losses of ``steps`` steps, fewer if ``seconds`` run out; optimizer and clipping as the published scripts."""
    built = model(run)
    trained = [parameter for parameter in built.parameters() if parameter.requires_grad]
    # Above the published 4e-5, so that the loss moves within 200 steps.
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.8, 0.999), eps=1e-8, weight_decay=3e-7)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    begin = time.perf_counter()
    for ids, mask, targets in batches(run.order):
        packed = built.build_inputs(mask, targets=targets)
        loss = built(**packed, encoder_input_ids=ids, encoder_attention_mask=mask).loss
        losses.append(loss.item())
        if len(losses) == steps or (seconds is not None and time.perf_counter() - begin > seconds):
            return losses
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    raise AssertionError("batches never end")


def off(losses: list[float], oracle: list[float]) -> list[float]:
    """Distance of a run's loss from the oracle's, per step."""
    return [abs(ours - exact) for ours, exact in zip(losses, oracle, strict=False)]


def budget(plain: list[list[float]], oracle: list[float]) -> list[float]:
    """Allowed distance from the oracle per step; see the module."""
    allowed, worst = [], 0.0
    for step, exact in enumerate(oracle):
        worst = max(worst, *(abs(losses[step] - exact) for losses in plain))
        allowed.append(FACTOR * worst + FLOOR * torch.finfo(torch.float32).eps * exact)
    return allowed


def usable(run: Run) -> str | None:
    """Why this machine cannot do the run, or None."""
    for operation in ("layer_mix", "layer_projection", "gated_cross_attention"):
        served, reason = backends.serves(operation, run.impl, "cpu")
        if not served:
            return reason
    return None


def measure(seconds: float) -> dict[str, Any]:
    """The losses of all runs, with facts about the machine."""
    from facts import facts

    losses: dict[str, list[float]] = {}
    taken, skipped = {}, {}
    for run in (ORACLE, *PLAIN, *OURS):
        reason = usable(run)
        if reason is not None:
            skipped[run.name] = reason
            continue
        begin = time.perf_counter()
        losses[run.name] = train(run, seconds=seconds)
        taken[run.name] = round(time.perf_counter() - begin, 1)
        print(f"{run.name}: {len(losses[run.name])} steps, {taken[run.name]} s, loss {losses[run.name][-1]:.4f}")
    return {"facts": facts(gpu=False), "losses": losses, "seconds": taken, "skipped": skipped}


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per float32 run: steps, last loss, largest distance, largest share of the budget."""
    losses = found["losses"]
    oracle, plain = losses[ORACLE.name], [losses[run.name] for run in PLAIN]
    allowed = budget(plain, oracle)
    result = []
    for name, each in losses.items():
        if name != ORACLE.name:
            distance = off(each, oracle)
            share = max(d / a for d, a in zip(distance, allowed, strict=False))
            result.append({"name": name, "steps": len(each), "last": each[-1], "off": max(distance), "share": share})
    return result


def table(found: dict[str, Any]) -> str:
    """Markdown: one line per run."""
    oracle = found["losses"][ORACLE.name]
    lines = [
        "| run | steps | loss at the end | largest distance from float64 | largest share of the budget |",
        "|---|---:|---:|---:|---:|",
        f"| float64 (first loss {oracle[0]:.4f}) | {len(oracle)} | {oracle[-1]:.6f} | | |",
    ]
    for row in rows(found):
        lines.append(
            f"| {row['name']} | {row['steps']} | {row['last']:.6f} | {row['off']:.1e} | {100 * row['share']:.0f}% |"
        )
    lines += [f"| {name} | 0 | not run: {reason} | | |" for name, reason in found["skipped"].items()]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot the loss curve, and the distance of every run from it together with the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = found["losses"]
    oracle = losses[ORACLE.name]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(oracle, color="black", linewidth=1)
    left.set(title="loss, float64", xlabel="step", ylabel="cross-entropy")
    names = {run.name for run in PLAIN}
    for name, each in losses.items():
        if name != ORACLE.name:
            distance = torch.tensor(off(each, oracle)).cummax(0).values.clamp(min=1e-9)
            grey = dict(color="0.7") if name in names else {}
            right.plot(distance, linewidth=1, label=name if name not in names or name == "torch" else None, **grey)
    allowed = budget([losses[run.name] for run in PLAIN], oracle)
    right.plot(allowed, color="black", linestyle="--", linewidth=1, label="budget")
    right.set(title="largest distance from float64 so far", xlabel="step", yscale="log")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Measure and write, or update the page; returns 1 if a run exceeds its budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/watch"))
    parser.add_argument("--seconds", type=float, default=1200.0, help="maximum per run; steps done so far count")
    parser.add_argument("--page", type=Path, help="write the recorded table into this page instead of running")
    options = parser.parse_args()
    file = options.output / "curves.json"
    if options.page:
        text, found = options.page.read_text(encoding="utf-8"), json.loads(file.read_text(encoding="utf-8"))
        written = SECTION.sub(lambda match: match[1] + table(found) + match[2], text)
        options.page.write_text(written, encoding="utf-8")
        return 0
    found = measure(options.seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, options.output / "curves.png")
    print(table(found))
    return int(any(row["share"] > 1 for row in rows(found)))


if __name__ == "__main__":
    sys.exit(main())
