"""What a training step and a decode step ask of a GPU, counted without one: launches, waits, bytes.

``python benchmarks/launches.py`` prints a Markdown table. The model has the paper's sizes (mT5-xl, a 7B LLM, bf16) and
no memory: its tensors are fake ones on a device that stands for a GPU, and the Triton backend is taken to be usable.
Nothing is computed or timed. Counted are:

- *launches*: operations of torch that start a kernel (not views and empty tensors; a copy before an out-of-place write
  counts as one more) and of layalign. An operation of either may start several kernels; it counts as one.
- *ours*: those that layalign's own code calls. The rest is transformers' or belongs to the backward.
- *waits*: where the host needs a number from the device, by the line of code that asks. transformers' own waits in
  building masks are not among them: it does not look at numbers of fake tensors.
- *MiB written*: by those operations, as results. *peak MiB*: the most that is alive at once of what the step has made.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import layalign
from layalign import LayAlignForCausalLM
from layalign.modeling import key_values
from layalign.nn import aligner
from layalign.ops import backends, checks
from layalign.utils.versions import cache_of

KIND = "lazy"  # one of torch's types of devices that a build without a GPU can fake; it stands for "cuda"
DEVICE = torch.device(KIND, 0)
OWN, THEIRS, BACKWARD = "layalign", "transformers", "backward"
_FOLDERS = {OWN: f"{Path(layalign.__file__).parent}/", THEIRS: f"{Path(transformers.__file__).parent}/"}

aten = torch.ops.aten
_NO_KERNEL = {
    "_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "lift_fresh", "alias", "sym_size", "_local_scalar_dense", "device",
}  # fmt: skip
_TWO_KERNELS = {"index_copy", "index_add", "index_fill", "constant_pad_nd", "masked_fill", "scatter", "scatter_add"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}


def is_view(func: Any) -> bool:
    """Whether an operation returns another view of its input's memory."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def launches_of(func: Any) -> int:
    """Kernels that an operation starts, see the module."""
    name = func.name().split("::")[1].split(".")[0]
    if is_view(func) or name in _NO_KERNEL or func.namespace == "prim":
        return 0
    return 2 if name in _TWO_KERNELS else 1


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for the device in an operation."""
    name = func.name().split("::")[1].split(".")[0]
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if not any(tensor.device.type != "cpu" for tensor in tensors) and "device" not in kwargs:
        return False
    if name in ("index", "index_put", "index_put_"):
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("_to_copy", "copy_"):  # from memory that is not pinned, and to the host
        devices = [tensor.device.type for tensor in tensors] + [torch.device(kwargs.get("device") or "meta").type]
        return "cpu" in devices and len(set(devices) - {"meta"}) > 1 and not kwargs.get("non_blocking")
    return name in _WAITS


def caller() -> tuple[str, str]:
    """(whose, file:line) of the innermost frame of layalign or transformers; of the backward if there is none."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        for whose, folder in _FOLDERS.items():
            if file.startswith(folder):
                return whose, f"{whose}/{file.removeprefix(folder)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return BACKWARD, ""


class Wait(NamedTuple):
    """Where the host waits: whose code asks, by which operation, its line, and what transformers had launched then."""

    whose: str
    operation: str
    line: str
    after: int


class Trace(TorchDispatchMode):
    """Counts what runs within it.

    Args:
        found: how many positions ``nonzero`` finds in a tensor, by its number of elements.

    Attributes:
        launches, written: launches and bytes of results, by whose they are.
        operations: launches by (whose, operation).
        waits: each wait.
        peak: the most bytes alive at once of what ran here has made.
    """

    def __init__(self, found: dict[int, int] | None = None) -> None:
        super().__init__()
        self.found = found or {}
        self.launches: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.operations: Counter[tuple[str, str]] = Counter()
        self.waits: list[Wait] = []
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = launches_of(func)
        waited = waits(func, args, kwargs)
        if count or waited:
            whose, line = caller()
            if waited:
                self.waits.append(Wait(whose, func.name(), line, self.launches[THEIRS]))
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else 1
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:
            rows = self.found.get(args[0].numel(), args[0].numel())
            result = args[0].new_empty((rows, args[0].dim()), dtype=torch.long)
        else:
            result = func(*args, **kwargs)
        if count:
            self.launches[whose] += count
            self.operations[whose, func.name()] += count
            results = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            if func in (
                aten.index_copy_.default,
                aten.index_copy.default,
            ):  # writes the rows, and copies the rest first
                self.written[whose] += args[3].nbytes
                self.written[whose] += result.nbytes if func is aten.index_copy.default else 0
            else:
                self.written[whose] += sum(each.nbytes for each in results)
            self._keep(results)
        return result

    def _keep(self, results: list[Tensor]) -> None:
        for result in results:
            storage = result.untyped_storage()
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if sum(self.launches.values()) % 8 == 0:  # to look at all of them each time takes long
            self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


