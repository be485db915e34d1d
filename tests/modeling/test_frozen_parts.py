"""Frozen parts in checkpoints: compared with what their names give, written where they differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import logits, named_model, tiny_encoder, tiny_folders, tiny_llm
from torch import nn
from transformers import AutoModelForCausalLM

from layalign import CheckpointError, LayAlignForCausalLM
from layalign.modeling import fingerprint
from layalign.modeling.fingerprint import difference

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def parts(tmp_path: Path) -> tuple[str, str]:
    return tiny_folders(tmp_path)


# Weights


def numbers(dtype: torch.dtype = torch.float32, count: int = 300_001) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("file", DTYPES[:3])
@pytest.mark.parametrize("saved", DTYPES)
def test_one_file_in_any_two_dtypes_is_one_part(file: torch.dtype, saved: torch.dtype) -> None:
    stored = numbers(file)
    entry = fingerprint.fingerprint(stored.to(saved))
    for loaded in DTYPES:
        assert difference(entry, stored.to(loaded)) is None, loaded
    for half in (torch.bfloat16, torch.float16):  # loaded in half precision, widened afterwards
        assert difference(entry, stored.to(half).float()) is None or saved != half
    widened = fingerprint.fingerprint(stored.to(torch.bfloat16).float())
    assert difference(widened, stored.to(saved)) is None


def small_step(x: torch.Tensor) -> torch.Tensor:
    return x + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))


def one_row(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:-32], x[-32:] * 1.02])


def pruned(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 1e-3, 0.0, x)


def rows_swapped(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[1000:2000], x[:1000], x[2000:]])


def last_bit(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:-1], torch.nextafter(x[-1:], torch.tensor(9.0))])


def two_signs(x: torch.Tensor) -> torch.Tensor:
    changed = x.clone()
    changed[[1, 3]] *= -1  # the highest bits of two words
    return changed


@pytest.mark.parametrize("change", [small_step, one_row, pruned, rows_swapped, last_bit, two_signs])
def test_small_changes_are_seen(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    whole = numbers()
    changed = change(whole)
    assert difference(fingerprint.fingerprint(whole), changed) == "other values"
    assert difference(fingerprint.fingerprint(changed), whole) == "other values"
    for saved in (torch.float32, torch.bfloat16, torch.float16):
        for loaded in (torch.bfloat16, torch.float16):
            seen = not torch.equal(whole.to(loaded), changed.to(loaded)) and saved in (torch.float32, loaded)
            if seen:  # only what the coarser dtype still shows
                entry = fingerprint.fingerprint(whole.to(saved))
                assert difference(entry, changed.to(loaded)) == "other values", (saved, loaded)


def test_bfloat16_against_float16_is_a_matter_of_the_rounding_error() -> None:
    whole = numbers()
    entry = fingerprint.fingerprint(whole.bfloat16())
    assert entry.split()[2] != fingerprint.fingerprint(whole.half().bfloat16()).split()[2]
    assert difference(entry, whole.half()) is None
    generator = torch.Generator().manual_seed(3)
    lora = torch.randn(len(whole), generator=generator) * 0.02 * 0.05  # a merged adapter: 5 % of the weights
    assert difference(entry, (whole + lora).half()) == "other values"
    assert difference(entry, rows_swapped(whole).half()) == "other values"


def test_fingerprints_do_not_depend_on_how_much_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [fingerprint.fingerprint(numbers(dtype)) for dtype in DTYPES]
    assert found[1].split()[:3] == ["bfloat16", "300001", found[0].split()[3]]  # the rounding of float32
    monkeypatch.setitem(fingerprint._STEP, "cpu", 1 << 20)
    again = [fingerprint.fingerprint(numbers(dtype)) for dtype in DTYPES]
    assert [entry.split()[:5] for entry in again] == [entry.split()[:5] for entry in found]
    for one, two in zip(found[1:3], again[1:3], strict=True):
        assert float(one.split()[5]) == pytest.approx(float(two.split()[5]), rel=1e-4)
    for odd in (torch.zeros(0), torch.tensor(2.0), torch.randn(3, 5).T, torch.ones(7).expand(4, 7)):
        assert difference(fingerprint.fingerprint(odd), odd.clone()) is None
    assert difference(fingerprint.fingerprint(torch.zeros(2, 3)), torch.zeros(3, 2)) == "shape 3x2 instead of 2x3"


def test_a_fingerprint_is_the_same_on_every_machine() -> None:
    """Checkpoints hold these: whoever changes the hash makes all of them read as changed."""
    entry = fingerprint.fingerprint(torch.arange(100.0) / 7)
    assert entry.startswith("float32 100 2c3f6af0a5b17d11 175dba89ef01f7ff d268096106144c7f -")
    entry = fingerprint.fingerprint((torch.arange(100.0) / 7).half())
    assert entry.startswith("float16 100 d268096106144c7f - - -14.505")


# Saving what a name does not give


def merge_lora(model: LayAlignForCausalLM) -> None:
    weight = model.llm.get_parameter(QUERY)
    weight.data += 1e-3 * torch.randn(32, 2) @ torch.randn(2, 32)  # past the version counter too


def train_a_step(model: LayAlignForCausalLM) -> None:
    model.llm.requires_grad_(True)
    optimizer = torch.optim.SGD(model.llm.parameters(), lr=1e-3)
    model.llm(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step()
    model.llm.requires_grad_(False)


def prune(model: LayAlignForCausalLM) -> None:
    with torch.no_grad():
        for module in model.llm.modules():
            if isinstance(module, nn.Linear):
                module.weight.masked_fill_(module.weight.abs() < 0.02, 0.0)


def turn_otherwise(model: LayAlignForCausalLM) -> None:
    model.llm.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    model.llm.model.rotary_emb = type(model.llm.model.rotary_emb)(model.llm.config)


def change_encoder(model: LayAlignForCausalLM) -> None:
    with torch.no_grad():
        model.encoder.get_input_embeddings().weight[:, 7] *= 1.5


def exchange_layers(model: LayAlignForCausalLM) -> None:
    one, two = (model.llm.model.layers[number].self_attn.q_proj for number in (0, 1))
    one.weight, two.weight = two.weight, one.weight


CHANGES = [merge_lora, train_a_step, prune, turn_otherwise, change_encoder, exchange_layers]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_part_is_written_and_comes_back(
    parts, change: Callable[[LayAlignForCausalLM], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    model = named_model(parts)
    before = logits(model)
    change(model)
    changed = "encoder" if change is change_encoder else "llm"
    expected = logits(model)
    assert (expected - before).abs().max() > 1e-5
    with pytest.raises(CheckpointError, match=f"changed_frozen: the {changed} is not what its name .* gives: "):
        model.save_pretrained(tmp_path / "out", changed_frozen="refuse")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out")
    what = {merge_lora: QUERY, prune: "other values", turn_otherwise: "rope_theta 5.0 instead of 10000.0"}
    assert f"the {changed} is not what its name {parts[changed == 'llm']} gives: " in caplog.text
    assert what.get(change, "other values") in caplog.text
    assert "so it is written with the checkpoint" in caplog.text
    names = {name.split(".")[0] for name in load_file(tmp_path / "out" / "model.safetensors")}
    assert names & {"encoder", "llm"} == {changed}
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "second")  # and it stays so
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path / "second")), expected)
    shutil.rmtree(parts[changed == "llm"])  # nor is it forgotten when nobody can compare
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "second")
    again.save_pretrained(tmp_path / "third")
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path / "third")), expected)


def test_resized_embeddings_and_other_vocabularies(parts, tmp_path: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(parts[1])
    llm.resize_token_embeddings(72, mean_resizing=False)
    model = LayAlignForCausalLM.from_encoder_and_llm(parts[0], llm)
    model.save_pretrained(tmp_path / "out")
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.get_text_config().vocab_size == again.llm.config.vocab_size == 72
    assert torch.equal(logits(again), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoder", ["mt5", "m2m_100", "xlm-roberta", "bert", "modernbert", "qwen2"])
def test_an_unchanged_part_is_left_to_its_name(
    encoder: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its files call its weights, and in whatever dtype they are loaded."""
    tiny_encoder(encoder).save_pretrained(tmp_path / "encoder")
    tiny_llm("gpt2" if encoder == "bert" else "llama", tie_word_embeddings=encoder == "mt5").save_pretrained(
        tmp_path / "llm", max_shard_size=20_000
    )
    names = str(tmp_path / "encoder"), str(tmp_path / "llm")
    kwargs = {"dtype": dtype}
    model = LayAlignForCausalLM.from_encoder_and_llm(*names, encoder_kwargs=kwargs, llm_kwargs=kwargs)
    model.save_pretrained(tmp_path / "out", changed_frozen="refuse")
    assert not any(name.startswith(("encoder.", "llm.")) for name in load_file(tmp_path / "out" / "model.safetensors"))
    for load in (None, torch.float32, torch.bfloat16, torch.float16):
        again = LayAlignForCausalLM.from_pretrained(tmp_path / "out", **({} if load is None else {"dtype": load}))
        again.save_pretrained(tmp_path / "again", changed_frozen="refuse")
    assert [record for record in caplog.records if record.name == "layalign"] == []


