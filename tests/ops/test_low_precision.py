"""Autocast, half-precision parts with fp32 masters, and quantised LLMs: dtypes, error budgets, nothing lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import batch, open_gates, tiny_encoder, tiny_llm, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from layalign import ArgumentError, CheckpointError, LayAlignForCausalLM, ops, reference
from layalign.modeling.checkpoint import is_quantised

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALVES = [BF16, F16]
OWN = ("mapping", "encoder_aligner", "cross_attention")


def own(model: LayAlignForCausalLM) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(OWN)}


def cast(model: LayAlignForCausalLM, encoder: torch.dtype, llm: torch.dtype, parts: torch.dtype) -> LayAlignForCausalLM:
    model.encoder.to(encoder)
    model.llm.to(llm)
    for name in OWN:
        getattr(model, name).to(parts)
    return model


def results(model: LayAlignForCausalLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, logits of real tokens, and one vector with the gradients of each own part."""
    model.zero_grad()
    output = model(**inputs, logits_to_keep=0)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()[inputs["attention_mask"].bool()]}
    for part in OWN:
        grads = [p.grad.flatten() for name, p in own(model).items() if name.startswith(part)]
        found[part] = torch.cat(grads)
    return found


def exact(model: LayAlignForCausalLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, of the same weights, in float64 by plain torch."""
    twin = copy.deepcopy(model).double()
    twin.encoder_aligner.projector.impl = "torch"
    for module in twin.cross_attention:
        module.impl = "torch"
    twin.key_values.choice = "never"
    return results(twin, inputs)


def plain(model: LayAlignForCausalLM) -> LayAlignForCausalLM:
    """The same model by plain torch, nothing folded."""
    twin = copy.deepcopy(model)
    twin.encoder_aligner.projector.impl = "torch"
    for module in twin.cross_attention:
        module.impl = "torch"
    twin.key_values.choice = "never"
    return twin


def within_budget(found: dict[str, Tensor], torchs: dict[str, Tensor], wanted: dict[str, Tensor], dtype: Any) -> None:
    """No further from float64 than twice plain torch in the same dtypes (and a few roundings of the largest value)."""
    for name, tensor in wanted.items():
        error, theirs = ((x[name].double() - tensor).norm() for x in (found, torchs))
        assert error <= 2 * theirs + 4 * torch.finfo(dtype).eps * tensor.norm(), name
        assert theirs <= 40 * torch.finfo(dtype).eps * tensor.norm(), name  # and plain torch itself is not far off


@pytest.mark.parametrize("structure", ["Linear", "MLP"])
@pytest.mark.parametrize("fold", ["never", "always"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_training_step_under_autocast(dtype: torch.dtype, fold: str, structure: str) -> None:
    model = tiny_model(fold_projections=fold, structure=structure)
    inputs = batch(model=model)
    wanted = exact(model, inputs)
    with torch.autocast("cpu", dtype):
        output = model(**inputs, logits_to_keep=0)
        assert output.logits.dtype == dtype and output.loss.dtype == F32
        source = model.encode_source(inputs["encoder_input_ids"], inputs["encoder_attention_mask"])[1]
        assert {state.dtype for state in (*source.keys, *source.values)} == {dtype}
    output.loss.backward()  # outside, as recommended
    outside = {name: parameter.grad.clone() for name, parameter in own(model).items()}
    assert {grad.dtype for grad in outside.values()} == {F32}
    with torch.autocast("cpu", dtype):
        found, torchs = results(model, inputs), results(plain(model), inputs)
    within_budget(found, torchs, wanted, dtype)
    for name, parameter in own(model).items():  # backward inside
        torch.testing.assert_close(parameter.grad, outside[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_generation_under_autocast(dtype: torch.dtype) -> None:
    model = tiny_model()
    inputs = batch(model=model, targets=None)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=[])
    settings |= dict(output_logits=True, return_dict_in_generate=True)
    with torch.autocast("cpu", dtype):
        output = model.generate(**inputs, **settings)
        full = dict(inputs, input_ids=output.sequences)
        full["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        with torch.no_grad():
            again = model(**full).logits[:, -7:-1]
    wanted = copy.deepcopy(plain(model)).double()(**full).logits[:, -7:-1].detach()
    bound = 40 * torch.finfo(dtype).eps * wanted.norm()
    assert (torch.stack(output.logits, 1) - wanted).norm() <= bound
    assert (again - wanted).norm() <= bound


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_folding_rounds_once_under_autocast(impl: str) -> None:
    """Folded weights and the gradient through them are made in fp32, however the block casts products."""
    model = tiny_model(fold_projections="always", impl=impl)
    inputs = batch(model=model)
    model(**inputs)
    whole = model.key_values._folded.weight
    with torch.autocast("cpu", BF16):
        loss = model(**inputs).loss
    assert torch.equal(model.key_values._folded.weight, whole.to(BF16))
    parameters = list(own(model).values())
    outside = torch.autograd.grad(loss, parameters, retain_graph=True)
    with torch.autocast("cpu", BF16):
        inside = torch.autograd.grad(loss, parameters)
    assert model.key_values.last == "folded"
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-6)


def test_float64_is_left_alone_by_autocast() -> None:
    model = plain(tiny_model()).double()
    inputs = batch(model=model, targets=None)
    with torch.no_grad():
        hidden = [torch.randn(2, 3, 24, dtype=torch.float64) for _ in range(4)]
        expected = model.encoder_aligner.states(hidden)
        with torch.autocast("cpu", BF16):
            found = model.encoder_aligner.states(hidden)
    assert found.dtype == torch.float64 and inputs
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_fp16_with_a_gradient_scaler() -> None:
    model = tiny_model()
    inputs = batch(model=model)
    wanted = exact(model, inputs)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(list(own(model).values()), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in own(model).items()}
    with torch.autocast("cpu", F16):
        loss = model(**inputs).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = {part: torch.cat([p.grad.flatten() for n, p in own(model).items() if n.startswith(part)]) for part in OWN}
    for part in OWN:
        assert (grads[part] - wanted[part]).norm() <= 40 * torch.finfo(F16).eps * wanted[part].norm(), part
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(before[name], parameter) for name, parameter in own(model).items())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_operations_under_autocast(dtype: torch.dtype) -> None:
    """fp32 in, the autocast dtype out, gradients in fp32; inside a disabled region nothing is rounded."""
    torch.manual_seed(0)
    hidden = [torch.randn(2, 5, 8) for _ in range(3)]
    w1, b1, w2, b2 = (torch.randn(s, requires_grad=True) for s in ((4, 3), (4,), (6, 8), (6,)))
    states = [torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)]
    gate = torch.tensor([0.7], requires_grad=True)
    for impl in ("auto", "torch"):
        with torch.autocast("cpu", dtype):
            y = ops.layer_projection(hidden, w1, b1, w2, b2, impl=impl)
            out = ops.gated_cross_attention(*states, gate, impl=impl)
            with torch.autocast("cpu", enabled=False):
                whole = ops.layer_projection(hidden, w1, b1, w2, b2, impl=impl)
        assert y.dtype == dtype and whole.dtype == F32
        assert out.dtype in (dtype, F32)
        exact_y = reference.layer_projection([h.double() for h in hidden], *(t.double() for t in (w1, b1, w2, b2)))
        exact_out = reference.gated_cross_attention(*(t.double() for t in (*states, gate)))
        torch.testing.assert_close(whole.double(), exact_y, rtol=1e-5, atol=1e-5)
        for found, wanted in ((y, exact_y), (out, exact_out)):
            assert (found.double() - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()
        grads = torch.autograd.grad(y.float().sum() + out.float().sum(), (w1, b1, w2, b2, gate))
        assert {grad.dtype for grad in grads} == {F32}


MIXED = [(BF16, BF16, F32), (F16, F16, F32), (F16, BF16, F32), (F32, BF16, F32), (BF16, F32, F32)]
PURE = [(BF16, BF16, BF16), (F16, F16, F16), (F16, BF16, BF16)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"structure": "MLP"}, {"fold_projections": "always"}, {"mix": "shared"}], ids=str
)
@pytest.mark.parametrize("dtypes", MIXED + PURE, ids=str)
def test_mixed_parts(dtypes: tuple[torch.dtype, ...], changes: dict[str, Any]) -> None:
    """(encoder, LLM, own parts): gradients in the own parts' dtype, numbers within the budget of the coarsest."""
    model = cast(tiny_model(**changes), *dtypes)
    inputs = batch(model=model)
    found, torchs, wanted = results(model, inputs), results(plain(model), inputs), exact(model, inputs)
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    within_budget(found, torchs, wanted, coarsest)
    assert found["loss"].dtype == F32 and found["logits"].dtype == dtypes[1]
    assert {parameter.grad.dtype for parameter in own(model).values()} == {dtypes[2]}
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not name.startswith(OWN))
    prompt = batch(model=model, targets=None)
    new = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert new.shape == (3, prompt["input_ids"].shape[1] + 3)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["Linear", "MLP"])
