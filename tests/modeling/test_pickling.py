"""torch.save, pickle and copies of models, attached LLMs and caches, here and in another process."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, tiny_encoder, tiny_llm, tiny_model
from torch import nn
from transformers import DynamicCache, StaticCache

from layalign import LayAlignForCausalLM, attach
from layalign.modeling.cache import get_source


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


WAYS = {"torch.save": _saved, "pickle": _pickled, "deepcopy": copy.deepcopy}


def _inputs(model: LayAlignForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch(model=model).items() if name != "labels"}


def _generate(model: LayAlignForCausalLM) -> None:
    model.generate(**_inputs(model), max_new_tokens=2, do_sample=False)


def _train(model: LayAlignForCausalLM) -> None:
    model.train()(**batch(model=model)).loss.backward()
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "parts"),
    [
        (lambda model: None, {}),
        (_generate, {"encoder": "bert", "llm": "gemma3_text"}),
        (_train, {"lora": {"r": 2, "target_modules": ["q_proj"]}}),
        # transformers then puts its recorders into the LLM too.
        (lambda model: model(**_inputs(model), output_hidden_states=True), {"encoder": "m2m_100", "llm": "gpt_neox"}),
    ],
    ids=["fresh", "generate", "training step, LoRA", "hidden states asked for"],
)
def test_a_model_and_its_parts_come_back_as_they_were(before: Any, parts: dict[str, Any]) -> None:
    model = tiny_model(**parts)
    inputs = _inputs(model)
    before(model)
    expected = model(**inputs).logits
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    encoded = model.encoder(inputs["encoder_input_ids"], output_hidden_states=True).hidden_states
    for name, way in WAYS.items():
        other = way(model)
        assert torch.equal(other(**inputs).logits, expected), name
        assert {n for n, p in other.named_parameters() if p.requires_grad} == trained
        assert other._attentions[0] in set(other.llm.modules())
        assert torch.equal(_tokens(other, inputs), _tokens(model, inputs))
        other(**batch(model=other)).loss.backward()
        assert other.cross_attention[0].adaption_gate.grad is not None
        assert isinstance(way(model.llm), type(model.llm))
        again = way(model.encoder)(inputs["encoder_input_ids"], output_hidden_states=True).hidden_states
        assert len(again) == len(encoded) and all(map(torch.equal, again, encoded))
    assert torch.equal(model(**inputs).logits, expected)  # and the model itself has lost nothing


def _tokens(model: LayAlignForCausalLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=3, do_sample=False)


def test_copies_of_a_part_keep_the_recorders() -> None:
    model = tiny_model(encoder="bert")
    for copied in (copy.copy(model.encoder), copy.deepcopy(model.encoder)):
        layer = copied.encoder.layer[0]
        assert len(layer._forward_hooks) == len(model.encoder.encoder.layer[0]._forward_hooks) > 0
    assert copied._output_capturing_hooks_installed is True
    assert len(copy.copy(model.encoder.encoder.layer[0])._forward_hooks) > 0
    seen: list[int] = []
    model.encoder.encoder.layer[0].register_forward_hook(_user_hook)
    assert _user_hook in _pickled(model.encoder).encoder.layer[0]._forward_hooks.values()
    assert not seen


def _user_hook(module: nn.Module, args: Any, output: Any) -> None:
    return None


@pytest.mark.parametrize("kind", ["default", "dynamic", "static"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_cache_with_a_source_goes_on_elsewhere(kind: str, way: str) -> None:
    model = tiny_model()
    inputs, ids = _inputs(model), torch.tensor([[5], [6], [7]])
    caches = {
        "default": lambda: None,
        "dynamic": lambda: DynamicCache(config=model.llm.config),
        "static": lambda: StaticCache(config=model.llm.config, max_cache_len=32),
    }
    with torch.no_grad():
        cache = model(**inputs, past_key_values=caches[kind](), use_cache=True).past_key_values
        for _ in range(2):  # from the second step on, launches are kept that hold addresses
            model(input_ids=ids, past_key_values=cache)
        other = WAYS[way](cache)
        expected = model(input_ids=ids, past_key_values=cache).logits
        for state in (*get_source(cache).keys, *get_source(cache).values):
            state.fill_(torch.nan)
        assert type(other) is type(cache)
        torch.testing.assert_close(model(input_ids=ids, past_key_values=other).logits, expected)


_ELSEWHERE = """
import sys, torch
model, inputs, expected, llm, ids, bare, cache = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(**inputs).logits, expected)
assert len(model(**inputs, output_hidden_states=True).hidden_states) == 4
assert torch.equal(llm(ids).logits, bare)
with torch.no_grad():
    model(input_ids=torch.tensor([[5], [6], [7]]), past_key_values=cache)
"""


@pytest.mark.slow
def test_another_process_reads_all_of_it(tmp_path: Path) -> None:
    model, llm, ids = tiny_model(), tiny_llm("qwen2"), torch.tensor([[5, 6, 7]])
    inputs = _inputs(model)
    expected, bare = model(**inputs).logits.detach(), llm(ids).logits.detach()
    with torch.no_grad():
        cache = model(**inputs, past_key_values=StaticCache(config=model.llm.config, max_cache_len=32)).past_key_values
    attach(llm)  # its attention function has a name that only this library knows
    torch.save((model, inputs, expected, llm, ids, bare, cache), tmp_path / "all.pt")
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "all.pt")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_a_bare_encoder_can_be_saved_after_joining() -> None:
    encoder, llm = tiny_encoder("xlm-roberta"), tiny_llm()
    LayAlignForCausalLM.from_encoder_and_llm(encoder, llm)
    assert isinstance(_saved(encoder), type(encoder)) and isinstance(_saved(llm), type(llm))
