"""GGUF files as the LLM: read as transformers reads them, named in configurations and checkpoints."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tiny import logits, open_gates, tiny_encoder
from tiny_gguf import VOCABULARY, tiny_llama, write_gguf
from tiny_training import byte_tokenizer, write_data
from transformers import AutoModelForCausalLM

from layalign import ArgumentError, CheckpointError, LayAlignForCausalLM
from layalign.modeling import gguf_files, names
from layalign.modeling.encoders import load_encoder, load_llm
from layalign.modeling.loading import load_model
from layalign.modeling.tokenization import load_tokenizer, load_tokenizers
from layalign.training import TrainConfig, train
from layalign.training.loading import load_train_config

IDS = torch.tensor([[5, 70, 11, 200, 33, 6, 9]])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with encoder/ and ggufs/tiny.gguf."""
    size = len(byte_tokenizer(add_eos=True))
    tiny_encoder(vocab_size=size).save_pretrained(tmp_path / "encoder")
    byte_tokenizer(add_eos=True).save_pretrained(tmp_path / "encoder")
    (tmp_path / "ggufs").mkdir()
    write_gguf(tmp_path / "ggufs" / "tiny.gguf", kind="Q8_0")
    return tmp_path


def joined(place: Path, **kwargs: Any) -> LayAlignForCausalLM:
    torch.manual_seed(2)
    llm = kwargs.pop("llm", str(place / "ggufs" / "tiny.gguf"))
    model = LayAlignForCausalLM.from_encoder_and_llm(str(place / "encoder"), llm, **kwargs)
    open_gates(model)
    return model.eval()


# Reading


def test_weights_are_those_that_were_written(tmp_path: Path) -> None:
    llm = tiny_llama()
    found = load_llm(str(write_gguf(tmp_path / "a.gguf", llm)))
    assert torch.equal(found(IDS).logits, llm(IDS).logits)
    assert found.config.name_or_path == str(tmp_path / "a.gguf")


@pytest.mark.parametrize("kind, most", [("F16", 0.01), ("Q8_0", 0.1), ("Q4_1", 2.0)])
def test_packed_weights_are_unpacked_once_and_may_be_saved(kind: str, most: float, tmp_path: Path) -> None:
    llm = tiny_llama()
    found = load_llm(str(write_gguf(tmp_path / "a.gguf", llm, kind)), dtype=torch.float32)
    away = (found(IDS).logits - llm(IDS).logits).abs().max()
    assert 0 < away < most
    found.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(IDS).logits, found(IDS).logits)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.slow
