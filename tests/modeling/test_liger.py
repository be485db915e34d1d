"""The loss by Liger's fused linear cross-entropy: when it is taken, what it must equal, what it leaves behind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import batch, tiny_encoder, tiny_llm, tiny_model
from torch.nn import functional as F
from transformers import DynamicCache

from layalign import ArgumentError, LayAlignConfig, LayAlignForCausalLM
from layalign.modeling import liger
from layalign.modeling.loss import passing_on
from layalign.nn.rows import Rows, only_rows
from layalign.utils.errors import BackendError

HELPERS = Path(__file__).parents[1] / "helpers"
NAMES = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    liger._load.cache_clear()
    yield
    liger._load.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A stand-in for liger_kernel in plain torch that also runs on a CPU; the shapes it was called with."""
    seen: list[tuple[int, ...]] = []

    def function(rows, weight, target, bias=None, reduction="mean"):  # type: ignore[no-untyped-def]
        seen.append(tuple(rows.shape))
        return F.cross_entropy(F.linear(rows, weight, bias).float(), target, reduction=reduction)

    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[NAMES[-1]].liger_fused_linear_cross_entropy = function  # type: ignore[attr-defined]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return seen


def with_bias(model: LayAlignForCausalLM) -> LayAlignForCausalLM:
    model.llm.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 64), requires_grad=False)
    return model


