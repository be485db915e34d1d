"""What happens to swapped modules afterwards: other processes, other parts, wrapped forwards, and their restoring."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published_tiny import (  # noqa: F401
    assert_same,
    calls_of_operations,
    data,
    loss_and_gradients,
    own_classes,
    published,
    published_model,
    settings,
    wrappers,
)
from tiny import tiny_model
from torch import nn

import layalign
from layalign import ArgumentError

RUN_A_PICKLE = """
import sys, torch
model, embeds, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pickle_runs_in_another_process(attention: str, tmp_path: Path) -> None:
    llm = published_model(attention=attention).model_llm
    embeds = torch.randn(3, 4, 32)
    llm.set_states([(torch.randn(3, 5, 32), torch.randn(3, 5, 32)) for _ in range(3)])
    expected = llm(inputs_embeds=embeds).logits.detach()
    layalign.swap_modules(llm)
    torch.save((llm, embeds, expected), tmp_path / "llm.pt")
    path = [str(Path(layalign.__file__).parents[1]), *sys.path]
    code = f"import sys; sys.path[:0] = {path!r}; import published_tiny" + RUN_A_PICKLE
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "llm.pt"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_an_attention_put_in_later_runs_as_published_and_keeps_its_config() -> None:
    model, twin = published_model(), published_model()
    layalign.swap_modules(model)
    for one in (model, twin):
        wrapper = wrappers(one)[0]
        wrapper.model = copy.deepcopy(wrapper.model)
        wrapper.model.config = one.model_llm.model.config
        with torch.no_grad():
            wrapper.model.q_proj.weight.mul_(2)
    expected = loss_and_gradients(twin, data())
    assert_same(expected, loss_and_gradients(model, data()))
    config = model.model_llm.model.config
    assert config._attn_implementation == "sdpa"
    layalign.restore_modules(model)
    assert wrappers(model)[0].model.config is config
    assert_same(expected, loss_and_gradients(model, data()))


def halved(linear: nn.Module) -> None:
    linear.register_forward_hook(lambda module, args, out: out * 0.5 + 0.1)


def patched(linear: nn.Module) -> None:
    linear.forward = lambda states: nn.functional.linear(states, linear.weight) + 0.1


def biased(linear: nn.Module) -> None:
    linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features))


@pytest.mark.parametrize("change", [halved, patched, biased])
def test_an_output_projection_that_is_not_linear_any_more_runs_as_published(change) -> None:
    model, before, twin = published_model(), published_model(), published_model()
    assert len(layalign.swap_modules(model).swapped) == 4
    for one in (model, before, twin):
        for wrapper in wrappers(one):
            change(wrapper.model.o_proj)
    expected = loss_and_gradients(twin, data())
    assert_same(expected, loss_and_gradients(model, data()))
    report = layalign.swap_modules(before)
    assert [name for name, _ in report.swapped] == ["encoder_aligner"]
    assert all("its output projection has" in text for name, text in report.left if name != "mapping")
    assert_same(expected, loss_and_gradients(before, data()))


def test_a_bias_of_zero_counts_as_a_bias_and_lora_without_one_does_not(calls) -> None:
    model = published_model(attention_bias=True)
    with torch.no_grad():
        for wrapper in wrappers(model):
            wrapper.model.o_proj.bias.zero_()
    assert [name for name, _ in layalign.swap_modules(model).swapped] == ["encoder_aligner"]
    peft = pytest.importorskip("peft")
    model = published_model()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model.model_llm.model)
    wrappers(model)[0].model.o_proj.lora_B["default"].bias = nn.Parameter(torch.ones(32))
    for wrapper in wrappers(model):
        wrapper.adaption_gate.requires_grad_(True)
    expected = loss_and_gradients(model.eval(), data())
    assert [name for name, _ in layalign.swap_modules(model).left] == [
        "model_llm.model.model.layers.0.self_attn", "mapping",
    ]  # fmt: skip
    calls.update(gated_cross_attention=0)
    assert_same(expected, loss_and_gradients(model, data()))
    assert calls["gated_cross_attention"] == 2


def test_hooks_of_accelerate_only_move_weights() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = published_model()
    expected = loss_and_gradients(model, data())
    for wrapper in wrappers(model):
        for linear in (wrapper.model.k_proj, wrapper.model.o_proj):
            hooks.add_hook_to_module(linear, hooks.AlignDevicesHook(io_same_device=True))
    assert len(layalign.swap_modules(model).swapped) == 4
    assert_same(expected, loss_and_gradients(model, data()))
    with torch.no_grad():
        model(**data())
    assert all(wrapper.layalign_swap.kept is not None for wrapper in wrappers(model))


# Inside an aligner


class Softer(published.WeightedLinearProjector):
    def forward(self, hidden_states):
        return self.fc2(nn.functional.silu(self.fc1(hidden_states.permute(0, 2, 3, 1)).transpose(2, 3)))


def other_projector(aligner) -> None:
    torch.manual_seed(1)
    aligner.projector = Softer(aligner.config)


def other_forward(aligner) -> None:
    aligner.projector.forward = lambda states: torch.ones(2, 5, 6, 32)


def other_relu(aligner) -> None:
    aligner.projector.relu = nn.GELU()


def hooked_relu(aligner) -> None:
    aligner.projector.relu.register_forward_hook(lambda module, args, out: out * 0.5)


def patched_relu(aligner) -> None:
    aligner.projector.relu.forward = torch.tanh


