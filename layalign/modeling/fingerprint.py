"""Fingerprints of a frozen part's weights, a line for each, and whether the part is what its name gives.

A weight's fingerprint is a hash of its bits, and of its bits after rounding to each half precision. So a part that is
loaded in another dtype is compared exactly, after rounding to that dtype. Only bfloat16 and float16, neither of which
holds the other's numbers, are compared by a sum, within the rounding error.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from layalign.modeling.lora import adapter_names, base_name
from layalign.modeling.names import cached_file, gguf_parts
from layalign.nn.sharding import reason_whole_is_not_here
from layalign.utils.errors import shown
from layalign.utils.reading import confined, read_json

QUANTISERS = ("bitsandbytes", "optimum", "torchao", "hqq")  # packages whose modules hold packed weights
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NUMBERS = (*HALVES.values(), torch.float32, torch.float64)  # dtypes whose fingerprints can be compared
# Settings that change no number that LayAlign computes with a part.
_HARMLESS = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "quantization_config", "use_cache",
    "return_dict", "id2label", "label2id", "problem_type", "num_labels", "is_decoder", "is_encoder_decoder",
    "tie_encoder_decoder", "tie_word_embeddings", "name_or_path", "task_specific_params", "tokenizer_class",
}  # fmt: skip
_HARMLESS_WORDS = ("token_id", "token_index", "output_")
_WORDS, _ROW = 1 << 15, 1 << 14  # length of a row of the hash, and of a row of the sum
_STEP = {"cpu": 1 << 18, "cuda": 1 << 26}  # numbers read at once: they fit a CPU's cache, or keep a GPU busy


# One weight


def fingerprint(tensor: Tensor) -> str:
    """`dtype shape bits bfloat16-bits float16-bits sum` of a floating tensor; `-` for what its dtype does not need.

    The dtype is that of the numbers: float32 that holds nothing finer than bfloat16 counts as bfloat16.
    """
    kind = _kind(tensor)
    halves = [_bits(tensor, dtype) if kind == "float32" else "-" for dtype in HALVES.values()]
    total = "-" if kind == "float32" else f"{_sum(tensor):.9g}"
    return " ".join([kind, _shape(tensor), _bits(tensor, getattr(torch, kind)), *halves, total])


def difference(entry: str, tensor: Tensor) -> str | None:
    """How a tensor differs from a stored fingerprint; None if it does not."""
    kind, shape, own, *halves, total = entry.split()
    if shape != _shape(tensor):
        return f"shape {_shape(tensor)} instead of {shape}"
    stored = {**dict(zip(HALVES, halves, strict=True)), kind: own}
    here = _kind(tensor)
    # One of the two is exact in this precision: the other may differ from it by rounding to it, and in no other way.
    for dtype in dict.fromkeys((here, kind)):
        if (dtype != "float32" or here == kind) and stored[dtype] == _bits(tensor, getattr(torch, dtype)):
            return None
    if {here, kind} == set(HALVES) and abs(_sum(tensor) - float(total)) <= _rounding_of_sum(tensor):
        return None
    return "other values"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _kind(tensor: Tensor) -> str:
    """The narrowest of bfloat16, float16 and float32 that holds the numbers of a tensor (float64 counts as float32)."""
    if tensor.dtype in HALVES.values():
        return str(tensor.dtype).removeprefix("torch.")
    fitting = dict(HALVES)
    for piece in _pieces(tensor):
        fitting = {name: dtype for name, dtype in fitting.items() if torch.equal(piece.to(dtype).to(piece), piece)}
        if not fitting:
            return "float32"
    return next(iter(fitting))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    step = _STEP["cuda" if flat.device.type == "cuda" else "cpu"]
    for start in range(0, len(flat), step):
        piece = flat[start : start + step]
        yield piece if piece.device.type in _STEP else piece.cpu()


def _bits(tensor: Tensor, dtype: torch.dtype) -> str:
    """A 64-bit hash of a tensor's numbers in ``dtype``: its bits, eight bytes at a time, times random odd factors."""
    total = row = 0
    for piece in _pieces(tensor):
        raw = _filled(piece.to(dtype).contiguous().view(torch.uint8), 8 * _WORDS).view(torch.int64).view(-1, _WORDS)
        mixed = (raw >> 31).bitwise_xor_(raw)  # else two flips of the highest bit would cancel
        sums = mixed.mul_(_factors("words", _WORDS, 1, raw.device)).sum(dim=1)
        total += int((sums * _factors("words", row + len(sums), 2, raw.device)[row:]).sum())
        row += len(sums)
    return f"{total % 2**64:016x}"


def _sum(tensor: Tensor) -> float:
    """The sum of a tensor's numbers times random factors, each the product of two of magnitude 1 to 2."""
    total, row = 0.0, 0
    for piece in _pieces(tensor):
        numbers = _filled(piece.float(), _ROW).view(-1, _ROW)
        sums = (numbers @ _factors("numbers", _ROW, 3, numbers.device)).double()
        total += float((sums * _factors("numbers", row + len(sums), 4, numbers.device)[row:]).sum())
        row += len(sums)
    return total


