"""Weights that one process does not hold whole are never read; what ships for the engines is what they accept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from tiny import batch, open_gates, tiny_model
from torch import nn

from layalign.nn import sharding
from layalign.nn.inspection import reason_against_reading
from layalign.training import TrainConfig
from layalign.training.distributed import shard_first
from layalign.training.launch import preset_file, sharding_arguments, with_kept_micro_batch
from layalign.training.trainer import load_trained
from layalign.utils.errors import ArgumentError
from layalign.utils.processes import Processes, join


def partition(model: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """As ZeRO-3 does: parameters are empty, and whole only while the module that owns them is called."""
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None and f"{name}.{key}" not in keep}
        for number, parameter in enumerate(own.values()):
            parameter.ds_id, parameter.ds_shape = (name, number), parameter.shape
            parameter.whole = parameter.data
            parameter.data = torch.empty(0, dtype=parameter.dtype)

        def gather(module: nn.Module, *_: Any, own: dict[str, Any] = own) -> None:
            for parameter in own.values():
                parameter.data = parameter.whole

        def release(module: nn.Module, *_: Any, own: dict[str, Any] = own) -> None:
            for parameter in own.values():
                parameter.data = torch.empty(0, dtype=parameter.dtype)

        if own:
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)


@pytest.mark.parametrize("structure", ["Linear", "MLP"])
@pytest.mark.parametrize("mix", ["layer-wise", "shared"])
def test_partitioned_weights_are_only_used_inside_their_modules(structure: str, mix: str) -> None:
    model = tiny_model(fold_projections="always", structure=structure, mix=mix)
    open_gates(model)
    inputs = batch(model=model)
    with torch.no_grad():
        wanted = model(**inputs).loss
        # DeepSpeed gathers what is read outside its module by itself: the boundary token.
        partition(model, keep=("mapping.end_boundary",))
        assert model.encoder_aligner.projector.fc2.weight.numel() == 0
        found = model(**inputs).loss
    assert model.key_values.last == "not folded: ZeRO-3 shards the model"
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("mark", ["ds_id", "_is_flat_param"])
def test_a_marked_weight_is_not_read_even_without_hooks(mark: str) -> None:
    model = tiny_model(fold_projections="always")
    setattr(model._attentions[1].v_proj.weight, mark, 3)
    assert "v_proj" in str(reason_of(model)) and reason_of(model) is not None
    inputs = batch(model=model)
    with torch.no_grad():
        model(**inputs)
    assert model.key_values.last.startswith("not folded: v_proj: its weight is")


def reason_of(model: Any) -> str | None:
    from layalign.modeling.key_values import reason_against

    return reason_against(model.encoder_aligner.projector, model._attentions)


class Wrapped(nn.Module):
    """A linear map whose own weight is not what it multiplies by, as in quantised and LoRA-wrapped layers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full_like(linear.weight, torch.nan)), linear.bias
        self.inside = [linear]
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside[0](x)


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_the_aligner_calls_maps_that_must_not_be_read(name: str) -> None:
    model = tiny_model(fold_projections="never")
    open_gates(model)
    inputs, projector = batch(model=model), model.encoder_aligner.projector
    wanted = model(**inputs).loss
    wanted.backward()
    gradients = {key: p.grad.clone() for key, p in projector.named_parameters() if p.grad is not None}
    plain = getattr(projector, name)
    setattr(projector, name, Wrapped(plain))
    plain.zero_grad()
    found = model(**inputs).loss
    found.backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(plain.weight.grad, gradients[f"{name}.weight"])


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one, over gloo."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_weights_look_plain_while_a_module_runs_and_are_left_alone(alone: None, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = tiny_model(fold_projections="always")
    open_gates(model)
    model.save_pretrained(tmp_path / "saved")
    inputs = batch(model=model)
    with torch.no_grad():
        wanted = model(**inputs).loss
    assert model.key_values.last == "folded"
    gate = model.cross_attention[0].adaption_gate
    before = gate.detach().clone()
    fully_shard(model)
    assert sharding.engine_of(model) == "FSDP2"
    k_proj = model._attentions[0].k_proj
    assert reason_against_reading(k_proj) == "its weight is sharded (DTensor)"
    seen = []
    model.encoder.register_forward_hook(lambda *_: seen.append(type(k_proj.weight)))
    with torch.no_grad():
        found = model(**inputs).loss
    assert seen == [nn.Parameter]  # what makes asking the parameters not enough
    assert model.key_values.last == "not folded: FSDP2 shards the model"
    torch.testing.assert_close(found, wanted)
    model.reshard()
    # Reading and writing whole.
    sharded = model.cross_attention[0].adaption_gate
    assert sharding.is_dtensor(sharded)
    torch.testing.assert_close(sharding.whole(sharded), before)
    sharding.put(sharded, torch.tensor([5.0]))
    assert sharding.whole(sharded).item() == 5
    load_trained(model, tmp_path / "saved")
    torch.testing.assert_close(sharding.whole(sharded), before)


