"""Damaged, foreign and malicious checkpoints: an error that names the folder and what is wrong; no code runs.

Where the file carries its SHA-256 (trained weights do), a single changed bit is found. Elsewhere what is found is
everything about names, sizes, dtypes and the file itself, and numbers that became NaN or infinite.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import times, tried
from mutate import mutated
from safetensors.torch import load_file, save_file
from tiny import open_gates, tiny_encoder, tiny_llm, tiny_model
from tiny_training import byte_tokenizer

from layalign import CheckpointError, LayAlignError, LayAlignForCausalLM
from layalign.modeling.tokenization import load_tokenizers
from layalign.published.convert import convert_published, convert_to_published
from layalign.published.names import load_bin

HOSTILE = "import pathlib\npathlib.Path({path!r}).write_text('ran')\n"


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small`: trained weights beside the names of the parts; `whole`: everything; `model.bin`: published."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_encoder().save_pretrained(folder / "encoder")
    tiny_llm(num_key_value_heads=2).save_pretrained(folder / "llm")
    for part in ("encoder", "llm"):
        byte_tokenizer(add_eos=True).save_pretrained(folder / part)
    model = LayAlignForCausalLM.from_encoder_and_llm(str(folder / "encoder"), str(folder / "llm"))
    open_gates(model)
    model.save_pretrained(folder / "small")
    model.save_pretrained(folder / "whole", save_frozen=True)
    convert_to_published(folder / "small", folder / "model.bin")
    return folder


@pytest.fixture
def work(saved: Path, tmp_path: Path) -> Path:
    for name in ("small", "whole"):
        shutil.copytree(saved / name, tmp_path / name)
    return tmp_path


def refused(folder: Path, **arguments: Any) -> str:
    """The text of the error that loading a folder must end in."""
    with pytest.raises(CheckpointError) as stopped:
        LayAlignForCausalLM.from_pretrained(folder, **arguments)
    text = str(stopped.value)
    assert str(folder) in text and "\n" not in text and len(text) < 1000, text
    tried("checkpoints")
    return text


def put_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, tensor in changes.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor.clone().contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small", "whole"])
def test_weights_that_do_not_fit_are_named(kind: str, work: Path) -> None:
    fresh = lambda: (shutil.rmtree(work / kind), shutil.copytree(work.parent / "keep", work / kind))  # noqa: E731
    shutil.rmtree(work.parent / "keep", ignore_errors=True)
    shutil.copytree(work / kind, work.parent / "keep")
    good = load_file(work / kind / "model.safetensors")
    for name in ("mapping.mlp.linear1.weight", "encoder_aligner.projector.fc1.bias", "cross_attention.1.adaption_gate"):
        tensor, problems = good[name], {"missing": None, "nan": torch.full_like(good[name], float("nan"))}
        problems |= {"inf": torch.full_like(tensor, float("-inf")), "integers": tensor.long(), "shape": tensor[None]}
        problems |= {"empty": tensor[:0], "rows": torch.cat([tensor, tensor])}
        problems |= {"bool": tensor > 0} if kind == "small" else {}
        for problem, changed in problems.items():
            put_weights(work / kind, **{name: changed})
            if kind == "whole" and problem == "integers":
                continue  # transformers casts them: the values are what the file says
            text = refused(work / kind)
            assert "model.safetensors" in text or "weights cannot be loaded" in text
            assert kind == "whole" or name in text
            fresh()
    put_weights(work / kind, **{"mapping.surprise": torch.zeros(1)})
    assert "mapping.surprise" in refused(work / kind)


def header(entries: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


BROKEN = {
    "empty": b"", "short": b"\x00" * 7, "zeros": b"\x00" * 4096, "foreign": b"PK\x03\x04" + b"x" * 100,
    "text": b"{}" * 50,
    "a huge header": struct.pack("<Q", 2**62) + b"{}", "a header of everything": struct.pack("<Q", 2**64 - 1),
    "no JSON": struct.pack("<Q", 4) + b"[[[[", "deep": struct.pack("<Q", 90_000) + b"[" * 90_000,
    "beyond the file": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "overlapping": header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"\x00" * 4),
    "overflowing": header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}),
    "negative": header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\x00" * 4),
    "an unknown dtype": header({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 4),
    "nothing in it": header({}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["small", "whole"])
def test_files_that_are_no_safetensors(kind: str, work: Path) -> None:
    path = work / kind / "model.safetensors"
    whole = path.read_bytes()
    for content in [*BROKEN.values(), *(whole[: len(whole) * part // 8] for part in range(8)), whole + b"x"]:
        path.write_bytes(content)
        refused(work / kind)
    path.unlink()
    refused(work / kind)
    path.mkdir()
    refused(work / kind)
    for name in ("no such folder", "encoder"):
        (work / "encoder").mkdir(exist_ok=True)
        refused(work / name)


@pytest.mark.slow
def test_mutated_weight_files(work: Path) -> None:
    """In the header nearly every change is found; what loads has the names, sizes and dtypes of the model."""
    path, draw, outcomes = work / "small" / "model.safetensors", random.Random("weights"), [0, 0]
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(times(150)):
        head = mutated(whole[:end], draw, large=False)
        path.write_bytes(head + whole[end:])
        try:
            model, error = LayAlignForCausalLM.from_pretrained(work / "small"), None
        except CheckpointError as caught:
            model, error = None, caught
        outcomes[error is None] += 1
        assert error is None or str(work / "small") in str(error)
        assert model is None or all(parameter.isfinite().all() for parameter in model.parameters())
        tried("checkpoints")
    assert outcomes[0] > sum(outcomes) * 0.8
    for _ in range(8):  # one bit of the numbers
        bits = bytearray(whole)
        bits[draw.randrange(end, len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(bits))
        assert "damaged" in refused(work / "small")


@pytest.mark.slow
def test_mutated_configurations(work: Path) -> None:
    draw, outcomes = random.Random("config"), [0, 0]
    for kind in ("small", "whole"):
        path = work / kind / "config.json"
        lines = path.read_bytes().split(b"\n")
        for _ in range(times(60)):
            place = draw.randrange(len(lines))
            changed = [*lines[:place], mutated(lines[place], draw, lines, large=False), *lines[place + 1 :]]
            path.write_bytes(b"\n".join(changed))
            try:
                LayAlignForCausalLM.from_pretrained(work / kind)
                outcomes[1] += 1
            except CheckpointError as error:
                assert str(work / kind) in str(error) and "\n" not in str(error)  # noqa: PT017
                outcomes[0] += 1
            tried("checkpoints")
    assert min(outcomes) > 10


@pytest.mark.parametrize(
    "change",
    [
        [], 5, None, {"model_type": "llama"}, {"model_type": None}, {"model_type": ["layalign"]},
        {"encoder_config": None},
        {"encoder_config": {}}, {"encoder_config": {"model_type": "evil"}}, {"encoder_config": {"model_type": 5}},
        {"llm_config": {"model_type": "llama", "hidden_size": "x"}}, {"llm_config": {"model_type": "layalign"}},
        {"llm_config": {"model_type": "llama", "hidden_size": 10**12}}, {"llm_config": []}, {"adapter_size": 10**12},
        {"adapter_size": 10**9}, {"adapter_size": -1}, {"encoder_layers": [10**30]}, {"encoder_layers": 5},
        {"encoder_layers": [0.5]},
        {"language_layers": [0, 0]}, {"language_layers": {}}, {"structure": ["Linear"]}, {"impl": "evil"},
        {"fixed_gate": 10**400},
        {"gate": "1"}, {"source_token_id": 1.5}, {"llm_bos_token_id": 10**6}, {"llm_bos_token_id": "1"}, {"lora": [1]},
        {"lora": {"r": -1, "target_modules": "all-linear"}}, {"lora": {"nothing": 1}}, {"frozen_saved": "yes"},
        {"encoder_name_or_path": 5}, {"encoder_name_or_path": None}, {"encoder_name_or_path": "../../nothing"},
        {"llm_name_or_path": "a\x00b"}, {"llm_name_or_path": "/etc"}, {"encoder_name_or_path": "/dev/null"},
    ],
)  # fmt: skip
def test_configurations_that_are_wrong(change: Any, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = work / "small" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **change} if isinstance(change, dict) else change))
    refused(work / "small")


def test_part_dtypes_and_dtypes_that_are_none(work: Path) -> None:
    path = work / "whole" / "config.json"
    config = json.loads(path.read_text())
    for wrong in ({"llm": "load"}, {"llm": 5}, {"llm": "int8"}, {"llm": "__class__"}):
        path.write_text(json.dumps({**config, "part_dtypes": wrong}))
        assert "part_dtypes" in refused(work / "whole")
    path.write_text(json.dumps(config))
    for dtype in ("load", "int32", 5, torch.int8):
        with pytest.raises(LayAlignError, match="dtype: expected a floating dtype"):
            LayAlignForCausalLM.from_pretrained(work / "small", dtype=dtype)
        tried("checkpoints")


def test_frozen_parts_of_other_sizes_are_named(work: Path, saved: Path) -> None:
    for part, model, what in (
        ("encoder", tiny_encoder(d_model=16), "hidden size 24, but the encoder has 16"),
        ("encoder", tiny_encoder(num_layers=2), "number of layers 4, but the encoder has 2"),
        ("llm", tiny_llm(num_hidden_layers=2), "number of layers 3, but the llm has 2"),
    ):
        assert what in refused(work / "small", **{part: model})


# What would run


def test_a_pickle_with_a_payload_is_not_run(work: Path, saved: Path) -> None:
    ran = work / "ran"
    weights = load_file(work / "whole" / "model.safetensors")
    for name, content in (("model", {**weights, "payload": Payload(ran)}), ("bare", Payload(ran))):
        path = work / f"{name}.bin"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="not a readable checkpoint of tensors"):
            load_bin(path)
        with pytest.raises(CheckpointError):
            convert_published(path, str(saved / "encoder"), str(saved / "llm"), work / "out")
        shutil.copy(path, work / "whole" / "pytorch_model.bin")
        assert LayAlignForCausalLM.from_pretrained(work / "whole") is not None  # safetensors are preferred
        shutil.move(work / "whole" / "model.safetensors", work / "aside")
        refused(work / "whole")
        shutil.move(work / "aside", work / "whole" / "model.safetensors")
        tried("checkpoints", 3)
    path.write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(CheckpointError):
        load_bin(path)
    assert not ran.exists() and not (work / "out").exists()
    pickle.loads(pickle.dumps(Payload(ran)))  # the payload is one
    assert ran.exists()


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["", "y\n"])
def test_code_that_a_checkpoint_names_is_not_run(
    work: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """`auto_map` and a module beside it, in the checkpoint, its parts' configurations and its tokenizers."""
    import io

    ran = work / "ran"
    monkeypatch.setattr("sys.stdin", io.StringIO(asked))  # transformers would ask there, and run it on a "y"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForTextEncoding", "AutoTokenizer")
    auto_map = dict.fromkeys(classes, "hostile.Hostile") | {"AutoTokenizer": ["hostile.Hostile", None]}
    for folder in ("encoder", "llm"):
        shutil.copytree(saved / folder, work / folder)
    for folder in ("encoder", "llm", "small", "whole"):
        (work / folder / "hostile.py").write_text(HOSTILE.format(path=str(ran)))
        for name in ("config.json", "tokenizer_config.json"):
            path = work / folder / name
            if path.exists():
                path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
    for folder in ("small", "whole"):
        path = work / folder / "config.json"
        config = json.loads(path.read_text())
        for part in ("encoder", "llm"):
            config[f"{part}_config"]["auto_map"] = auto_map
            config[f"{part}_config"]["_name_or_path"] = config[f"{part}_name_or_path"] = str(work / part)
        path.write_text(json.dumps(config))
        for model_type in (None, "hostile"):
            for part in ("encoder", "llm"):
                inner = work / part / "config.json"
                kept = inner.read_text()
                if model_type is not None:
                    inner.write_text(json.dumps({**json.loads(kept), "model_type": model_type}))
                try:
                    LayAlignForCausalLM.from_pretrained(work / folder)
                except CheckpointError as error:
                    assert str(work / folder) in str(error)  # noqa: PT017
                inner.write_text(kept)
                tried("checkpoints")
    for part in ("encoder", "llm"):
        for kind in ({}, {"tokenizer_class": "Hostile"}):
            path = work / part / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **kind}))
            try:
                load_tokenizers(encoder=str(work / part), llm=str(work / part))
            except CheckpointError as error:
                assert str(work / part) in str(error)  # noqa: PT017
            tried("checkpoints")
    assert not ran.exists()


