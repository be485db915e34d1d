"""The compiled extension: its own checks, its instruction sets, its threads, and what is said where it is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layalign import BackendError, __version__, ops, reference
from layalign.ops import backends, extension

ROOT = Path(__file__).parents[2]
INSTALLED = backends.serves("layer_mix", "cpp", "cpu")[0]
needs_extension = pytest.mark.skipif(not INSTALLED, reason=backends.capability("cpp", "cpu")[1])
CPU = (-1, 0, 1)


def states(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def attention_call(**changes):
    """Inputs, out and log-sum-exp of a good forward call, with some of them exchanged."""
    given = dict(query=states(2, 4, 3, 8), key=states(2, 2, 5, 8), value=states(2, 2, 5, 8), gate=states(1))
    given |= dict(residual=None, key_mask=None, out=states(2, 3, 4, 8), lse=states(2, 4, 3)) | changes
    described = {name: extension.describe(tensor) for name, tensor in given.items()}
    inputs = tuple(described[name] for name in ("query", "key", "value", "gate", "residual", "key_mask"))
    return (*inputs, 0.5), described["out"], described["lse"], given


@needs_extension
def test_a_wrong_call_never_reaches_a_kernel() -> None:
    """Below the Python checks: every argument is checked again where memory is touched."""
    found = extension.module()
    inputs, out, lse, _given = attention_call()
    found.gated_cross_attention_forward(inputs, out, lse, CPU)
    bad = {
        r"query: expected a floating tensor \(B, H, T, d\)": dict(query=states(4, 3, 8)),
        r"query: expected a head size of 1 to 256": dict(
            query=states(2, 4, 3, 300), key=states(2, 2, 5, 300), value=states(2, 2, 5, 300)
        ),
        r"key: expected \(B, G, S, d\) with G a divisor of H": dict(key=states(2, 3, 5, 8)),
        r"key: expected dtype code 0, got 2": dict(key=states(2, 2, 5, 8, dtype=torch.bfloat16)),
        r"value: expected sizes \(2, 2, 5, 8\), got \(2, 2, 4, 8\)": dict(value=states(2, 2, 4, 8)),
        r"value: expected a last stride of 1": dict(value=states(2, 2, 8, 5).mT),
        r"gate: expected one floating number": dict(gate=states(2)),
        r"residual: expected sizes \(2, 3, 4, 8\)": dict(residual=states(2, 4, 3, 8)),
        r"key_mask: expected dtype code 3, got 0": dict(key_mask=states(2, 5)),
        r"out: expected sizes": dict(out=states(2, 4, 3, 8)),
        r"out: expected contiguous memory": dict(out=states(2, 3, 4, 16)[..., :8]),
        r"lse: expected dtype code 0": dict(lse=states(2, 4, 3, dtype=torch.float16)),
    }
    for message, changes in bad.items():
        inputs, out, lse, _given = attention_call(**changes)
        with pytest.raises(found.Error, match=f"gated_cross_attention: {message}"):
            found.gated_cross_attention_forward(inputs, out, lse, CPU)
    inputs, out, lse, _given = attention_call()
    query = inputs[0]
    for message, described in {
        "query: unknown dtype code": (query[0], 9, *query[2:]),
        "query: expected an address, got null": (0, *query[1:]),
        "query: expected at most 4 sizes, as many strides": (*query[:3], (1, 2)),
        "query: expected sizes and strides of 0 or more": (*query[:3], (-8, 8, 8, 1)),
        r"query: expected \(address, dtype, sizes, strides\) or None": (1, 2),
    }.items():
        with pytest.raises(found.Error, match=f"gated_cross_attention: {message}"):
            found.gated_cross_attention_forward((described, *inputs[1:]), out, lse, CPU)
    with pytest.raises(found.Error, match="place: expected at least one thread"):
        found.gated_cross_attention_forward(inputs, out, lse, (-1, 0, 0))
    if not found.cuda:
        with pytest.raises(found.Error, match="place: this module was built without CUDA"):
            found.gated_cross_attention_forward(inputs, out, lse, (0, 0, 1))


@needs_extension
def test_a_wrong_layer_mix_never_reaches_a_kernel() -> None:
    found = extension.module()

    def call(hidden, weight, bias, out) -> None:
        described = [extension.describe(layer) for layer in hidden]
        found.layer_mix_forward(described, *map(extension.describe, (weight, bias, out)), CPU)

    hidden, weight, bias, out = [states(1, 3, 8)] * 2, states(4, 2), states(4), states(4, 1, 3, 8)
    call(hidden, weight, bias, out)
    bad = {
        "hidden: expected 1 to 64 layers, got 0": ([], weight, bias, out),
        r"hidden\[1\]: expected dtype code 0, got 1": ([hidden[0], hidden[0].half()], weight, bias, out),
        r"hidden\[1\]: expected sizes": ([hidden[0], states(1, 2, 8)], weight, bias, out),
        r"weight: expected sizes \(4, 2\), got \(4, 3\)": (hidden, states(4, 3), bias, out),
        r"bias: expected sizes \(4\), got \(3\)": (hidden, weight, states(3), out),
        "out: expected dtype code 0, got 2": (hidden, weight, bias, out.bfloat16()),
        "weight: expected 1 to 256 slots": (hidden, states(300, 2), None, states(300, 1, 3, 8)),
    }
    for message, arguments in bad.items():
        with pytest.raises(found.Error, match=f"layer_mix: {message}"):
            call(*arguments)
    x, sums = states(4, 1, 3, 8), [states(4, 2), states(4)]
    described = [extension.describe(layer) for layer in hidden]
    parts = map(extension.describe, (weight, x, x, sums[0], None, None, None))
    with pytest.raises(found.Error, match="layer_mix_backward: dbias: expected dweight and dbias together"):
        found.layer_mix_backward(described, *parts, CPU)


@needs_extension
def test_the_extensions_errors_arrive_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "place", lambda *_: (-1, 0, 0))
    with pytest.raises(BackendError, match="impl='cpp': layer_mix: place: expected at least one thread"):
        ops.layer_mix([states(1, 3, 8)], states(2, 1), impl="cpp")


SCRIPT = """
import sys, torch
from layalign import ops, reference
from layalign.ops import extension
torch.manual_seed(0)
hidden, weight, bias = [torch.randn(2, 9, 70, dtype=torch.float64) for _ in range(5)], torch.randn(6, 5), torch.randn(6)
query, key, value = (torch.randn(2, 4, rows, 59, dtype=torch.float64) for rows in (33, 41, 41))
gate = torch.ones(1)
for dtype, bound in ((torch.float32, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
    low = [h.to(dtype) for h in hidden], weight, bias
    exact = reference.layer_mix([h.double() for h in low[0]], weight.double(), bias.double())
    assert (ops.layer_mix(*low, impl="cpp").double() - exact).abs().max() < bound
    few = [x.to(dtype) for x in (query, key, value)]
    exact = reference.gated_cross_attention(*(x.double() for x in few), gate.double())
    assert (ops.gated_cross_attention(*few, gate, impl="cpp").double() - exact).abs().max() < bound
print(extension.module().instruction_set())
"""


def run_with(**environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


@pytest.mark.slow
@needs_extension
def test_every_instruction_set_of_this_machine_is_right() -> None:
    found = extension.module()
    best = found.instruction_set()
    names = [name for name in ("avx512", "avx2", "neon", "baseline") if found.use_instruction_set(name)]
    assert found.use_instruction_set(best) and best in names
    for name in names:
        done = run_with(LAYALIGN_CPU_ISA=name)
        assert done.stdout.strip() == name, done.stderr
    done = run_with(LAYALIGN_CPU_ISA="mmx")
    assert done.returncode != 0 and "LAYALIGN_CPU_ISA" in done.stderr and "mmx" in done.stderr


@pytest.mark.slow
@needs_extension
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads through /proc")
def test_the_kernels_run_on_torchs_threads_and_give_the_same_bits_on_any_number() -> None:
    query, key, value = (states(4, 8, rows, 64).requires_grad_() for rows in (300, 200, 200))
    hidden, weight = [states(4, 300, 256) for _ in range(8)], states(32, 8).requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.randn(2000, 2000) @ torch.randn(2000, 100)  # torch has its threads now
            there = len(os.listdir("/proc/self/task"))
            out = ops.gated_cross_attention(query, key, value, states(1), impl="cpp")
            x = ops.layer_mix(hidden, weight, impl="cpp")
            gradients = torch.autograd.grad((out.square().sum(), x.square().sum()), (query, key, value, weight))
            results.append([out, x, *gradients])
            # Autograd starts threads of its own for a first backward; the kernels start none.
            if threads > 1:
                assert len(os.listdir("/proc/self/task")) == there
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@needs_extension
def test_tensors_and_parameters_of_other_kinds() -> None:
    hidden = [states(2, 4, 6).mT for _ in range(3)]  # no unit last stride
    weight, bias = states(4, 3).double(), states(4).bfloat16()
    expected = reference.layer_mix([layer.double() for layer in hidden], weight, bias.double())
    torch.testing.assert_close(ops.layer_mix(hidden, weight, bias, impl="cpp").double(), expected, rtol=1e-5, atol=1e-5)
    scalar = torch.tensor(0.7, dtype=torch.float64)
    inputs = states(1, 2, 3, 8), states(1, 2, 5, 8), states(1, 2, 5, 8)
    found = ops.gated_cross_attention(*inputs, scalar, states(1, 3, 2, 8).double(), impl="cpp")
    exact = reference.gated_cross_attention(*(x.double() for x in inputs), scalar, states(1, 3, 2, 8).double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@needs_extension
def test_auto_takes_the_kernels_where_they_pay() -> None:
    hidden, weight = [states(1, 16, 512)] * 8, states(24, 8)
    assert backends.choose("layer_mix", "cpu", hidden, weight, None) == "cpp"
    trained = weight.clone().requires_grad_()
    assert backends.choose("layer_mix", "cpu", hidden, trained, None) == "torch"
    assert backends.choose("layer_projection", "cpu", hidden, trained, None, states(8, 512), None) == "torch"
    with torch.no_grad():
        assert backends.choose("layer_mix", "cpu", hidden, trained, None) == "cpp"
    many = [states(2, 64, 512)] * 8
    assert backends.choose("layer_mix", "cpu", many, trained, None) == "cpp"
    assert backends.choose("layer_mix", "cpu", [layer.double() for layer in many], trained, None) == "torch"
    few = states(1, 2, 1, 8), states(1, 2, 5, 8), states(1, 2, 5, 8), states(1)
    assert backends.choose("gated_cross_attention", "cpu", *few) == "cpp"


def test_a_missing_or_outdated_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    for found, message in (
        (None, r"layalign\._C is not installed: not built: no C\+\+ compiler"),
        ("0.0.1", rf"layalign\._C belongs to version 0\.0\.1, this is {re.escape(__version__)}: install again"),
    ):
        module: ModuleType | None = None
        if found is not None:
            module = ModuleType("layalign._C")
            module.version = found  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "layalign._C", module)  # type: ignore[arg-type]
        monkeypatch.setattr(extension, "build_notes", lambda: {"cpp": "not built: no C++ compiler"})
        extension.module.cache_clear()
        try:
            usable, reason = backends.get("cpp").usable("cpu")
        finally:
            extension.module.cache_clear()
        assert not usable and re.match(message, reason)
    if not torch.cuda.is_available():
        assert backends.get("cuda").usable("cuda")[1] != "CUDA kernels found"
    assert backends.get("cpp").usable("cuda") == (False, "the C++ kernels run on the CPU, the tensors are on cuda")


def test_an_outdated_emulation_path_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAYALIGN_EMULATE_CUDA", str(tmp_path / "nothing.so"))
    extension.module.cache_clear()
    try:
        usable, reason = backends.get("cuda").usable("cpu")
    finally:
        extension.module.cache_clear()
    assert not usable and "nothing.so" in reason


def test_every_cuda_launch_goes_through_the_function_that_sets_the_device() -> None:
    launch = re.compile(r"^(?!\s*//).*(?:<<<|cudaLaunch)", re.MULTILINE)
    files = [file for file in (ROOT / "csrc").rglob("*.cu*") if launch.search(file.read_text(encoding="utf-8"))]
    assert [file.name for file in files] == ["launch.cuh"]
    before, _ = files[0].read_text(encoding="utf-8").split("cudaLaunchKernel(")
    assert "DeviceScope scope(launch.device" in before.rpartition("void queue(")[2]
