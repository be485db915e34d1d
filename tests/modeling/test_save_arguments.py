"""save_pretrained and from_pretrained: each argument is honoured or refused by its name; adapters; files' modes."""

from __future__ import annotations

import inspect
import json
import os
import stat
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from tiny import logits, named_model, tiny_encoder, tiny_folders, tiny_llm
from transformers import AutoModelForCausalLM, PreTrainedModel

from layalign import ArgumentError, CheckpointError, LayAlignForCausalLM


@pytest.fixture
def parts(tmp_path: Path) -> tuple[str, str]:
    return tiny_folders(tmp_path)


@pytest.fixture
def model(parts) -> LayAlignForCausalLM:
    return named_model(parts)


# Writing


def test_a_variant_has_its_own_file(model: LayAlignForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.fp16.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path, variant="fp16")), logits(model))
    with pytest.raises(CheckpointError, match=r"cannot read model.safetensors: there is no such file"):
        LayAlignForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert {"model.fp16.safetensors", "model.safetensors"} <= set(os.listdir(tmp_path))


@pytest.mark.parametrize("size", ["9KB", 9_000])
@pytest.mark.parametrize("save_frozen", [False, True])
def test_shards_are_no_larger_than_asked(
    model: LayAlignForCausalLM, tmp_path: Path, size: Any, save_frozen: bool
) -> None:
    model.save_pretrained(tmp_path, max_shard_size=size, save_frozen=save_frozen)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values()) and len(files) > 1
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 9_000 for file in files)
    again = LayAlignForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{files[0].name}: damaged"):
        LayAlignForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)  # nothing of the shards is left
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path)), logits(model))