def test_shards_outside_the_folder_are_refused(work: Path) -> None:
    folder = work / "whole"
    weights = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", work / "outside.safetensors")
    for file in (
        "../outside.safetensors",
        str(work / "outside.safetensors"),
        "a/../../outside.safetensors",
        5,
        None,
        "..",
    ):
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "expected the name of a file in its folder" in refused(folder)
    for text in ("[]", "{", '{"weight_map": 5}', "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_mutated_tokenizers(name: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "llm", tmp_path / "llm_tokenizer")
    shutil.copytree(saved / "llm", tmp_path / "encoder_tokenizer")
    path, draw = tmp_path / "llm_tokenizer" / name, random.Random(name)
    whole = path.read_bytes()
    for _ in range(times(40)):
        path.write_bytes(mutated(whole, draw, large=False))
        try:
            load_tokenizers(tmp_path)
        except CheckpointError as error:
            assert str(error).startswith("llm tokenizer: ") and "\n" not in str(error)  # noqa: PT017
        tried("checkpoints")


# Published checkpoints


@pytest.mark.slow
def test_mutated_published_files(saved: Path, work: Path) -> None:
    """A changed zip file of tensors: an error and no output folder, or tensors that were all read."""
    whole, draw, outcomes = (saved / "model.bin").read_bytes(), random.Random("bin"), [0, 0]
    path = work / "model.bin"
    for turn in range(times(160)):
        if turn % 3 == 0:  # the pickle in it comes first, and the directory last
            changed = mutated(whole[:12_000], draw, large=False) + whole[12_000:]
        elif turn % 3 == 1:
            changed = whole[:-8_000] + mutated(whole[-8_000:], draw, large=False)
        else:
            changed = mutated(whole, draw)
        path.write_bytes(changed)
        try:
            for tensor in load_bin(path).values():
                tensor.sum()  # reads it all
            outcomes[1] += 1
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)  # noqa: PT017
            outcomes[0] += 1
        tried("checkpoints")
    assert outcomes[0] > sum(outcomes) / 4


