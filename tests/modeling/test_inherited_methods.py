"""What a model inherits from transformers' models: each method does all of it to the right part, or refuses first."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from tiny import VOCABULARY, batch, tiny_encoder, tiny_llm, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

from layalign import ArgumentError, LayAlignConfig, LayAlignForCausalLM, attach, detach
from layalign.modeling.attention_interface import carries_source
from layalign.modeling.decoders import attention_modules

LORA = {"r": 2, "target_modules": ["q_proj"]}


def _inputs(model: LayAlignForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch(model=model).items() if name != "labels"}


def _logits(model: Any) -> torch.Tensor:
    """(N, V) at the positions that are no padding."""
    inputs = _inputs(model)
    with torch.no_grad():
        return model(**inputs).logits.float()[inputs["attention_mask"].bool()]


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a method could leave half changed."""
    weights = {name: (p.dtype, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    configs = {
        name: m.config for name, m in model.named_modules() if isinstance(getattr(m, "config", None), PretrainedConfig)
    }
    functions = {name: config._attn_implementation_internal for name, config in configs.items()}
    return {"weights": weights, "configs": {n: c.to_dict() for n, c in configs.items()}, "functions": functions}


def _assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["configs"] == two["configs"] and one["functions"] == two["functions"]
    assert one["weights"].keys() == two["weights"].keys()
    for name, (dtype, trains, weight) in one["weights"].items():
        assert (dtype, trains) == two["weights"][name][:2], name
        assert torch.equal(weight, two["weights"][name][2]), name


def _trains_and_generates(model: LayAlignForCausalLM) -> None:
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.train()(**batch(model=model)).loss.backward()
    assert model.cross_attention[0].adaption_gate.grad is not None
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not any(
        n.startswith(("llm", "encoder.")) and "lora" not in n for n, p in model.named_parameters() if p.requires_grad
    )
    model.eval().generate(**_inputs(model), max_new_tokens=2, do_sample=False)


# Vocabulary


@pytest.mark.parametrize(("llm", "tied"), [("llama", False), ("llama", True), ("gemma3_text", True), ("gpt2", True)])
@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"new_num_tokens": 72}, 72),
        ({"new_num_tokens": 72, "mean_resizing": False}, 72),
        ({"new_num_tokens": 66, "pad_to_multiple_of": 16}, 80),
        ({"pad_to_multiple_of": np.int64(48)}, 96),
        ({"new_num_tokens": 40}, 40),
    ],
)
def test_resizing_the_vocabulary_changes_all_of_it(llm: str, tied: bool, arguments: dict[str, Any], size: int) -> None:
    part = tiny_llm(llm, tie_word_embeddings=tied)
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), part).eval()
    nn.init.constant_(model.cross_attention[0].adaption_gate, 0.7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = min(size, VOCABULARY)
    inputs = _inputs(model)
    for name in ("encoder_input_ids", "input_ids"):
        inputs[name] = inputs[name].clamp(max=kept - 1)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert model.resize_token_embeddings(**arguments).num_embeddings == size
    head = model.get_output_embeddings()
    assert head.weight.shape[0] == size == model.get_input_embeddings().weight.shape[0]
    assert (head.weight is model.get_input_embeddings().weight) is tied
    for config in (model.llm.config, model.config.llm_config, model.config):
        assert config.get_text_config(decoder=True).vocab_size == size
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[..., :kept], expected[..., :kept])
    for name, tensor in model.state_dict().items():
        rows = min(len(tensor), len(before[name]))
        assert torch.equal(tensor[:rows], before[name][:rows]) and tensor.shape[1:] == before[name].shape[1:]
    row = {"encoder_input_ids": torch.tensor([[5, 6]]), **model.build_inputs(torch.ones(1, 2), None, [[size - 1, 2]])}
    model.train()(**row).loss.backward()
    assert not any(p.requires_grad for p in model.llm.parameters())
    model.eval().generate(encoder_input_ids=row["encoder_input_ids"], max_new_tokens=2, do_sample=False)
    assert type(model.config.llm_config.vocab_size) is int
    with pytest.raises(ArgumentError, match=rf"labels: expected ids in 0..{size - 1}"):
        model(**{**row, "labels": row["labels"].masked_fill(row["labels"] == size - 1, size)})
    model.resize_token_embeddings(VOCABULARY)
    if size > VOCABULARY:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.unload().config.get_text_config().vocab_size == VOCABULARY
    assert all(parameter.requires_grad for parameter in part.parameters())


