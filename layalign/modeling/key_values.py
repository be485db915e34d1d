"""How the source's keys and values of all language layers are computed: decided once a call, and done here.

k_i is the LLM's key map of layer i on the aligner's key state y[2i], v_i its value map on y[2i + 1]. Calling aligner
and maps as modules is always correct. :class:`KeyValueProjector` knows three cheaper ways, and when they do not serve.
With the structure "Linear", the LLM's maps follow the aligner's projection directly, so

    k_i = k_proj_i(y[2i]) = x[2i] @ (Wk_i @ W2).T + (Wk_i @ b2 + bk_i)

and likewise for v_i. Folding Wk_i @ W2 costs D_e * D_l * D_kv multiply-adds per map whenever W2 changes, and saves
D_e * D_l + D_l * D_kv - D_e * D_kv per row and map from then on; :func:`break_even_rows` compares the two. Folding
reads weights instead of calling modules, so the maps must be frozen ``nn.Linear`` modules: :func:`reason_against` says
why they cannot be folded (sharded, quantised or LoRA-wrapped maps, hooks, ...).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layalign import ops
from layalign.modeling.decoders import KEY_VALUE_MAPS, head_size, key_value_maps, key_value_states
from layalign.modeling.identity import Identity, bits, reason_against_watching, sample, unwritten
from layalign.modeling.padding import spread_all
from layalign.nn.aligner import EncoderAligner, WeightedLinearProjector, reason_against_passing
from layalign.nn.inspection import is_intercepted, is_repatched, is_watched, reason_against_reading
from layalign.nn.rows import Rows, patched_forward
from layalign.ops import checks, grouped_projection
from layalign.ops.grouped_projection import PackedWeight, heads

logger = logging.getLogger("layalign")

CHOICES = ("auto", "always", "never")
MARGIN = 1.25  # factor on the break-even rows in training: the folded weights take memory, so they must pay clearly


def break_even_rows(
    encoder_size: int, llm_size: int, kv_size: int, training: bool = False, reused: int = 1, terms: int = 1
) -> float:
    """The number of rows (B * S) in a call from which folding takes fewer multiply-adds; infinite if it never does.

    Args:
        encoder_size, llm_size, kv_size: D_e, D_l, D_kv.
        training: whether gradients are computed. Their share of the fold (dW2) is paid in every backward.
        reused: number of calls that one folded weight serves before W2 changes.
        terms: number of products of a fold: 2 for an fp32 W2 and half-precision maps.

    Source: the counts in this module's docstring. For training, forward and backward: 3 D_e D_l + 2 D_l D_kv per row
    unfolded, 3 D_e D_kv folded.
    """
    fold = encoder_size * llm_size * kv_size
    if training:
        saved = 3 * encoder_size * llm_size + 2 * llm_size * kv_size - 3 * encoder_size * kv_size
        cost = fold * (1 + terms / reused)
    else:
        saved = encoder_size * llm_size + llm_size * kv_size - encoder_size * kv_size
        cost = fold * terms / reused
    return cost / saved if saved > 0 else float("inf")


# The following read the modules' own tables: an attribute costs a microsecond, and a call reads a hundred of them.


def _maps(attentions: Sequence[Any]) -> list[Any]:
    """The key map and the value map of each layer in turn; None where a layer has none of that name."""
    names = _names(attentions)
    return [attention._modules.get(name) for attention in attentions for name in names]


def _names(attentions: Sequence[Any]) -> tuple[str, ...]:
    """The names of the first layer's two maps; if one map computes both, the usual names, which the layer lacks."""
    maps = key_value_maps(attentions[0]) if attentions else None
    return KEY_VALUE_MAPS[0].names if maps is None or maps.split is not None else maps.names