def test_no_code_of_the_hub_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")
    monkeypatch.setattr(kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(kernels, "get_gguf_kernel", lambda: pytest.fail("a kernel was asked for"))
    monkeypatch.setattr(kernels, "get_ggml_layer_mapping", lambda: pytest.fail("layers were asked for"))
    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.get_gguf_kernel", lambda: pytest.fail("a kernel"))
    load_llm(str(write_gguf(tmp_path / "a.gguf", kind="Q8_0")))
    with gguf_files.without_kernels():
        kernels.kernelize_ggml_layers(None)
    assert kernels.is_kernels_available()


def test_head_has_metadata_and_places(tmp_path: Path) -> None:
    head = gguf_files.read_head(write_gguf(tmp_path / "a.gguf", kind="Q4_0"))
    assert head.architecture == "llama" and head.metadata["llama.block_count"] == 2
    assert head.metadata["tokenizer.ggml.tokens"] == VOCABULARY
    assert head.tensors["blk.1.ffn_down.weight"].shape == (64, 96) and len(head.tensors) == 20
    assert head.tensors["output_norm.weight"].start % 32 == 0


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "damaged.gguf"

    def refused(content: bytes, match: str) -> None:
        path.write_bytes(content)
        for ask in (
            gguf_files.read_head,
            lambda name: load_llm(str(name)),
            lambda name: load_tokenizer("llm", str(name)),
        ):
            with pytest.raises(CheckpointError, match=rf"damaged\.gguf.*({match})"):
                ask(path)

    refused(b"", "got 0 bytes")
    refused(b"GGML" + whole[4:], "little-endian GGUF file")
    refused(whole[:4] + struct.pack("<I", 9) + whole[8:], "version 9")
    refused(whole[:8] + struct.pack("<Q", 2**60) + whole[16:], "expected at most .* tensors")
    refused(whole[:16] + struct.pack("<Q", 2**60) + whole[24:], "expected at most .* keys")
    refused(whole[:24] + struct.pack("<Q", 2**62) + whole[32:], "it is cut off")
    refused(whole[: len(whole) // 2], "cut off")
    refused(whole[:3000], "cut off")
    key = whole.index(b"llama.block_count") + len(b"llama.block_count") + 4
    refused(whole[:key] + struct.pack("<I", 10**6) + whole[key + 4 :], "num_layers: expected at most 4096")


@pytest.mark.slow
def test_bytes_that_changed_by_chance_never_bring_another_error(tmp_path: Path) -> None:
    whole, draw = write_gguf(tmp_path / "whole.gguf").read_bytes(), random.Random(0)
    head = whole.index(b"token_embd") + 2000
    path, refusals = tmp_path / "changed.gguf", 0
    for _ in range(300):
        content = bytearray(whole[: draw.choice([len(whole), draw.randrange(24, head)])])
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(min(head, len(content)))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            gguf_files.read_head(path)
        except CheckpointError as error:
            refusals += str(path) in str(error)
    assert refusals > 150


def test_without_the_package_the_error_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"llm: expected the package gguf.*pip install 'layalign\[weights\]'"):
        load_llm(str(place / "ggufs" / "tiny.gguf"))
    with pytest.raises(CheckpointError, match="expected the package gguf"):
        load_tokenizer("llm", str(place / "ggufs" / "tiny.gguf"))


def test_an_encoder_is_no_gguf_file(place: Path) -> None:
    with pytest.raises(ArgumentError, match="encoder: expected a folder or hub name, got a GGUF file"):
        load_encoder(str(place / "ggufs" / "tiny.gguf"))


def test_what_transformers_cannot_read_is_told(place: Path) -> None:
    import gguf

    path = place / "ggufs" / "other.gguf"
    writer = gguf.GGUFWriter(path, "wavtokenizer-dec")
    writer.add_name("Other")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(CheckpointError, match=r"llm: .*other\.gguf.* cannot be loaded: .*wavtokenizer"):
        LayAlignForCausalLM.from_encoder_and_llm(str(place / "encoder"), str(path))


# Its tokenizer


def test_single_digits_are_split_where_the_file_says_so(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = str(place / "ggufs" / "tiny.gguf")
    tokenizer = load_tokenizer("llm", file)
    assert tokenizer.tokenize("the 1919") == ["the", "Ġ", "1", "9", "1", "9"]
    assert tokenizer.decode(tokenizer("the 1919")["input_ids"]) == "the 1919"
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    assert caplog.text == ""


def test_a_name_may_be_relative(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_llm(str(place / "ggufs" / "tiny.gguf"))
    monkeypatch.chdir(place)
    assert load_tokenizer("llm", "ggufs/tiny.gguf").tokenize("19") == ["1", "9"]
    llm = load_llm("ggufs/tiny.gguf")
    assert all(torch.equal(a, b) for a, b in zip(llm.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("pre, warns", [("gpt-2", False), (None, False), ("poro-chat", True), ("llama-bpe", None)])
def test_another_way_to_split_is_told_where_it_is_not_known(
    pre: str | None, warns: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer("llm", str(write_gguf(tmp_path / "a.gguf", pre=pre)))
    told = "splits text in the way that llama.cpp calls" in caplog.text
    if warns is None:  # new releases of transformers know it
        splits = type(tokenizer.backend_tokenizer.pre_tokenizer).__name__ != "ByteLevel"
        assert told != splits
    else:
        assert told == warns and tokenizer.tokenize("1919") == ["19", "19"]


# Names


@pytest.mark.parametrize(
    "name, parts, path",
    [
        ("dir/a.gguf", ("dir", "a.gguf"), True),
        ("a.gguf", (".", "a.gguf"), True),
        ("/x/y/a.gguf", ("/x/y", "a.gguf"), True),
        ("owner/name:a.gguf", ("owner/name", "a.gguf"), False),
        ("owner/name:deep/a.gguf", ("owner/name", "deep/a.gguf"), False),
        ("./name:a.gguf", (".", "name:a.gguf"), True),
        ("owner/name", ("owner/name", None), False),
    ],
)
def test_names_of_gguf_files(name: str, parts: tuple[str, str | None], path: bool) -> None:
    assert names.gguf_parts(name) == parts and names.is_path(name) is path


def test_a_file_beside_a_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert names.with_gguf("ggufs", "tiny.gguf") == "ggufs/tiny.gguf"
    assert names.with_gguf("owner/name", "a.gguf") == "owner/name:a.gguf"
    for name, file in (("ggufs", "tiny.bin"), ("ggufs", "../a.gguf"), ("ggufs", "/a.gguf"), ("a.gguf", "b.gguf")):
        with pytest.raises(ArgumentError, match="gguf_file: expected"):
            names.with_gguf(name, file)
    with pytest.raises(CheckpointError, match=r"llm: no such file: .*/ggufs/no\.gguf"):
        load_llm("ggufs", gguf_file="no.gguf")
    assert load_llm("ggufs", gguf_file="tiny.gguf").config.name_or_path == str(place / "ggufs" / "tiny.gguf")


def test_a_file_of_a_hub_repository(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = place / "hub" / "models--someone--llm-gguf"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(place / "ggufs" / "tiny.gguf", snapshot / "tiny.gguf")
    model = joined(place, llm="someone/llm-gguf", llm_kwargs={"gguf_file": "tiny.gguf"})
    assert model.config.llm_name_or_path == "someone/llm-gguf:tiny.gguf"
    model.save_pretrained(place / "out")
    assert json.loads((place / "out" / "config.json").read_text())["frozen_saved"] is False
    again = LayAlignForCausalLM.from_pretrained(place / "out")
    assert torch.equal(logits(again), logits(model))
    assert load_tokenizer("llm", config=again.config).tokenize("19") == ["1", "9"]
    (place / "someone" / "llm-gguf").mkdir(parents=True)  # a folder of this name changes nothing
    monkeypatch.chdir(place)
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(place / "out")), logits(model))


# Checkpoints


@pytest.mark.slow
def test_a_checkpoint_over_a_gguf_file_loads_again(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = joined(place)
    model.save_pretrained(place / "out")
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["llm_name_or_path"] == str(place / "ggufs" / "tiny.gguf")
    assert config["frozen_folders"] == {"encoder": "../encoder", "llm": "../ggufs/tiny.gguf"}
    assert config["frozen_saved"] is False and caplog.text == ""
    again = LayAlignForCausalLM.from_pretrained(place / "out")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(place / "second")
    place.rename(place.parent / "moved")
    moved = place.parent / "moved"
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(moved / "second")), logits(model))
    _, llm_tokenizer = load_tokenizers(moved / "out", encoder=str(moved / "encoder"), config=again.config.__class__(
        **{**config, "llm_name_or_path": str(moved / "ggufs" / "tiny.gguf")}
    ))  # fmt: skip
    assert llm_tokenizer.tokenize("19") == ["1", "9"]


def test_in_another_dtype_it_is_the_same_llm(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = joined(place, llm_kwargs={"dtype": torch.bfloat16})
    model.save_pretrained(place / "out")
    assert json.loads((place / "out" / "config.json").read_text())["frozen_saved"] is False
    LayAlignForCausalLM.from_pretrained(place / "out", llm_kwargs={"dtype": "float32"})
    assert caplog.text == ""


def test_a_gguf_file_that_changed_is_refused(place: Path) -> None:
    joined(place).save_pretrained(place / "out")
    write_gguf(place / "ggufs" / "tiny.gguf", tiny_llama(seed=1), "Q8_0")
    with pytest.raises(CheckpointError, match="is not the one that the checkpoint was saved with"):
        LayAlignForCausalLM.from_pretrained(place / "out")
    (place / "ggufs" / "tiny.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"no such file: '.*/ggufs/tiny\.gguf'"):
        LayAlignForCausalLM.from_pretrained(place / "out")


def test_an_llm_that_is_not_its_gguf_file_any_more_is_written(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = joined(place)
    with torch.no_grad():
        model.llm.model.layers[1].mlp.up_proj.weight[3, 3] += 1
    model.save_pretrained(place / "out")
    assert json.loads((place / "out" / "config.json").read_text())["frozen_saved"] == ["llm"]
    assert "is not what its name" in caplog.text and "up_proj.weight: other values" in caplog.text
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(place / "out")), logits(model))


def test_all_of_it_may_be_saved(place: Path) -> None:
    model = joined(place)
    model.save_pretrained(place / "out", save_frozen=True)
    shutil.rmtree(place / "ggufs")
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(place / "out")), logits(model))


def test_an_llm_that_somebody_else_read_from_a_gguf_file_is_written(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its configuration names the folder, and nothing says which file of it."""
    options = gguf_files.arguments("tiny.gguf")
    model = joined(place, llm=AutoModelForCausalLM.from_pretrained(place / "ggufs", **options))
    model.save_pretrained(place / "out")
    assert "its folder has GGUF files and no other weights" in caplog.text
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(place / "out")), logits(model))


# Configurations


def test_a_configuration_names_the_file_in_two_ways(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    one = load_train_config({"encoder": "encoder", "llm": "ggufs/tiny.gguf"})
    two = load_train_config({"encoder": "encoder", "llm": "ggufs", "gguf_file": "tiny.gguf"})
    three = load_train_config({"encoder": "encoder"}, overrides=["llm=ggufs", "gguf_file=tiny.gguf"])
    assert one == two == three and one.llm == "ggufs/tiny.gguf" and one.gguf_file is None
    assert load_train_config({"llm": "a/b", "gguf_file": "c.gguf"}).llm == "a/b:c.gguf"
    with pytest.raises(ArgumentError, match="gguf_file: expected llm"):
        TrainConfig(gguf_file="tiny.gguf")


@pytest.mark.slow
def test_training_and_what_follows_it(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_data(place / "datas")
    config = load_train_config(
        {
            "encoder": str(place / "encoder"), "llm": str(place / "ggufs"), "gguf_file": "tiny.gguf",
            "data": str(place / "datas"), "output_dir": str(place / "out"), "batch_size": 4, "dev_size": 4,
            "max_steps": 2, "eval_steps": 0, "save_steps": 0, "progress": False, "use_cpu": True,
        }
    )  # fmt: skip
    train(config)
    model, _, tokenizer = load_model(str(place / "out"), "cpu", "auto")
    assert model.config.llm_name_or_path == str(place / "ggufs" / "tiny.gguf")
    assert model.config.llm_bos_token_id is None  # its tokenizer adds none
    assert tokenizer.tokenize("19") == ["1", "9"]  # as it was saved with the checkpoint