def test_resizing_the_llm_itself_is_noticed() -> None:
    model = tiny_model()
    model.llm.resize_token_embeddings(72)
    row = {"encoder_input_ids": torch.tensor([[5, 6]]), **model.build_inputs(torch.ones(1, 2), None, [[71, 2]])}
    assert model(**row).loss.isfinite()


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "too small": (lambda m: m.resize_token_embeddings(1), "new_num_tokens: expected more than llm_bos_token_id 1"),
    "negative": (lambda m: m.resize_token_embeddings(-3), "new_num_tokens: expected"),
    "text": (lambda m: m.resize_token_embeddings("a"), "new_num_tokens: expected"),
    "fraction": (lambda m: m.resize_token_embeddings(pad_to_multiple_of=1.5), "pad_to_multiple_of: expected"),
    "set_input_embeddings": (lambda m: m.set_input_embeddings(nn.Embedding(64, 8)), r"embeddings: .*\(V, 32\)"),
    "set_output_embeddings": (lambda m: m.set_output_embeddings(nn.Linear(8, 64)), r"embeddings: .*\(V, 32\)"),
    "set_encoder": (lambda m: m.set_encoder(m.encoder), "encoder: expected to stay"),
    "set_decoder": (lambda m: m.set_decoder(m.llm), "decoder: expected to stay"),
    "set_attn_implementation": (lambda m: m.set_attn_implementation("nonsense"), "attn_implementation: "),
    "its part": (lambda m: m.set_attn_implementation({"text": "eager"}), "attn_implementation: expected"),
    "half of it": (
        lambda m: m.set_attn_implementation({"llm_config": "eager", "encoder_config": "nonsense"}),
        "attn_implementation: ",
    ),
    "add_adapter": (lambda m: m.add_adapter(LORA, "other"), "adapter_name: expected 'default'"),
    "dequantize": (lambda m: m.dequantize(), "dequantize: expected a quantised"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case: str) -> None:
    model, (call, text) = tiny_model(), REFUSED[case]
    before, expected = _state(model), _logits(model)
    with pytest.raises(ArgumentError, match=text):
        call(model)
    _assert_same(_state(model), before)
    assert torch.equal(_logits(model), expected)


def test_a_failure_in_the_middle_of_resizing_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    for llm in ("llama", "gemma3_text"):  # the second changes its embedding in place
        model = tiny_model(llm=llm)
        before, modules = _state(model), (model.get_input_embeddings(), model.get_output_embeddings())

        def fail(*args: Any, **kwargs: Any) -> None:
            raise MemoryError("no memory for the head")

        monkeypatch.setattr(type(model.llm), "_get_resized_lm_head", fail)
        with pytest.raises(MemoryError):
            model.resize_token_embeddings(72)
        _assert_same(_state(model), before)
        assert (model.get_input_embeddings(), model.get_output_embeddings()) == modules


def test_embeddings_that_cannot_be_resized_are_refused_first() -> None:
    pytest.importorskip("peft")
    model = tiny_model(lora={"r": 2, "target_modules": ["q_proj", "embed_tokens"]})
    before = _state(model)
    with pytest.raises(ArgumentError, match="expected plain input embeddings"):
        model.resize_token_embeddings(72)
    _assert_same(_state(model), before)