def _filled(flat: Tensor, row: int) -> Tensor:
    """``flat``, padded with zeros to full rows."""
    missing = -len(flat) % row
    return nn.functional.pad(flat, (0, missing)) if missing else flat


def _rounding_of_sum(tensor: Tensor) -> float:
    """How far rounding to bfloat16 and to float16 may bring two sums apart: six standard deviations."""
    relative = float(tensor.float().norm()) * sum(torch.finfo(dtype).eps for dtype in HALVES.values())
    half = torch.finfo(torch.float16)
    return 6 * 7 / 3 * (relative + tensor.numel() ** 0.5 * half.smallest_normal * half.eps) / 12**0.5


def _factors(kind: str, count: int, seed: int, device: torch.device) -> Tensor:
    """Random factors: the same on every machine, in every version (numpy keeps this stream), and for every count."""
    return _drawn(kind, max(_WORDS, 1 << (count - 1).bit_length()), seed, device)[:count]


@functools.lru_cache(maxsize=16)
def _drawn(kind: str, count: int, seed: int, device: torch.device) -> Tensor:
    draw = np.random.RandomState(seed)
    if kind == "words":
        return torch.from_numpy(draw.randint(-(2**63), 2**63 - 1, count, dtype=np.int64) | 1).to(device)
    drawn = draw.random_sample(count) * 2 - 1
    return torch.from_numpy(drawn + np.sign(drawn)).float().to(device)


# A part


@dataclass(frozen=True)
class Found:
    """A frozen part as it is in memory.

    Attributes:
        entries: name of each weight that could be read -> its fingerprint.
        unread: why some or all weights could not be read; None if all could.
        differs: how it differs from what its name gives; None if it does not, or if this is unknown.
        unchecked: why it could not be compared with what its name gives.
    """

    entries: dict[str, str] = field(default_factory=dict)
    unread: str | None = None
    differs: str | None = None
    unchecked: str | None = None


def is_quantised(part: nn.Module) -> bool:
    """Whether a frozen part is quantised, by transformers or by a quantiser's own modules."""
    if getattr(part, "is_quantized", False) or getattr(part, "hf_quantizer", None) is not None:
        return True
    return any(type(module).__module__.split(".")[0] in QUANTISERS for module in part.modules())


def frozen_tensors(part: nn.Module, every: bool = False) -> Iterator[tuple[str, list[str], Tensor]]:
    """(name in the part, all its names without adapters, tensor) of a part's frozen weights and stored buffers.

    Args:
        part: with or without adapters, whose weights are left out.
        every: also weights that train, those of a pooler (nothing reads it, and a file may lack it) and the buffers of
            a quantised part (its quantiser's scales, which no file has).
    """
    foreign = adapter_names(part)
    by_id: dict[int, tuple[str, list[str], Tensor]] = {}
    for name, tensor in part.named_parameters(remove_duplicate=False):
        if name not in foreign and (every or not (tensor.requires_grad or "pooler" in name.split("."))):
            by_id.setdefault(id(tensor), (name, [], tensor))[1].append(base_name(name))
    for path, module in part.named_modules() if every or not is_quantised(part) else ():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                name = f"{path}.{leaf}" if path else leaf
                by_id.setdefault(id(buffer), (name, [], buffer))[1].append(base_name(name))
    yield from by_id.values()


def readable(part: nn.Module, name: str, tensor: Tensor) -> Tensor | str:
    """The full tensor as an ordinary one, or why it cannot be read here."""
    if (reason := reason_whole_is_not_here(tensor)) is not None:
        return reason
    if tensor.device.type == "meta":
        try:
            from transformers.integrations.accelerate import load_offloaded_parameter

            tensor = load_offloaded_parameter(part, name)  # type: ignore[arg-type]
        except Exception:  # other hooks than accelerate's, other releases
            return "it is offloaded"
    if tensor.dtype not in NUMBERS or type(tensor.data) is not Tensor:
        return "it is quantised" if is_quantised(part) else f"its numbers are {tensor.dtype}"
    return tensor.detach()


def examine(part: nn.Module) -> Found:
    """The fingerprints of a part's frozen weights."""
    entries, reasons, count = {}, [], 0
    for name, (first, *_), tensor in frozen_tensors(part):
        count += 1
        weight = readable(part, name, tensor)
        if isinstance(weight, Tensor):
            entries[first] = fingerprint(weight)
        elif tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
            reasons.append(f"{first}: {weight}")
    unread = f"{len(reasons)} of {count} weights cannot be read ({reasons[0]})" if reasons else None
    return Found(entries, unread)


