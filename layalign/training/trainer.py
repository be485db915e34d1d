"""transformers' Trainer with LayAlign's weight decay, checkpoints, batch order and step guard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import find_batch_size

from layalign.modeling import checkpoint, loading
from layalign.modeling.checkpoint import reading
from layalign.modeling.tokenization import save_tokenizers
from layalign.nn.sharding import full_shape, put
from layalign.training import record
from layalign.training.checkpoints import UNFINISHED, clear_unfinished, publish, rotate
from layalign.training.distributed import DistributedTrainer
from layalign.training.guard import StepGuard
from layalign.training.stop import StopOnSignal
from layalign.utils.errors import CheckpointError, refuse
from layalign.utils.files import writing

_BATCHES_PER_POOL = 50


class LengthBucketSampler(Sampler[int]):
    """Random order in which neighbours have similar lengths, so that batches need little padding.

    The order depends on the seed and the epoch only, so a resumed run draws the same batches as an uninterrupted one.

    Args:
        lengths: one number per example.
        batch_size: examples per optimizer step.
        seed: seed of the shuffles.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
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
        # A short batch stays last; otherwise every batch after it would mix two buckets.
        tail = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([index for batch in shuffled + tail for index in batch])


class LayAlignTrainer(DistributedTrainer):
    """Trainer of a `LayAlignForCausalLM`.

    It differs from transformers' Trainer as follows.

    - Weight decay applies to every trained parameter, as published.
    - The loss of a step is the mean over its micro batches, as published.
    - Checkpoints hold the trained weights and the tokenizers. They are written atomically
      (`layalign.training.checkpoints`).
    - A step with a NaN is not taken (`layalign.training.guard`).

    Args:
        tokenizers: (encoder tokenizer, LLM tokenizer), saved with every checkpoint.
        lengths: one number per training example to bucket by, or None for a plain shuffle.
        guard: checks each step. Default: a guard that stops at a NaN.
        **kwargs: as for transformers' Trainer, except metrics: evaluation computes no logits.

    Raises:
        ArgumentError: metrics are asked for.
    """

    def __init__(
        self,
        *,
        tokenizers: tuple[Any, Any],
        lengths: Sequence[int] | None = None,
        guard: StepGuard | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                refuse(
                    name, "None (the dev loss is all that this trainer measures; transformers' Trainer takes it)", name
                )
        self.guard, self.stop = StepGuard() if guard is None else guard, StopOnSignal()
        # Passed at construction, so that the Trainer saves the guard's state.
        super().__init__(**{**kwargs, "callbacks": [*(kwargs.get("callbacks") or ()), self.guard, self.stop]})
        self.tokenizers = tokenizers
        self.lengths = lengths
        self.model_accepts_loss_kwargs = False
        self.record: dict[str, Any] | None = None  # written into each checkpoint as run.json
        self._staging: Path | None = None
        self.examples_seen = 0  # in training, over all processes

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All parameters; transformers would exclude biases and norms."""
        return [name for name, _ in model.named_parameters()]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthBucketSampler(self.lengths, batch, self.args.seed)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but no batch if no step is left.

        A run that was killed between its last checkpoint and its end resumes with no step left. The Trainer would take
        another one, because it checks for the end only after a step.
        """
        if self.state.global_step < self.state.max_steps:
            return super().get_batch_samples(*args, **kwargs)
        self.control.should_training_stop = True
        # The checkpoint's control state still asks for saving, evaluating and logging, which have been done.
        self.control.should_save = self.control.should_evaluate = self.control.should_log = False
        return [], None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer's; the guard checks the gradients before they are clipped."""
        self.examples_seen += (find_batch_size(inputs) or 0) * self.args.world_size
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.saw(loss, inputs)
        if self.accelerator.sync_gradients:
            step = self.state.global_step + 1
            # A single process cannot run a sharded model.
            rerun = None if self.sharding else lambda batch: model(**self._prepare_inputs(batch))
            self.guard.check(step, model, self._mean_over_processes, rerun)
            self.stop.agreed = self.stop.requested
            if self.args.world_size > 1:  # a single process need not synchronize with its device
                asked = torch.full((), float(self.stop.requested), device=loss.device)  # no copy from the host
                self.stop.agreed = bool(self._mean_over_processes(asked) > 0)
        return loss

    def _mean_over_processes(self, number: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(number.float(), reduction="mean")

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but in a staging folder that is renamed once everything is on the disk."""
        run, main = Path(super()._get_output_dir(trial)), self.args.should_save
        name = f"checkpoint-{self.state.global_step}"
        staged, final = run / UNFINISHED / name, run / name
        with writing(str(final), "the checkpoints before it are intact, and the run can resume from the last one"):
            try:
                if main:
                    clear_unfinished(run)
                    staged.mkdir(parents=True)
                self.accelerator.wait_for_everyone()
                self._staging = staged.parent
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.state.best_model_checkpoint == str(staged):
                    self.state.best_model_checkpoint = str(final)
                if main:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
                    if self.record is not None:
                        record.write(staged, self.record)
                    publish(staged, final)
                    rotate(run, final, self.args.save_total_limit, self.state.best_model_checkpoint)
            finally:
                self._staging = None
                if main:
                    clear_unfinished(run)
        self.accelerator.wait_for_everyone()  # no process may look for the checkpoint before it is renamed

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        save_tokenizers(folder, *self.tokenizers)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint), "the optimizer's and the scheduler's state cannot be read"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint), "the state of the random numbers cannot be read"):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_trained(self.model, self.state.best_model_checkpoint)


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Load the trained weights of a checkpoint folder into a model that already has its frozen parts.

    Raises:
        CheckpointError: the folder has no readable weights, or they do not fit.
    """
    weights = loading.read_all(os.path.abspath(folder))
    places = dict(model.named_parameters())
    wanted = checkpoint.trained_names(model)
    stored = {name for name in weights if name in wanted or name.startswith(checkpoint.OWN_PARTS)}
    missing, foreign = sorted(wanted - stored), sorted(stored - wanted)
    if missing or foreign:
        problem = f"{missing[0]} is missing" if missing else f"the model has no {foreign[0]}"
        raise CheckpointError(f"{folder}: does not fit the model: {problem}")
    with torch.no_grad():
        for name in wanted:
            if full_shape(places[name]) != weights[name].shape:
                raise CheckpointError(
                    f"{folder}: {name}: expected {tuple(full_shape(places[name]))}, got {tuple(weights[name].shape)}"
                )
            # In place, since the optimizer and wrappers refer to the existing parameter.
            put(places[name], weights[name])