def test_masters_keep_the_updates_that_half_precision_loses(structure: str) -> None:
    """Ten updates of a 2000th of each weight: below bf16's resolution (a 256th), so only fp32 moves."""
    moved = {}
    for parts in (F32, BF16):
        model = cast(tiny_model(structure=structure), BF16, BF16, parts)
        before = {name: parameter.detach().clone() for name, parameter in own(model).items()}
        optimizer = torch.optim.SGD(list(own(model).values()), lr=1.0)
        for step in range(10):
            model(**batch(model=model, seed=step)).loss.backward()
            with torch.no_grad():  # the size is set here, for a fair comparison; the sign is the gradient's
                for name, parameter in own(model).items():
                    parameter.grad.copy_(parameter.grad.sign() * before[name].abs() / 2000)
            optimizer.step()
            optimizer.zero_grad()
        moved[parts] = {name: float((p != before[name]).float().mean()) for name, p in own(model).items()}
    assert moved[F32].keys() == moved[BF16].keys() and len(moved[F32]) > 8
    assert max(moved[BF16].values()) == 0.0
    assert min(moved[F32].values()) > 0.2  # relu and padding leave some gradients at zero


def test_casting_the_whole_model() -> None:
    inputs = batch(model=tiny_model())
    expected = tiny_model()(**inputs).loss
    for dtype, change in ((F16, lambda m: m.half()), (BF16, lambda m: m.bfloat16()), (BF16, lambda m: m.to(BF16))):
        model = change(tiny_model())
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        loss = model(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
        assert {parameter.grad.dtype for parameter in own(model).values()} == {dtype}
        assert torch.equal(model.float()(**inputs).loss, model(**inputs).loss)
        assert {parameter.dtype for parameter in model.parameters()} == {F32}


# The saved dtype comes back


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, str]:
    """An encoder in fp16, of which transformers keeps some weights in fp32, and an LLM in bf16."""
    tiny_encoder().half().save_pretrained(tmp_path / "encoder")
    tiny_llm(num_key_value_heads=2).bfloat16().save_pretrained(tmp_path / "llm")
    return str(tmp_path / "encoder"), str(tmp_path / "llm")