def differences(stored: Mapping[str, str], part: nn.Module, same_version: bool) -> list[str]:
    """How a part differs from stored fingerprints: one text per weight.

    Another release of transformers may call a weight by another name: there a name alone is no difference.
    """
    here = {each: (name, tensor) for name, names, tensor in frozen_tensors(part, every=True) for each in names}
    tensors = {id(tensor): readable(part, name, tensor) for name, tensor in here.values()}
    problems = []
    for name, entry in stored.items():
        if name in here:
            weight = tensors[id(here[name][1])]
            if isinstance(weight, Tensor) and (problem := difference(entry, weight)) is not None:
                problems.append(f"{name}: {problem}")
        elif same_version and not any(
            difference(entry, tensor) is None for tensor in tensors.values() if isinstance(tensor, Tensor)
        ):
            problems.append(f"{name}: is missing")
    return problems


def settings_that_differ(wanted: Any, found: Any) -> list[str]:
    """Settings with which configuration ``found`` gives other numbers than ``wanted``: one text per setting."""
    expected, here = _settings(wanted.to_dict()), _settings(found.to_dict())
    return [
        f"configuration: {key} {shown(here[key])} instead of {shown(expected[key])}"
        for key in expected
        if key in here and expected[key] != here[key]
    ]


def _settings(values: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in _HARMLESS or str(key).startswith("_") or any(word in str(key) for word in _HARMLESS_WORDS):
            continue
        if isinstance(value, Mapping):
            flat.update(_settings(value, f"{start}{key}."))
        else:
            flat[f"{start}{key}"] = json.loads(json.dumps(value, default=str))
    return flat


def summary(problems: list[str]) -> str:
    """The first three differences, and the number of the others."""
    more = len(problems) - 3
    return "; ".join(problems[:3]) + (f"; and {more} more" if more > 0 else "")


# What a name gives, without the hub


def weight_files(name: str) -> list[Path]:
    """The weight files of a folder, a GGUF file's name or a hub name in the cache; empty if one is missing."""
    place, file = gguf_parts(name)
    if file is not None:
        only = Path(name) if Path(name).is_absolute() else cached_file(place, file)
        return [only] if only is not None and only.is_file() else []
    for first in ("model.safetensors", "pytorch_model.bin"):
        for file in (first, f"{first}.index.json"):
            path = Path(name) / file if Path(name).is_absolute() else cached_file(name, file)
            if path is None or not path.is_file():
                continue
            if path.suffix != ".json":
                return [path]
            try:
                named = set(read_json(path)["weight_map"].values())
                files = [confined(path.parent, each, str(path)) for each in sorted(named)]
            except (ValueError, KeyError, TypeError, AttributeError):
                return []
            return files if all(each.is_file() for each in files) else []
    return []


def _contents(files: Iterable[Path]) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    """Name -> (shape, function that reads the tensor) of weight files; nothing is read yet."""
    contents: dict[str, tuple[str, Callable[[], Tensor]]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118  # it is not a mapping
                shape = "x".join(map(str, opened.get_slice(name).get_shape())) or "scalar"
                contents[name] = shape, functools.partial(opened.get_tensor, name)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for name, tensor in state.items():
                if isinstance(tensor, Tensor):
                    contents[name] = _shape(tensor), functools.partial(lambda each: each, tensor)
    return contents


def differences_from_files(part: nn.Module, files: Iterable[Path]) -> tuple[list[str], list[str]]:
    """(how a part differs from weight files, names of its weights that no file seems to have).

    Files may hold a model of which the part is only the encoder, and may have older names. So a weight is searched by
    the end of its name, and then by its content.
    """
    contents = _contents(files)
    by_end: dict[str, list[str]] = {}
    for name in contents:
        for end in _ends(name):
            by_end.setdefault(end, []).append(name)
    problems, unfound = [], []
    for own, names, tensor in frozen_tensors(part):
        here = readable(part, own, tensor)
        if not isinstance(here, Tensor):
            continue
        shape = _shape(here)
        called = [name for each in names for name in by_end.get(each, ())]
        called += [end for each in names for end in _ends(each) if end in contents]
        alike = [name for name in contents if contents[name][0] == shape]
        # By content only if no name matches: two layers that changed places are a difference.
        if any(_same(contents[name][1](), here) for name in alike if not called or name in called):
            continue
        if not called:
            unfound.append(names[0])
        elif any(name in alike for name in called):
            problems.append(f"{names[0]}: other values")
        else:
            problems.append(f"{names[0]}: shape {shape} instead of {contents[called[0]][0]}")
    return problems, unfound


def _ends(name: str) -> list[str]:
    pieces = name.split(".")
    return [".".join(pieces[start:]) for start in range(len(pieces))]


def _same(file: Tensor, here: Tensor) -> bool:
    """Whether ``here`` is the file's tensor, loaded in some dtype and perhaps widened afterwards."""
    routes = [None, *(half for half in HALVES.values() if here.dtype in (torch.float32, torch.float64))]
    if file.dtype in HALVES.values() or not file.is_floating_point():
        routes = [None]
    for start, piece in zip(range(0, max(here.numel(), 1), 1 << 24), here.reshape(-1).split(1 << 24), strict=False):
        there = file.reshape(-1)[start : start + (1 << 24)].to(piece.device)
        routes = [r for r in routes if torch.equal((there if r is None else there.to(r)).to(piece.dtype), piece)]
        if not routes:
            return False
    return True