# The attention function


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.set_attn_implementation({"llm_config": "eager"}),
        lambda model: model.llm.set_attn_implementation("eager"),
        lambda model: setattr(model.llm.config, "_attn_implementation", "eager"),
    ],
    ids=["model", "part by name", "the LLM's own", "written into the configuration"],
)
def test_another_attention_function_keeps_the_source(change: Callable[[Any], Any]) -> None:
    model, cold = tiny_model(), tiny_model()
    expected = _logits(model)
    with torch.no_grad():
        for gate in cold.cross_attention:
            gate.adaption_gate.zero_()
    assert (_logits(cold) - expected).abs().max() > 0.1  # what it would be without the source
    change(model)
    torch.testing.assert_close(_logits(model), expected)
    assert model.llm.config._attn_implementation == "layalign_eager"
    torch.testing.assert_close(_logits(copy.deepcopy(model)), expected)
    model.set_attn_implementation("sdpa")
    assert torch.equal(_logits(model), expected)
    assert model.unload().config._attn_implementation in ("sdpa", "eager")


def test_an_attached_llm_alone_keeps_its_source_too() -> None:
    llm = tiny_llm()
    attach(llm)
    llm.set_attn_implementation("eager")
    assert all(carries_source(module) for _, module in attention_modules(llm).values())
    detach(llm)
    llm.set_attn_implementation("eager")
    assert llm.config._attn_implementation == "eager"


# Adapters


def test_adapters_go_into_the_llm_alone() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(encoder="qwen2")  # an encoder whose maps have the same names
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter(peft.LoraConfig(**LORA))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains - own == {n for n, _ in model.named_parameters() if ".lora_" in n} and own <= trains
    assert not any(".lora_" in n for n, _ in model.encoder.named_parameters())
    assert model.config.lora is not None and model.config.lora["r"] == 2
    with pytest.raises(ArgumentError, match="has an adapter already"):
        model.add_adapter(peft.LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
    _trains_and_generates(model)


@pytest.mark.parametrize(
    "method", ["active_adapters", "disable_adapters", "enable_adapters", "get_adapter_state_dict", "set_adapter"]
)
def test_adapter_methods_are_the_llms(method: str) -> None:
    pytest.importorskip("peft")
    model = tiny_model(lora=LORA)
    arguments = ("default",) if method == "set_adapter" else ()
    try:
        expected = getattr(copy.deepcopy(model.llm), method)(*arguments)
    except ValueError as error:  # a transformers that wants a later peft refuses both
        with pytest.raises(ValueError, match=re.escape(str(error))):
            getattr(model, method)(*arguments)
        return
    found = getattr(model, method)(*arguments)
    assert (found.keys() == expected.keys()) if isinstance(expected, dict) else found == expected


def test_disabled_and_deleted_adapters_are_gone(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    expected = _logits(model)
    model.add_lora(LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(_logits(model), expected)
    if metadata.version("peft") < MIN_PEFT_VERSION:  # see above
        with pytest.raises(ValueError, match="PEFT"):
            model.disable_adapters()
        return
    model.disable_adapters()
    torch.testing.assert_close(_logits(model), expected)
    model.delete_adapter("default")
    torch.testing.assert_close(_logits(model), expected)
    assert model.config.lora is None
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(_logits(LayAlignForCausalLM.from_pretrained(tmp_path)), expected)


# What works as it is inherited


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "tie_weights": lambda m: m.tie_weights(),
    "init_weights": lambda m: m.init_weights(),
    "gradient_checkpointing": lambda m: m.gradient_checkpointing_enable(),
    "gradient_checkpointing, re-entrant": lambda m: m.gradient_checkpointing_enable({"use_reentrant": True}),
    "gradient_checkpointing off": lambda m: (m.gradient_checkpointing_enable(), m.gradient_checkpointing_disable()),
    "enable_input_require_grads": lambda m: m.enable_input_require_grads(),
    "input_require_grads off": lambda m: (m.enable_input_require_grads(), m.disable_input_require_grads()),
    "train and eval": lambda m: m.train().eval(),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict(), strict=True),
    "float": lambda m: m.float(),
    "resize to the same": lambda m: m.resize_token_embeddings(VOCABULARY),
    "the same embeddings": lambda m: m.set_input_embeddings(m.get_input_embeddings()),
    "the same head": lambda m: m.set_output_embeddings(m.get_output_embeddings()),
    "add_model_tags": lambda m: m.add_model_tags(["one"]),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_leaves_the_numbers_alone(case: str) -> None:
    model = tiny_model()
    expected, trains = _logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    HARMLESS[case](model)
    torch.testing.assert_close(_logits(model), expected, rtol=0, atol=0)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    _trains_and_generates(model)


@pytest.mark.parametrize(
    "change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.bfloat16)]
)
@pytest.mark.parametrize("encoder", ["mt5", "xlm-roberta"])
def test_another_dtype(change: Callable[[Any], Any], encoder: str) -> None:
    model = tiny_model(encoder=encoder)
    expected = _logits(model)
    change(model)
    assert model.dtype == model.llm.dtype == model.encoder.dtype != torch.float32
    torch.testing.assert_close(_logits(model), expected, atol=0.1, rtol=0.05)
    _trains_and_generates(model)


def test_other_embeddings_are_frozen_as_the_llms_own() -> None:
    model = tiny_model()
    embeddings, head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY, bias=False)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    assert model.llm.get_input_embeddings() is embeddings and model.llm.lm_head is head
    _trains_and_generates(model)


def test_what_is_counted_is_the_whole() -> None:
    model = tiny_model()
    parts = (model.llm, model.encoder, model.mapping, model.encoder_aligner, model.cross_attention)
    numbers = [parameter.numel() for part in parts for parameter in part.parameters()]
    assert model.num_parameters() == sum(numbers)
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_memory_footprint(return_buffers=False) == 4 * sum(numbers)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.get_decoder() is model.llm.get_decoder() and model.get_encoder() is model.encoder
    assert model.can_generate() and model.base_model is model.llm


def test_a_configuration_builds_the_same_model() -> None:
    model = tiny_model()
    for other in (
        AutoModelForCausalLM.from_config(model.config),
        LayAlignForCausalLM(model.config),
        AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).float(),
    ):
        other.load_state_dict(model.state_dict(), strict=True)
        other.freeze()
        atol = 0.05 if other.config.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(_logits(other.eval()), _logits(model), atol=atol, rtol=0)
        _trains_and_generates(other)