def test_old_file_formats_are_compared_too(parts, tmp_path: Path) -> None:
    for folder in parts:
        state = load_file(Path(folder) / "model.safetensors")
        torch.save(state, Path(folder) / "pytorch_model.bin")
        (Path(folder) / "model.safetensors").unlink()
    model = named_model(parts)
    model.save_pretrained(tmp_path / "out", changed_frozen="refuse")
    merge_lora(model)
    with pytest.raises(CheckpointError, match=QUERY):
        model.save_pretrained(tmp_path / "out", changed_frozen="refuse")


def test_files_are_read_once_and_memory_every_time(parts, tmp_path: Path, monkeypatch) -> None:
    model, reads = named_model(parts), []
    real = fingerprint.differences_from_files
    monkeypatch.setattr(fingerprint, "differences_from_files", lambda *a: reads.append(a) or real(*a))
    for _ in range(3):
        model.save_pretrained(tmp_path / "out", changed_frozen="refuse")
    assert len(reads) == 2
    pointer = model.llm.get_parameter(QUERY).data_ptr()
    merge_lora(model)
    assert model.llm.get_parameter(QUERY).data_ptr() == pointer
    with pytest.raises(CheckpointError, match=QUERY):
        model.save_pretrained(tmp_path / "out", changed_frozen="refuse")