class _Same:
    """Stands for :class:`layalign.modeling.identity.Identity`, which asks tensors for their addresses."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def of(self, tensors: Sequence[Tensor]) -> bool:
        return all(one is other for one, other in zip(self.tensors, tensors, strict=True))


@contextmanager
def pretended_gpu() -> Iterator[FakeTensorMode]:
    """Within the block tensors on :data:`DEVICE` are fake ones, Triton's kernels serve them, weights may be read."""
    usable, autocast = backends._capability, torch.is_autocast_enabled

    def capability(backend: str, device: str) -> tuple[bool, str]:
        return usable(backend, device) if device != KIND else (backend in ("triton", "torch"), "taken to be usable")

    with ExitStack() as patches:
        for place, name, value in (
            (backends, "_capability", capability),
            (torch, "is_autocast_enabled", lambda *kind: kind != (KIND,) and autocast(*kind)),
            (aligner, "reason_against_reading", lambda linear: None),
            (key_values, "reason_against_reading", lambda linear: None),
            (key_values, "reason_against_watching", lambda tensors: None),
            (key_values, "Identity", _Same),
            (checks, "ASSERTING", checks.ASSERTING | {KIND}),
        ):
            patches.enter_context(mock.patch.object(place, name, value))
        yield patches.enter_context(FakeTensorMode())


def pretend(model: nn.Module) -> None:
    """Replace the parameters and buffers of ``model`` by fake ones on the device. Within :func:`pretended_gpu`."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = tensor, nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return made[id(tensor)][1]  # type: ignore[no-any-return]

    with torch.no_grad():
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                own.update({name: fake(tensor) for name, tensor in own.items() if tensor is not None})


SIZES = {
    "encoder": ("mt5", dict(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, vocab_size=250112)),
    "llm": ("llama", dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                          vocab_size=32000)),
}  # fmt: skip


def built(**options: Any) -> LayAlignForCausalLM:
    """A model of :data:`SIZES` in bf16, without memory. Within :func:`pretended_gpu`."""
    with unset_fake_temporarily(), torch.device("meta"):
        parts = []
        for auto, (kind, changes) in zip((AutoModel, AutoModelForCausalLM), SIZES.values(), strict=True):
            parts.append(auto.from_config(AutoConfig.for_model(kind, **changes), dtype=torch.bfloat16))
        model = LayAlignForCausalLM.from_encoder_and_llm(*parts, **options)
    pretend(model)
    return model


def ids(*shape: int) -> Tensor:
    """Ids or a mask on the device."""
    return torch.empty(shape, dtype=torch.long, device=DEVICE)


B, S, T, BEAMS = 8, 128, 160, 4
REAL, LABELS = B * S * 3 // 4, 400  # source tokens that are no padding, labels
SOURCE = {"encoder_input_ids": (B, S), "encoder_attention_mask": (B, S)}
INPUT = {"input_ids": (B, T), "attention_mask": (B, T)}


def training_step(model: LayAlignForCausalLM, **more: Tensor | None) -> Trace:
    """Forward and backward of a batch as the collator makes it; ``more`` arguments of the model."""
    model.train()
    shapes = {**SOURCE, **INPUT, "labels": (B, T), "encoder_token_index": (REAL,), "loss_index": (LABELS,)}
    batch = {name: ids(*shape) for name, shape in shapes.items()}
    trace = Trace({B * S: REAL, B * T: LABELS})
    with trace:
        model(**{**batch, **more}).loss.backward()
    return trace


@torch.no_grad()
def decode_step(model: LayAlignForCausalLM, beams: int = 1) -> Trace:
    """One new token of every sequence; with beams, after they have changed places."""
    model.eval()
    with Trace({B * S: REAL}):  # answers where the host asks
        _, mask, embeds, source = model._begin(ids(B, T), ids(B, T), ids(B, S), ids(B, S))
    embeds, mask = embeds.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0)
    output = model(
        inputs_embeds=embeds, attention_mask=mask, source_states=source.share(beams), use_cache=True, logits_to_keep=1
    )
    cache = cache_of(output)
    step = {"input_ids": ids(B * beams, 1), "attention_mask": ids(B * beams, T + 1), "position_ids": ids(B * beams, 1)}
    trace = Trace()
    with trace:
        if beams > 1:
            cache.reorder_cache(ids(B * beams))
        model(**step, past_key_values=cache, use_cache=True)
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", action="store_true", help="also print the launches of layalign by operation")
    arguments = parser.parse_args()
    print(f"B {B}, S {S} with {REAL} real tokens of {B * S}, T {T} with {LABELS} labels, {BEAMS} beams\n")
    print("| step | waits of ours | launches | ours | MiB written | ours | peak MiB |\n|---|---|---|---|---|---|---|")
    with pretended_gpu():
        for name, options, run in (
            ("training", {}, training_step),
            (
                "training, positions not given",
                {},
                lambda m: training_step(m, encoder_token_index=None, loss_index=None),
            ),
            ("training, folded", {"fold_projections": "always"}, training_step),
            ("decode", {}, decode_step),
            (f"decode, {BEAMS} beams", {}, lambda model: decode_step(model, BEAMS)),
        ):
            trace = run(built(**options))
            own = sum(wait.whose == OWN for wait in trace.waits)
            written = [round(size / 2**20, 1) for size in (sum(trace.written.values()), trace.written[OWN])]
            counts = own, sum(trace.launches.values()), trace.launches[OWN], *written, round(trace.peak / 2**20)
            print(f"| {name} | {' | '.join(map(str, counts))} |", flush=True)
            for wait in trace.waits:
                print(*wait[:3], file=sys.stderr)
            if arguments.operations:
                for (whose, operation), count in trace.operations.most_common():
                    if whose == OWN or operation.startswith(OWN):
                        print(f"  {count:5} {operation} {whose}", file=sys.stderr)


if __name__ == "__main__":
    main()
