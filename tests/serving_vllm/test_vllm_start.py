"""What is refused at the start, the LLM's identity, memory of a source, and other models beside the plugin."""

from __future__ import annotations

import pytest
import torch
from tiny import open_gates
from vllm_case import ENGINE, answers, cases, checkpoint, engine, save, vllm_encoder, vllm_llm

from layalign import LayAlignForCausalLM
from layalign.serving.vllm import compat, register


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint(folder)
    return folder


REFUSED = {
    "serve: expected some of": dict(hf_overrides={"serve": {"tasks": "math"}}),
    "task: expected one of": dict(hf_overrides={"serve": {"task": "maths"}}),
    "skip_tokenizer_init": dict(skip_tokenizer_init=True),
    "enable_lora": dict(enable_lora=True),
    "pipeline_parallel_size": dict(pipeline_parallel_size=2),
    "disable_hybrid_kv_cache_manager": dict(disable_hybrid_kv_cache_manager=True),
}


@pytest.mark.parametrize("expected", REFUSED)
def test_settings_are_refused_at_the_start(expected, folder):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(Exception, match=expected):
        EngineArgs(model=str(folder), **{**ENGINE, **REFUSED[expected]}).create_engine_config()


def test_an_architecture_without_its_own_maps_is_refused(tmp_path):
    checkpoint(tmp_path, llm="gpt_neox")
    with pytest.raises(Exception, match="llm: expected layer 0"), engine(tmp_path):
        pass


def named(folder):
    vllm_encoder().save_pretrained(folder / "encoder")
    vllm_llm().save_pretrained(folder / "llm")
    model = LayAlignForCausalLM.from_encoder_and_llm(str(folder / "encoder"), str(folder / "llm")).eval()
    open_gates(model)
    save(model, folder / "model")
    return folder / "model"


def test_another_llm_under_the_name_is_refused(tmp_path):
    place = named(tmp_path)
    changed = vllm_llm()
    with torch.no_grad():
        changed.model.layers[1].self_attn.k_proj.weight[3, 5] += 1
    changed.save_pretrained(tmp_path / "llm")
    with (
        pytest.raises(Exception, match=r"not the one that the checkpoint was saved with: model\.layers\.1"),
        engine(place),
    ):
        pass


def test_a_damaged_checkpoint_is_refused(tmp_path):
    place = named(tmp_path)
    file = place / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(Exception, match="SHA-256"), engine(place):
        pass


def test_what_crosses_over_is_the_states_of_the_encoder(folder):
    """E + 1 states of D_e numbers for each token of a source; not 2 L G d keys and values."""
    with engine(folder) as llm:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        given, embed = [], model.embed_multimodal

        def watched(**kwargs):
            given.extend(embed(**kwargs))
            return given[-len(kwargs["encoder_input_ids"]) :]

        model.embed_multimodal = watched
        asked = cases(folder)[:3]
        assert answers(llm, asked) == [each.answer for each in asked]
        config = model.config
        width = (len(config.encoder_layers) + 1) * config.encoder_config.hidden_size
        assert {tuple(each.shape) for each in given} == {(len(each.source), width) for each in asked}


def test_other_models_are_served_as_without_the_plugin(tmp_path):
    from vllm import SamplingParams

    llm = vllm_llm()
    llm.save_pretrained(tmp_path)
    register()
    prompt = [5, 9, 7, 30, 200]
    wanted = llm.generate(
        torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
    )
    with engine(tmp_path, skip_tokenizer_init=True) as served:
        how = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        found = served.generate({"prompt_token_ids": prompt}, how, use_tqdm=False)
    assert list(found[0].outputs[0].token_ids) == wanted[0, len(prompt) :].tolist()


def test_outside_its_range_the_plugin_steps_back(monkeypatch, caplog):
    monkeypatch.setattr(compat, "version", lambda name: "0.33.1+cpu")
    monkeypatch.setattr(compat, "install", None)
    register()
    assert "expected vllm>=0.32,<0.33, found 0.33.1+cpu" in caplog.text