def test_a_part_that_its_class_cannot_hold_is_refused_when_saving(parts, tmp_path: Path) -> None:
    model = named_model(parts)
    model.llm.model.layers[0].extra = nn.Linear(3, 3)
    for frozen in (False, True):
        model.llm.requires_grad_(not frozen)
        with pytest.raises(CheckpointError, match=r"llm: cannot be written so that it loads again: .*extra"):
            model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Loading another part than was saved


def test_a_name_that_gives_something_else_later_is_refused(
    parts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    named_model(parts).save_pretrained(tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(parts[1])
    with torch.no_grad():
        other.get_parameter(QUERY)[3].mul_(1.01)
    other.save_pretrained(parts[1])
    what = rf"the llm \(.*\) is not the one that the checkpoint was saved with: {QUERY}: other values"
    for given in ({}, {"llm": other}):
        with pytest.raises(CheckpointError, match=what):
            LayAlignForCausalLM.from_pretrained(tmp_path / "out", **given)
        LayAlignForCausalLM.from_pretrained(tmp_path / "out", changed_frozen="warn", **given)
        assert "is not the one that the checkpoint was saved with" in caplog.text
        caplog.clear()
    config = json.loads((Path(parts[0]) / "config.json").read_text())
    tiny_llm(num_key_value_heads=2).save_pretrained(parts[1])
    (Path(parts[0]) / "config.json").write_text(json.dumps({**config, "feed_forward_proj": "relu"}))
    with pytest.raises(CheckpointError, match=r"the encoder .*configuration: \w+ .* instead of"):
        LayAlignForCausalLM.from_pretrained(tmp_path / "out")


def test_a_checkpoint_of_another_transformers_is_compared_by_content(parts, tmp_path: Path) -> None:
    named_model(parts).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    entries = config["frozen_fingerprints"]["llm"]
    entries["model.blocks.1.query.weight"] = entries.pop(QUERY)  # the same weight under another name
    path.write_text(json.dumps(config))
    LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    entries["model.gone.weight"] = entries["model.norm.weight"][:-1] + "7"
    entries["model.gone.weight"] = entries["model.gone.weight"].replace(" 32 ", " 33 ")
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model.gone.weight: is missing"):
        LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    path.write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    LayAlignForCausalLM.from_pretrained(tmp_path / "out")


def test_old_checkpoints_load(parts, tmp_path: Path) -> None:
    model = named_model(parts)
    for whole in (False, True):
        model.save_pretrained(tmp_path / "out", save_frozen=whole)
        path = tmp_path / "out" / "config.json"
        config = json.loads(path.read_text())
        assert config["frozen_saved"] is whole
        for key in ("frozen_fingerprints", "frozen_folders"):
            del config[key]
        path.write_text(json.dumps(config))
        assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_offloaded_parts_are_compared_where_their_weights_are(parts, tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = named_model(parts)
    expected = fingerprint.examine(model.llm).entries
    cpu_offload(model.llm, execution_device=torch.device("cpu"))
    assert model.llm.get_parameter(QUERY).is_meta
    assert fingerprint.examine(model.llm) == fingerprint.Found(expected)


def test_parts_that_cannot_be_read_say_so(parts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = named_model(parts)
    packed = model.llm.model.layers[0].self_attn.q_proj
    packed.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    for _ in range(2):
        model.save_pretrained(tmp_path / "out")
    assert caplog.text.count("it cannot be checked that all of it is what that name gives") == 1
    assert "1 of 30 weights cannot be read (model.layers.0.self_attn.q_proj.weight: " in caplog.text
    merge_lora(model)  # what can be read is compared
    with pytest.raises(CheckpointError, match=QUERY):
        model.save_pretrained(tmp_path / "out", changed_frozen="refuse")
