"""Every baseline is the one model with other settings: what each means, and that all of them train and answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import batch, open_gates, tiny_encoder, tiny_llm, tiny_model
from tiny_training import save_parts, training_config

from layalign import LayAlignForCausalLM
from layalign.cli import main
from layalign.data import Example, LayAlignCollator
from layalign.modeling.configuration import LayAlignConfig
from layalign.modeling.layers import named_layers
from layalign.published.convert import convert_to_published
from layalign.training import TrainSummary, baselines, build_model, load_train_config, train
from layalign.training.baselines import BASELINES
from layalign.training.loading import configured_stages
from layalign.utils.errors import ArgumentError, CheckpointError
from layalign.utils.pages import replaced

NAMES = list(BASELINES)
DOCS = Path(__file__).parents[2] / "docs" / "baselines.md"


def built(name: str, **changes: Any) -> LayAlignForCausalLM:
    return tiny_model(**{**BASELINES[name].settings, **changes})


def text_only(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("encoder_")}


# What each one is


def test_the_llm_alone_is_the_bare_llm_and_runs_no_encoder() -> None:
    model = built("llm")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.encoder.register_forward_hook(lambda *_: pytest.fail("the encoder was run"))
    inputs = batch(prompts=(2, 4, 3), model=model)
    bare = model.unload()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = bare(**{k: v for k, v in text_only(inputs).items() if k != "labels"}, position_ids=positions).logits
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), bare, **BASELINES["llm"].settings)
    found = model(**inputs, logits_to_keep=0).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_without_adapter_the_source_comes_through_the_gates_alone() -> None:
    model = built("no-adapter")
    inputs = batch(prompts=(2, 4, 3), model=model)
    assert model.mapping is None and inputs["input_ids"].shape[1] == 1 + max(2 + 3, 4 + 1, 3 + 4)
    full, bare = model(**inputs, logits_to_keep=0).logits, built("llm")(**inputs, logits_to_keep=0).logits
    assert not torch.allclose(full, bare)
    with torch.no_grad():
        for module in model.cross_attention:
            module.adaption_gate.zero_()
    torch.testing.assert_close(model(**inputs, logits_to_keep=0).logits, bare)


def test_without_adapter_and_first_token_there_must_be_a_prompt() -> None:
    model = built("no-adapter", llm_bos_token_id=None)
    model.config.llm_bos_token_id = None
    with pytest.raises(ArgumentError, match="prompts: expected text"):
        model.build_inputs(torch.ones(2, 3, dtype=torch.long))


def test_mindmerger_is_layalign_with_closed_gates() -> None:
    layalign, adapter = built("layalign"), built("mindmerger-soft")
    adapter.mapping.load_state_dict(layalign.mapping.state_dict())
    with torch.no_grad():
        for module in layalign.cross_attention:
            module.adaption_gate.zero_()
    inputs = batch(model=layalign)
    torch.testing.assert_close(layalign(**inputs).loss, adapter(**inputs).loss)


def test_a_shared_mix_is_a_layer_wise_one_with_equal_rows() -> None:
    shared, own = built("shared-mix"), built("layalign")
    own.load_state_dict(shared.state_dict() | {n: t for n, t in own.state_dict().items() if ".fc1." in n})
    mix, mixes = shared.encoder_aligner.projector.fc1, own.encoder_aligner.projector.fc1
    assert mix.weight.shape[0] == 2 and mixes.weight.shape[0] == 2 * len(own.cross_attention)
    with torch.no_grad():
        mixes.weight.copy_(mix.weight.repeat(len(own.cross_attention), 1))
        mixes.bias.copy_(mix.bias.repeat(len(own.cross_attention)))
    inputs = batch(model=own)
    losses = [model(**inputs).loss for model in (shared, own)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    summed = mixes.weight.grad.view(len(own.cross_attention), *mix.weight.shape).sum(0)
    torch.testing.assert_close(mix.weight.grad, summed)
    hidden = [torch.randn(2, 5, 24) for _ in range(4)]
    pairs = shared.encoder_aligner(hidden)
    assert len(pairs) == len(own.cross_attention) and all(
        torch.equal(a, b) for a, b in zip(pairs[0], pairs[-1], strict=True)
    )


def test_in_place_of_the_prompt() -> None:
    class Words:  # the least that the collator asks of a tokenizer
        pad_token_id, eos_token_id = 0, 2

        def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
            rows = [[3 + len(word) for word in line.split()] for line in ([text] if isinstance(text, str) else text)]
            return {"input_ids": rows[0] if isinstance(text, str) else rows}

    example = Example("eins zwei", "one two three", "German", prompt="a bb ccc dddd")
    lengths = {}
    for name in ("langbridge", "mindmerger-soft"):
        collator = LayAlignCollator.from_model(built(name), Words(), Words(), stage="task")
        lengths[name] = collator([example])["input_ids"].shape[1]
    assert lengths["mindmerger-soft"] - lengths["langbridge"] == 4  # the prompt's words


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, layers",
    [
        ("last-layer", [4]),
        ("first-third", [0]),
        ("middle-third", [1, 2]),
        ("last-third", [3]),
        ("all-layers", [0, 1, 2, 3, 4]),
    ],
)
def test_named_encoder_layers(name: str, layers: list[int]) -> None:
    model = built(name)
    assert model.config.encoder_layers == layers
    assert model.encoder_aligner.projector.fc1.in_features == len(layers)


def test_thirds_of_the_published_layers() -> None:
    thirds = [named_layers(f"{part}-third", 25) for part in ("first", "middle", "last")]
    assert thirds == [list(range(8)), list(range(8, 16)), list(range(16, 24))]  # as in the paper's table 7
    assert named_layers(None, 25) == [layer for third in thirds for layer in third]
    with pytest.raises(ArgumentError, match="encoder_layers: expected at least 3 layers"):
        named_layers("first-third", 3)


@pytest.mark.slow
def test_a_fixed_gate_stays(tmp_path: Path) -> None:
    encoder, llm = tiny_encoder(), tiny_llm()
    for part, folder in ((encoder, "encoder"), (llm, "llm")):
        part.save_pretrained(tmp_path / folder)
    model = LayAlignForCausalLM.from_encoder_and_llm(str(tmp_path / "encoder"), str(tmp_path / "llm"), fixed_gate=0.25)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch(model=model)).loss.backward()
    optimizer.step()
    for save_frozen in (False, True):
        model.save_pretrained(tmp_path / str(save_frozen), save_frozen=save_frozen)
        again = LayAlignForCausalLM.from_pretrained(tmp_path / str(save_frozen))
        for gate in (module.adaption_gate for module in again.cross_attention):
            assert gate.item() == 0.25 and not gate.requires_grad
        trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad} and trained


def test_adapter_size() -> None:
    model = tiny_model(adapter_size=7)
    assert model.mapping.mlp.linear1.weight.shape == (7, 24)
    assert tiny_model().mapping.mlp.linear1.weight.shape == (48, 24)


# All of them train, answer, and come back from disk


@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_and_answers(name: str) -> None:
    settings = dict(BASELINES[name].settings)
    if "lora" in settings:
        pytest.importorskip("peft")
    model = tiny_model(**settings).train()
    inputs = batch(prompts=(2, 4, 3), model=model)
    loss = model(**inputs).loss
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert bool(trained) == bool(BASELINES[name].stages)
    if trained:
        loss.backward()
        # LoRA's first factor has no gradient while its second one is zero.
        dead = [n for n, p in trained.items() if "lora_A" not in n and (p.grad is None or not p.grad.any())]
        assert not dead
    model.eval()
    inputs = batch(prompts=(2, 4, 3), targets=None, model=model)
    whole = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    for i in range(3):  # an answer does not depend on its neighbours
        text = inputs["attention_mask"][i].bool()
        source = inputs["encoder_attention_mask"][i].bool()
        alone = {k: v[i : i + 1][:, source if k.startswith("encoder") else text] for k, v in inputs.items()}
        one = model.generate(**alone, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert whole[i, -5:].tolist() == one[0, -5:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if BASELINES[name].stages])
def test_both_stages_from_a_configuration(name: str, tmp_path: Path) -> None:
    if "lora" in BASELINES[name].settings:
        pytest.importorskip("peft")
    parts = save_parts(tmp_path / "parts")
    before = None
    for stage in BASELINES[name].stages:
        values = {
            "encoder": parts.encoder, "llm": parts.llm, "data": parts.data, "stages": {"translation": {}, "task": {}},
            "output_dir": str(tmp_path / "out" / stage), "max_steps": 1, "batch_size": 2, "dev_size": 2,
            "eval_steps": 0, "save_steps": 0, "use_cpu": True, "progress": False, "baseline": name,
            "init_checkpoint": before,
        }  # fmt: skip
        config = load_train_config(values, stage=stage)
        if before is not None:
            config.init_checkpoint = before
        train(config)
        assert Path(config.output_dir) == tmp_path / "out" / stage
        before = config.output_dir
    model = LayAlignForCausalLM.from_pretrained(before)
    assert (model.mapping is None, model.config.use_prompt, model.config.mix, model.config.fixed_gate) == (
        not config.use_adapter, config.use_prompt, config.mix, config.fixed_gate,
    )  # fmt: skip
    assert configured_stages(None, overrides=[]) == ["translation"]


# Names and errors


def test_configuration_of_a_baseline() -> None:
    values = {"output_dir": "a/translation", "stages": {"translation": {}, "task": {"output_dir": "a/task"}}}
    config = load_train_config(values, stage="task", overrides=["baseline=no-translation"])
    assert config.output_dir == "a/task" and config.init_checkpoint is None
    config = load_train_config(preset="math", stage="task", overrides=["baseline=mindmerger-soft"])
    assert config.init_checkpoint == "outputs/math/mindmerger-soft/translation" and config.language_layers == []
    assert config.output_dir == "outputs/math/mindmerger-soft/task"
    with pytest.raises(ArgumentError, match="baseline: no-translation has only the task stage, got translation"):
        load_train_config(values, stage="translation", overrides=["baseline=no-translation"])
    with pytest.raises(ArgumentError, match="baseline: llm has no stage"):
        load_train_config(values, stage="task", overrides=["baseline=llm"])
    with pytest.raises(ArgumentError, match="baseline: expected one of llm, "):
        load_train_config({"baseline": "layalgin"})


def test_folders_that_somebody_chose_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(
        "baseline: mindmerger-soft\noutput_dir: mine\nstages: {task: {init_checkpoint: start, output_dir: mine/task}}\n"
    )
    config = load_train_config(tmp_path / "c.yaml")
    assert (config.output_dir, config.init_checkpoint, config.language_layers) == ("mine", None, [])
    config = load_train_config(tmp_path / "c.yaml", stage="task")
    assert (config.output_dir, config.init_checkpoint) == ("mine/task", "start")
    named = ["baseline=layalign", "output_dir=mine", "init_checkpoint=start"]
    config = load_train_config(preset="math", stage="task", overrides=named)
    assert (config.output_dir, config.init_checkpoint) == ("mine", "start")
    assert load_train_config({}, overrides=["baseline=layalign"]).output_dir == "outputs"

    def places(*arguments: str) -> list[tuple[str, str | None]]:
        with pytest.raises(SystemExit) as stop:
            main(["train", *arguments, "--print-config"])
        assert stop.value.code == 0
        texts = capsys.readouterr().out.split("# ")[1:]
        values = [yaml.safe_load(text.split("\n", 1)[1]) for text in texts]
        return [(each["output_dir"], each["init_checkpoint"]) for each in values]

    math = ["--preset", "math", "--baseline", "layalign"]
    assert places(*math) == [
        ("outputs/math/layalign/translation", None),
        ("outputs/math/layalign/task", "outputs/math/layalign/translation"),
    ]
    assert places(*math, "--output", "o") == [("o/translation", None), ("o/task", "o/translation")]
    assert places(*math, "--stage", "task", "--output", "o") == [("o", "outputs/math/layalign/translation")]
    assert places("--config", str(tmp_path / "c.yaml"), "--baseline", "no-adapter") == [("mine/task", "start")]


def test_two_stages_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("output_dir: mine\nstages: {translation: {}, task: {}}\n")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tmp_path / "c.yaml")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: output_dir: expected one for each stage, got mine for both")


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [0, 1])
def test_two_baselines_do_not_mix_in_a_folder(save_steps: int, tmp_path: Path) -> None:
    parts = save_parts(tmp_path / "parts")

    def run(name: str) -> TrainSummary:
        changes = {"baseline": name, "max_steps": 1, "save_steps": save_steps}
        return train(training_config(parts, tmp_path / "run", **changes))

    run("layalign")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    with pytest.raises(ArgumentError, match="^baseline: the run in .* has 'layalign', this one 'mindmerger-soft'"):
        run("mindmerger-soft")
    with pytest.raises(ArgumentError, match="^baseline: the run in .* has 'layalign', this one 'no-task'"):
        run("no-task")  # the same model, another experiment
    assert {path: path.read_bytes() for path in before} == before
    assert run("layalign").steps == 1


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("mix", "own", "mix: expected one of"),
        ("adapter", 1, "adapter: expected true or false"),
        ("prompt", "no", "prompt: expected true or false"),
        ("gate", float("nan"), "gate: expected a finite number or None"),
        ("gate", True, "gate: expected a finite number or None"),
        ("adapter_size", 0, "adapter_size: expected a positive integer, 'match' or None"),
        ("mask_encoder_padding", "false", "mask_encoder_padding: expected true or false, got 'false'"),
        ("encoder_layers", "lowest", "encoder_layers: expected indices or one of all, first-third, "),
    ],
)
def test_wrong_settings(field: str, value: Any, text: str) -> None:
    llm, encoder = tiny_llm().config, tiny_encoder().config
    with pytest.raises(ArgumentError, match=text):
        LayAlignConfig(encoder_config=encoder, llm_config=llm, **{field: value})


def test_a_model_must_read_something() -> None:
    with pytest.raises(ArgumentError, match="use_prompt: expected true without an adapter"):
        LayAlignConfig(use_adapter=False, use_prompt=False)


@pytest.mark.slow
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    for part, folder in ((tiny_encoder(), "encoder"), (tiny_llm(), "llm")):
        part.save_pretrained(tmp_path / folder)
    model = LayAlignForCausalLM.from_encoder_and_llm(str(tmp_path / "encoder"), str(tmp_path / "llm"))
    model.save_pretrained(tmp_path / "start")
    start = {"init_checkpoint": str(tmp_path / "start"), "stage": "task"}
    changes = {"mix": {"mix": "shared"}, "fixed_gate": {"fixed_gate": 1.0}, "layers": {"encoder_layers": "last"}}
    for text, change in changes.items():
        with pytest.raises(ArgumentError, match=text):
            build_model(load_train_config(start | change))
    build_model(load_train_config(start | {"encoder_layers": [0, 1, 2, 3]}))


@pytest.mark.parametrize("name", ["mindmerger-soft", "no-adapter", "shared-mix", "wide"])
def test_what_the_published_format_cannot_hold(name: str, tmp_path: Path) -> None:
    model = tiny_model(adapter_size=7) if name == "wide" else built(name)
    model.save_pretrained(tmp_path / "ours", save_frozen=True)
    with pytest.raises(CheckpointError, match="the published format has an adapter"):
        convert_to_published(tmp_path / "ours", tmp_path / "theirs.bin")
    assert not (tmp_path / "theirs.bin").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no-adapter", "shared-mix", "langbridge", "llm"])
def test_compiled_forward_is_one_graph(name: str) -> None:
    model = built(name)
    inputs = batch(prompts=(2, 4, 3), targets=None, model=model)
    expected = model(**inputs, use_cache=False).logits
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_train_is_said(tmp_path: Path) -> None:
    parts = save_parts(tmp_path / "parts")
    config = load_train_config(
        {"encoder": parts.encoder, "llm": parts.llm, "data": parts.data, "use_adapter": False, "language_layers": [],
         "output_dir": str(tmp_path / "out"), "dev_size": 2, "use_cpu": True}
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="model: expected an adapter, language layers or LoRA to train"):
        train(config)


def test_the_table_in_the_documentation_is_current() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert replaced(page, baselines.BEGIN, baselines.END, baselines.markdown()) == page, "run `make docs`"
    assert all(f"| `{name}` |" in page for name in NAMES)


def test_shared_mix_with_gates_apart_trains_each_gate() -> None:
    model = built("shared-mix")
    open_gates(model)
    model(**batch(model=model)).loss.backward()
    grads = [module.adaption_gate.grad.item() for module in model.cross_attention]
    assert len(set(grads)) == len(grads)
