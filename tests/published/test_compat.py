"""The published classes over ours, against what the authors' own code computed (``tests/golden``)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from layalign import CheckpointError, LayAlignForCausalLM
from layalign.published.classes import EncoderAligner, LayAlign, LayAlignConfig
from layalign.published.convert import convert_published, convert_to_published

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["mha_translation", "gqa_task_mlp"]


def published_model(case: str, **arguments) -> LayAlign:
    folder = GOLDEN / case
    settings = json.loads((folder / "case.json").read_text())
    config = LayAlignConfig(
        mt_path=str(folder / "encoder"),
        llm_path=str(folder / "llm"),
        max_gen_len=settings["max_new_tokens"],
        llm_bos_token_id=settings["bos"],
        llm_pad_token_id=settings["pad"],
        encoder_aligner_config=SimpleNamespace(**settings["aligner"]),
        augmentation=False,
    )
    return LayAlign(config, **arguments)


def loaded(case: str) -> tuple[LayAlign, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = published_model(case)
    state = torch.load(GOLDEN / case / "pytorch_model.bin", weights_only=True)
    assert str(model.load_state_dict(state, True)) == "<All keys matched successfully>"
    return model.eval(), load_file(GOLDEN / case / "batch.safetensors"), load_file(GOLDEN / case / "grads.safetensors")


def prompt(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "prompt_ids" not in data:
        return {}
    return {"input_ids_prompt": data["prompt_ids"], "mask_prompt": data["prompt_mask"]}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_equal_the_published_code(case: str) -> None:
    model, data, gradients = loaded(case)
    loss = model(
        data["input_ids"], data["attention_mask"], labels=data["labels"], mask_label=data["labels_mask"], **prompt(data)
    )
    assert abs(loss.item() - data["loss"].item()) <= 1e-5 * abs(data["loss"].item())
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.published_parameters()}
    assert set(found) == set(gradients)
    for name, expected in gradients.items():
        error = (found[name] - expected).norm() / expected.norm()
        assert error <= 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_generated_ids_equal_the_published_code(case: str) -> None:
    model, data, _ = loaded(case)
    generated = model(data["input_ids"], data["attention_mask"], **prompt(data))
    assert torch.equal(generated, data["generated"])


@pytest.mark.parametrize("case", CASES)
def test_aligner_states_equal_the_published_code(case: str) -> None:
    model, data, _ = loaded(case)
    settings = json.loads((GOLDEN / case / "case.json").read_text())["aligner"]
    aligner = EncoderAligner(SimpleNamespace(**settings))
    aligner.load_state_dict(model.encoder_aligner.state_dict())
    with torch.no_grad():
        output = model.encoder_mt(data["input_ids"], data["attention_mask"], output_hidden_states=True)
        hidden = [output.hidden_states[layer] for layer in settings["encoder_layers"]]
        pairs = aligner(hidden)
        stacked = aligner(torch.stack(hidden, dim=1))
    assert len(pairs) == settings["num_language_layers"]
    for layer, pair in enumerate(pairs):
        for kind in (0, 1):
            torch.testing.assert_close(pair[kind], data["aligner_states"][layer, kind], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stacked[layer][kind], pair[kind])


@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_the_published_names_and_values(case: str) -> None:
    model, _, _ = loaded(case)
    expected = torch.load(GOLDEN / case / "pytorch_model.bin", weights_only=True)
    state = model.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_strict_loading_reports_published_names() -> None:
    model = published_model("gqa_task_mlp")
    state = dict(torch.load(GOLDEN / "gqa_task_mlp" / "pytorch_model.bin", weights_only=True))
    state.pop("model_llm.model.model.layers.2.self_attn.adaption_gate")
    state["something.else"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    assert "model_llm.model.model.layers.2.self_attn.adaption_gate" in str(caught.value)
    assert '"something.else"' in str(caught.value)


def test_freezing_is_the_published_one() -> None:
    trains = {name for name, parameter in published_model("gqa_task_mlp").named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trains} == {"mapping", "encoder_aligner", "cross_attention"}
    model = published_model("gqa_task_mlp", encoder_freeze=False)
    assert all(parameter.requires_grad for parameter in model.encoder_mt.parameters())
    assert not any(parameter.requires_grad for parameter in model.model_llm.parameters())


def test_a_published_style_training_loop_lowers_the_loss() -> None:
    model, data, _ = loaded("mha_translation")
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2, betas=(0.8, 0.999))
    losses = []
    for _ in range(8):
        loss = model(data["input_ids"], data["attention_mask"], labels=data["labels"], mask_label=data["labels_mask"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("case", CASES)
def test_convert_there_and_back(case: str, tmp_path: Path) -> None:
    folder = GOLDEN / case
    settings = json.loads((folder / "case.json").read_text())
    data = load_file(folder / "batch.safetensors")
    report = convert_published(
        folder / "pytorch_model.bin",
        str(folder / "encoder"),
        str(folder / "llm"),
        tmp_path / "ours",
        encoder_layers=settings["aligner"]["encoder_layers"],
        llm_bos_token_id=settings["bos"],
        source_token_id=settings["pad"],
    )
    assert report.language_layers == settings["aligner"]["language_layers"]
    assert report.structure == settings["structure"] and not report.frozen_saved
    assert (tmp_path / "ours" / "model.safetensors").stat().st_size < 100_000

    model = LayAlignForCausalLM.from_pretrained(tmp_path / "ours")
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(data["labels"], data["labels_mask"], strict=True)]
    prompts = None
    if "prompt_ids" in data:
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(data["prompt_ids"], data["prompt_mask"], strict=True)]
    packed = model.build_inputs(data["attention_mask"], prompts, rows)
    with torch.no_grad():
        loss = model(**packed, encoder_input_ids=data["input_ids"], encoder_attention_mask=data["attention_mask"]).loss
    assert abs(loss.item() - data["loss"].item()) <= 1e-5 * data["loss"].item()

    convert_to_published(tmp_path / "ours", tmp_path / "back" / "pytorch_model.bin")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    original = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert set(back) == set(original)
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_convert_keeps_an_llm_that_was_trained_too(tmp_path: Path) -> None:
    folder = GOLDEN / "mha_translation"
    state = dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
    name = "model_llm.model.model.layers.1.self_attn.model.q_proj.weight"
    state[name] = state[name] + 1
    torch.save(state, tmp_path / "changed.bin")
    report = convert_published(
        tmp_path / "changed.bin", str(folder / "encoder"), str(folder / "llm"), tmp_path / "ours"
    )
    assert report.frozen_saved
    model = LayAlignForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(model.llm.model.layers[1].self_attn.q_proj.weight, state[name])


def test_convert_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    folder = GOLDEN / "mha_translation"
    parts = str(folder / "encoder"), str(folder / "llm"), tmp_path / "ours"
    with pytest.raises(CheckpointError, match="no such file"):
        convert_published(tmp_path / "nothing.bin", *parts)
    (tmp_path / "broken.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:4000])
    with pytest.raises(CheckpointError, match="broken.bin: not a readable checkpoint"):
        convert_published(tmp_path / "broken.bin", *parts)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.bin")
    with pytest.raises(CheckpointError, match="not a published LayAlign checkpoint"):
        convert_published(tmp_path / "foreign.bin", *parts)
    with pytest.raises(CheckpointError, match="mixes 4 layers"):
        convert_published(folder / "pytorch_model.bin", *parts, encoder_layers=[0, 1])
    assert not (tmp_path / "ours").exists()


def test_a_pickle_with_code_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"weight": Evil()}, tmp_path / "evil.bin")
    folder = GOLDEN / "mha_translation"
    with pytest.raises(CheckpointError):
        convert_published(tmp_path / "evil.bin", str(folder / "encoder"), str(folder / "llm"), tmp_path / "ours")
    assert not (tmp_path / "executed").exists()
