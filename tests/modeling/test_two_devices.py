"""An LLM whose layers are on two devices: what the layers need of the source and the gates is not copied at every step.

The second device is "meta", which computes nothing: what is copied to it is counted.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import batch, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from layalign.modeling.cache import SourceKeyValues, get_source
from layalign.modeling.cross_attention import OnePass, one_pass
from layalign.modeling.parts import gate_devices
from layalign.nn import GatedCrossAttention
from layalign.nn.rows import Rows
from layalign.ops import backends

CPU, SECOND = torch.device("cpu"), torch.device("meta")


class Copies(TorchDispatchMode):
    """Collects the shapes of the tensors that are copied from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.shapes.append(tuple(args[0].shape))
        return result


def moved(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(SECOND), requires_grad=parameter.requires_grad)


def put_on_two_devices(model: Any) -> None:
    """As a device map does, with accelerate's hooks; the LLM's layers after the first are on the second device."""
    there = tuple(f"model.layers.{layer}" for layer in range(1, len(model.llm.model.layers)))
    for name, module in model.llm.named_modules():
        second = name.startswith((*there, "model.norm", "lm_head"))
        if second:
            for key, parameter in list(module._parameters.items()):
                module._parameters[key] = None if parameter is None else moved(parameter)
        if module._parameters or name in there:
            on = SECOND if second else CPU
            add_hook_to_module(module, AlignDevicesHook(execution_device=on, skip_keys=["past_key_values", "cache"]))
    for gated in model.cross_attention[1:]:
        gated._parameters["adaption_gate"] = moved(gated.adaption_gate)


@torch.no_grad()
def test_a_decode_step_copies_nothing_of_the_source() -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    put_on_two_devices(model)
    with Copies() as copies:
        output = model(**inputs, use_cache=True)
    mask = tuple(inputs["encoder_attention_mask"].shape)
    assert copies.shapes.count(mask) == 1  # for two layers
    attended = inputs["attention_mask"]
    for _ in range(3):
        attended = torch.cat([attended, attended[:, -1:]], 1)
        with Copies() as copies:
            step = dict(input_ids=torch.ones(3, 1, dtype=torch.long), attention_mask=attended)
            output = model(**step, past_key_values=output.past_key_values)
        gate, states = (1,), {tuple(key.shape) for key in get_source(output.past_key_values).keys}
        assert copies.shapes  # accelerate moves what one layer hands on to the next
        assert not {mask, gate, *states} & set(copies.shapes)


def source_of(*, grad: bool = False, mask: Tensor | None = None) -> SourceKeyValues:
    key, value = (torch.randn(2, 2, 5, 16).requires_grad_(grad) for _ in range(2))
    return SourceKeyValues((3,), (key,), (value,), mask)


def some_mask() -> Tensor:
    return torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


WRITES = {
    "in place": lambda source: source.mask.logical_not_(),
    "another tensor": lambda source: setattr(source, "mask", ~source.mask),
    "other memory": lambda source: setattr(source.mask, "data", ~source.mask),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_the_copy_of_a_mask_is_kept_until_the_mask_is_written_to(write: Any) -> None:
    source = source_of(mask=some_mask())
    assert source.mask_on(CPU) is source.mask and not source.masks
    kept = source.mask_on(SECOND)
    assert kept is not None and kept.device == SECOND and source.mask_on(SECOND) is kept
    assert not source.has_written_masks()
    write(source)
    assert source.has_written_masks()
    again = source.mask_on(SECOND)
    assert again is not kept and source.mask_on(SECOND) is again and not source.has_written_masks()
    assert not source_of().mask_on(SECOND)


def test_the_copy_of_a_mask_is_for_one_source_only() -> None:
    source = source_of(mask=some_mask())
    source.mask_on(SECOND)
    assert not source.select(torch.tensor([1])).masks and not copy.deepcopy(source).masks
    with torch.inference_mode():
        source = source_of(mask=some_mask())
        assert source.mask_on(SECOND) is not source.mask_on(SECOND)  # nothing would show a write to the mask
    source = source_of(mask=some_mask())
    with torch.inference_mode():
        kept = source.mask_on(SECOND)
    assert kept is not None and not kept.is_inference()  # a training pass may follow


@pytest.mark.skipif(not backends.capability("cpp", "cpu")[0], reason="no C++ kernels here")
@pytest.mark.parametrize("written", [False, True])
@torch.no_grad()
def test_a_write_within_a_pass_is_followed(written: bool) -> None:
    """Also where another device's layers have a copy of the mask."""
    source, module = source_of(mask=some_mask()), GatedCrossAttention("cpp", gate=0.5)
    query, residual = torch.randn(2, 4, 1, 16), torch.randn(2, 1, 4, 16)
    for _ in range(2):
        with one_pass(source, (module,)) as one:
            one.attend(3, query, residual, None)
    source.mask_on(SECOND)
    with one_pass(source, (module,)) as one:
        assert one.ready
        if written:
            WRITES["in place"](source)
        assert one._holds() != written
        found = one.attend(3, query, residual, None)
    expected = module(query, source.keys[0], source.values[0], residual, key_mask=source.mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "grads", "trained"), [(1, False, False), (17, False, False), (1, True, True)])
def test_a_source_keeps_the_states_that_were_moved(rows: int, grads: bool, trained: bool) -> None:
    source, module = source_of(grad=trained, mask=some_mask()), GatedCrossAttention("torch", gate=0.5)
    query, residual = torch.randn(2, 4, rows, 16, device=SECOND), torch.randn(2, rows, 4, 16, device=SECOND)
    before = source.keys[0], source.values[0]
    for step in range(2):
        with torch.set_grad_enabled(grads), Copies() as copies:
            found = OnePass(source, (module,)).attend(3, query, residual, None)
        assert found.device == SECOND and found.requires_grad == trained
        gate, states = copies.shapes.count((1,)), copies.shapes.count((2, 2, 5, 16))
        assert gate == 1  # here it is on the first device; a copy of it is never kept, as it may be written to
        assert states == (2 if trained or step == 0 else 0)
    assert (source.keys[0] is before[0] and source.values[0] is before[1]) == trained
    assert (source.keys[0].device == source.values[0].device == SECOND) != trained


def test_gates_are_put_on_the_devices_of_their_layers() -> None:
    def attention(device: torch.device, hook: Any = None, **maps: Any) -> nn.Module:
        module: Any = nn.Module()
        module.k_proj, module.v_proj = (maps.get(name) or nn.Linear(2, 2, device=device) for name in ("k", "v"))
        module.k_proj._hf_hook = hook
        return module

    execution = SimpleNamespace(execution_device="cuda:1")
    of_quantised = dict(k=nn.Identity(), v=nn.Identity())  # without a weight
    attentions = [
        attention(CPU),
        attention(SECOND, execution),
        attention(SECOND),
        attention(CPU, **of_quantised),
    ]
    home = torch.device("cuda", 3)
    assert gate_devices(attentions, home) == [CPU, torch.device("cuda", 1), home, home]
    assert [gated.adaption_gate.device for gated in tiny_model().cross_attention] == [CPU] * 3


def test_indices_are_copied_once_for_each_device() -> None:
    rows = Rows(torch.tensor([[True, False], [True, True]]))
    states = torch.randn(2, 2, 4, device=SECOND)
    with Copies() as copies:
        for _ in range(3):
            rows.spread(rows.select(states))
    assert copies.shapes == [(3,)]
    source = SourceKeyValues((0, 1), (states,) * 2, (states,) * 2, some_mask())
    with Copies() as copies:
        source.select(torch.tensor([1, 0]))
    assert copies.shapes == [(2,)]
