"""swap_modules beside look-alikes, sharded and hooked weights, peft, gradient checkpointing, DDP and torch.compile."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from published_tiny import (  # noqa: F401
    assert_same,
    calls_of_operations,
    data,
    gates,
    loss_and_gradients,
    own_classes,
    published,
    published_model,
    settings,
    wrappers,
)
from torch import nn

import layalign
from layalign import ArgumentError

# What is left alone


class Softer(published.WeightedLinearProjector):
    """Looks published, computes something else."""

    def forward(self, hidden_states):
        return self.fc2(torch.nn.functional.silu(self.fc1(hidden_states.permute(0, 2, 3, 1)).transpose(2, 3)))


class Squashed(published.AdaptedAttention):
    def forward(self, **kwargs):
        gate, self.adaption_gate.data = self.adaption_gate.data, self.adaption_gate.data.tanh()
        out = super().forward(**kwargs)
        self.adaption_gate.data = gate
        return out


class Masked(published.AdaptedAttention):
    source_mask = None

    def forward(self, **kwargs):
        return super().forward(**kwargs) if self.source_mask is None else None


class Custom(nn.Module):
    """An attention of its own, not through the interface."""

    def __init__(self, inner: nn.Module, config) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj
        self.config, self.layer_idx, self.head_dim = config, 0, inner.head_dim

    def forward(self, **kwargs):
        return kwargs["hidden_states"], None


def test_look_alikes_are_left_with_the_reason() -> None:
    config = settings().encoder_aligner_config
    inner = published_model().model_llm.model.model.layers[1].self_attn.model
    aligner = published.EncoderAligner(config)
    aligner.projector = Softer(config)
    patched, dropout = published.EncoderAligner(config), published.EncoderAligner(config)
    patched.forward = lambda hidden: hidden
    dropout.projector.dropout = nn.Dropout(0.5)
    twofold = published.EncoderAligner(SimpleNamespace(**{**vars(config), "num_transformer_submodules": 2}))
    contradiction = published.EncoderAligner(SimpleNamespace(**{**vars(config), "structure": "Linear"}))
    contradiction.projector.fc3 = nn.Linear(32, 32)
    stateless = published.AdaptedAttention(inner)
    del stateless.adapter_states
    tree = nn.ModuleDict(
        dict(
            softer=aligner, patched=patched, dropout=dropout, twofold=twofold, contradiction=contradiction,
            squashed=Squashed(inner), masked=Masked(inner), stateless=stateless,
            custom=published.AdaptedAttention(Custom(inner, inner.config)),
            bare=published.AdaptedAttention(Custom(inner, None)),
            empty=published.AdaptedAttention(nn.Linear(2, 2)),
        )
    )  # fmt: skip
    classes = own_classes(tree)
    report = layalign.swap_modules(tree)
    left = dict(report.left)
    for name, words in {
        "softer": "differs from the published formula",
        "patched": "patched on the instance",
        "dropout": "parts that the published one does not have: dropout",
        "twofold": "num_transformer_submodules is 2",
        "contradiction": "structure is 'Linear'",
        "squashed": "differs from the published formula",
        "masked": "it has source_mask beyond the published one",
        "stateless": "no adapter_states",
        "custom": "does not hand its keywords",
        "bare": "has no config._attn_implementation",
        "empty": "expected one child that is an attention module",
    }.items():
        assert words in left[name], (name, left[name])
    # A good projector inside an aligner of another format is swapped by itself.
    assert {name for name, _ in report.swapped} == {"patched.projector", "twofold.projector"}
    layalign.restore_modules(tree)
    assert own_classes(tree) == classes
    assert inner.config._attn_implementation == "sdpa"


def hook(linear: nn.Module) -> None:
    linear.register_forward_hook(lambda *_: None)


def resize(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data.new_empty(0)


def zero3(linear: nn.Linear) -> None:
    linear.weight.ds_id = 0


def normed(linear: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(linear)


@pytest.mark.parametrize("change", [hook, resize, zero3, normed])
@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_weights_that_must_not_be_read_are_not(name: str, change, calls) -> None:
    aligner = published.EncoderAligner(settings().encoder_aligner_config)
    later = copy.deepcopy(aligner)
    change(getattr(aligner.projector, name))
    report = layalign.swap_modules(aligner)
    assert not report.swapped and report.left[0][1].startswith(f"{name}: ")
    assert layalign.swap_modules(later).swapped  # and when it happens after the swap, the original runs again
    calls.update(layer_projection=0)
    change(getattr(later.projector, name))
    hidden = [torch.randn(2, 5, 24) for _ in range(3)]
    if change is resize:
        with pytest.raises(RuntimeError):
            later(hidden)
    else:
        assert len(later(hidden)) == 3
    assert calls["layer_projection"] == 0


# With others


def test_peft_lora_on_the_llm() -> None:
    peft = pytest.importorskip("peft")
    model = published_model("qwen2")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(settings, model.model_llm.model)
    for gate in gates(model):
        gate.requires_grad_(True)
    expected = loss_and_gradients(model, data())
    assert any("v_proj.lora_A" in name for name in expected)
    new = model(**data(labels=False))
    assert len(layalign.swap_modules(model).swapped) == 4
    assert_same(expected, loss_and_gradients(model, data()))
    assert torch.equal(model(**data(labels=False)), new)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_as_without_the_swap(reentrant: bool) -> None:
    found = []
    for swap in (False, True):
        model = published_model().train()
        model.encoder_mt.eval()
        if swap:
            layalign.swap_modules(model)
        model.model_llm.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.model_llm.model.enable_input_require_grads()
        if reentrant:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                loss_and_gradients(model, data())
        else:
            found.append(loss_and_gradients(model, data()))
    if found:
        assert_same(*found)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "above"])
def test_torch_compile(when: str, calls, monkeypatch: pytest.MonkeyPatch) -> None:
    reset, resets = torch.compiler.reset, []
    reset()
    monkeypatch.setattr(torch.compiler, "reset", lambda: (resets.append(1), reset()))
    model = published_model(layers=(0, 2))
    expected = loss_and_gradients(model, data())
    if when != "after":
        compiled = torch.compile(model, backend="eager")
        assert_same(expected, loss_and_gradients(model, data()))
        compiled(**data())
        report = layalign.swap_modules(compiled if when == "before" else model)
        assert bool(report.notes) == (when == "before") and resets == [1]
        assert report.swapped[0][0].startswith("_orig_mod.") == (when == "before")
    else:
        layalign.swap_modules(model)
        compiled = torch.compile(model, backend="eager")
    calls.update(layer_projection=0, gated_cross_attention=0)
    model.zero_grad()
    loss = compiled(**data())
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(expected, {"loss": loss.detach(), **found})
    assert calls == {"layer_projection": 1, "gated_cross_attention": 2}
    layalign.restore_modules(compiled)
    calls.update(layer_projection=0, gated_cross_attention=0)
    torch.testing.assert_close(compiled(**data()), expected["loss"])
    assert calls == {"layer_projection": 0, "gated_cross_attention": 0}


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_compiled_whole_without_a_graph_break(train: bool) -> None:
    torch.compiler.reset()
    model = published_model("mistral")
    embeds = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    expected = loss_and_gradients(model, data())
    layalign.swap_modules(model)
    model.model_llm.train(train)
    aligner = torch.compile(model.encoder_aligner, backend="aot_eager", fullgraph=True)
    llm = torch.compile(model.model_llm.model.model, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        hidden = [torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]
        pairs = aligner(hidden)
        torch.testing.assert_close(pairs, model.encoder_aligner(hidden))
        model.model_llm.set_states(pairs)
        with torch.set_grad_enabled(train):
            found = llm(inputs_embeds=embeds, use_cache=False).last_hidden_state
            torch.testing.assert_close(
                found, model.model_llm.model.model(inputs_embeds=embeds).last_hidden_state, rtol=1e-5, atol=1e-5
            )
    torch.compiler.reset()
    assert_same(expected, loss_and_gradients(model.train(False), data()))


@pytest.mark.slow
def test_a_compiled_llm_reads_what_was_kept_before_and_notices_new_states(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    model = published_model(layers=(0, 2))
    expected = published_model(layers=(0, 2))
    layalign.swap_modules(model)
    compiled = torch.compile(model.model_llm.model.model, backend="eager", fullgraph=True)
    counted: list[int] = []
    maps = [wrapper.model.k_proj for wrapper in wrappers(model)]

    def forward(module: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        if any(module is each for each in maps):
            counted.append(states.shape[1])
        return nn.functional.linear(states, module.weight, module.bias)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    embeds = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for seed in (3, 4, 5, 5):
            model(**data(seed=seed))  # eager: keeps
            expected(**data(seed=seed))
            found = []
            for _ in range(2):
                counted.clear()
                found.append(compiled(inputs_embeds=embeds, use_cache=False).last_hidden_state)
                assert counted == [4, 4]  # the LLM's own keys, none of the source
            wanted = expected.model_llm.model.model(inputs_embeds=embeds).last_hidden_state
            for one in found:
                torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
        for wrapper, other in zip(wrappers(model), wrappers(expected), strict=True):
            wrapper.update_adapter_states(tuple(state * -2 for state in wrapper.adapter_states))
            other.update_adapter_states(wrapper.adapter_states)
        found = compiled(inputs_embeds=embeds, use_cache=False).last_hidden_state  # nothing kept for these
        wanted = expected.model_llm.model.model(inputs_embeds=embeds).last_hidden_state
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_inside_ddp(tmp_path) -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        model = published_model()
        expected = loss_and_gradients(model, data())
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        report = layalign.swap_modules(parallel)
        assert {name.split(".")[0] for name, _ in report.swapped} == {"module"} and len(report.swapped) == 4
        loss_and_gradients(parallel, data())
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same({name: g for name, g in expected.items() if name != "loss"}, found)
    finally:
        distributed.destroy_process_group()


def test_a_class_put_over_ours_is_not_lost() -> None:
    aligner = published.EncoderAligner(settings().encoder_aligner_config)
    layalign.swap_modules(aligner)
    ours = type(aligner)
    aligner.__class__ = type("Sharded", (ours,), {})
    with pytest.raises(ArgumentError, match="a Sharded got another class after it was swapped"):
        layalign.restore_modules(aligner)
    aligner.__class__ = ours
    layalign.restore_modules(aligner)
    assert type(aligner) is published.EncoderAligner


def test_weights_that_cannot_run_now_are_swapped_untried_and_the_report_says_so() -> None:
    model = published_model(layers=(1,))
    model.model_llm.model.model.layers[1].self_attn.model.to("meta")
    report = dict(layalign.swap_modules(model).swapped)
    assert "not tried on a small input" in report["model_llm.model.model.layers.1.self_attn"]
