"""Training in several processes: the steps and the checkpoints do not depend on how many there are.

The loss of a step is the mean over its micro batches, as published. `batch_size` and `micro_batch_size` alone decide
which examples form a micro batch and which micro batches form a step; the processes share the micro batches of a step.
So DDP, FSDP2 and ZeRO give the losses and weights of a single process, and a run can be resumed with another number of
processes or another engine.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput

from layalign.modeling import checkpoint
from layalign.modeling.decoders import key_value_modules
from layalign.nn import sharding
from layalign.utils.errors import ArgumentError, CheckpointError

logger = logging.getLogger("layalign")

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


class EvenShares(BatchSamplerShard):
    """Process r of W gets the batches r, r + W, ... of the inner sampler, unchanged.

    accelerate's own class would fill a short batch with examples from the start of the epoch. Here, a process without a
    batch in the last round repeats the first batch of that round with weight 0 (:func:`weights_of_step`), so that every
    process takes part in every collective call.
    """

    def __len__(self) -> int:
        return math.ceil(len(self.batch_sampler) / self.num_processes)

    def __iter__(self) -> Iterator[Any]:
        together: list[Any] = []
        for batch in self.batch_sampler:
            together.append(batch)
            if len(together) == self.num_processes:
                yield together[self.process_index]
                together = []
        if together:
            yield together[self.process_index if self.process_index < len(together) else 0]


def weights_of_step(batches: int, step: int, rounds: int, rank: int, world: int) -> list[float]:
    """Weight of each micro batch of a process in a step, so that the step is the mean over its real micro batches.

    Args:
        batches: micro batches of an epoch, over all processes.
        step: index of the step in its epoch.
        rounds: micro batches of one process in a full step (gradient accumulation steps).
        rank, world: rank of this process, and the number of processes.

    Returns:
        One weight per micro batch of this process; the engine averages over processes and accumulation steps. All are 1
        except in the last step of an epoch.
    """
    real = min(rounds * world, batches - step * rounds * world)
    own = math.ceil(real / world)
    return [own * world / real if i * world + rank < real else 0.0 for i in range(own)]


class DistributedTrainer(Trainer):
    """transformers' Trainer, but steps, dev losses and checkpoints do not depend on the number of processes."""

    is_fsdp_enabled: bool
    control: Any
    keeps_hyperparameters = True  # whether a resumed run takes the checkpoint's learning rate, betas, ...
    _weights: list[float] | None = None

    @property
    def sharding(self) -> str | None:
        """The engine that shards weights, gradients or optimizer state: "FSDP2", "FSDP1", "ZeRO-n" or None."""
        if self.is_deepspeed_enabled:
            return f"ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        if self.is_fsdp_enabled:
            return f"FSDP{self.accelerator.state.fsdp_plugin.fsdp_version}"
        return None

    def create_accelerator_and_postprocess(self) -> None:
        """Enable FSDP on CPUs too: accelerate allows it on GPUs only, and the tests run it on CPUs."""
        super().create_accelerator_and_postprocess()
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if not wanted or self.is_fsdp_enabled or self.args.device.type != "cpu" or self.args.world_size == 1:
            return
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True

    # Data

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        if type(loader.batch_sampler) is BatchSamplerShard:
            loader.batch_sampler.__class__ = EvenShares  # same fields; torch does not allow assigning another sampler
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._weights = None
        if self.args.world_size > 1:
            rounds, world = self.args.gradient_accumulation_steps, self.args.world_size
            batches = math.ceil(len(self.train_dataset) / self.args.train_batch_size)
            step = self.state.global_step % math.ceil(batches / (rounds * world))
            self._weights = weights_of_step(batches, step, rounds, self.args.process_index, world)
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not model.training or not self._weights:
            return found
        weight = self._weights.pop(0)
        if weight == 1:
            return found
        return (found[0] * weight, found[1]) if return_outputs else found * weight

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The dev loss: the mean of the batches' losses over all processes, weighted by their number of examples."""
        if self.sharding is not None and not self.accelerator._models:
            raise ArgumentError(f"sharding: {self.sharding} shards the model when training begins, not before")
        # Not prepared by accelerate here: a model prepared without DDP would later train without it, each process on
        # its own gradients.
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sampler, world, rank = dataloader.batch_sampler, self.args.world_size, self.args.process_index
        batches = len(sampler.batch_sampler) if isinstance(sampler, EvenShares) else len(dataloader)
        total = torch.zeros(2, dtype=torch.float64)
        for number, inputs in enumerate(dataloader):
            with self.accelerator.autocast():
                loss, _, _ = self.prediction_step(model, {**inputs, "skip_logits": True}, True, ignore_keys=ignore_keys)
            if number * world + rank < batches:
                count = find_batch_size(inputs)
                total += torch.tensor([float(loss) * count, count], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if world > 1:
            total = self.accelerator.reduce(total.to(self.args.device), "sum").cpu()
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(total[1]))

    # Weights and checkpoints

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.sharding is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.sharding == "FSDP1":
            raise ArgumentError("sharding: FSDP1 is not supported, expected fsdp_version: 2")
        if resume_from_checkpoint is not None:  # before the weights are sharded
            self._load_from_checkpoint(resume_from_checkpoint, self.model)
        checkpoint.prepare(self.model)
        if self.sharding == "FSDP2":
            shard_first(self.model, self.accelerator)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.create_optimizer()
        order = [[names[id(parameter)] for parameter in group["params"]] for group in self.optimizer.param_groups]
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._trained_order = order
        if self.sharding == "FSDP2":
            places = dict(self.model.named_parameters())
            for group, wanted in zip(self.optimizer.param_groups, order, strict=True):
                # accelerate finds parameters by address, which is the same for all empty shards of a process.
                group["params"] = [places[name] for name in wanted]
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model. From a sharded one, only the weights to be saved are gathered."""
        if self.sharding is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=self.whole_state())

    def whole_state(self) -> dict[str, Tensor]:
        """The weights that a checkpoint holds, gathered on the CPU. Collective: all processes must call it."""
        model = self.accelerator.unwrap_model(self.model)
        names = model.saved_names()
        found = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in names:
                tensor = sharding.whole(tensor)
                found[name] = tensor.cpu() if self.args.should_save else tensor[:0]
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self._zero_state() if self.is_deepspeed_enabled else whole_optimizer_state(self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(
                for_groups(self.lr_scheduler.state_dict(), len(self._trained_order)), Path(output_dir) / SCHEDULER
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.keeps_hyperparameters or checkpoint is None:
            self._load_states(checkpoint)
            return
        groups = self.optimizer.param_groups
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        own = [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups]
        bases = list(getattr(schedule, "base_lrs", ()))
        self._load_states(checkpoint)
        for group, wanted in zip(self.optimizer.param_groups, own, strict=True):
            group.update(wanted)
        if bases and hasattr(schedule, "lr_lambdas"):
            schedule.base_lrs = bases
            for group, base, shape in zip(self.optimizer.param_groups, bases, schedule.lr_lambdas, strict=True):
                group["lr"] = base * shape(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_states(self, checkpoint: str | None) -> None:
        if checkpoint is None or (self.sharding is None and self.args.world_size == 1):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        try:
            files = (Path(checkpoint) / OPTIMIZER, Path(checkpoint) / SCHEDULER)
            state, schedule = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
        except OSError as error:
            raise CheckpointError(f"{checkpoint}: cannot read the optimizer's state: {error}") from error
        if self.is_deepspeed_enabled:
            self._put_zero_state(state)
        else:
            put_optimizer_state(self.optimizer.optimizer, state)
        self.lr_scheduler.load_state_dict(for_groups(schedule, len(self.lr_scheduler.optimizer.param_groups)))

    # ZeRO keeps the optimizer's state in flat partitions; DeepSpeed's functions read and write the part of a parameter.

    def _zero_parts(self) -> tuple[Any, Any, list[Any]]:
        """(DeepSpeed's functions, its optimizer, the trained parameters in the order of the original optimizer)."""
        from deepspeed import utils as functions

        places = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        return (
            functions,
            self.model_wrapped.optimizer,
            [places[name] for group in self._trained_order for name in group],
        )

    def _zero_state(self) -> dict[str, Any]:
        functions, zero, parameters = self._zero_parts()
        inner = zero.optimizer
        steps = [entry["step"] for entry in inner.state.values() if "step" in entry]
        if not steps:
            raise CheckpointError("sharding: this version of DeepSpeed does not show its optimizer's state")
        state = {}
        for number, parameter in enumerate(parameters):
            found = {key: functions.safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            shape = sharding.full_shape(parameter)
            whole = {key: value.detach().view(shape).cpu() for key, value in found.items()}
            state[number] = {"step": torch.as_tensor(float(steps[0])), **whole}
        first, *_ = inner.param_groups
        options = {key: value for key, value in first.items() if key != "params"}
        numbers = iter(range(len(parameters)))
        groups = [{**options, "params": [next(numbers) for _ in group]} for group in self._trained_order]
        return {"state": state, "param_groups": groups}

    def _put_zero_state(self, state: dict[str, Any]) -> None:
        functions, zero, parameters = self._zero_parts()
        if len(state["state"]) != len(parameters):
            raise CheckpointError(f"{OPTIMIZER}: expected the state of {len(parameters)} weights")
        steps = torch.as_tensor(float(state["state"][0]["step"]))
        partitions = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3
        for flat in zero.single_partition_of_fp32_groups if partitions is None else partitions:
            # As the first step would create it.
            zero.optimizer.state[flat] = {"step": steps.clone(), **{key: torch.zeros_like(flat) for key in _MOMENTS}}
        if partitions is None:
            zero._lazy_init_hp_params_optimizer_state()
        for group in zero.optimizer.param_groups:  # the scheduler sets it only after the next step
            group["lr"] = state["param_groups"][0]["lr"]
        for parameter, (_, entry) in zip(parameters, sorted(state["state"].items()), strict=True):
            for key in _MOMENTS:
                value = entry[key].to(parameter.device)
                if partitions is None:
                    functions.safe_set_full_optimizer_state(parameter, value, key)
                    continue
                size, rank = parameter.ds_tensor.ds_numel, self.args.process_index  # size includes the padding
                filled = nn.functional.pad(value.flatten(), (0, size * self.args.world_size - value.numel()))
                functions.safe_set_local_optimizer_state(parameter, filled[size * rank : size * (rank + 1)], key)


_MOMENTS = ("exp_avg", "exp_avg_sq")


def shard_first(model: Any, accelerator: Any) -> None:
    """Make the key and value projections of each layer, and the encoder's embeddings, separate FSDP2 units.

    The source's keys and values are computed with these projections before their layer runs, when the layer's other
    weights are still sharded. FSDP2 gathers a unit when its modules are called. The embeddings would otherwise stay
    gathered for the whole step.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    if plugin.cpu_ram_efficient_loading:
        raise ArgumentError("fsdp_cpu_ram_efficient_loading: expected false (every process loads the model), got true")
    options: dict[str, Any] = {"mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy()}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    if mesh is not None:
        options["mesh"] = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    units = [key_value_modules(attention) for attention in model.source_attentions]
    for unit in (*units, [model.encoder.get_input_embeddings()]):
        modules = [module for module in unit if module is not None and not isinstance(module, FSDPModule)]
        if modules:
            fully_shard(modules, reshard_after_forward=plugin.reshard_after_forward, **options)


def for_groups(schedule: dict[str, Any], groups: int) -> dict[str, Any]:
    """A scheduler's state for another number of parameter groups (ZeRO drops empty ones); all share one rate."""
    return {key: (value * groups)[:groups] if isinstance(value, list) else value for key, value in schedule.items()}


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with all shards gathered. Collective: all processes must call it."""
    state = optimizer.state_dict()
    whole = {  # new dicts, since state_dict() returns the optimizer's own
        number: {
            key: value.full_tensor().cpu() if sharding.is_dtensor(value) else value for key, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": whole}


def put_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what :func:`whole_optimizer_state` returned, sharded like the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(parameters) != len(numbers):
        raise CheckpointError(f"{OPTIMIZER}: expected the state of {len(parameters)} weights, got {len(numbers)}")
    for number, parameter in zip(numbers, parameters, strict=True):
        entry = state["state"].get(number, {})
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entry[key] = sharding.like(parameter, value)
    optimizer.load_state_dict(state)