def gradients(model: LayAlignForCausalLM, **changes) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**dict(batch(model=model), **changes))
    assert output.logits is None
    output.loss.backward()
    return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("llm", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("divisor", [None, 16, torch.tensor(5)])
def test_same_loss_and_same_gradients_as_without(llm: str, divisor: object, calls: list) -> None:
    model = tiny_model(llm=llm)
    if llm == "llama":
        with_bias(model)
    expected, wanted = gradients(model, num_items_in_batch=divisor)
    assert not calls
    model.config.fused_loss = "always"
    found, grads = gradients(model, num_items_in_batch=divisor)
    assert calls == [(8, 32)]  # 3 + 1 + 4 labels, hidden states instead of logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert grads.keys() == wanted.keys() and not any(name.startswith("llm.") for name in grads)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-6)


def test_a_head_that_trains_gets_its_gradient(calls: list) -> None:
    model = tiny_model()
    model.llm.lm_head.requires_grad_(True)
    _, wanted = gradients(model)
    model.config.fused_loss = "always"
    _, grads = gradients(model)
    assert calls
    torch.testing.assert_close(grads["llm.lm_head.weight"], wanted["llm.lm_head.weight"], rtol=1e-6, atol=1e-6)


def test_no_label_at_all_gives_zero_loss(calls: list) -> None:
    model = tiny_model(fused_loss="always")
    inputs = batch(model=model)
    output = model(**dict(inputs, labels=torch.full_like(inputs["labels"], -100)))
    output.loss.backward()
    assert output.loss.item() == 0 and not calls


def test_the_head_is_as_before_after_success_and_after_an_exception(
    calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(fused_loss="always")
    head, inputs = model.llm.lm_head, batch(model=model)
    logits = model(**inputs | {"labels": None}).logits
    attributes = dict(head.__dict__)
    model(**inputs)
    assert head.__dict__ == attributes and len(calls) == 1
    with monkeypatch.context() as patched:
        patched.setattr(model.llm.model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
    assert head.__dict__ == attributes
    assert torch.equal(model(**inputs | {"labels": None}).logits, logits)


def test_blocks_nest_and_an_inner_exception_leaves_the_outer_one() -> None:
    head, hidden = torch.nn.Linear(4, 9), torch.randn(2, 3, 4)
    rows = torch.tensor([[True, False, False], [True, False, False]])
    own, other = hidden[rows][None], hidden[~rows][None]

    def fails() -> None:
        with passing_on(head, [other]) as inner:
            assert head(other) is inner[0] is other
            raise ZeroDivisionError

    with passing_on(head, [own]) as outer:
        assert head(own) is own
        with pytest.raises(ZeroDivisionError):
            fails()
        view = own[:, :, :]
        assert head(view) is view and len(outer) == 2
        for states in (other, own[:, :1], hidden):  # whoever else calls the head gets its result
            assert torch.equal(head(states), torch.nn.functional.linear(states, head.weight, head.bias))
    assert "forward" not in head.__dict__ and head(own).shape == (1, 2, 9)
    with only_rows([head], Rows(rows), spread=False):
        assert head(hidden).shape == (1, 2, 9)


def test_blocks_end_in_any_order() -> None:
    head, own, other = torch.nn.Linear(4, 9), torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    plain = head.forward
    for patch in (False, True):
        if patch:
            head.forward = plain
        for _ in range(50):  # always one of them in progress: what is over is not kept
            first, second = passing_on(head, [own]), passing_on(head, [other])
            first.__enter__(), second.__enter__()
            first.__exit__(None, None, None)
            assert head(other) is other and head(own).shape == (1, 2, 9)
            third = passing_on(head, [own])
            third.__enter__()
            second.__exit__(None, None, None)
            assert head(own) is own and head.__dict__["forward"].before is (plain if patch else None)
            third.__exit__(None, None, None)
        assert head.__dict__.get("forward") is (plain if patch else None)


def test_auto_takes_it_in_training_on_a_gpu_only(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm()
    assert not liger.chosen("auto", llm, device="cuda")  # Triton's interpreter is for those who ask for it
    monkeypatch.delenv("TRITON_INTERPRET")
    assert liger.chosen("auto", llm, device="cuda")
    assert not liger.chosen("auto", llm) and not liger.chosen("auto", llm, device="mps")
    assert not liger.chosen("auto", llm, keep=0, device="cuda")
    assert not liger.chosen("never", llm, device="cuda")
    with torch.no_grad():
        assert not liger.chosen("auto", llm, device="cuda")
        assert liger.chosen("always", llm, device="cuda")
    gradients(tiny_model())
    assert not calls


def hooked(llm) -> None:  # type: ignore[no-untyped-def]
    llm.lm_head.register_forward_hook(lambda *_: None)


def patched(llm) -> None:  # type: ignore[no-untyped-def]
    llm.lm_head.forward = llm.lm_head.forward


def wrapped(llm) -> None:  # type: ignore[no-untyped-def]
    llm.lm_head = type("LoraLinear", (torch.nn.Linear,), {})(32, 64)


def sharded(llm) -> None:  # type: ignore[no-untyped-def]
    llm.lm_head.weight = torch.nn.Parameter(llm.lm_head.weight[:8])


REFUSALS: dict[str, tuple[str, dict, Callable]] = {
    "hooks": ("has hooks", {}, hooked),
    "patched": ("a patched forward", {}, patched),
    "wrapped": ("LoraLinear is not a plain Linear", {}, wrapped),
    "sharded": ("its weight is sharded", {}, sharded),
    "float64": ("it computes in fp32", {}, lambda llm: llm.double()),
    "gemma2": ("final_logit_softcapping = 30.0", {"name": "gemma2"}, lambda llm: None),
    "cohere": ("logit_scale = 0.5", {}, lambda llm: setattr(llm.config, "logit_scale", 0.5)),
    "granite": ("logits_scaling = 8.0", {}, lambda llm: setattr(llm.config, "logits_scaling", 8.0)),
    "falcon": ("lm_head_multiplier = 0.1", {}, lambda llm: setattr(llm.config, "lm_head_multiplier", 0.1)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_in_the_way_is_named(case: str, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, settings, change = REFUSALS[case]
    llm = tiny_llm(**settings)
    change(llm)
    with pytest.raises(ArgumentError, match=f"fused_loss: expected 'auto' or 'never' .*{reason}"):
        liger.chosen("always", llm)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert reason in (liger.reason_against(llm, device="cuda") or "")
    assert not liger.chosen("auto", llm, device="cuda") and not liger.chosen("never", llm, device="cuda")


def test_a_scale_of_one_is_not_in_the_way(calls: list) -> None:
    llm = tiny_llm()
    llm.config.logit_scale, llm.config.logits_scaling = 1.0, None
    assert liger.reason_against(llm) is None


def test_always_says_when_logits_are_asked_for_or_the_device_or_the_package_is_missing(
    calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(fused_loss="always")
    inputs = batch(model=model)
    with pytest.raises(ArgumentError, match="logits_to_keep asks for logits"):
        model(**inputs, logits_to_keep=0)
    assert model(**inputs | {"labels": None}).logits is not None  # no loss, nothing to be computed by it
    monkeypatch.delattr(sys.modules[NAMES[-1]], "liger_fused_linear_cross_entropy")
    liger._load.cache_clear()
    with pytest.raises(ArgumentError, match="liger-kernel >= 0.5 is not installed"):
        model(**inputs)
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    liger._load.cache_clear()
    with pytest.raises(ArgumentError, match="liger-kernel >= 0.5 is not installed"):
        model(**inputs)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ArgumentError, match="need a GPU, the output head is on cpu"):
        model(**inputs)


@pytest.mark.slow
def test_a_compiled_call_takes_the_plain_loss_and_always_says_so(calls: list) -> None:
    model = tiny_model()
    inputs = batch(model=model)
    source = {name: inputs.pop(name) for name in ("encoder_input_ids", "encoder_attention_mask")}
    inputs["source_states"] = model.encode_source(*source.values())[1]
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with torch.no_grad():
        torch._dynamo.reset()
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
        torch.testing.assert_close(found, model(**inputs).loss)
        model.config.fused_loss = "always"
        with pytest.raises(ArgumentError, match="the call is compiled"):
            torch.compile(model, backend="aot_eager")(**inputs)
        assert not calls
        model(**inputs)
        assert calls


def test_a_second_backward_is_refused(calls: list) -> None:
    model = tiny_model()
    model.config.fused_loss = "always"
    loss = model(**batch(model=model)).loss
    assert calls
    loss.backward(retain_graph=True)
    with pytest.raises(BackendError, match="once; set fused_loss='never'"):
        loss.backward()


def scaled(llm):  # type: ignore[no-untyped-def]
    """An LLM that scales its logits after the head, and no field of its configuration says so."""
    forward = type(llm).forward

    def changed(self, **inputs):  # type: ignore[no-untyped-def]
        output = forward(self, **inputs)
        output.logits = output.logits * 3
        return output

    llm.__class__ = type("Scaled", (type(llm),), {"forward": changed})
    return llm


def test_an_llm_that_changes_its_logits_unannounced_is_noticed(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), scaled(tiny_llm()))
    expected, wanted = gradients(model)
    real = liger.reason_against
    for _ in range(2):  # found out in the first call, known in the second
        with monkeypatch.context() as patch:
            patch.delenv("TRITON_INTERPRET")
            patch.setattr(liger, "reason_against", lambda llm, keep=None, device=None: real(llm, keep, "cuda"))
            found, grads = gradients(model)
        assert torch.equal(found, expected)
        assert all(torch.equal(grads[name], wanted[name]) for name in wanted)
    assert not calls
    assert liger.reason_against(model.llm, device="cuda") == "Scaled changes the logits after its head"
    other = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), scaled(tiny_llm()), fused_loss="always")
    for _ in range(2):
        with pytest.raises(ArgumentError, match="changes the logits after its head"):
            gradients(other)


def test_its_kernels_run_on_the_device_of_the_rows(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a device map no one makes the head's device the current one, and Triton launches on the current one."""

    class OnSecond(torch.Tensor):
        is_cuda = True

        def get_device(self) -> int:
            return 1

    current = [0]

    def exchange(device: int) -> int:
        before, current[0] = current[0], max(device, 0)
        return before

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    found = sys.modules[NAMES[-1]]
    function = found.liger_fused_linear_cross_entropy
    on: list[int] = []
    found.liger_fused_linear_cross_entropy = lambda *given, **options: (
        on.append(current[0]) or function(*given, **options)
    )
    rows, head = torch.randn(3, 8).as_subclass(OnSecond), torch.nn.Linear(8, 16)
    liger.fused_label_loss(rows, head, torch.tensor([1, 2, 3]), None)
    assert on == [1] and current == [0]


def test_a_cache_is_not_filled_twice(calls: list) -> None:
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), scaled(tiny_llm()), fused_loss="always")
    with pytest.raises(ArgumentError, match="fused_loss: expected 'never' for Scaled"):
        model(**batch(model=model), past_key_values=DynamicCache(config=model.llm.config), use_cache=True)


def test_the_configuration_keeps_the_choice_and_old_ones_load(tmp_path: Path) -> None:
    model = tiny_model(fused_loss="never")
    model.save_pretrained(tmp_path, save_frozen=True)
    assert LayAlignForCausalLM.from_pretrained(tmp_path).config.fused_loss == "never"
    old = copy.deepcopy(model.config).to_dict()
    del old["fused_loss"]
    assert LayAlignConfig.from_dict(old).fused_loss == "auto"
    with pytest.raises(ArgumentError, match="fused_loss: expected one of"):
        LayAlignConfig(fused_loss="sometimes")


def run(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HELPERS), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_the_package_is_not_imported_before_it_is_wanted() -> None:
    code = "import sys, layalign; from tiny import *; m = tiny_model(); m(**batch(model=m)).loss.backward();"
    done = run(code + "print('liger_kernel' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr[-2000:]


REAL = """
import torch
from tiny import batch, tiny_model

for llm in ("llama", "qwen2"):
    model = tiny_model(llm=llm)
    results = []
    for choice in ("never", "always"):
        for head in (False, True):
            model.config.fused_loss = choice
            model.zero_grad()
            model.llm.lm_head.requires_grad_(head)
            loss = model(**batch(model=model), num_items_in_batch=5).loss
            loss.backward()
            results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    for (loss, wanted), (found, grads) in zip(results[:2], results[2:]):
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-6)
        assert grads.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(grads[name], wanted[name], rtol=1e-5, atol=1e-6)
print("agree")
"""


@pytest.mark.slow
def test_the_real_kernels_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="Liger's kernels are written in Triton")
    pytest.importorskip("liger_kernel", reason="the extra layalign[liger] is not installed")
    done = run(REAL)
    assert done.stdout.strip() == "agree", done.stderr[-3000:]
