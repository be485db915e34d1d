"""The compiled extension ``layalign._C`` (csrc/): launchers of the C++ kernels for the CPU and of the CUDA kernels.

The functions take the backend's name, then the arguments of the Triton launchers in ``layalign_kernels``. They allocate
the results, pass addresses, sizes and strides, and raise the extension's errors as :class:`BackendError`. The extension
is loaded by the first call that needs it.

Where ``LAYALIGN_EMULATE_CUDA`` names a module built by ``csrc/builder.py emulated``, the backend "cuda" serves CPU
tensors for tests: it runs the source of the CUDA kernels as C++, one thread after another.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from importlib import resources
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from layalign.utils.errors import BackendError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3}
Described = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def emulating() -> bool:
    """Whether CUDA kernels run on CPU tensors (for tests)."""
    return bool(os.environ.get("LAYALIGN_EMULATE_CUDA"))


@functools.cache
def build_notes() -> dict[str, str]:
    """What the installation built, and why it did not build the rest, by backend; empty where nothing was recorded."""
    file = resources.files("layalign") / "_build.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


@functools.cache
def module(emulated: bool = False) -> ModuleType:
    """The extension.

    Raises:
        BackendError: it is not installed, cannot be loaded, or belongs to another version of the package.
    """
    from layalign import __version__

    try:
        if emulated:
            path = os.environ["LAYALIGN_EMULATE_CUDA"]
            spec = importlib.util.spec_from_file_location("_C_emulated", path)
            if spec is None or spec.loader is None:
                raise BackendError(f"LAYALIGN_EMULATE_CUDA: {path} is not an extension module")
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        else:
            found = importlib.import_module("layalign._C")
    except ModuleNotFoundError:
        note = build_notes().get("cpp", "this installation was made without it")
        raise BackendError(f"layalign._C is not installed: {note}") from None
    except ImportError as error:
        raise BackendError(f"layalign._C cannot be loaded: {error}") from None
    if found.version != __version__:
        raise BackendError(f"layalign._C belongs to version {found.version}, this is {__version__}: install again")
    return found


def accepts_dtype(dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the kernels take tensors of this dtype."""
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return False, f"{name} is left to impl='torch', its kernels compute in float32"
    return True, ""


def describe(tensor: Tensor | None) -> Described | None:
    """A tensor as the extension takes it: (address, dtype, sizes, strides)."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape, tensor.stride()


def describe_each(tensors: Sequence[Tensor] | Tensor) -> list[Described | None]:
    """Tensors of one kind described; of a single tensor, its parts along the first dimension."""
    if not isinstance(tensors, Tensor):
        return list(map(describe, tensors))
    begin, code, (step, *strides) = tensors.data_ptr(), DTYPES[tensors.dtype], tensors.stride()
    shape, stride, step = tensors.shape[1:], tuple(strides), step * tensors.element_size()
    return [(begin + j * step, code, shape, stride) for j in range(tensors.shape[0])]


def unit(tensor: Tensor) -> Tensor:
    """``tensor`` with a last stride of 1, copied only where it has another."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    # contiguous() returns an empty tensor as it is.
    return tensor.contiguous() if tensor.numel() else tensor.new_empty(tensor.shape)


def describe_layers(hidden: Sequence[Tensor]) -> tuple[list[Described], Sequence[Tensor]]:
    """The E layers described, and the described tensors, which must outlive the call: :func:`unit` copies some."""
    code = DTYPES[hidden[0].dtype]
    strides = [layer.stride() for layer in hidden]
    if not all(stride[-1] == 1 for stride in strides):
        hidden = [unit(layer) for layer in hidden]
        strides = [layer.stride() for layer in hidden]
    return [(t.data_ptr(), code, t.shape, stride) for t, stride in zip(hidden, strides, strict=True)], hidden


def float_like(tensor: Tensor) -> Tensor:
    """``tensor`` in a dtype that the kernels read; casts only small parameters in float64."""
    return tensor if tensor.dtype in DTYPES else tensor.float()


def place(backend: str, device: torch.device) -> tuple[int, int, int]:
    """(device, stream, threads) as the extension takes them; device -1 is the CPU."""
    if backend == "cpp":
        return -1, 0, torch.get_num_threads()
    if device.type == "cpu":
        return 0, 0, 1  # emulated
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream, 1


