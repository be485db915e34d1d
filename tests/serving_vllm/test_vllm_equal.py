"""vLLM's greedy ids are those of `LayAlignForCausalLM.generate`."""

from __future__ import annotations

import pytest
import torch
from tiny import open_gates
from vllm_case import answers, cases, checkpoint, engine, greedy, save, vllm_encoder, vllm_llm

from layalign import LayAlignForCausalLM
from layalign.modeling.encoders import load_encoder, load_llm

FAMILIES = [
    *(("xlm-roberta", llm) for llm in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3")),
    *((encoder, "llama") for encoder in ("mt5", "umt5", "m2m_100", "bert", "modernbert", "qwen2")),
]
VARIANTS = {
    "some layers": dict(language_layers=[3, 0, 1], encoder_layers=[4, 1]),
    "not folded": dict(fold_projections="never"),
    "MLP": dict(structure="MLP"),
    "shared mix": dict(mix="shared"),
    "no adapter": dict(use_adapter=False),
    "adapter alone": dict(language_layers=[]),
    "fused by layer": dict(adapter_fusion="softmax"),
    "fused by token": dict(adapter_fusion="token-softmax"),
    "no first token": dict(llm_bos_token_id=None),
}


def require_equal(folder, **settings):
    asked = cases(folder)
    with engine(folder, **settings) as llm:
        assert answers(llm, asked) == [each.answer for each in asked]


@pytest.mark.parametrize(("encoder", "llm"), FAMILIES, ids=["+".join(pair) for pair in FAMILIES])
def test_families(encoder, llm, tmp_path):
    checkpoint(tmp_path, encoder, llm)
    require_equal(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tmp_path):
    checkpoint(tmp_path, llm="qwen2", **VARIANTS[variant])
    require_equal(tmp_path)


@pytest.mark.parametrize("llm", ["olmo2", "phi3"])  # vLLM runs the first through transformers' own code
def test_maps_called_as_modules(llm, tmp_path):
    checkpoint(tmp_path, llm=llm, structure="MLP")
    require_equal(tmp_path)


def test_the_source_matters(tmp_path):
    checkpoint(tmp_path)
    model = LayAlignForCausalLM.from_pretrained(tmp_path)
    asked = cases(tmp_path)
    for gate in model.cross_attention:
        torch.nn.init.zeros_(gate.adaption_gate)
    shut = [greedy(model, each.source, each.prompt, each.length) for each in asked]
    assert sum(ids != each.answer for ids, each in zip(shut, asked, strict=True)) > len(asked) // 2


def parts(folder):
    encoder, llm = folder / "encoder", folder / "llm"
    vllm_encoder("mt5").save_pretrained(encoder)
    vllm_llm("qwen3").save_pretrained(llm)
    return str(encoder), str(llm)


def test_trained_weights_alone(tmp_path):
    model = LayAlignForCausalLM.from_encoder_and_llm(*parts(tmp_path)).eval()
    open_gates(model)
    save(model, tmp_path / "model")
    require_equal(tmp_path / "model")


def test_lora_is_merged(tmp_path):
    encoder, llm = parts(tmp_path)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
    model = LayAlignForCausalLM.from_encoder_and_llm(encoder, llm, lora=settings).eval()
    open_gates(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save(model, tmp_path / "model")
    require_equal(tmp_path / "model")


def test_an_encoder_in_half_precision(tmp_path):
    encoder, llm = parts(tmp_path)
    model = LayAlignForCausalLM.from_encoder_and_llm(load_encoder(encoder, dtype=torch.bfloat16), load_llm(llm)).eval()
    open_gates(model)
    save(model, tmp_path / "model", save_frozen=True)
    require_equal(tmp_path / "model")


def test_compiled(tmp_path):
    checkpoint(tmp_path)
    require_equal(tmp_path, enforce_eager=False)