def named(parts: tuple[str, str], dtype: torch.dtype) -> LayAlignForCausalLM:
    auto = {"encoder_kwargs": {"dtype": "auto"}, "llm_kwargs": {"dtype": "auto"}}
    model = LayAlignForCausalLM.from_encoder_and_llm(*parts, **auto)
    open_gates(model)
    for name in OWN:
        getattr(model, name).to(dtype)
    return model.eval()


def assert_same_bits(found: nn.Module, expected: dict[str, Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_dtype_comes_back_bit_by_bit(saved, tmp_path: Path, dtype: torch.dtype, frozen: bool) -> None:
    model = named(saved, dtype)
    before = copy.deepcopy(model.state_dict())
    assert {tensor.dtype for name, tensor in before.items() if name.startswith("encoder.")} == {F16, F32}
    assert {tensor.dtype for name, tensor in before.items() if name.startswith("llm.")} == {BF16}
    model.save_pretrained(tmp_path / "out", save_frozen=frozen)
    assert {load_file(tmp_path / "out" / "model.safetensors")[name].dtype for name in own(model)} == {dtype}
    for arguments in ({}, {"dtype": "auto"}):
        assert_same_bits(LayAlignForCausalLM.from_pretrained(tmp_path / "out", **arguments), before)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_the_dtype_that_is_asked_for(saved, tmp_path: Path, frozen: bool) -> None:
    named(saved, F32).save_pretrained(tmp_path / "out", save_frozen=frozen)

    def dtypes(**arguments: Any) -> list[set[torch.dtype]]:
        model = LayAlignForCausalLM.from_pretrained(tmp_path / "out", **arguments)
        parts = [own(model).values(), model.encoder.parameters(), model.llm.parameters()]
        return [{parameter.dtype for parameter in part} for part in parts]

    for asked in (BF16, "bfloat16"):
        assert dtypes(dtype=asked)[::2] == [{BF16}, {BF16}]
        assert dtypes(torch_dtype=asked)[::2] == [{BF16}, {BF16}]
    assert dtypes(dtype=F32) == [{F32}] * 3
    assert dtypes(llm_kwargs={"dtype": F16}) == [{F32}, {F16, F32}, {F16}]
    assert dtypes(encoder_kwargs={"dtype": F32}, dtype=BF16) == [{BF16}, {F32}, {BF16}]


def test_weights_cast_after_loading_are_not_rounded(saved, tmp_path: Path) -> None:
    """The configuration still says bf16, the weights are wider."""
    model = named(saved, F32)
    model.llm.float()
    with torch.no_grad():
        for parameter in model.llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-4)
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "out", save_frozen=True)
    assert_same_bits(LayAlignForCausalLM.from_pretrained(tmp_path / "out"), before)


