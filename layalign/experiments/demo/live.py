"""A short training run from scratch: LayAlign over all encoder layers, and over only the last one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layalign.data import Example, LayAlignCollator
from layalign.modeling.model import LayAlignForCausalLM

SYSTEMS = {"all": "LayAlign, all encoder layers", "last": "last encoder layer only"}  # by `encoder_layers`
LEARNING_RATE, WARM_UP, CLIP = 1e-3, 4, 1.0

Show = Callable[[int, int, dict[str, float]], None]


@dataclass
class Curves:
    """Losses in nats per target token, by system (the keys of `SYSTEMS`).

    Attributes:
        batches: loss of each step's batch, before the step.
        held_out: (steps done, loss) on pairs that are not trained on.
        pairs: number of training pairs.
        read: number of pairs that were read, including repetitions.
        trained: number of trained parameters of each system.
    """

    batches: dict[str, list[float]] = field(default_factory=dict)
    held_out: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    pairs: int = 0
    read: int = 0
    trained: dict[str, int] = field(default_factory=dict)


def train_live(
    encoder: Any,
    llm: Any,
    tokenizers: tuple[Any, Any],
    pairs: Sequence[Example],
    held_out: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    show: Show = lambda step, steps, losses: None,
) -> Curves:
    """Train both systems on the same batches, from the same initial adapter.

    Args:
        encoder, llm: the frozen parts. The LLM must not be attached; it is restored at the end.
        tokenizers: tokenizers of encoder and LLM.
        pairs: training pairs.
        held_out: pairs for the held-out loss.
        steps, batch_size: number and size of the batches; each pair is read once before any is repeated.
        seed: seed of the initial weights and of the order.
        show: called after each step with (step, steps, loss by system).
    """
    # The second LLM has its own modules but shares the weights, so it takes no memory except for activations.
    llms = [llm, copy.deepcopy(llm, {id(parameter): parameter for parameter in llm.parameters()})]
    models: dict[str, Any] = {}
    curves = Curves(pairs=len(pairs))
    for layers, own in zip(SYSTEMS, llms, strict=True):
        torch.manual_seed(seed)
        models[layers] = LayAlignForCausalLM.from_encoder_and_llm(encoder, own, encoder_layers=layers)
    models["last"].mapping.load_state_dict(models["all"].mapping.state_dict())
    try:
        collate = LayAlignCollator.from_model(models["all"], *tokenizers)
        optimizers = {name: _optimizer(model) for name, model in models.items()}
        curves.trained = {name: sum(p.numel() for p in _trained(model)) for name, model in models.items()}
        _hold_out(models, collate, held_out, 0, curves)
        for step, chosen in enumerate(_batches(pairs, batch_size, steps, seed), 1):
            batch = collate(chosen)
            for name, model in models.items():
                loss = _train_step(model.train(), optimizers[name], batch, step)
                curves.batches.setdefault(name, []).append(loss)
            curves.read += len(chosen)
            show(step, steps, {name: losses[-1] for name, losses in curves.batches.items()})
            if step in (steps // 2, steps):
                _hold_out(models, collate, held_out, step, curves)
    finally:
        for model in models.values():
            model.unload()
    return curves


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=LEARNING_RATE, weight_decay=0.0)


def _train_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], step: int) -> float:
    """Take one step, with linear warm-up; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * min(1.0, step / WARM_UP)
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(_trained(model), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def _hold_out(models: dict[str, Any], collate: Any, examples: Sequence[Example], step: int, curves: Curves) -> None:
    batch = collate(examples)
    for name, model in models.items():
        curves.held_out.setdefault(name, []).append((step, float(model.eval()(**batch).loss)))


def _batches(pairs: Sequence[Example], size: int, steps: int, seed: int) -> Iterator[list[Example]]:
    """Batches of all pairs in a random order, then in another one, and so on."""
    draw, left = random.Random(seed), list[Example]()
    for _ in range(steps):
        if len(left) < size:
            left = draw.sample(list(pairs), len(pairs))
        yield left[:size]
        left = left[size:]