@pytest.mark.slow
def test_published_files_that_do_not_fit_leave_the_output_alone(saved: Path, work: Path) -> None:
    state = torch.load(saved / "model.bin", weights_only=True)
    fc1, gate = "encoder_aligner.projector.fc1.weight", next(name for name in state if name.endswith("adaption_gate"))
    wrong: list[Any] = [
        {}, [], 5, "text", {1: torch.zeros(1)}, {"a": 5}, {"model_state_dict": 5}, {**state, fc1: state[fc1][:1]},
        {**state, fc1: state[fc1].long()}, {**state, fc1: state[fc1].to(torch.complex64)}, {**state,
        fc1: state[fc1] * float("nan")},
        {**state, fc1: state[fc1].to_sparse()}, {**state, fc1: torch.zeros(1).expand(10**6, 10**6)}, {**state,
        "surprise": state[fc1]},
        {name: tensor for name, tensor in state.items() if name != fc1}, {gate.replace(".0.",
        f".{'9' * 5000}."): state[gate], fc1: state[fc1]},
        {name: tensor for name, tensor in state.items() if name != gate}, {**state, gate: torch.tensor(float("inf"))},
        {**state, fc1: torch.quantize_per_tensor(state[fc1], 0.1, 0, torch.qint8)},
    ]  # fmt: skip
    output = work / "out"
    output.mkdir()
    (output / "config.json").write_text("keep me")
    for content in wrong:
        torch.save(content, work / "model.bin")
        with pytest.raises(LayAlignError) as stopped:
            convert_published(work / "model.bin", str(saved / "encoder"), str(saved / "llm"), output)
        assert str(work / "model.bin") in str(stopped.value) and "\n" not in str(stopped.value)
        tried("checkpoints")
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert (output / "config.json").read_text() == "keep me"


def test_an_interrupted_conversion_leaves_no_file(saved: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "model.bin").write_text("keep me")

    def fails(state: Any, path: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        convert_to_published(saved / "small", work / "model.bin")
    assert (work / "model.bin").read_text() == "keep me"


def test_the_damaged_golden_model_of_all_kinds_still_loads_undamaged(saved: Path) -> None:
    """What the checks above refuse is not what they are for."""
    for kind in ("small", "whole"):
        model = LayAlignForCausalLM.from_pretrained(saved / kind)
        again = LayAlignForCausalLM.from_pretrained(saved / kind, trust_remote_code=False, output_loading_info=False)
        for one, two in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, two)
    assert tiny_model() is not None