def _parameters(linear: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """(weight, bias) of a linear map that :func:`reason_against_reading` has accepted."""
    own: Any = linear._parameters
    return own["weight"], own.get("bias")


def reason_against(projector: WeightedLinearProjector, attentions: Sequence[nn.Module]) -> str | None:
    """Why the weights cannot be folded; None if they can."""
    if projector.structure != "Linear":
        return f'structure "{projector.structure}" has a relu between the two maps'
    if projector.times > 1:
        return 'with mix "shared" one product serves all layers'
    if is_intercepted(projector):
        return "the aligner's projector has hooks or a patched forward, which reading its weights would bypass"
    problem = reason_against_reading(projector.fc2) or reason_against_watching(projector.fc2._parameters.values())
    if problem is not None:
        return f"fc2: {problem}"
    first: Any = None
    names = _names(attentions)
    for place, linear in enumerate(_maps(attentions)):
        name = names[place % 2]
        if linear is None:
            return f"{type(attentions[place // 2]).__name__} has no {name} of its own"
        problem = reason_against_reading(linear) or reason_against_watching(linear._parameters.values())
        if problem is not None:
            return f"{name}: {problem}"
        weight, bias = _parameters(linear)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return f"{name} trains"
        kind = weight.shape, weight.device, bias is None
        first = kind if first is None else first
        if kind != first:
            return "the layers' key and value maps differ in shape, device or bias"
    if first is not None and first[1] != projector.fc2.weight.device:
        return "aligner and LLM are on different devices"
    return None


class _Passed:
    """All that the answer of :func:`reason_against` depends on, for a projector and attentions that it has accepted."""

    def __init__(self, settings: tuple[Any, ...], parameters: Sequence[Tensor]) -> None:
        self.settings, self.parameters = settings, Identity(parameters)

    def holds(self, settings: tuple[Any, ...], parameters: Sequence[Tensor]) -> bool:
        return self.settings == settings and self.parameters.of(parameters)


def _seen(
    projector: WeightedLinearProjector, attentions: Sequence[nn.Module]
) -> tuple[tuple[Any, ...], list[nn.Parameter]]:
    """(settings, parameters) that :func:`reason_against` and a fold depend on."""
    own: Any = projector._modules
    settings: list[Any] = [projector.structure, projector.times, type(projector), is_intercepted(projector)]
    parameters: list[nn.Parameter] = []
    for linear in (own["fc2"], *_maps(attentions)):
        settings += type(linear), linear is not None and is_intercepted(linear)
        for name, p in () if linear is None else linear._parameters.items():
            if p is not None:
                settings += name, p.requires_grad, len(p.__dict__)  # in __dict__ ZeRO-3 and FSDP1 mark theirs
                parameters.append(p)
    return tuple(settings), parameters


@torch.inference_mode(False)
@torch.no_grad()
def _values(fc2: nn.Linear, maps: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """The numbers that are compared where no version counter shows a write.

    All of fc2, which trains, and the biases. Of the LLM's frozen maps, which are too large to read, a sample.
    """
    biases = [bits(linear.bias) for linear in maps if linear.bias is not None]
    frozen = torch.cat([*(sample(linear.weight) for linear in maps), *biases])
    return *(bits(p) for p in _parameters(fc2) if p is not None), frozen


@dataclass(frozen=True)
class Folded:
    """The folded weight (2L, D_kv, D_e), packed or not, the bias (2L, D_kv), and what they were made from."""

    weight: Tensor | PackedWeight
    bias: Tensor | None
    key: tuple[Any, ...]
    values: tuple[Tensor, ...]


def _fold_dtype(own: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an LLM's map ``own`` is folded for products in ``dtype``."""
    return dtype if own.dtype == dtype else torch.promote_types(dtype, torch.float32)


def fold(fc2: nn.Linear, maps: Sequence[nn.Linear], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The aligner's projection folded into the LLM's maps, once, for an engine that keeps it.

    Args:
        fc2: the projection, D_e -> D_l.
        maps: M maps of one shape, D_l -> D_kv.
        dtype: of the result.

    Returns:
        The weight (M, D_kv, D_e) and the bias (M, D_kv), or None if there is none.
    """
    folded = _fold(fc2, maps, dtype, ())
    assert isinstance(folded.weight, Tensor)
    return folded.weight, folded.bias


def _terms(inner: Tensor, dtype: torch.dtype) -> int:
    """The number of terms in ``dtype`` whose sum is ``inner``."""
    return 2 if inner.dtype.itemsize > dtype.itemsize else 1


@torch.inference_mode(False)  # tensors made in inference mode cannot be saved for a backward
@torch.no_grad()
def _fold(
    fc2: nn.Linear, maps: Sequence[nn.Linear], dtype: torch.dtype, key: tuple[Any, ...], packed: bool = False
) -> Folded:
    """Fold in ``dtype``, with one rounding, at the end.

    Products of half-precision maps run in half precision, on a GPU at many times the rate of fp32. They accumulate in
    fp32, and take an fp32 W2 in two terms: W2 = high + low, [W_i | W_i] @ [high; low].
    """
    values = tuple(each.clone() for each in _values(fc2, maps))
    compute = _fold_dtype(maps[0].weight, dtype)
    split = _terms(fc2.weight, compute) > 1

    def inner(tensor: Tensor) -> Tensor:
        high = tensor.to(compute)
        return torch.cat([high, (tensor - high).to(compute)]) if split else high

    inner_weight, inner_bias = inner(fc2.weight), None if fc2.bias is None else inner(fc2.bias)
    shape = len(maps), maps[0].out_features
    weight: Tensor | PackedWeight
    if packed:
        weight = PackedWeight(*shape, fc2.in_features)
    else:
        weight = torch.empty((*shape, fc2.in_features), dtype=dtype, device=inner_weight.device)
    has_bias = fc2.bias is not None or maps[0].bias is not None
    bias = torch.zeros(shape, dtype=dtype, device=inner_weight.device) if has_bias else None
    for index, linear in enumerate(maps):
        own = linear.weight.to(compute)
        if split:
            own = torch.cat([own, own], dim=1)
        elif own.is_cpu and own.data_ptr() % 64:  # mapped from a file: a CPU's last bits depend on the address
            own = own.clone()
        product = own @ inner_weight
        if isinstance(weight, PackedWeight):
            weight.put(slice(index, index + 1), product[None])
        else:
            weight[index] = product
        if bias is not None:
            offset = None if linear.bias is None else linear.bias.to(compute)
            if inner_bias is not None:
                offset = own @ inner_bias if offset is None else torch.addmv(offset, own, inner_bias)
            bias[index] = offset
    return Folded(weight, bias, key, values)


class _Fold(torch.autograd.Function):
    """Hands out the folded weights; its backward is dW2 = sum_i W_i.T @ dM_i, db2 = sum_i W_i.T @ dc_i."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, folded: Folded, maps: Sequence[nn.Linear]
    ) -> tuple[Tensor, Tensor | None]:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(*(linear.weight for linear in maps))
        assert isinstance(folded.weight, Tensor)
        # Views: the cached tensors serve later calls too.
        return folded.weight.view_as(folded.weight), None if folded.bias is None else folded.bias.view_as(folded.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_bias: Tensor | None) -> tuple[Any, ...]:
        need_weight, need_bias, *_ = ctx.needs_input_grad
        total: Tensor | None = None
        total_bias: Tensor | None = None
        for index, own in enumerate(ctx.saved_tensors):
            if need_weight and grad is not None:
                total = _added(total, own.T.to(grad.dtype) @ grad[index])
            if need_bias and grad_bias is not None:
                total_bias = _added(total_bias, grad_bias[index] @ own.to(grad_bias.dtype))
        totals = zip((total, total_bias), ctx.dtypes, strict=True)
        return (*(None if sums is None else sums.to(dtype) for sums, dtype in totals), None, None)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part, in fp32 at least: half precision would round after every addition."""
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32))
    return total.add_(part)


def useful(projector: WeightedLinearProjector, hidden: Sequence[Tensor]) -> bool:
    """Whether to compute by a projector's weights, a few mixes at a time: on a CPU, if its weights may be read."""
    if not grouped_projection.can_run(hidden, projector.impl):
        return False
    if projector.structure != "Linear" or is_intercepted(projector):
        return False
    return all(reason_against_reading(linear) is None for linear in (projector.fc1, projector.fc2))


def by_weights(
    projector: WeightedLinearProjector,
    hidden: Sequence[Tensor],
    folded: tuple[Tensor | PackedWeight, Tensor | None] | None = None,
    outer: Sequence[nn.Linear] = (),
    size: int | None = None,
) -> Sequence[Tensor]:
    """:func:`layalign.ops.grouped_projection.grouped_projection` of modules that :func:`useful` has accepted."""
    fc1, fc2, pairs = projector.fc1, projector.fc2, [_parameters(linear) for linear in outer]
    mix, inner = (fc1.weight, fc1.bias), (fc2.weight, fc2.bias)
    return grouped_projection.grouped_projection(hidden, mix, inner, folded, pairs, size=size, impl=projector.impl)


class Way(NamedTuple):
    """How keys and values are computed in a call.

    Attributes:
        name: one of :data:`WAYS`.
        passed: for :data:`FOLDED`, what was accepted of the weights.
    """

    name: str
    passed: _Passed | None = None


# From the fewest calls of modules to the most:
FOLDED = "folded"  # x[j] @ (Wk @ W2).T
GROUPED = "grouped"  # aligner and maps by their weights, a few mixes at a time
MAPS_CALLED = "maps called"  # the aligner by its weights, the maps as modules
CALLED = "called"
WAYS = (FOLDED, GROUPED, MAPS_CALLED, CALLED)


def _reads_rows(way: Way, aligner: EncoderAligner, hidden: Sequence[Tensor]) -> bool:
    """Whether the operations get the tokens to compute, and read them where they are, instead of copies of them.

    On a CPU copies are faster. What watches or replaces a module expects the tokens alone.
    """
    if hidden[0].is_cpu:
        return False
    return way.name == FOLDED or (
        _is_own(aligner, EncoderAligner) and _is_own(aligner.projector, WeightedLinearProjector)
    )


def _is_own(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` is of this class, and only engines act in its calls."""
    return type(module) is cls and not (is_watched(module) or patched_forward(module) or is_repatched(cls))


class KeyValueProjector:
    """Computes the source's keys and values of all language layers. :meth:`way` decides how, for each call.

    The folded weights are kept until the weights that they were made from change. A change is noticed by the
    parameters' identity, memory and version counters, and by comparing values: all of the aligner's, and a sample of
    each of the LLM's maps. After writing single numbers of the LLM's maps in a way that version counters miss
    (``.data``, numpy, shared memory), call :meth:`forget`.

    Args:
        choice: whether to fold: "auto" (by :func:`break_even_rows`), "always" (wherever it can be done) or "never".

    Attributes:
        last: whether the last call folded, and if not, why.
    """

    def __init__(self, choice: str = "auto") -> None:
        self.choice = choice
        self.last: str = "not asked yet"
        self._folded: Folded | None = None
        self._passed: _Passed | None = None
        self._version: int | None = None
        self._calls, self._calls_before = 0, 1  # calls in training with the current weights, and with those before

    def forget(self) -> None:
        """Fold again in the next call."""
        self._folded = None

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles do not carry what can be computed again
        return KeyValueProjector(self.choice).__dict__

    def __call__(
        self,
        aligner: EncoderAligner,
        attentions: Sequence[nn.Module],
        hidden: Sequence[Tensor],
        dtype: torch.dtype,
        engine: str | None = None,
        rows: Rows | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """L keys and L values, each (B, G, S, d) in ``dtype``, or in autocast's.

        Args:
            aligner: the model's aligner.
            attentions: the LLM's self-attention modules of the L language layers.
            hidden: E tensors (B, S, D_e), the encoder's hidden states.
            dtype: the LLM's dtype.
            engine: the engine that shards the model, or None.
            rows: the tokens to compute; the others' keys and values are zeros. None for all.
        """
        way, index = self.way(aligner, attentions, hidden, engine, rows), None
        if rows is not None and _reads_rows(way, aligner, hidden):
            index = rows.index.to(hidden[0].device)
        elif rows is not None:
            hidden = [rows.select(states) for states in hidden]
        made = self._both(way, aligner, attentions, hidden, dtype, index)
        if rows is not None:
            both = spread_all(rows, made)
        else:
            both = made.unbind(0) if isinstance(made, Tensor) else made
        return list(both[0::2]), list(both[1::2])

    def _both(
        self,
        way: Way,
        aligner: EncoderAligner,
        attentions: Sequence[nn.Module],
        hidden: Sequence[Tensor],
        dtype: torch.dtype,
        index: Tensor | None,
    ) -> list[Tensor] | Tensor:
        """Key and value of each layer in turn: 2L tensors (B, G, S, d), or one.

        ``index``: the tokens to compute, (N,) positions in (B, S); they make one row of N tokens.
        """
        projector = aligner.projector
        if way.name == CALLED:
            pairs = aligner(hidden) if index is None else aligner(hidden, rows=index)
            return self._by_modules(attentions, pairs, dtype)
        layers = aligner.layers(hidden)
        if way.name == MAPS_CALLED:
            states = list(by_weights(projector, layers)) * projector.times
            return self._by_modules(attentions, zip(states[0::2], states[1::2], strict=True), dtype)
        maps, size = _maps(attentions), head_size(attentions[0])
        both: Sequence[Tensor] | Tensor
        if way.name == FOLDED:
            both = self._by_folding(projector, maps, layers, size, way.passed, index)
        else:
            both = by_weights(projector, layers, outer=maps, size=size)
        if checks.autocast_dtype(both[0]) is not None:  # autocast keeps its own dtype, as in the LLM's modules
            return both if isinstance(both, Tensor) else list(both)
        return both.to(dtype) if isinstance(both, Tensor) else [each.to(dtype) for each in both]

    def way(
        self,
        aligner: EncoderAligner,
        attentions: Sequence[nn.Module],
        hidden: Sequence[Tensor],
        engine: str | None = None,
        rows: Rows | None = None,
    ) -> Way:
        """How a call with these arguments is computed. Why it does not fold is noted in :attr:`last`."""
        if torch.compiler.is_compiling():  # the weights' versions cannot be watched
            return Way(CALLED)
        against = f"{engine} shards the model" if engine else reason_against_passing(aligner)
        if against is not None:
            self.say(against)
            return Way(CALLED)
        projector = aligner.projector
        reading, passed = self._against_reading(projector, attentions)
        against = reading if reading is not None else self._against(projector, attentions, hidden, rows)
        self.say(against)
        if against is None:
            return Way(FOLDED, passed)
        if not useful(projector, hidden):
            return Way(CALLED)
        if reading is not None or checks.autocast_dtype(hidden[0]) is not None:
            return Way(MAPS_CALLED)
        return Way(GROUPED if _maps(attentions[:1])[0].weight.dtype == hidden[0].dtype else MAPS_CALLED)

    def _by_modules(
        self, attentions: Sequence[nn.Module], pairs: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype
    ) -> list[Tensor]:
        return [
            state
            for module, (key, value) in zip(attentions, pairs, strict=True)
            for state in key_value_states(module, key.to(dtype), value.to(dtype))
        ]

    def _by_folding(
        self,
        projector: WeightedLinearProjector,
        maps: Sequence[nn.Linear],
        hidden: Sequence[Tensor],
        size: int,
        passed: _Passed | None,
        index: Tensor | None,
    ) -> Sequence[Tensor] | Tensor:
        fc1, fc2, by_groups = projector.fc1, projector.fc2, useful(projector, hidden)
        packed = by_groups and grouped_projection.packable(hidden, maps[0].out_features, projector.impl)
        packed = packed and not grouped_projection.differentiated((fc1.weight, fc1.bias, fc2.weight, fc2.bias, *hidden))
        folded = self._current(fc2, maps, hidden[0], packed, passed)
        weight, bias = folded.weight, folded.bias
        if by_groups:
            return by_weights(projector, hidden, (weight, bias), maps, size)
        assert isinstance(weight, Tensor)
        if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (fc2.weight, fc2.bias)):
            weight, bias = _Fold.apply(fc2.weight, fc2.bias, folded, maps)
        both = ops.layer_projection(hidden, fc1.weight, fc1.bias, weight, bias, rows=index, impl=projector.impl)
        return heads(both, size)

    def _against_reading(
        self, projector: WeightedLinearProjector, attentions: Sequence[nn.Module]
    ) -> tuple[str | None, _Passed | None]:
        """(why the modules must be called, None), or (None, what was accepted of the weights to read)."""
        if not attentions:
            return "no layer attends", None
        if checks.transforming():
            return "under functional transforms (torch.func) the modules are called", None
        seen, passed = _seen(projector, attentions), self._passed
        if passed is not None and passed.holds(*seen):
            return None, passed
        against = reason_against(projector, attentions)
        passed = None if against is not None else _Passed(*seen)
        self._passed, self._folded = passed, None  # the weights may change while the modules are called
        return against, passed

    def _against(
        self,
        projector: WeightedLinearProjector,
        attentions: Sequence[nn.Module],
        hidden: Sequence[Tensor],
        rows: Rows | None,
    ) -> str | None:
        """Why not to fold, if the weights may be read; None to fold."""
        if self.choice == "never":
            return "fold_projections='never'"
        if self.choice == "always":
            return None
        fc2, linear = projector.fc2, _maps(attentions)[0]
        version = fc2.weight._version
        if version != self._version:
            self._version, self._calls, self._calls_before = version, 0, max(self._calls, 1)
        training = torch.is_grad_enabled() and fc2.weight.requires_grad
        if not training:
            return None  # folded once, however many calls follow
        self._calls += 1
        count = hidden[0].shape[0] * hidden[0].shape[1] if rows is None else len(rows)
        sizes = fc2.in_features, fc2.out_features, linear.out_features
        dtype = checks.compute_dtype(hidden[0])
        fold_dtype = _fold_dtype(linear.weight, dtype)
        if fold_dtype != dtype and not hidden[0].is_cpu:  # a GPU has another rate for each
            return f"a fold of {linear.weight.dtype} maps is in {fold_dtype}, the products that it saves in {dtype}"
        terms = _terms(fc2.weight, fold_dtype)
        needed = MARGIN * break_even_rows(*sizes, training=True, reused=self._calls_before, terms=terms)
        return None if count >= needed else f"{count} rows a call, folding pays from {needed:.0f}"

    def _current(
        self, fc2: nn.Linear, maps: Sequence[nn.Linear], like: Tensor, packed: bool, passed: _Passed | None
    ) -> Folded:
        dtype = checks.compute_dtype(like)
        packed = packed and dtype == torch.float32
        key = dtype, packed, passed
        folded = self._folded
        if folded is None or folded.key != key or not unwritten(folded.values, _values(fc2, maps)):
            self._folded = folded = None  # free the old weights first
            with checks.without_autocast(like):
                self._folded = folded = _fold(fc2, maps, dtype, key, packed)
        return folded

    def say(self, against: str | None) -> None:
        """Note in :attr:`last` that a call folds, or the reason ``against``; log it if it has changed."""
        if torch.compiler.is_compiling():  # a log line would break the graph, reading `last` would add a guard
            return
        now = "folded" if against is None else f"not folded: {against}"
        if now != self.last:
            logger.info("layalign: keys and values of the source: %s", now)
            self.last = now