def test_what_fsdp2_cannot_load_is_refused() -> None:
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    with pytest.raises(ArgumentError, match="^fsdp_cpu_ram_efficient_loading: expected false"):
        shard_first(tiny_model(), SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))


def test_fsdp1_weights_are_not_read(alone: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    linear = nn.Linear(4, 6)
    wrapped = FullyShardedDataParallel(linear, device_id=torch.device("cpu"), use_orig_params=False)
    assert reason_against_reading(wrapped.module) == "its weight is sharded or of a tensor subclass" or (
        "flat parameter" in str(reason_against_reading(wrapped.module))
    )


# What ships


def environment_of(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file` hands to its processes."""
    file = preset_file("accelerate", f"{name}.yaml")
    ClusterConfig.from_yaml_file(str(file))  # refuses keys that it does not know
    args = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", "train.py"])
    args, *_ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def test_every_configuration_is_accepted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted(path.stem for path in preset_file("accelerate", "ddp.yaml").parent.glob("*.yaml"))
    assert names == ["ddp", "fsdp2", "zero2", "zero3"]
    page = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
    assert all(name in page for name in names)


def test_the_ddp_configuration_asks_for_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment = environment_of("ddp")
    assert environment.get("ACCELERATE_USE_FSDP", "false") == environment.get("ACCELERATE_USE_DEEPSPEED", "false")


def test_the_fsdp2_configuration_says_what_sharding_fsdp2_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment = environment_of("fsdp2")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_USE")):
            monkeypatch.setenv(key, value)
    from transformers import TrainingArguments

    from_file = FullyShardedDataParallelPlugin()
    own = sharding_arguments(TrainConfig(sharding="fsdp2"), 2)
    from_key = FullyShardedDataParallelPlugin(**TrainingArguments(use_cpu=True, **own).fsdp_plugin_args)
    for plugin in (from_file, from_key):
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert plugin.cpu_ram_efficient_loading is False
        assert plugin.activation_checkpointing is False
        assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
        assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"
    assert not from_file.cpu_offload.offload_params if hasattr(from_file.cpu_offload, "offload_params") else True


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_configurations(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment = environment_of(f"zero{stage}")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert environment["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    settings = json.loads(preset_file("deepspeed", f"zero{stage}.json").read_text(encoding="utf-8"))
    assert settings["zero_optimization"]["stage"] == stage
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert settings[key] == "auto"
    assert settings["gradient_clipping"] == settings["bf16"]["enabled"] == "auto"
    assert not {"optimizer", "scheduler"} & set(settings)  # the published ones, from the training configuration


# The settings of a run


def test_sharding_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="^sharding: expected one of fsdp2, zero2, zero3, got 'fsdp'"):
        TrainConfig(sharding="fsdp")
    with pytest.raises(ArgumentError, match="^sharding: fsdp2 needs several processes"):
        sharding_arguments(TrainConfig(sharding="fsdp2"), 1)
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(ArgumentError, match=r"^sharding: zero2 needs the package deepspeed"):
        sharding_arguments(TrainConfig(sharding="zero2"), 2)
    assert sharding_arguments(TrainConfig(), 1) == {}


def test_a_resumed_run_keeps_its_micro_batch(caplog: pytest.LogCaptureFixture) -> None:
    config = TrainConfig(batch_size=16)
    assert with_kept_micro_batch(config, {"micro_batch": 4}, 2).batch_plan(2) == (4, 2)
    assert config.micro_batch_size is None  # what the run's file says stays
    given = TrainConfig(batch_size=16, micro_batch_size=2)
    assert with_kept_micro_batch(given, {"micro_batch": 8}, 2).micro_batch_size == 2
    assert with_kept_micro_batch(config, {}, 2) is config
    assert not caplog.text
    assert with_kept_micro_batch(config, {"micro_batch": 8}, 4) is config
    assert "micro_batch_size: the run had 8, which does not fit 4 processes" in caplog.text


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") == "cpu"
    assert not dist.is_initialized()
    alone = Processes()
    assert (alone.main, alone.all_get(lambda: 3), alone.all_gather(4)) == (True, 3, [4])
    assert alone.deal([1, 2, 3]) == [[1], [2], [3]]


def test_batches_are_dealt_out_in_rounds() -> None:
    processes = Processes()
    processes.world = 2
    assert processes.deal(["a", "b", "c"]) == [["a", "b"], ["c"]]
