"""A launch that is made again hands the driver what Triton hands it for the same call.

Without a GPU this is seen with a driver that only writes down (emulated_triton.py), in a process where kernels are not
interpreted; on a GPU the numbers are compared too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, tiny_model
from torch import Tensor, nn

from layalign import ops
from layalign.ops import cached_launch
from layalign.ops.backends.triton import interpreting
from layalign.ops.cached_launch import CachedDecode

pytest.importorskip("triton")
from emulated_triton import Emulated, Launched, OnSecond, SecondDevice, emulated_triton

interpreted = pytest.mark.skipif(not interpreting(), reason="kernels are not interpreted here")
compiled = pytest.mark.skipif(interpreting(), reason="runs in a process of its own, the first test's")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

GPU = "cuda" if torch.cuda.is_available() else "cpu"
DECODED: dict[str, dict[str, Any]] = {
    "as in a model": {},
    "split source": {"source": 900},
    "split source, odd head size": {"source": 900, "rows": 3, "heads": 1, "size": 13},
    "no mask": {"masked": False},
    "scaled": {"scale": 0.3},
    "few rows": {"rows": 3},
    "residual of another type": {"residual_dtype": torch.float16},
    "half precision": {"dtype": torch.float16, "residual_dtype": torch.float16},
}


@pytest.mark.slow
@interpreted
def test_in_a_process_whose_kernels_are_not_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout and " passed" in done.stdout


@interpreted
def test_interpreted_kernels_are_called_in_full() -> None:
    assert CachedDecode.after(*split(arguments())) is None


def arguments(
    rows: int = 1,
    source: int = 5,
    masked: bool = True,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype = torch.float32,
    heads: int = 4,
    size: int = 16,
    seed: int = 0,
    device: str = "cpu",
) -> list[Any]:
    """query, key, value, gate, residual, mask, scale, impl."""
    torch.manual_seed(seed)

    def states(count: int, length: int) -> Tensor:
        return torch.randn(2, length, count, size).to(device, dtype).transpose(1, 2)

    residual, groups = torch.randn(2, rows, heads, size).to(device, residual_dtype), max(1, heads // 2)
    gate = torch.tensor([0.5], device=device)
    tensors = [states(heads, rows), states(groups, source), states(groups, source), gate, residual]
    mask = torch.arange(source, device=device) < torch.tensor([[source], [max(source - 2, 1)]], device=device)
    return [*(tensor.requires_grad_() for tensor in tensors), mask if masked else None, scale, "triton"]


def split(given: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(given[:6]), *given[6:]


def full(given: Sequence[Any]) -> Tensor:
    query, key, value, gate, residual, mask, scale, impl = given
    return ops.gated_cross_attention(query, key, value, gate, residual, key_mask=mask, scale=scale, impl=impl)


def decoded(again: CachedDecode, given: Sequence[Any]) -> Tensor | None:
    query, key, value, gate, residual, mask, scale, impl = given
    return again(query, residual, scale) if again.prepare(key, value, gate, mask, impl) else None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    with emulated_triton(monkeypatch) as found:
        yield found


@pytest.fixture
def by_triton(driver: Emulated, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that Triton itself launched."""
    from triton.runtime.jit import JITFunction

    found: list[str] = []
    run = JITFunction.run

    def counting(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        if not warmup:
            found.append(self.__name__)
        return run(self, *args, warmup=warmup, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counting)
    return found


def launched(driver: Emulated, given: Sequence[Any], call: Callable[[], Any]) -> list[Launched]:
    """What a call launches. Addresses by the argument that lies there, others by when they first come up."""
    driver.launches.clear()
    results = call()
    assert results is not None
    names = {tensor.data_ptr(): f"argument {i}" for i, tensor in enumerate(given) if isinstance(tensor, Tensor)}
    found = []
    for launch in driver.launches:
        pointers = {name: value for name, value in launch.arguments.items() if name.startswith("p_") and value}
        named = {name: names.setdefault(value, f"fresh {len(names)}") for name, value in pointers.items()}
        found.append(launch._replace(arguments={**launch.arguments, **named}))
    assert found
    return found


@compiled
@pytest.mark.parametrize("change", DECODED.values(), ids=DECODED)
@torch.no_grad()
def test_a_cached_decode_launches_the_same(
    change: dict[str, Any], driver: Emulated, by_triton: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from layalign_kernels import gated_cross_attention_decode

    monkeypatch.setattr(gated_cross_attention_decode, "multiprocessors", lambda _: 132)
    given = arguments(**change)
    right = launched(driver, given, lambda: full(given))
    again = CachedDecode.after(*split(given))
    assert again is not None
    for seed in (1, 2):
        other = arguments(**change, seed=seed)
        given[0], given[3], given[4] = other[0], other[3], other[4]  # query, gate and residual are new at every step
        by_triton.clear()
        driver.stream = seed  # the current one, whatever it was
        found = launched(driver, given, lambda: decoded(again, given))
        assert not by_triton
        assert found == [launch._replace(stream=seed) for launch in right]
    assert len(right) == (2 if "source" in change else 1)
    if "source" in change:  # the log-sum-exps lie after the parts, in one piece of memory, aligned as the parts are
        arguments_ = driver.launches[0].arguments
        splits, rows = arguments_["splits"], driver.launches[1].arguments["rows"]
        parts = 4 * splits * rows * change.get("size", 16)
        assert splits > 1 and arguments_["p_lse"] - arguments_["p_part"] == -(-parts // 16) * 16
        assert (parts % 16 == 0) == ("size" not in change)


def moved(tensor: Tensor) -> Tensor:
    """The same numbers 4 bytes after a multiple of 16."""
    memory = torch.empty(tensor.numel() + 5, dtype=tensor.dtype)
    found = memory[1:].as_strided(tensor.shape, tensor.stride()) if memory.data_ptr() % 16 == 0 else memory
    return found.copy_(tensor.detach())


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@compiled
@torch.no_grad()
def test_what_a_kept_decode_does_not_serve_goes_to_triton(driver: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    full(given)
    again = CachedDecode.after(*split(given))
    assert again is not None and decoded(again, given) is not None
    count = len(driver.launches)
    aligned = given[0]
    given[0] = moved(aligned)
    assert given[0].data_ptr() % 16 and decoded(again, given) is None  # the kernel was compiled for multiples of 16
    given[0] = aligned
    with tf32():
        assert decoded(again, given) is None
    for place in (1, 2, 5):
        before = given[place].data
        given[place].data = before.clone()  # what is bound to the launch is the memory that it had
        assert decoded(again, given) is None
        given[place].data = before
    assert len(driver.launches) == count
    assert decoded(again, given) is not None
    full([moved(aligned), *given[1:]])
    assert len(driver.launches) == count + 2
    # Made from an unaligned query, one serves both.
    again = CachedDecode.after(*split([moved(aligned), *given[1:]]))
    assert again is not None and decoded(again, given) is not None
    assert decoded(again, [moved(aligned), *given[1:]]) is not None


@compiled
@pytest.mark.parametrize("case", ["hooks", "ROCm", "an old Triton"])
def test_what_cannot_be_kept(case: str, driver: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    from layalign_kernels.gated_cross_attention_decode import gated_cross_attention_decode_kernel

    if case == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    elif case == "an old Triton":
        monkeypatch.setattr("triton.__version__", "3.3.1+git1")
    else:
        monkeypatch.setattr(gated_cross_attention_decode_kernel, "pre_run_hooks", [lambda *_, **__: None])
    with torch.no_grad():
        assert CachedDecode.after(*split(arguments())) is None


def on_second(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(OnSecond)


def operations() -> dict[str, tuple[list[str], Callable[[], Any]]]:
    """By name: the kernels that an operation launches, and a call of it with tensors of the second device."""
    from layalign_kernels import gated_cross_attention as forward
    from layalign_kernels import gated_cross_attention_backward as backward
    from layalign_kernels import gated_cross_attention_decode as decode
    from layalign_kernels import layer_mix, layer_projection

    hidden = [on_second(torch.randn(2, 3, 16)) for _ in range(2)]
    mix, bias, weight = (on_second(torch.randn(size)) for size in ((4, 2), 4, (8, 16)))
    x = on_second(torch.randn(4, 2, 3, 16))
    *tensors, mask, scale, _ = arguments(source=900)
    query, key, value, gate, residual = map(on_second, tensors)
    others = key, value, gate, residual, on_second(mask), scale
    lse = on_second(torch.randn(2, 4, 1))
    combine = "gated_cross_attention_decode_combine_kernel"
    return {
        "mix": (["layer_mix_forward_kernel"], lambda: layer_mix.layer_mix_forward(hidden, mix, bias)),
        "mix backward": (
            ["layer_mix_weight_kernel", "layer_mix_hidden_kernel"],
            lambda: layer_mix.layer_mix_backward(x, x, hidden, mix, True, True),
        ),
        "projection": (
            ["shared_projection_kernel"],
            lambda: layer_projection.layer_projection_forward(hidden, mix, bias, weight, None),
        ),
        "attention": (
            ["gated_cross_attention_forward_kernel"],
            lambda: forward.gated_cross_attention_forward(query, *others),
        ),
        "attention backward": (
            ["gated_cross_attention_dq_kernel", "gated_cross_attention_dkv_kernel"],
            lambda: backward.gated_cross_attention_backward(residual, query, key, value, gate, others[4], lse, scale),
        ),
        "decode": (
            ["gated_cross_attention_decode_kernel"],
            lambda: decode.gated_cross_attention_decode(query, *others, splits=1),
        ),
        "split decode": (
            ["gated_cross_attention_decode_kernel", combine],
            lambda: decode.gated_cross_attention_decode(query, *others, splits=2),
        ),
    }


@compiled
def test_every_kernel_is_launched_on_the_device_of_its_tensors(
    driver: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layalign_kernels import common

    monkeypatch.setattr(common, "_device_facts", lambda *_: ("sm_90", 132))
    for name, (kernels, call) in operations().items():
        driver.launches.clear()
        with SecondDevice():
            call()
        assert [launch.kernel for launch in driver.launches] == kernels, name
        assert {(launch.device, launch.stream) for launch in driver.launches} == {(1, driver.stream + 1)}, name
        assert driver.device == 0


@compiled
@pytest.mark.parametrize("change", [{}, {"source": 900}], ids=["whole", "split"])
@torch.no_grad()
def test_a_cached_decode_is_launched_on_the_device_of_its_tensors(
    change: dict[str, Any], driver: Emulated, by_triton: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever device is the current one: under a device map, no one makes a layer's device the current one."""
    from layalign_kernels import gated_cross_attention_decode

    monkeypatch.setattr(gated_cross_attention_decode, "multiprocessors", lambda _: 132)
    given = arguments(**change)
    driver.device = 1
    full(given)
    again = CachedDecode.after(*split(given))
    by_triton.clear()
    for current in (1, 0):
        driver.device = current
        driver.launches.clear()
        assert again is not None and decoded(again, given) is not None and not by_triton
        assert {(launch.device, launch.stream) for launch in driver.launches} == {(1, driver.stream + 1)}
        assert driver.device == current


def with_triton(model: Any) -> Any:
    for module in model.cross_attention:
        module.impl = "triton"
        nn.init.constant_(module.adaption_gate, 0.5)
    return model


@compiled
def test_a_model_launches_the_same_either_way(
    driver: Emulated, by_triton: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_triton(tiny_model())
    inputs = batch(model=model)
    layers = len(model.config.language_layers)

    def counted(call: Callable[[], None]) -> tuple[list[tuple[Any, ...]], int]:
        driver.launches.clear()
        by_triton.clear()
        call()
        numbers = [
            (launch.kernel, launch.programs, [v for n, v in launch.arguments.items() if not n.startswith("p_")])
            for launch in driver.launches
        ]
        return numbers, len(by_triton)

    def generate() -> None:
        source = {name: inputs[name] for name in ("encoder_input_ids", "encoder_attention_mask")}
        # The emulated driver computes nothing: the logits are what lies in the memory.
        model.generate(**source, max_new_tokens=6, remove_invalid_values=True, do_sample=False, eos_token_id=None)

    generate()  # the model's own check that the source arrives
    short, launches_of_triton = counted(generate)
    assert len(short) == 6 * layers
    # A generation's first pass and its first step have another shape each time, and say what follows.
    assert launches_of_triton == 2 * layers
    monkeypatch.setattr(cached_launch, "possible", lambda: False)
    long, launches_of_triton = counted(generate)
    assert long == short and launches_of_triton == 6 * layers


@compiled
@on_gpu
@pytest.mark.parametrize("change", DECODED.values(), ids=DECODED)
@torch.no_grad()
def test_a_cached_decode_has_the_same_numbers(change: dict[str, Any]) -> None:
    given = arguments(**change, device=GPU)
    full(given)
    again = CachedDecode.after(*split(given))
    assert again is not None
    for seed in (1, 2):
        other = arguments(**change, seed=seed, device=GPU)
        given[0], given[3], given[4] = other[0], other[3] * seed, other[4]
        found = decoded(again, given)
        assert found is not None and torch.equal(found, full(given)) and found.isfinite().all()
