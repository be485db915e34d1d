"""In a training step and a decode step the host waits for no GPU because of us. Traced without one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, tiny_model
from torch import Tensor

from layalign import ArgumentError
from layalign.modeling.llm_inputs import IGNORE_INDEX
from layalign.modeling.llm_pass import predicted
from layalign.nn.rows import Rows
from layalign.training.guard import StepGuard

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import launches

# Older torch may know no fake tensors of that device.
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
BATCH = dict(sources=(6, 3, 5), targets=(3, 1, 4))
TOKENS, LABELS = 14, 8  # of that batch: real source tokens, labels


def positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the collator adds."""
    wanted = predicted(inputs["labels"]) != IGNORE_INDEX
    return {"encoder_token_index": Rows(inputs["encoder_attention_mask"]).index, "loss_index": Rows(wanted).index}


def pretended() -> None:
    """Skip the test where old torch cannot pretend."""
    try:
        with launches.pretended_gpu():
            launches.ids(2, 2)[:, None].sum()
    except (RuntimeError, NotImplementedError, AttributeError):
        if not OLD:
            raise
        pytest.skip("this torch has no fake tensors of that device")


def traced(given: bool, train: bool = True, **options: Any) -> launches.Trace:
    """A training step of a tiny model, traced."""
    pretended()
    model = tiny_model(**options).train(train)
    inputs = batch(model=model, **BATCH)
    shapes = {name: each.shape for name, each in {**inputs, **(positions(inputs) if given else {})}.items()}
    trace = launches.Trace({3 * 6: TOKENS, inputs["labels"].numel(): LABELS})
    with launches.pretended_gpu():
        launches.pretend(model)
        fake = {name: launches.ids(*shape) for name, shape in shapes.items()}
        with trace:
            model(**fake).loss.backward()
    return trace


def ours(trace: launches.Trace) -> list[launches.Wait]:
    return [wait for wait in trace.waits if wait.whose == launches.OWN]


@pytest.mark.parametrize("options", [
    {}, {"structure": "MLP"}, {"mask_encoder_padding": False}, {"use_adapter": False}, {"fold_projections": "always"},
    {"fold_projections": "never"}, {"prune_last_layer": "never"}, {"adapter_fusion": "softmax"},
    {"llm": "llama_gqa_wide_heads", "encoder": "xlm-roberta"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("train", [True, False], ids=["training", "dev loss"])
def test_a_step_waits_for_nothing(options: dict[str, Any], train: bool) -> None:
    assert ours(traced(True, train, **options)) == []


def test_without_positions_it_waits_before_the_encoder_begins() -> None:
    trace = traced(False)
    assert [wait.after for wait in ours(trace)] == [0, 0, 0] and trace.launches[launches.THEIRS] > 100


def test_padding_costs_a_few_launches_for_all_layers_together() -> None:
    """However many layers there are: no copies of the encoder's states, no zeros for each layer's keys and values."""
    counts = {}
    for layers in ([0, 1], [0, 1, 2]):
        trace = traced(True, language_layers=layers, fold_projections="never")
        own = {name: count for (whose, name), count in trace.operations.items() if whose == launches.OWN}
        # each layer has two products, and attention both ways
        counts[len(layers)] = sum(count for name, count in own.items() if "gated" not in name) - own["aten::mm"]
        assert own["aten::index_select"] < 10 and own["aten::new_zeros"] < 6
    assert counts[2] == counts[3]


@pytest.mark.parametrize("beams, waits", [(1, 0), (4, 1)])
def test_a_decode_step(beams: int, waits: int) -> None:
    """Beams: whether they have stayed with their sequence is asked once. Nothing is copied then."""
    pretended()
    model = tiny_model()
    with launches.pretended_gpu():
        launches.pretend(model)
        trace = launches.decode_step(model, beams)
    assert len(ours(trace)) == waits
    assert trace.operations[launches.OWN, "layalign::gated_cross_attention_decode"] == 3
    assert trace.operations[launches.OWN, "aten::index_select"] == 0


def test_the_guard_waits_once_a_step() -> None:
    pretended()
    model, guard = tiny_model(), StepGuard()
    with launches.pretended_gpu():
        launches.pretend(model)
        loss = torch.empty((), device=launches.DEVICE)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with launches.Trace() as trace:
            for _ in range(3):
                guard.saw(loss, {})
            assert trace.waits == []
            guard.check(1, model, lambda number: number, None)
    assert len({wait.line for wait in trace.waits}) == 1


def test_positions_change_no_number() -> None:
    model = tiny_model()
    inputs = batch(model=model, **BATCH)
    found = []
    for more in ({}, positions(inputs)):
        model.zero_grad()
        loss = model(**inputs, **more).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", ["encoder_token_index", "loss_index"])
@pytest.mark.parametrize("change", [
    lambda index: index.flip(0), lambda index: index[1:], lambda index: index + 1, lambda index: index.int(),
    lambda index: index[None], lambda index: index.tolist(), lambda index: index.new_tensor([]),
], ids=["order", "one less", "others", "int32", "two-dimensional", "list", "none"])  # fmt: skip
def test_wrong_positions_are_named(name: str, change: Any) -> None:
    model = tiny_model()
    inputs = batch(model=model, **BATCH)
    given = positions(inputs)
    with pytest.raises(ArgumentError, match=f"{name}: expected"):
        model(**inputs, **{**given, name: change(given[name])})


def test_a_device_asserts_what_the_host_does_not_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check gives it a text with the argument's name, short enough to be printed."""
    texts: list[str] = []
    monkeypatch.setattr(torch, "_assert_async", lambda good, text: texts.append(text))
    traced(True)
    assert [text.partition(":")[0] for text in texts] == ["loss_index", "encoder_token_index", "input_ids"]
    assert max(len(text.encode()) for text in texts) < 255  # torch's limit on a GPU


def test_in_pieces_of_a_batch_positions_are_left_aside() -> None:
    """DataParallel cuts every tensor into pieces."""
    model = tiny_model()
    inputs = batch(model=model, **BATCH)
    expected = model(**inputs).loss
    model._is_replica = True
    assert torch.equal(model(**inputs, encoder_token_index=torch.arange(2), loss_index=torch.arange(3)).loss, expected)
