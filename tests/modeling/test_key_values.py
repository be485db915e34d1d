"""Keys and values from folded weights: the same numbers as by the LLM's modules, and only where weights may be read."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from tiny import batch, compiles, tiny_model

from layalign import ArgumentError, LayAlignConfig
from layalign.modeling import key_values
from layalign.modeling.key_values import MARGIN, break_even_rows, reason_against


def loss_and_gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"loss": loss.detach(), **found}


def both(llm: str = "llama", **options):
    """The same model twice, called through modules and folded."""
    never, always = (tiny_model(llm=llm, fold_projections=choice, **options) for choice in ("never", "always"))
    return never, always


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    assert first.keys() == second.keys()
    for name in first:
        scale = first[name].abs().max().clamp(min=1e-3)
        assert (first[name] - second[name]).abs().max() <= bound * scale, name


@pytest.mark.parametrize("llm", ["llama", "llama_gqa_wide_heads", "qwen2", "gemma2", "olmo2"])
def test_folded_and_called_give_the_same_loss_and_gradients(llm: str) -> None:
    """qwen2 has biases, llama_gqa_wide_heads fewer key heads and another head size."""
    modules, folded = both(llm)
    inputs = batch(model=modules)
    wide = llm != "gemma2"  # its own eager attention gives NaN in float64
    for model in (modules, folded):
        model.to(torch.float64 if wide else torch.float32)  # without most of the noise of gradients that cancel
    same = loss_and_gradients(modules, inputs), loss_and_gradients(folded, inputs)
    assert_same(*same, bound=1e-6 if wide else 1e-5)
    for model in (modules, folded):
        model.float()
    first, second = (model(**inputs).loss for model in (modules, folded))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert modules.key_values.last == "not folded: fold_projections='never'"
    assert folded.key_values.last == "folded"
    inputs = batch(model=modules, targets=None)
    new = [m.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (modules, folded)]
    assert torch.equal(*new)


def test_a_training_run_with_accumulation_is_the_same() -> None:
    modules, folded = both(language_layers=[0, 2])
    losses = []
    for model in (modules, folded):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for step in range(4):
            for micro in range(2):
                loss = model(**batch(model=model, seed=10 * step + micro)).loss
                (loss / 2).backward()
                found.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(found)
    assert losses[0][0] != losses[0][-1]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-5)


def test_the_weights_are_folded_once_per_change(monkeypatch: pytest.MonkeyPatch) -> None:

    counted = []
    original = key_values._fold
    monkeypatch.setattr(key_values, "_fold", lambda *a: (counted.append(1), original(*a))[1])
    model = tiny_model(fold_projections="always")
    inputs = batch(model=model)
    for _ in range(3):
        model(**inputs).loss.backward()
    assert len(counted) == 1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    model(**inputs)
    assert len(counted) == 2
    weight = model.encoder_aligner.projector.fc2.weight
    weight.data = weight.data.clone().mul_(0.5)
    first = model(**inputs).loss
    assert len(counted) == 3  # other memory
    weight.data.mul_(2.0)  # past autograd's version counter
    assert not torch.equal(model(**inputs).loss, first) and len(counted) == 4
    model._attentions[0].k_proj.weight.data[1, 5] += 5.0  # of the LLM's maps a few numbers are compared
    model(**inputs)
    assert len(counted) == 4
    model.key_values.forget()
    model(**inputs)
    assert len(counted) == 5


def reasons():
    def lora(model):
        model.add_lora(dict(r=2, target_modules=["k_proj"]))

    def hook(model):
        model._attentions[0].v_proj.register_forward_hook(lambda *_: None)

    def patched(model):
        model._attentions[0].k_proj.forward = lambda x: x

    def trains(model):
        model._attentions[1].k_proj.weight.requires_grad_(True)

    def projector(model):
        model.encoder_aligner.projector.register_forward_hook(lambda *_: None)

    def patched_projector(model):
        own = model.encoder_aligner.projector
        own.forward = own.forward

    def partitioned(model):
        model._attentions[1].v_proj.weight.ds_id = 0  # as ZeRO-3 marks its parameters

    def reshaped(model):
        weight = model._attentions[1].k_proj.weight
        weight.data = weight.data.view(-1)  # in the same place

    def quantised(model):
        class OtherLinear(torch.nn.Linear):
            pass

        model._attentions[0].k_proj.__class__ = OtherLinear

    return {
        lora: "k_proj: Linear is not a plain Linear",
        hook: "v_proj: Linear has hooks",
        patched: "k_proj: Linear has hooks, a patched forward",
        trains: "k_proj trains",
        projector: "the aligner's projector has hooks",
        patched_projector: "the aligner's projector has hooks or a patched forward",
        partitioned: "v_proj: its weight is partitioned by ZeRO-3",
        reshaped: "k_proj: its weight is sharded",
        quantised: "k_proj: OtherLinear is not a plain Linear",
    }


@pytest.mark.parametrize("folded_before", [False, True])
@pytest.mark.parametrize(("change", "reason"), reasons().items(), ids=lambda value: getattr(value, "__name__", ""))
def test_weights_that_must_not_be_read_are_not(change, reason: str, folded_before: bool) -> None:
    if change.__name__ == "lora":
        pytest.importorskip("peft")
    model = tiny_model(fold_projections="always")
    if folded_before:
        model(**batch(model=model))
        assert model.key_values.last == "folded"
    change(model)
    assert reason_against(model.encoder_aligner.projector, model._attentions).startswith(reason)
    if change.__name__ == "reshaped":  # no call of the module works either
        against, _ = model.key_values._against_reading(model.encoder_aligner.projector, model._attentions)
        assert against.startswith(reason)
    elif change.__name__ != "patched":  # that one changes the width
        model(**batch(model=model))
        assert model.key_values.last.startswith(f"not folded: {reason}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(structure="MLP"), 'structure "MLP" has a relu between the two maps'),
        (dict(llm="phi3"), "Phi3Attention has no k_proj of its own"),
        (dict(llm="gpt2"), "GPT2Attention has no k_proj of its own"),
    ],
)
def test_models_that_cannot_be_folded_say_so(options: dict, reason: str) -> None:
    model = tiny_model(fold_projections="always", **options)
    model(**batch(model=model))
    assert model.key_values.last == f"not folded: {reason}"


@pytest.mark.parametrize("fold", ["auto", "always"])
def test_a_model_made_in_inference_mode_is_not_folded(fold: str) -> None:
    expected = tiny_model(fold_projections="never")
    inputs = batch(model=expected)
    with torch.inference_mode():
        model = tiny_model(fold_projections=fold)
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).loss, expected(**inputs).loss)
    assert model.key_values.last == "not folded: fc2: it was made in inference mode and has no version counter"


def test_break_even() -> None:
    assert round(break_even_rows(2048, 4096, 4096)) == 2048  # mT5-xl and Llama-2-7B
    assert round(break_even_rows(2048, 4096, 1024)) == 819  # and Llama-3-8B
    assert break_even_rows(2048, 4096, 1024, reused=10) < 82
    assert break_even_rows(8, 4, 1000) == math.inf
    training = [break_even_rows(512, 768, 768, training=True, reused=n) for n in (1, 2, 8)]
    assert training == sorted(training, reverse=True) and round(training[0]) == 512


def test_auto_folds_at_inference_and_by_the_rule_in_training() -> None:
    model = tiny_model()  # D_e 24, D_l = D_kv 32
    needed = MARGIN * break_even_rows(24, 32, 32, training=True)
    few, many = batch(model=model, sources=(6, 3, 5)), batch(model=model, sources=(20, 20, 20))
    assert 14 < needed < 60
    model(**few)  # 14 real tokens; padding does not count
    assert model.key_values.last == f"not folded: 14 rows a call, folding pays from {needed:.0f}"
    model(**many)
    assert model.key_values.last == "folded"
    with torch.no_grad():
        model(**few)
    assert model.key_values.last == "folded"


@pytest.mark.parametrize(
    "maps, why", [(torch.bfloat16, "40 rows a call, folding pays from"), (torch.float32, "a fold of")]
)
def test_on_a_gpu_auto_does_not_fold_at_another_rate_than_that_of_the_products(maps: torch.dtype, why: str) -> None:
    model = tiny_model()
    projector = model.encoder_aligner.projector.to("meta")
    model.llm.to("meta", maps)
    hidden = [torch.empty(8, 5, 24, device="meta", dtype=torch.bfloat16)]
    against = model.key_values._against(projector, model._attentions, hidden, None)
    needed = MARGIN * break_even_rows(24, 32, 32, training=True, terms=2)
    assert against is not None and against.startswith(why) and needed > 40
    assert why == "a fold of" or against.endswith(f" {needed:.0f}")


def test_other_dtypes_and_autocast() -> None:
    modules, folded = both()
    for model in (modules, folded):
        model.llm.to(torch.bfloat16)  # encoder and aligner stay in float32
    inputs = batch(model=modules)
    first, second = (model(**inputs).loss for model in (modules, folded))
    torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)
    modules, folded = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = (model(**inputs).loss for model in (modules, folded))
    torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)
    assert folded.key_values._folded.weight.dtype == torch.bfloat16


def test_copies_and_pickles_do_not_carry_the_folded_weights() -> None:
    model = tiny_model(fold_projections="always")
    inputs = batch(model=model, targets=None)
    with torch.no_grad():
        expected = model(**inputs).logits
        twin = copy.deepcopy(model)
        assert twin.key_values._folded is None and twin.key_values.choice == "always"
        assert torch.equal(twin(**inputs).logits, expected)
    assert pickle.loads(pickle.dumps(model.key_values))._folded is None


@pytest.mark.slow
@compiles
def test_compiled_it_calls_the_modules() -> None:
    modules, folded = both()
    ids = torch.randint(4, 60, (2, 7))
    compiled = torch.compile(folded.encode_source, backend="eager")
    with torch.no_grad():
        soft, source = compiled(ids, torch.ones_like(ids))
        plain_soft, plain = modules.encode_source(ids, torch.ones_like(ids))
    torch.testing.assert_close(soft, plain_soft)
    torch.testing.assert_close(source.keys, plain.keys)


def test_a_bad_choice_is_named() -> None:
    with pytest.raises(ArgumentError, match="^fold_projections: expected one of auto, always, never, got 'maybe'"):
        LayAlignConfig(fold_projections="maybe")


@pytest.mark.parametrize("llm", ["llama", "llama_gqa_wide_heads", "qwen2"])
def test_where_folding_does_not_pay_the_maps_are_called(llm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the projector is one launch for all slots."""
    modules, together = both(llm)
    together.key_values.choice = "auto"
    for model in (modules, together):
        model.double()
    monkeypatch.setattr(key_values, "useful", lambda *_: False)
    for attention in modules._attentions:
        attention.k_proj.register_forward_hook(lambda *_: None)  # it wants to see the module called
    inputs, forward = batch(model=modules), torch.nn.Linear.forward
    maps = {id(attention.k_proj) for model in (modules, together) for attention in model._attentions}
    called: list[int] = []

    def counting(self, x: torch.Tensor) -> torch.Tensor:
        called.extend([1] if id(self) in maps else [])
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counting)
    first, layers = loss_and_gradients(modules, inputs), len(modules._attentions)
    assert len(called) == 2 * layers  # for the LLM's own keys and for the source's
    second = loss_and_gradients(together, inputs)
    assert len(called) == 4 * layers and "folding pays from" in together.key_values.last
    assert_same(first, second, bound=1e-6)