class Hub:
    """Takes what is pushed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", self.create_commit)

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        self.created.append({"repo_id": repo_id, **kwargs})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def create_commit(self, **kwargs: Any) -> None:
        self.commits.append(kwargs)


def test_pushing_pushes(model: LayAlignForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other.txt").write_text("not of the model")
    model.save_pretrained(
        tmp_path / "mine", push_to_hub=True, private=True, token="t", commit_message="said", create_pr=True
    )
    assert [(each["repo_id"], each["private"], each["token"]) for each in hub.created] == [("mine", True, "t")]
    (commit,) = hub.commits
    assert (commit["repo_id"], commit["commit_message"], commit["token"]) == ("someone/mine", "said", "t")
    assert commit["create_pr"] is True
    pushed = {operation.path_in_repo for operation in commit["operations"]}
    assert pushed == {"config.json", "generation_config.json", "model.safetensors"}


def test_pushing_without_the_hub_is_an_error(model: LayAlignForCausalLM, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for push in (
        lambda: model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="nobody/none"),
        lambda: model.push_to_hub("nobody/none"),
    ):
        with pytest.raises(Exception, match="offline") as error:
            push()
        bare = tiny_llm()
        with pytest.raises(type(error.value)):
            bare.push_to_hub("nobody/none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"safe_serialization": False}, "safe_serialization: expected True"),
        ({"save_peft_format": False}, "save_peft_format: expected True"),
        ({"save_original_format": False}, "save_original_format: expected True"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint: expected False"),
        ({"save_function": print}, "save_function: expected"),
        ({"repo_id": "a/b"}, "repo_id: expected push_to_hub=True with it"),
        ({"token": "t"}, "token: expected push_to_hub=True with it"),
        ({"commit_message": "m"}, "commit_message: expected push_to_hub=True with it"),
        ({"push_to_hub": "yes"}, "push_to_hub: expected true or false, got 'yes'"),
        ({"max_shard_size": "big"}, "max_shard_size: expected a number of bytes or a text such as 5GB, got 'big'"),
        ({"max_shard_size": 0}, "max_shard_size: expected"),
        ({"variant": "../x"}, "variant: expected a word such as fp16, or None"),
        ({"variant": ""}, "variant: expected a word such as fp16, or None"),
        ({"changed_frozen": "ignore"}, "changed_frozen: expected one of write, refuse"),
        ({"nonsense": 1}, "nonsense: save_pretrained has no such argument"),
    ],
)
def test_what_saving_cannot_honour_is_refused(arguments: dict, message: str, model, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        model.save_pretrained(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_every_argument_of_transformers_is_known(model: LayAlignForCausalLM, tmp_path: Path) -> None:
    """With the value that asks for nothing each is taken, so a new one is noticed here."""
    known = inspect.signature(PreTrainedModel.save_pretrained).parameters
    neutral = {name: each.default for name, each in known.items() if each.default is not inspect.Parameter.empty}
    model.save_pretrained(tmp_path / "out", **neutral)
    model.save_pretrained(tmp_path / "not", **{**neutral, "is_main_process": False})
    assert not (tmp_path / "not").exists()
    known = inspect.signature(PreTrainedModel.from_pretrained).parameters
    neutral = {name: each.default for name, each in known.items() if each.default is not inspect.Parameter.empty}
    for name in ("fusion_config", "disable_mmap"):
        neutral.pop(name, None)
    LayAlignForCausalLM.from_pretrained(tmp_path / "out", **neutral)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_safetensors": False}, "use_safetensors: expected None or True, got False"),
        ({"weights_only": False}, "weights_only: expected None or True, got False"),
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes: expected None or False, got True"),
        ({"state_dict": {}}, "state_dict: expected None"),
        ({"key_mapping": {"a": "b"}}, "key_mapping: expected None"),
        ({"quantization_config": {}}, "quantization_config: expected it in llm_kwargs"),
        ({"changed_frozen": "write"}, "changed_frozen: expected one of refuse, warn"),
        ({"nonsense": 1}, "nonsense: from_pretrained has no such argument"),
        ({"config": {}}, "config: expected a LayAlignConfig"),
        ({"llm": 5}, "llm: expected a transformers model, got 5"),
        ({"impl": "magic"}, "impl: expected 'auto' or one of"),
    ],
)
@pytest.mark.parametrize("save_frozen", [False, True])
def test_what_loading_cannot_honour_is_refused(
    arguments: dict, message: str, save_frozen: bool, model: LayAlignForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "out", save_frozen=save_frozen)
    with pytest.raises(ArgumentError, match=message):
        LayAlignForCausalLM.from_pretrained(tmp_path / "out", **arguments)
    with pytest.raises(ArgumentError, match="expected keyword arguments after the name"):
        LayAlignForCausalLM.from_pretrained(tmp_path / "out", 5)


@pytest.mark.parametrize("save_frozen", [False, True])
def test_what_loading_honours(save_frozen: bool, model: LayAlignForCausalLM, tmp_path: Path) -> None:
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "out" / "inside", save_frozen=save_frozen)
    again, info = LayAlignForCausalLM.from_pretrained(
        tmp_path / "out", subfolder="inside", fold_projections="never", prune_last_layer="never",
        output_loading_info=True, device_map={"": "cpu"}, use_safetensors=True, attn_implementation="eager",
    )  # fmt: skip
    assert (again.config.fold_projections, again.config.prune_last_layer) == ("never", "never")
    assert again.generation_config.max_new_tokens == 7 and not any(info.values())
    assert again.llm.config._attn_implementation == "layalign_eager"
    torch.testing.assert_close(logits(again)[:, -1], logits(model)[:, -1])
    for dtype in ("auto", "bfloat16"):
        kwargs = {"dtype": dtype}
        again = LayAlignForCausalLM.from_pretrained(
            tmp_path / "out" / "inside", encoder_kwargs=kwargs, llm_kwargs=kwargs
        )
        wanted = torch.float32 if dtype == "auto" else torch.bfloat16
        assert again.llm.dtype == again.encoder.dtype == wanted and again.mapping.end_boundary.dtype == torch.float32


def test_files_have_the_modes_that_any_file_gets(model: LayAlignForCausalLM, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "out", max_shard_size="9KB", save_frozen=True)
        model.save_pretrained(tmp_path / "one")
    finally:
        os.umask(before)
    files = [path for folder in ("out", "one") for path in (tmp_path / folder).iterdir()]
    assert len(files) > 6 and {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {"0o640"}


# Adapters


def lora(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes})


def add_adapter(part: Any, settings: Any, name: str = "default") -> None:
    """As ``part.add_adapter``, which in transformers 5.24 wants a peft that is not out."""
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(settings, part, name)
    part._hf_peft_config_loaded = True


def switched_off(model: LayAlignForCausalLM) -> None:
    for module in model.llm.modules():
        if hasattr(module, "base_layer"):
            module.enable_adapters(False)


RELOADABLE = {
    "plain": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, "some layers": {"layers_to_transform": [1]},
    "head and embeddings": {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"}, "bias": {"bias": "none", "lora_dropout": 0.1},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", RELOADABLE)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_adapter_added_by_hand_is_recorded(
    kind: str, moment: str, parts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    llm, settings = AutoModelForCausalLM.from_pretrained(parts[1]), lora(**RELOADABLE[kind])
    if moment == "before":
        add_adapter(llm, settings)
    model = LayAlignForCausalLM.from_encoder_and_llm(parts[0], llm)
    said = "the llm comes with an adapter (default): it is frozen with the LLM and saved with the checkpoint"
    assert (said in caplog.text) == (moment == "before")
    if moment == "after":
        add_adapter(model.llm, settings)
    model.eval()
    model.save_pretrained(tmp_path / "out")
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == names
    assert any(".lora_" in name for name in names) == (moment == "after")
    assert "base_model_name_or_path" not in json.loads((tmp_path / "out" / "config.json").read_text())["lora"]
    again.save_pretrained(tmp_path / "second", save_frozen=True)
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path / "second")), logits(model))


def merged(model: LayAlignForCausalLM) -> None:
    for module in model.llm.modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()


def scaled(model: LayAlignForCausalLM) -> None:
    model.llm.model.layers[0].self_attn.q_proj.scaling["default"] *= 2


def mixed(model: LayAlignForCausalLM) -> None:
    model.llm.model.layers[0].self_attn.v_proj = model.llm.model.layers[0].self_attn.v_proj.base_layer


REFUSED = {
    "two": (lambda m: add_adapter(m.llm, lora(), "second"), "got .*second"),
    "merged": (merged, "it is merged into the weights"),
    "switched off": (switched_off, "it is switched off"),
    "scaled by hand": (scaled, "scales by"),
    "taken out of a layer": (mixed, "the adapter was changed by hand"),
    "encoder": (lambda m: add_adapter(m.encoder, lora(target_modules=["q"])), "encoder: expected no adapter in it"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("save_frozen", [False, True])
def test_adapters_that_would_not_come_back_are_refused_when_saving(
    case: str, save_frozen: bool, model: LayAlignForCausalLM, tmp_path: Path
) -> None:
    change, message = REFUSED[case]
    add_adapter(model.llm, lora())
    change(model)
    with pytest.raises(CheckpointError, match=message):
        model.save_pretrained(tmp_path / "out", save_frozen=save_frozen)
    assert not (tmp_path / "out").exists()


def test_another_adapters_name_kind_or_wrapper_is_refused(model: LayAlignForCausalLM, parts, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    add_adapter(model.llm, lora(), "mine")
    with pytest.raises(CheckpointError, match="expected at most one LoRA adapter, called 'default'"):
        model.save_pretrained(tmp_path / "out")
    model = named_model(parts)
    add_adapter(model.llm, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(CheckpointError, match=r"called 'default' .* got .*IA3"):
        model.save_pretrained(tmp_path / "out")
    wrapped = peft.get_peft_model(tiny_llm(), lora())
    with pytest.raises(ArgumentError, match=r"llm: expected a transformers model .*PeftModel.*get_base_model"):
        LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), wrapped)
    inside = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), wrapped.get_base_model())
    inside.eval().save_pretrained(tmp_path / "out")
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path / "out")), logits(inside))


def test_an_adapter_that_was_removed_is_forgotten(model: LayAlignForCausalLM, tmp_path: Path) -> None:
    before = logits(model)
    model.add_lora(lora())
    for name, module in list(model.llm.named_modules()):
        if hasattr(module, "base_layer"):
            model.llm.set_submodule(name, module.base_layer)
    model.save_pretrained(tmp_path / "out", changed_frozen="refuse")
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.lora is None and torch.equal(logits(again), before)


def test_a_checkpoint_without_its_adapters_weights_is_damaged(model: LayAlignForCausalLM, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model.add_lora(lora())
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items() if "layers.0" not in name}
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"llm.model.layers.0.self_attn.q_proj.lora_A.default.weight is missing"):
        LayAlignForCausalLM.from_pretrained(tmp_path / "out")
