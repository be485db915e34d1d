"""transformers' Trainer where LayAlign differs: what decays, what is saved, and how batches are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from layalign import checkpoint
from layalign.errors import CheckpointError
from layalign.tokenization import save_tokenizers

_BATCHES_PER_POOL = 50


class LengthBucketSampler(Sampler[int]):
    """Random order in which neighbours have similar lengths, so that batches carry little padding.

    The order depends on the seed and the epoch alone: a resumed run draws what the uninterrupted one draws.

    Args:
        lengths: one number per example.
        batch_size: examples of one optimiser step.
        seed: of the shuffles.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch_size * _BATCHES_PER_POOL
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            drawn = sorted(order[start : start + pool], key=self.lengths.__getitem__, reverse=True)
            batches += [drawn[i : i + self.batch_size] for i in range(0, len(drawn), self.batch_size)]
        # A short batch stays last, else every batch behind it would straddle two lengths.
        tail = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([index for batch in shuffled + tail for index in batch])


class LayAlignTrainer(Trainer):
    """Trainer of a `LayAlignForCausalLM`.

    Weight decay covers every trained parameter, as published; the loss of a step is the mean over its micro batches, as
    published; checkpoints hold the trained weights only, the tokenizers beside them.

    Args:
        tokenizers: (encoder tokenizer, LLM tokenizer), saved with every checkpoint.
        lengths: one number per training example to bucket by, or None for a plain shuffle.
        **kwargs: as transformers' Trainer.
    """

    def __init__(self, *, tokenizers: tuple[Any, Any], lengths: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizers = tokenizers
        self.lengths = lengths
        self.model_accepts_loss_kwargs = False

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All of them; transformers would leave out biases and norms."""
        return [name for name, _ in model.named_parameters()]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthBucketSampler(self.lengths, batch, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        save_tokenizers(folder, *self.tokenizers)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_trained(self.model, self.state.best_model_checkpoint)


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Put the trained weights of a checkpoint folder into a model that already has its frozen parts.

    Raises:
        CheckpointError: the folder has no readable weights, or they do not fit.
    """
    try:
        weights = load_file(Path(folder) / checkpoint.WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot read {checkpoint.WEIGHTS}: {error}") from error
    places = dict(model.named_parameters())
    wanted = checkpoint.trained_names(model)
    stored = {name for name in weights if name in wanted or name.startswith(checkpoint.OWN_PARTS)}
    missing, foreign = sorted(wanted - stored), sorted(stored - wanted)
    if missing or foreign:
        problem = f"{missing[0]} is missing" if missing else f"the model has no {foreign[0]}"
        raise CheckpointError(f"{folder}: does not fit the model: {problem}")
    with torch.no_grad():
        for name in wanted:
            if places[name].shape != weights[name].shape:
                raise CheckpointError(
                    f"{folder}: {name}: expected {tuple(places[name].shape)}, got {tuple(weights[name].shape)}"
                )
            # In place: the optimiser and any wrapper keep the parameter they have.
            places[name].copy_(weights[name])