@pytest.mark.parametrize("change", [other_projector, other_forward, other_relu, hooked_relu, patched_relu])
def test_changes_inside_an_aligner_are_followed(change) -> None:
    aligner = published.EncoderAligner(settings().encoder_aligner_config)
    twin = copy.deepcopy(aligner)
    hidden = [torch.randn(2, 5, 24) for _ in range(3)]
    assert layalign.swap_modules(aligner).swapped
    before = aligner(hidden)[0][0]
    change(aligner), change(twin)
    found, expected = aligner(hidden)[0][0], twin(hidden)[0][0]
    assert torch.equal(found, expected) and not torch.allclose(found, before, atol=1e-3)


def test_a_hook_on_the_relu_goes_on_seeing_it() -> None:
    aligner = published.EncoderAligner(settings().encoder_aligner_config)
    seen: list[nn.Module] = []
    aligner.projector.relu.register_forward_hook(lambda module, *_: seen.append(module))
    report = layalign.swap_modules(aligner)
    assert not report.swapped and "relu: expected a ReLU without hooks" in report.left[0][1]
    seen.clear()
    aligner([torch.randn(2, 5, 24) for _ in range(3)])
    assert seen == [aligner.projector.relu]


def test_layers_of_several_dtypes_are_stacked_as_before() -> None:
    aligner = published.EncoderAligner(settings().encoder_aligner_config)
    hidden = [torch.randn(2, 5, 24).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float32)]
    expected = aligner(hidden)
    layalign.swap_modules(aligner)
    torch.testing.assert_close(aligner(hidden), expected)


def test_the_argument_keeps_its_own_name() -> None:
    class Named(published.EncoderAligner):
        def forward(self, layers):
            return super().forward(layers)

    aligner = Named(settings().encoder_aligner_config)
    hidden = [torch.randn(2, 5, 24) for _ in range(3)]
    expected = aligner(hidden)
    assert layalign.swap_modules(aligner).swapped
    torch.testing.assert_close(aligner(layers=hidden), expected, rtol=1e-5, atol=1e-6)


# Restoring


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_wrapped_after_the_swap_outlives_it(compiled: bool) -> None:
    model = published_model()
    expected = loss_and_gradients(model, data())
    layalign.swap_modules(model)
    for module in (model.encoder_aligner, wrappers(model)[0]):
        forward = module.forward
        if compiled:
            module.forward = torch.compile(forward, backend="eager")
        else:
            module.forward = functools.wraps(forward)(lambda *args, forward=forward, **kwargs: forward(*args, **kwargs))
    assert_same(expected, loss_and_gradients(model, data()))
    report = layalign.restore_modules(model)
    assert [note.split(":")[0] for note in report.notes[:2]] == [
        "model_llm.model.model.layers.0.self_attn", "encoder_aligner",
    ]  # fmt: skip
    assert_same(expected, loss_and_gradients(model, data()))


def test_what_can_be_restored_is_before_an_error() -> None:
    model = published_model()
    classes = own_classes(model)
    layalign.swap_modules(model)
    first = wrappers(model)[0]
    ours = type(first)
    first.__class__ = type("Sharded", (ours,), {})
    with pytest.raises(ArgumentError, match="a Sharded got another class"):
        layalign.restore_modules(model)
    first.__class__ = ours
    report = layalign.restore_modules(model)
    assert [name for name, _ in report.swapped] == ["model_llm.model.model.layers.0.self_attn"]
    assert own_classes(model) == classes


@pytest.mark.parametrize("inner_first", [False, True])
def test_settings_of_our_own_parts_come_back_in_any_order(inner_first: bool) -> None:
    model = tiny_model()
    parts = [model, model.encoder_aligner]
    for part in reversed(parts) if inner_first else parts:
        layalign.swap_modules(part, impl="torch")
    layalign.restore_modules(model)
    assert model.encoder_aligner.projector.impl == "auto" and model.cross_attention[0].impl == "auto"


def test_a_class_that_cannot_be_extended_is_left() -> None:
    class Final(published.EncoderAligner):
        def __init_subclass__(cls) -> None:
            raise TypeError("final")

    config = settings().encoder_aligner_config
    tree = nn.ModuleList([published.EncoderAligner(config), Final(config), published.EncoderAligner(config)])
    report = layalign.swap_modules(tree)
    assert [name for name, _ in report.swapped] == ["0", "1.projector", "2"]
    assert dict(report.left)["1"] == "its class cannot be extended: TypeError: final" and type(tree[1]) is Final


@pytest.mark.parametrize("protocol", [0, 1, 2, pickle.HIGHEST_PROTOCOL])
def test_all_protocols_of_pickle(protocol: int) -> None:
    aligner = published.EncoderAligner(settings().encoder_aligner_config)
    layalign.swap_modules(aligner)
    assert type(pickle.loads(pickle.dumps(aligner, protocol=protocol))) is type(aligner)


def test_a_float64_model_is_swapped_under_any_default_device() -> None:
    model = published_model("qwen2").double()
    expected = loss_and_gradients(model, data())
    with torch.device("meta"):
        assert len(layalign.swap_modules(model).swapped) == 4
    assert_same(expected, loss_and_gradients(model, data()))


def test_a_compiled_aligner_is_one_row_of_the_report() -> None:
    model = published_model()
    model.encoder_aligner = torch.compile(model.encoder_aligner, backend="eager")
    report = layalign.swap_modules(model)
    assert [name for name, _ in report.left] == ["mapping"]
    assert "encoder_aligner._orig_mod" in dict(report.swapped)