def test_arguments_that_would_be_ignored_are_refused(saved, tmp_path: Path) -> None:
    named(saved, F32).save_pretrained(tmp_path / "out", save_frozen=True)
    with pytest.raises(ArgumentError, match=r"llm_kwargs: expected only dtype, .* got device_map"):
        LayAlignForCausalLM.from_pretrained(tmp_path / "out", llm_kwargs={"device_map": "cpu"})
    with pytest.raises(ArgumentError, match="quantization_config: expected it in llm_kwargs or encoder_kwargs"):
        LayAlignForCausalLM.from_pretrained(tmp_path / "out", quantization_config=object())


# Quantised LLMs: module calls only


@pytest.fixture
def parts(tmp_path: Path) -> tuple[str, str]:
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    tiny_llm(hidden_size=64, intermediate_size=128, num_key_value_heads=2).save_pretrained(tmp_path / "llm")
    return str(tmp_path / "encoder"), str(tmp_path / "llm")


def configurations(kind: str) -> dict[str, Any]:
    if kind.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        if kind.endswith("8"):
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return {"quantization_config": QuantoConfig(weights="int8")}


def dequantised(llm: nn.Module, path: str) -> nn.Module:
    """A plain LLM with the weights that the quantised one stands for, read off its maps with unit vectors."""
    twin = AutoModelForCausalLM.from_pretrained(path, dtype=F32)
    for name, module in twin.named_modules():
        other = llm.get_submodule(name)
        if isinstance(module, nn.Linear) and type(other) is not nn.Linear:
            with torch.no_grad():
                module.weight.copy_(other(torch.eye(module.in_features, dtype=other_dtype(other))).T)
    return twin


def other_dtype(module: nn.Module) -> torch.dtype:
    return getattr(module, "compute_dtype", None) or F32


KINDS = {"bitsandbytes-4": 0.02, "bitsandbytes-8": 0.05, "quanto-8": 0.01}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_llm(kind: str, parts, tmp_path: Path) -> None:
    options = configurations(kind)
    model = LayAlignForCausalLM.from_encoder_and_llm(*parts, llm_kwargs=options, fold_projections="always")
    open_gates(model)
    model.eval()
    assert is_quantised(model.llm) and not is_quantised(model.encoder)
    inputs = batch(model=model)
    found = results(model, inputs)
    assert model.key_values.last.startswith("not folded: k_proj: ") and "not a plain Linear" in model.key_values.last
    twin = LayAlignForCausalLM.from_encoder_and_llm(parts[0], dequantised(model.llm, parts[1]))
    for name, parameter in own(twin).items():
        parameter.data.copy_(own(model)[name])
    for name, tensor in results(twin.eval(), inputs).items():
        assert (found[name] - tensor).norm() <= KINDS[kind] * tensor.norm(), name
    assert {parameter.grad.dtype for parameter in own(model).values()} == {F32}
    assert all(parameter.grad is None for parameter in model.llm.parameters())
    settings = dict(max_new_tokens=4, pad_token_id=0, do_sample=False)
    new = model.generate(**batch(model=model, targets=None), **settings)

    for name in OWN:
        getattr(model, name).to(BF16)
    model.save_pretrained(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert set(weights) == set(own(model)) and {tensor.dtype for tensor in weights.values()} == {BF16}
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out", llm_kwargs=options)
    assert is_quantised(again.llm) and all(torch.equal(p, own(model)[name]) for name, p in own(again).items())
    with torch.no_grad():
        assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    assert len(again.generate(**batch(model=model, targets=None), **settings)) == len(new)
    with pytest.raises(CheckpointError, match="save_frozen: the llm is quantised; save the trained weights alone"):
        model.save_pretrained(tmp_path / "all", save_frozen=True)
    plain_again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert not is_quantised(plain_again.llm)


@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_quantos_own_call(weights: str, parts) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    llm = AutoModelForCausalLM.from_pretrained(parts[1])
    quanto.quantize(llm, weights=getattr(quanto, weights))
    quanto.freeze(llm)
    model = LayAlignForCausalLM.from_encoder_and_llm(parts[0], llm, fold_projections="always")
    open_gates(model)
    assert is_quantised(model.llm)
    inputs = batch(model=model.eval())
    found = results(model, inputs)
    assert "QLinear is not a plain Linear" in model.key_values.last
    twin = LayAlignForCausalLM.from_encoder_and_llm(parts[0], dequantised(llm, parts[1]))
    twin.load_state_dict(own(model), strict=False)
    for name, tensor in results(twin.eval(), inputs).items():
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