def _call(backend: str, device: torch.device, function: str, *arguments: Any) -> Any:
    extension = module(backend == "cuda" and device.type == "cpu")
    try:
        return getattr(extension, function)(*arguments)
    except extension.Error as error:
        raise BackendError(f"impl={backend!r}: {error}") from None


LAUNCHERS = (
    "layer_mix_forward",
    "layer_mix_backward",
    "gated_cross_attention_forward",
    "gated_cross_attention_backward",
    "gated_cross_attention_decode",
)


def launchers(backend: str) -> dict[str, Callable[..., Any]]:
    """The functions of :data:`LAUNCHERS` for "cpp" or "cuda", by name."""
    return {name: functools.partial(globals()[name], backend) for name in LAUNCHERS}


def _scratch(elements: int, like: Tensor) -> Tensor | None:
    return torch.empty(elements, dtype=torch.float32, device=like.device) if elements else None


def layer_mix_forward(backend: str, hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """E tensors (B, S, D), (2L, E), (2L,) or None -> (2L, B, S, D), contiguous."""
    first = hidden[0]
    weight, bias = unit(float_like(weight)), None if bias is None else float_like(bias).contiguous()
    out = torch.empty((weight.shape[0], *first.shape), dtype=first.dtype, device=first.device)
    if out.numel():
        layers, _kept = describe_layers(hidden)
        arguments = layers, describe(weight), describe(bias), describe(out), place(backend, first.device)
        _call(backend, first.device, "layer_mix_forward", *arguments)
    return out


def layer_mix_backward(
    backend: str,
    grad: Tensor,
    x: Tensor,
    hidden: Sequence[Tensor],
    weight: Tensor,
    need_weight: bool,
    need_hidden: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> dW (2L, E) and db (2L,) in fp32, dh (E, B, S, D) in x's dtype; None for what is not needed."""
    grad, weight = unit(grad.to(x.dtype)), unit(float_like(weight))
    x, slots, layers = x.contiguous(), weight.shape[0], len(hidden)
    dweight = torch.empty((slots, layers), dtype=torch.float32, device=x.device) if need_weight else None
    dbias = torch.empty(slots, dtype=torch.float32, device=x.device) if need_weight else None
    dhidden = torch.empty((layers, *x.shape[1:]), dtype=x.dtype, device=x.device) if need_hidden else None
    if x.numel() == 0:
        return tuple(None if part is None else part.zero_() for part in (dweight, dbias, dhidden))  # type: ignore[return-value]
    at = place(backend, x.device)
    elements = 0
    if need_weight and backend == "cuda":
        elements = _call(backend, x.device, "layer_mix_workspace", slots, layers, *x.shape[1:], at[0])
    workspace = _scratch(elements, x)
    parts = (weight, grad, x, dweight, dbias, dhidden, workspace)
    described, _kept = describe_layers(hidden)
    _call(backend, x.device, "layer_mix_backward", described, *map(describe, parts), at)
    return dweight, dbias, dhidden


def pack_weight(weight: Tensor, packed: Tensor) -> bool:
    """weight (J, N, K) fp32 into packed (J, tiles, K, width), contiguous; returns whether the weight is finite."""
    weight = unit(weight)
    arguments = describe(weight), describe(packed), torch.get_num_threads()
    return _call("cpp", weight.device, "pack_weight", *arguments)  # type: ignore[no-any-return]


def layer_projection_forward(
    hidden: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    packed: Tensor,
    finite: bool,
    bias: Tensor | None,
    outs: Sequence[Tensor] | Tensor,
) -> None:
    """The C++ kernel: E hidden (B, S, K) fp32, packed (1 or J, ...), bias (N,) or (J, N), into J outs (B, S, N)."""
    slots = mix_weight.shape[0]
    mix_weight, mix_bias = unit(float_like(mix_weight)), None if mix_bias is None else float_like(mix_bias).contiguous()
    bias = None if bias is None else unit(bias).expand(slots, bias.shape[-1])
    layers, _kept = describe_layers(hidden)
    mix = layers, describe(mix_weight), describe(mix_bias)
    projection = describe(packed), finite, describe(bias), describe_each(outs)
    _call("cpp", hidden[0].device, "layer_projection_forward", *mix, *projection, torch.get_num_threads())


def layer_projection_backward(x: Tensor, grads: Sequence[Tensor | None], dweight: Tensor) -> None:
    """The C++ kernel: dweight (1 or J, K, N) += x (J, R, K) transposed @ grads, J of (R, N) or None, all fp32."""
    kept = [None if grad is None else unit(grad) for grad in grads]
    arguments = describe(x), [describe(grad) for grad in kept], describe(dweight), torch.get_num_threads()
    _call("cpp", x.device, "layer_projection_backward", *arguments)


def batched_linear(
    x: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    transposed: bool,
) -> None:
    """The C++ kernel: outs[j] (R, N) = x[j] (R, K) @ weights[j] (K, N; transposed: N, K) + biases[j], all fp32."""
    x, weights = [unit(each) for each in x], [unit(each) for each in weights]
    biases = [None if bias is None else unit(bias) for bias in biases]
    described = [[describe(tensor) for tensor in tensors] for tensors in (x, weights, biases, outs)]
    _call("cpp", outs[0].device, "batched_linear", *described, transposed, torch.get_num_threads())


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, residual: Tensor | None, mask: Tensor | None, scale: Any
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """The described inputs, and the described tensors, which must outlive the call."""
    size = query.shape[-1]
    residual = None if residual is None else unit(float_like(residual))
    kept = [unit(query), unit(key), unit(value), float_like(gate), residual, mask]
    return (*map(describe, kept), size**-0.5 if scale is None else float(scale)), kept


def gated_cross_attention_forward(backend: str, query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """query, key, value, gate, residual, key_mask and scale, with shapes as in the public function
    -> out (B, T, H, d) contiguous, log-sum-exp (B, H, T) fp32 in base 2.
    """
    batch, heads, length, size = query.shape
    out = torch.empty((batch, length, heads, size), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    if out.numel():
        inputs, _kept = _inputs(query, *others)
        at = place(backend, query.device)
        _call(backend, query.device, "gated_cross_attention_forward", inputs, describe(out), describe(lse), at)
    return out, lse


def gated_cross_attention_decode(backend: str, query: Tensor, *others: Any, splits: int | None = None) -> Tensor:
    """As the forward, for few rows T, without the log-sum-exp; ``splits`` overrides the extension's choice."""
    batch, heads, length, size = query.shape
    out = torch.empty((batch, length, heads, size), dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    inputs, _kept = _inputs(query, *others)
    at = place(backend, query.device)
    workspace = None
    if backend == "cpp":
        splits = 1  # the C++ kernel splits the work itself
    elif splits is None:
        splits = int(_call(backend, query.device, "decode_splits", inputs, at[0]))
    if splits > 1:
        workspace = _scratch(_call(backend, query.device, "decode_workspace", inputs, splits, at[0]), query)
    _call(backend, query.device, "gated_cross_attention_decode", inputs, describe(out), splits, describe(workspace), at)
    return out


def gated_cross_attention_backward(
    backend: str,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    key_mask: Tensor | None,
    lse: Tensor,
    scale: float | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """-> dq, dk, dv in the inputs' dtype and shape (views of (B, rows, heads, d) memory), dgate like the gate."""
    grad = unit(grad.to(query.dtype))

    def rows_first(states: Tensor) -> Tensor:  # the memory order of the projections that wrote the states
        batch, heads, rows, size = states.shape
        return torch.empty((batch, rows, heads, size), dtype=states.dtype, device=states.device).transpose(1, 2)

    states = zip((query, key, value), needs[:3], strict=True)
    results: list[Tensor | None] = [rows_first(tensor) if need else None for tensor, need in states]
    results.append(torch.empty(gate.shape, dtype=torch.float32, device=gate.device) if needs[3] else None)
    if query.numel() == 0 or key.numel() == 0:
        results = [None if result is None else result.zero_() for result in results]
    else:
        inputs, _kept = _inputs(query, key, value, gate, None, key_mask, scale)
        at = place(backend, query.device)
        elements = 0
        if backend == "cuda":
            elements = _call(backend, query.device, "backward_workspace", inputs, list(needs), at[0])
        parts = (grad, lse, *results, _scratch(elements, query))
        _call(backend, query.device, "gated_cross_attention_backward", inputs, *map(describe, parts), at)
    if results[3] is not None:
        results[3] = results[3].to(gate.dtype)
    return tuple(results)