# The configuration


@pytest.mark.parametrize("llm", ["llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox"])
def test_a_configuration_answers_as_its_llms(llm: str, tmp_path: Path) -> None:
    model = tiny_model(llm=llm)
    names = (
        "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "use_cache",
        "tie_word_embeddings", "is_encoder_decoder",
    )  # fmt: skip
    missing = object()
    before = set(model.config.to_dict())
    for name in names:
        assert getattr(model.config, name, missing) == getattr(model.llm.config, name, missing), name
    assert not hasattr(model.config, "quantization_config")
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not written.keys() & (set(names) - {"is_encoder_decoder"}) and set(model.config.to_dict()) == before
    assert LayAlignConfig.from_pretrained(tmp_path).hidden_size == model.llm.config.hidden_size
    empty = LayAlignConfig()
    assert not hasattr(empty, "hidden_size") and copy.deepcopy(empty).to_dict() == empty.to_dict()


def test_deepspeeds_auto_entries_are_filled(tmp_path: Path) -> None:
    class Settings(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):  # without the package, which its constructor wants
        def __init__(self, settings: dict[str, Any]) -> None:
            HfDeepSpeedConfig.__init__(self, settings)
            self.mismatches, self._dtype = [], None

    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    found = []
    for model in (tiny_llm(), tiny_model()):
        settings = Settings({"zero_optimization": {"stage": 3, **dict.fromkeys(names, "auto")}})
        settings.trainer_config_finalize(TrainingArguments(str(tmp_path), use_cpu=True), model, 10)
        found.append(settings.config["zero_optimization"])
    assert found[0] == found[1] and found[0]["reduce_bucket_size"] == 32 * 32
