"""Encoder layers fused into the adapter's soft tokens, and adapters with as many parameters as LayAlign."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, compiles, row, tiny_encoder, tiny_folders, tiny_llm, tiny_model
from torch import Tensor, nn

from layalign import LayAlignForCausalLM, reference
from layalign.modeling.configuration import LayAlignConfig
from layalign.modeling.parts import matching_adapter_size, trained_parameters
from layalign.nn import Adapter
from layalign.nn.adapter import SoftmaxFusion, TokenSoftmaxFusion
from layalign.published.convert import convert_to_published
from layalign.training import TrainConfig, build_model
from layalign.training.baselines import BASELINES
from layalign.utils.errors import ArgumentError, CheckpointError

FUSIONS = ("softmax", "token-softmax")
WITHOUT = dict(language_layers=[])


def drawn(module: nn.Module, seed: int = 0) -> Any:
    """Every parameter away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return module


def states(layers: int = 4, size: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(layers)]


def by_reference(fusion: SoftmaxFusion | TokenSoftmaxFusion, hidden: list[Tensor]) -> Tensor:
    if isinstance(fusion, SoftmaxFusion):
        return reference.softmax_fusion(hidden, 10 * fusion.logits)
    names = ("attend", "norm1", "linear1", "linear2", "norm2", "logits")
    maps = [(getattr(fusion, name).weight, getattr(fusion, name).bias) for name in names]
    logits = reference.token_logits(hidden, fusion.layer_embedding, fusion.cls, fusion.query, *maps)
    return reference.softmax_fusion(hidden, logits)


def model_with(fusion: str | None, **config: Any) -> LayAlignForCausalLM:
    model = tiny_model(adapter_fusion=fusion, **config)
    drawn(model.mapping)
    return model


