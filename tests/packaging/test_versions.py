"""transformers' versions: the cache under both of its names, and what is said where a version does not fit."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
from tiny import batch, tiny_model
from transformers import DynamicCache

import layalign
from layalign import ArgumentError, cli
from layalign.utils import versions
from layalign.utils.versions import CACHE_NAMES, cache_of

ROOT = Path(__file__).parents[2]

NOTE = r"transformers \S+ is installed; tested with 5\.0 to 5\.24"


def filled(model):
    """A cache with the source and three sequences."""
    return cache_of(model(**batch(model=model, targets=None), use_cache=True))


def one_more(model) -> dict[str, torch.Tensor]:
    """The next token of each sequence, and the mask of all."""
    mask = batch(model=model, targets=None)["attention_mask"]
    return dict(input_ids=torch.full((3, 1), 5), attention_mask=torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_taken_under_both_names(name: str) -> None:
    model = tiny_model()
    inputs, more = batch(model=model, targets=None), one_more(model)
    expected = model(**more, **{versions.generation_cache_name(): filled(model)}).logits
    cache = DynamicCache(config=model.llm.config)
    assert cache_of(model(**inputs, use_cache=True, **{name: cache})) is cache
    torch.testing.assert_close(model(**more, **{name: cache}).logits, expected)
    more["input_ids"] = torch.cat([inputs["input_ids"], more["input_ids"]], dim=1)
    found = model.generate(**more, **{name: filled(model)}, max_new_tokens=1, do_sample=False)
    assert torch.equal(found[:, -1], expected[:, -1].argmax(-1))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_an_llm_gets_the_cache_under_the_name_that_it_takes(name: str) -> None:
    model = tiny_model()
    inputs, more = batch(model=model, targets=None), one_more(model)
    expected = model(**more, cache=filled(model)).logits
    weights, llm, calls = model.state_dict(), model.unload(), []
    taken, original = versions.cache_name(llm.forward), llm.forward

    def old(self, inputs_embeds=None, past_key_values=None, **kwargs):
        return called(inputs_embeds, past_key_values, kwargs)

    def new(self, inputs_embeds=None, cache=None, **kwargs):
        return called(inputs_embeds, cache, kwargs)

    def called(inputs_embeds, cache, kwargs):
        assert not kwargs.keys() & CACHE_NAMES
        calls.append(cache)
        return original(inputs_embeds=inputs_embeds, **{taken: cache}, **kwargs)

    llm.forward = MethodType(new if name == "cache" else old, llm)
    model = type(model)(model.config, encoder=model.encoder, llm=llm).eval()
    model.load_state_dict(weights)
    torch.testing.assert_close(model(**more, cache=filled(model)).logits, expected)
    assert calls[-1].get_seq_length() == more["attention_mask"].shape[1]
    assert model.generate(**inputs, max_new_tokens=2, eos_token_id=[]).shape[1] == inputs["input_ids"].shape[1] + 2


def test_an_unknown_cache_argument_is_an_error_with_the_tested_versions() -> None:
    model = tiny_model()
    with pytest.raises(ArgumentError, match=rf"^kv_store: expected the cache as cache or past_key_values; {NOTE}$"):
        model(**one_more(model), kv_store=filled(model))
    with pytest.raises(ArgumentError, match="^cache, past_key_values: expected one cache"):
        model(**batch(model=model), cache=filled(model), past_key_values=filled(model))

    def forward(inputs_embeds, kv_store=None): ...

    with pytest.raises(ArgumentError, match=rf"forward: expected an argument named cache or past_key_values; {NOTE}$"):
        versions.cache_name(forward)


def test_a_name_that_transformers_no_longer_has_is_an_error_with_the_tested_versions() -> None:
    text = rf"cannot import name 'Gone' from 'transformers'.*; {NOTE}$"
    with pytest.raises(ImportError, match=text), versions.importing():
        from transformers import Gone  # noqa: F401


def test_imports_and_commands_name_the_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new transformers in miniature: a name is gone, and a command fails for it."""
    import transformers.masking_utils

    assert cli.describe(TypeError("no"))[0] == "TypeError: no"  # a tested version is not to blame
    monkeypatch.delitem(sys.modules, "layalign.modeling.attention_interface")
    monkeypatch.delitem(vars(layalign), "attach", raising=False)
    monkeypatch.delattr(transformers.masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS")
    for start in (lambda: layalign.attach, lambda: importlib.import_module("layalign.modeling.attention_interface")):
        with pytest.raises(ImportError, match=rf"^cannot import name 'ALL_MASK_.*; {NOTE}$"):
            start()
    monkeypatch.setitem(versions.TESTED, "transformers", ("4.0", "4.1"))
    line, _ = cli.describe(TypeError("no"))
    assert re.fullmatch(r"TypeError: no; transformers \S+ is installed; tested with 4\.0 to 4\.1", line)


def test_the_ranges_are_the_same_everywhere() -> None:
    (lowest, newest), (low_torch, new_torch) = versions.TESTED["transformers"], versions.TESTED["torch"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"transformers>={lowest},' in project and f'"torch>={low_torch}"' in project
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert f"| transformers | {lowest} to {newest} without 5.4 (" in page
    assert f"| PyTorch | {low_torch} to {new_torch} (" in page
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\ntransformers=={newest}." in pins
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    lists = {
        ast.unparse(node.targets[0]): [getattr(each, "value", None) for each in node.value.elts]
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    }
    for name in ("TRANSFORMERS", "MINORS", "ACROSS"):
        assert lists[name][0].startswith(f"{lowest}.") and lists[name][-1].startswith(f"{newest}."), name
    assert lists["TORCH"][0].startswith(f"{low_torch}.") and lists["TORCH"][-1].startswith(f"{new_torch}.")