# The formulas


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_adapter_computes_the_reference(fusion: str) -> None:
    adapter, hidden = drawn(Adapter(6, 3, 5, fusion, 4).double()), states()
    expected = adapter.mlp(by_reference(adapter.fusion, hidden))
    torch.testing.assert_close(adapter(hidden), expected, rtol=1e-12, atol=1e-12)
    weights = adapter.fusion.weights(hidden)
    assert weights.shape == ((4,) if fusion == "softmax" else (2, 5, 4)) and weights.std() > 0.01
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_token_weights_are_those_of_the_published_transformer_layer() -> None:
    size, layers = 6, 4
    layer = nn.TransformerEncoderLayer(size, nhead=1, dropout=0.0, batch_first=True, dtype=torch.float64)
    out = nn.Linear(size, layers, dtype=torch.float64)
    cls, embedding = torch.randn(size, dtype=torch.float64), torch.randn(layers, size, dtype=torch.float64)
    drawn(layer)
    hidden = states(layers, size)
    tokens = (torch.stack(hidden, dim=2) + embedding).flatten(0, 1)
    rows = layer(torch.cat([cls.expand(len(tokens), 1, -1), tokens], dim=1))[:, 0]
    expected = out(rows).softmax(-1).view(2, 5, layers)

    fusion = TokenSoftmaxFusion(size, layers).double()
    attention = layer.self_attn
    (q, k, v), (q_bias, _, v_bias) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    with torch.no_grad():
        fusion.cls.copy_(cls)
        fusion.layer_embedding.copy_(embedding)
        fusion.query.copy_((q @ cls + q_bias) @ k)
        fusion.attend.weight.copy_(attention.out_proj.weight @ v)
        fusion.attend.bias.copy_(attention.out_proj.weight @ v_bias + attention.out_proj.bias)
    for name in ("linear1", "linear2", "norm1", "norm2"):
        getattr(fusion, name).load_state_dict(getattr(layer, name).state_dict())
    fusion.logits.load_state_dict(out.state_dict())
    torch.testing.assert_close(fusion.weights(hidden), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients(fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layalign.nn.adapter.FEED_FORWARD", 7)
    adapter, hidden = drawn(Adapter(6, 3, 5, fusion, 4).double()), states()
    names = [name for name, _ in adapter.named_parameters() if name != "end_boundary"]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(adapter, dict(zip(names, values[4:], strict=True)), (list(values[:4]),))

    inputs = [*hidden, *(adapter.get_parameter(name).detach() for name in names)]
    assert torch.autograd.gradcheck(run, [each.clone().requires_grad_() for each in inputs], fast_mode=True)


def test_where_they_start() -> None:
    torch.testing.assert_close(SoftmaxFusion(5).weights([]), torch.full((5,), 0.2))
    start = TokenSoftmaxFusion(6, 4)
    assert not start.cls.any() and not start.query.any() and start.layer_embedding.std() > 0.5
    weights = start.weights(states(dtype=torch.float32))
    assert (weights[0, 0] - weights[1, 1]).abs().max() > 1e-3  # of the token from the first step


@pytest.mark.parametrize("fusion", FUSIONS)
def test_bf16_is_as_near_as_plain_torch(fusion: str) -> None:
    errors = []
    for seed in range(20):  # one adapter alone may be lucky either way
        torch.manual_seed(seed)
        adapter, hidden = drawn(Adapter(6, 3, 5, fusion, 4).double()).fusion, states()
        exact = adapter(hidden)
        adapter.bfloat16()
        half = [each.bfloat16() for each in hidden]
        assert adapter(half).dtype == torch.bfloat16
        errors.append([float((y.double() - exact).abs().max()) for y in (adapter(half), by_reference(adapter, half))])
    ours, plain = (sum(column) for column in zip(*errors, strict=True))
    assert ours <= 1.5 * plain and max(error for error, _ in errors) < 0.1


# In the model


@pytest.mark.parametrize("config", [{}, WITHOUT], ids=["aligner", "adapter alone"])
@pytest.mark.parametrize("encoder", ["mt5", "bert"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_all_layers_but_the_embeddings_are_fused(fusion: str, encoder: str, config: Any) -> None:
    model = model_with(fusion, encoder=encoder, **config)
    assert model.config.fused_layers == [1, 2, 3, 4]
    inputs = batch(model=model)
    ids, mask = inputs["encoder_input_ids"], inputs["encoder_attention_mask"]
    hidden = model.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
    expected = model.mapping.mlp(by_reference(model.mapping.fusion, list(hidden)))
    found, source = model.encode_source(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    assert len(source.keys) == len(model.config.language_layers)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_aligner_reads_what_it_read_before(fusion: str) -> None:
    plain, fused = tiny_model(encoder_layers=[0, 2]), tiny_model(encoder_layers=[0, 2], adapter_fusion=fusion)
    fused.encoder_aligner.load_state_dict(plain.encoder_aligner.state_dict())
    inputs = batch(model=plain)
    ids = inputs["encoder_input_ids"], inputs["encoder_attention_mask"]
    for one, two in zip(plain.encode_source(*ids)[1].keys, fused.encode_source(*ids)[1].keys, strict=True):
        assert torch.equal(one, two)


def test_without_fusion_the_parameters_are_the_published_ones() -> None:
    names = {name for name, _ in tiny_model().mapping.named_parameters()}
    assert names == {"end_boundary", *(f"mlp.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias"))}


@pytest.mark.parametrize("config", [{}, WITHOUT], ids=["aligner", "adapter alone"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_neighbours_caches_and_checkpointing_change_nothing(fusion: str, config: Any) -> None:
    model = model_with(fusion, **config)
    inputs = batch(model=model)
    whole = model(**inputs, logits_to_keep=0).logits
    for i in range(3):
        alone = model(**row(inputs, i), logits_to_keep=0).logits[0]
        torch.testing.assert_close(whole[i][inputs["attention_mask"][i].bool()], alone, rtol=1e-4, atol=1e-5)

    asked = batch(prompts=(2, 4, 3), targets=None, model=model)
    answers = [
        model.generate(**asked, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*answers)

    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)  # of the encoder's dropout
        model(**inputs).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.mapping.parameters()])
    assert all(grad.any() for grad in gradients[0])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_compiled_adapter(fusion: str) -> None:
    adapter, hidden = drawn(Adapter(6, 3, 5, fusion, 4)), states(dtype=torch.float32)
    torch._dynamo.reset()
    found = torch.compile(adapter, backend="aot_eager", fullgraph=True)(hidden)
    torch.testing.assert_close(found, adapter(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@compiles
def test_a_compiled_model_is_one_graph() -> None:
    model = model_with("softmax", language_layers=[])
    inputs = batch(prompts=(2, 4, 3), targets=None, model=model)
    expected = model(**inputs, use_cache=False).logits
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_frozen_parts_in_bf16(fusion: str) -> None:
    model = model_with(fusion).train()
    model.encoder.bfloat16()
    model.llm.bfloat16()
    inputs = batch(model=model)
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.mapping.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(model(**inputs).loss - loss) < 0.1 * loss


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_saved_loaded_and_gone_on_with(fusion: str, tmp_path: Path) -> None:
    encoder, llm = tiny_folders(tmp_path)
    model = LayAlignForCausalLM.from_encoder_and_llm(encoder, llm, adapter_fusion=fusion)
    drawn(model.mapping)
    model.save_pretrained(tmp_path / "saved")
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.adapter_fusion == fusion
    inputs = batch(model=model)
    assert torch.equal(model.eval()(**inputs).loss, again.eval()(**inputs).loss)

    start = dict(stage="task", init_checkpoint=str(tmp_path / "saved"))
    assert build_model(TrainConfig(**start)).config.adapter_fusion == fusion
    other = next(each for each in FUSIONS if each != fusion)
    with pytest.raises(ArgumentError, match=rf"adapter_fusion: init_checkpoint .* has {fusion}, got {other}"):
        build_model(TrainConfig(**start, adapter_fusion=other))

    model.save_pretrained(tmp_path / "whole", save_frozen=True)
    with pytest.raises(CheckpointError, match="an adapter of one size over the encoder's last states"):
        convert_to_published(tmp_path / "whole", tmp_path / "theirs.bin")


def test_wrong_settings_and_inputs() -> None:
    parts = dict(encoder_config=tiny_encoder().config, llm_config=tiny_llm().config)
    with pytest.raises(ArgumentError, match="adapter_fusion: expected one of softmax, token-softmax, got 'mean'"):
        LayAlignConfig(**parts, adapter_fusion="mean")
    with pytest.raises(ArgumentError, match="adapter_fusion: expected one of softmax, token-softmax, got 'mean'"):
        TrainConfig(adapter_fusion="mean")
    with pytest.raises(ArgumentError, match="adapter_fusion: expected None for a model without an adapter"):
        LayAlignConfig(**parts, adapter_fusion="softmax", use_adapter=False)
    with pytest.raises(ArgumentError, match=r"layers: expected 1\.\.2147483647, got None"):
        Adapter(6, 3, fusion="softmax")
    with pytest.raises(ArgumentError, match="layers: expected None for an adapter without fusion, got 3"):
        Adapter(6, 3, layers=3)
    adapter, hidden = Adapter(6, 3, 5, "softmax", 4), states(dtype=torch.float32)
    with pytest.raises(ArgumentError, match=r"hidden_states: expected 4 tensors"):
        adapter(hidden[:3])
    with pytest.raises(ArgumentError, match=r"hidden_states: expected 4 tensors"):
        adapter(torch.stack(hidden))
    with pytest.raises(ArgumentError, match=r"hidden_states\[2\]: expected the shape \(2, 5, 6\) of the first"):
        adapter([*hidden[:2], hidden[2][:1], hidden[3]])
    with pytest.raises(ArgumentError, match=r"hidden_states\[1\]: expected the weights' dtype torch.float32"):
        adapter([hidden[0], hidden[1].double(), *hidden[2:]])


# As many parameters


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "config",
    [{}, {"structure": "MLP"}, {"encoder_layers": "all"}, {"mix": "shared"}, {"adapter_fusion": "softmax"}],
    ids=str,
)
def test_an_adapter_with_as_many_parameters_as_layalign(config: Any) -> None:
    alone = tiny_model(language_layers=[], adapter_size="match", **config)
    config.pop("adapter_fusion", None)
    layalign = tiny_model(**config)
    step = 24 + 32 + 1
    assert alone.config.adapter_size == alone.mapping.mlp.linear1.out_features > 48
    assert abs(trained(alone) - trained(layalign)) <= step / 2
    assert trained(layalign) == trained_parameters(layalign.config)


def test_the_formula_of_the_width() -> None:
    layers, encoder_layers, d_e, d_l = 3, 4, 24, 32
    mix, projection, gates = 2 * layers * (encoder_layers + 1), d_l * (d_e + 1), layers
    expected = 2 * d_e + round((mix + projection + gates) / (d_e + d_l + 1))
    model = tiny_model(**BASELINES["mindmerger-matched"].settings)
    assert model.config.adapter_size == expected == matching_adapter_size(model.config)


def test_a_match_is_a_number_in_the_checkpoint(tmp_path: Path) -> None:
    encoder, llm = tiny_folders(tmp_path)
    settings = dict(encoder=encoder, llm=llm, language_layers=[], adapter_size="match")
    model = build_model(TrainConfig(**settings))
    model.save_pretrained(tmp_path / "saved")
    size = LayAlignForCausalLM.from_pretrained(tmp_path / "saved").config.adapter_size
    assert size == model.mapping.mlp.linear1.out_features
    start = dict(stage="task", init_checkpoint=str(tmp_path / "saved"), language_layers=[])
    assert build_model(TrainConfig(**start, adapter_size="match")).config.adapter_size == size
    with pytest.raises(ArgumentError, match=rf"adapter_size: init_checkpoint .* has {size}, got 48"):
        build_model(TrainConfig(**start, adapter_size=48))


def test_when_nothing_matches() -> None:
    parts = dict(encoder_config=tiny_encoder().config, llm_config=tiny_llm().config, adapter_size="match")
    with pytest.raises(ArgumentError, match="adapter_size: 'match' is for an adapter alone"):
        LayAlignConfig(**parts)
    with pytest.raises(ArgumentError, match="adapter_size: 'match' is for an adapter alone"):
        LayAlignConfig(**parts, language_layers=[], use_adapter=False)
    with pytest.raises(ArgumentError, match=r"adapter_size: the fusion alone has \d+ parameters more than LayAlign"):
        LayAlignConfig(**parts, language_layers=[], adapter_fusion="token-softmax")
    with pytest.raises(ArgumentError, match="adapter_size: expected a positive integer, 'match' or None, got 'wide'"):
        LayAlignConfig(**{**parts, "adapter_size": "wide"})
    with pytest.raises(ArgumentError, match="adapter_size: expected a whole number, got 'wide'"):
        TrainConfig(adapter_size="wide")
