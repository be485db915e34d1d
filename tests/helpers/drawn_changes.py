"""What may change between two calls of a model, one function each, and the model built afresh that answers are held to.

A :class:`Case` is a model that is called and changed by turns. :meth:`Case.fresh` builds another one that has never
been called: the same parts, the same changes of structure, copies of the tensors that the first one holds now. It runs
without anything that earlier calls have left in this process, and by full calls only (:func:`never_called`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import pickle
import random
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from torch.nn.utils import parametrize

from layalign import LayAlignForCausalLM
from layalign.modeling import cross_attention as passes
from layalign.modeling import decoders
from layalign.modeling.last_layer import LastLayer
from layalign.nn import EncoderAligner, GatedCrossAttention, WeightedLinearProjector, aligner, cross_attention
from layalign.ops import cached_launch
from layalign.utils.errors import ArgumentError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
Change = Callable[[Any, random.Random], Any]

CHANGES: dict[str, Change] = {}  # of values, dtypes, places: a copy of the tensors tells all of them
STRUCTURE: dict[str, Change] = {}  # what a fresh model goes through as well
OBJECTS: dict[str, Change] = {}  # give another object that stands for the same model
WORLD: dict[str, Change] = {}  # of the process: they hold for both models


def _into(table: dict[str, Change]) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        table[change.__name__] = change
        return change

    return add


# Tensors


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, shared ones by each of their names."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                if tensor.is_meta and hasattr(module, "_hf_hook"):  # accelerate keeps it elsewhere
                    tensor = nn.Parameter(module._hf_hook.weights_map[leaf], tensor.requires_grad)
                found[f"{prefix}.{leaf}" if prefix else leaf] = tensor
    return found


def give(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copies of ``values`` in place of the tensors of ``model``."""
    memo: dict[int, Any] = {}
    assert tensors(model).keys() == values.keys()
    for name, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for leaf, old in table.items():
                if old is not None:
                    value = values[f"{name}.{leaf}" if name else leaf]
                    plain = type(value) in (Tensor, nn.Parameter)  # what is quantised cannot be copied, nor written
                    with torch.inference_mode(value.is_inference()):
                        table[leaf] = copy.deepcopy(value, memo) if plain else value


def is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta


def other(tensor: Tensor, draw: random.Random) -> Tensor:
    """The same numbers in another order; another number for a single one."""
    tensor = tensor.detach()
    if tensor.numel() == 1:
        return torch.full_like(tensor, draw.uniform(-1.5, 1.5))
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    return tensor.flatten()[order.to(tensor.device)].view_as(tensor).clone()


def maps(model: nn.Module) -> list[nn.Module]:
    """The linear maps that keys and values of a source hang on, and their neighbours."""
    last = {"fc1", "fc2", "fc3", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "q_proj", "o_proj"}
    found = (module for name, module in model.named_modules() if name.rpartition(".")[2] in last)
    return [module for module in found if "encoder_mt" not in type(module).__name__]


def parts(model: Any, draw: random.Random) -> nn.Module:
    """A part of the model: often what is folded, gates, or all of it."""
    kinds: list[Any] = [
        maps(model),
        maps(model),
        [module for module in model.modules() if hasattr(module, "adaption_gate")],
        [model.encoder_aligner, model.encoder_aligner.projector, model.encoder_aligner.projector.fc2],
        [model, *model.children()],
        [module for module in model.modules() if decoders.key_value_maps(module) is not None],
    ]
    return draw.choice([kind for kind in kinds if kind and kind[0] is not None][draw.randrange(len(kinds)) - 1])


def slots(model: Any, draw: random.Random) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, parameter) of one part, at most eight of them."""
    found = [
        (module, name, parameter)
        for module in parts(model, draw).modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_plain(parameter)
    ]
    return draw.sample(found, min(len(found), 8))


class Memory:
    """Memory for tensors that gives out again what was given back longest ago: at once, where malloc may take long."""

    def __init__(self) -> None:
        self._free: dict[int, deque[np.ndarray]] = defaultdict(deque)

    def take(self, value: Tensor) -> Tensor:
        """A copy of ``value``, contiguous."""
        if value.device.type != "cpu" or value.numel() == 0 or type(value) not in (Tensor, nn.Parameter):
            return value.detach().clone()
        value = value.detach().contiguous()
        size = value.numel() * value.element_size()
        block = self._free[size].popleft() if self._free[size] else np.empty(size + 64, np.uint8)
        start = -block.ctypes.data % 64
        view = block[start : start + size]  # which the tensor holds, and nobody else
        weakref.finalize(view, self._free[size].append, block)
        found = torch.from_numpy(view).view(value.dtype).view(value.shape)
        found.data.copy_(value)  # the counter of writes stays at zero
        return found

    def forget(self) -> None:
        self._free = defaultdict(deque)


MEMORY = Memory()


def convert(part: nn.Module, dtype: torch.dtype) -> None:
    """``part.to(dtype)`` in such memory."""
    part._apply(lambda t: MEMORY.take(t.to(dtype)) if t.is_floating_point() else t)


# Changes of tensors


@_into(CHANGES)
def there_and_back(model: Any, draw: random.Random) -> None:
    part, dtype = parts(model, draw), draw.choice([torch.bfloat16, torch.float16])
    if all(is_plain(p) and p.dtype == torch.float32 for p in part.parameters()):
        convert(part, dtype)
        convert(part, torch.float32)


@_into(CHANGES)
def another_dtype(model: Any, draw: random.Random) -> None:
    dtype = draw.choice([torch.bfloat16, torch.float32, torch.float64, torch.float32])
    part = draw.choice([model, model, *model.children(), parts(model, draw)])
    if all(is_plain(p) for p in part.parameters()):
        convert(part, dtype)


@_into(CHANGES)
def back_to_float(model: Any, draw: random.Random) -> None:
    if all(is_plain(p) for p in model.parameters()):
        convert(model, torch.float32)


@_into(CHANGES)
def through_meta(model: Any, draw: random.Random) -> None:
    part = draw.choice([model.encoder_aligner, model.mapping, *maps(model)])
    if part is not None and all(is_plain(p) for p in part.parameters()) and not parametrize.is_parametrized(part):
        kept = {name: other(value, draw) for name, value in part.state_dict().items()}
        part.to("meta").to_empty(device="cpu")
        part.load_state_dict(kept)


@_into(CHANGES)
def another_device(model: Any, draw: random.Random) -> None:
    if not is_offloaded(model):
        model.to(draw.choice(DEVICES))


def is_offloaded(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@_into(CHANGES)
def offloaded(model: Any, draw: random.Random) -> None:
    """Weights elsewhere, brought for each call; and back for good."""
    if is_offloaded(model):
        remove_hook_from_submodules(model)
        return
    altered = any("forward" in each.__dict__ or parametrize.is_parametrized(each) for each in model.modules())
    if isinstance(model, LayAlignForCausalLM) and all(is_plain(p) for p in model.parameters()) and not altered:
        cpu_offload(draw.choice([model.llm, model.encoder_aligner]), torch.device(DEVICES[-1]))


@_into(CHANGES)
def loaded(model: Any, draw: random.Random) -> None:
    part = draw.choice([model, parts(model, draw), model.encoder_aligner])
    if is_offloaded(model) or is_quantised(model):
        return
    new = {k: other(v, draw) if is_plain(v) and v.numel() < 2048 else v for k, v in part.state_dict().items()}
    if draw.random() < 0.5:  # some of them
        new = {name: new[name] for name in draw.sample(sorted(new), (len(new) + 1) // 2)}
    assign = draw.random() < 0.5
    part.load_state_dict({k: v.clone() for k, v in new.items()} if assign else new, strict=False, assign=assign)


@_into(CHANGES)
def new_parameters(model: Any, draw: random.Random) -> None:
    """Until one comes with the identity of the first one."""
    for module, name in [(module, name) for module, name, _ in slots(model, draw)]:
        value, wanted = other(getattr(module, name), draw), getattr(module, name).requires_grad
        before = id(getattr(module, name))
        for _ in range(20):
            getattr(module, name).data = torch.empty(0)
            new = MEMORY.take(value)
            delattr(module, name)  # nothing is made in between: the next one takes this one's place
            setattr(module, name, nn.Parameter(new, requires_grad=wanted))
            if id(getattr(module, name)) == before:
                break


@_into(CHANGES)
def made_in_inference_mode(model: Any, draw: random.Random) -> None:
    for module, name, parameter in slots(model, draw)[:1]:
        if not parameter.requires_grad:
            with torch.inference_mode():
                setattr(module, name, nn.Parameter(other(parameter, draw), requires_grad=False))


@_into(CHANGES)
def data_assigned(model: Any, draw: random.Random) -> None:
    for _, _, parameter in slots(model, draw):
        value = other(parameter, draw)
        for _ in range(draw.choice([1, 2, 3])):
            parameter.data = torch.empty(0)
            parameter.data = MEMORY.take(value)


@_into(CHANGES)
def data_of_the_other(model: Any, draw: random.Random) -> None:
    """Two maps change places."""
    alike: dict[Any, list[nn.Parameter]] = {}
    for _, _, parameter in slots(model, draw):
        alike.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
    for same in alike.values():
        if len(same) > 1:
            same[0].data, same[1].data = same[1].data, same[0].data


@_into(CHANGES)
def storage_set(model: Any, draw: random.Random) -> None:
    for _, _, parameter in slots(model, draw):
        with torch.no_grad():
            (parameter if draw.random() < 0.5 else parameter.data).set_(MEMORY.take(other(parameter, draw)))


@_into(CHANGES)
def swapped(model: Any, draw: random.Random) -> None:
    for _, _, parameter in slots(model, draw):
        new = nn.Parameter(MEMORY.take(other(parameter, draw)), parameter.requires_grad)
        with contextlib.suppress(RuntimeError):  # torch refuses while a graph holds the parameter
            torch.utils.swap_tensors(parameter, new)


@_into(CHANGES)
def swapped_on_conversion(model: Any, draw: random.Random) -> None:
    part = parts(model, draw)
    if all(is_plain(p) and p.dtype == torch.float32 for p in part.parameters()):
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with contextlib.suppress(RuntimeError):  # as above
                part.to(torch.bfloat16).float()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        convert(part, torch.float32)  # where it came half of the way


@_into(CHANGES)
def shared_memory(model: Any, draw: random.Random) -> None:
    for _, _, parameter in slots(model, draw):
        parameter.data.share_memory_()


@_into(CHANGES)
def written_in_place(model: Any, draw: random.Random) -> None:
    mode = draw.choice([torch.no_grad, torch.inference_mode])
    for _, _, parameter in slots(model, draw):
        with mode():
            parameter.copy_(other(parameter, draw))


@_into(CHANGES)
def foreach_written(model: Any, draw: random.Random) -> None:
    found = [parameter for _, _, parameter in slots(model, draw)]
    with torch.no_grad():
        torch._foreach_mul_(found, draw.choice([0.8, 1.25]))


@_into(CHANGES)
def optimizer_step(model: Any, draw: random.Random) -> None:
    trained = [p for p in model.parameters() if p.requires_grad and is_plain(p)]
    for parameter in trained:
        parameter.grad = other(parameter, draw)
    kind = draw.choice([torch.optim.SGD, functools.partial(torch.optim.AdamW, foreach=False), torch.optim.AdamW])
    if trained:
        kind(trained, lr=0.1).step()
    model.zero_grad()


@_into(CHANGES)
def asked_for_gradients(model: Any, draw: random.Random) -> None:
    for _, _, parameter in slots(model, draw):
        if not parameter.is_inference():
            parameter.requires_grad_(draw.random() < 0.5)


@_into(CHANGES)
def trained_as_at_first(model: Any, draw: random.Random) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_inference() and is_plain(parameter):
            parameter.requires_grad_(not name.startswith(("llm.", "encoder.", "encoder_mt.", "model_llm.")))


@_into(CHANGES)
def laid_out_otherwise(model: Any, draw: random.Random) -> None:
    for _, _, parameter in slots(model, draw):
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


# Changes of structure, which the fresh model goes through too


@_into(STRUCTURE)
def train(model: Any, draw: random.Random) -> None:
    draw.choice([model, model, parts(model, draw)]).train()


@_into(STRUCTURE)
def evaluate(model: Any, draw: random.Random) -> None:
    draw.choice([model, model, parts(model, draw)]).eval()


def watching(module: nn.Module, *args: Any) -> None:
    pass


def enlarging(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 1.25 if isinstance(out, Tensor) and out.is_floating_point() else None


def enlarging_before(module: nn.Module, args: Any) -> Any:
    plain = args and isinstance(args[0], Tensor) and args[0].is_floating_point()
    return (args[0] * 1.25, *args[1:]) if plain else None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@_into(STRUCTURE)
def hooked(model: Any, draw: random.Random) -> None:
    part = draw.choice(list(parts(model, draw).modules()))
    kind = draw.choice(["watching", "enlarging", "before", "backward"])
    if kind == "before":
        part.register_forward_pre_hook(enlarging_before)
    elif kind == "backward":
        part.register_full_backward_hook(watching)
    else:
        part.register_forward_hook({"watching": watching, "enlarging": enlarging}[kind])


@_into(STRUCTURE)
def hooks_off(model: Any, draw: random.Random) -> None:
    for module in model.modules():
        for name in _HOOKS:
            hooks = getattr(module, name)
            for key in [key for key, hook in hooks.items() if hook in (watching, enlarging, enlarging_before)]:
                del hooks[key]


def larger_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    out = type(module).forward(module, *args, **kwargs)
    return out * 1.25 if isinstance(out, Tensor) else out


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "func", None) is larger_forward


@_into(STRUCTURE)
def patched(model: Any, draw: random.Random) -> None:
    part = draw.choice(list(parts(model, draw).modules()))
    if "forward" not in part.__dict__:
        part.forward = functools.partial(larger_forward, part)  # type: ignore[method-assign]


@_into(STRUCTURE)
def patches_off(model: Any, draw: random.Random) -> None:
    for module in model.modules():
        if _is_ours(module.__dict__.get("forward")):
            del module.__dict__["forward"]


@_into(STRUCTURE)
def another_gate_formula(model: Any, draw: random.Random) -> None:
    gates = [module for module in model.modules() if isinstance(module, GatedCrossAttention)]
    for module in gates[: draw.choice([1, len(gates)])] if gates else ():
        if "effective_gate" in module.__dict__:
            del module.__dict__["effective_gate"]
        else:
            module.effective_gate = functools.partial(tanh_gate, module)  # type: ignore[method-assign]


def tanh_gate(module: Any) -> Tensor:
    return torch.tanh(module.adaption_gate)


class Larger(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.25


def _parents(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, str, nn.Module]]:
    found = ((parent, name, child) for parent in model.modules() for name, child in parent._modules.items())
    return [(parent, name, child) for parent, name, child in found if child is not None and wanted(child)]


@_into(STRUCTURE)
def another_module(model: Any, draw: random.Random) -> None:
    """A copy in a module's place."""
    kinds = nn.Linear, EncoderAligner, WeightedLinearProjector, GatedCrossAttention
    chosen = [*maps(model), *(each for each in model.modules() if type(each) in kinds[1:])]
    chosen += [each for each in model.modules() if decoders.key_value_maps(each) is not None]
    parent, name, child = draw.choice(_parents(model, lambda each: any(each is one for one in chosen)))
    parent._modules[name] = copy.deepcopy(child)


@_into(STRUCTURE)
def another_class(model: Any, draw: random.Random) -> None:
    found = _parents(model, lambda each: type(each) in (nn.Linear, Larger) and any(each is one for one in maps(model)))
    if found:
        _, _, child = draw.choice(found)
        child.__class__ = nn.Linear if type(child) is Larger else Larger


@_into(STRUCTURE)
def other_attention(model: Any, draw: random.Random) -> None:
    name = draw.choice(["eager", "sdpa"])
    if isinstance(model, LayAlignForCausalLM):
        draw.choice([model, model.llm]).set_attn_implementation(name)
    else:
        model.model_llm.model.set_attn_implementation(name)


@_into(STRUCTURE)
def settings(model: Any, draw: random.Random) -> None:
    if isinstance(model, LayAlignForCausalLM):
        model.key_values.choice = draw.choice(["auto", "always", "never"])
        model.last_layer.choice = draw.choice(["auto", "never"])
        model.config.mask_encoder_padding = draw.random() < 0.7
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl = draw.choice(["auto", "torch"])


@_into(STRUCTURE)
def checkpointing(model: Any, draw: random.Random) -> None:
    if isinstance(model, LayAlignForCausalLM):
        how = {"use_reentrant": draw.random() < 0.5}
        model.gradient_checkpointing_enable(how) if draw.random() < 0.5 else model.gradient_checkpointing_disable()


@_into(STRUCTURE)
def parametrized(model: Any, draw: random.Random) -> None:
    chosen = draw.choice(maps(model))
    if parametrize.is_parametrized(chosen):
        parametrize.remove_parametrizations(chosen, "weight")
    elif type(chosen) is nn.Linear and not is_quantised(model):
        parametrize.register_parametrization(chosen, "weight", nn.Tanh())


def is_quantised(model: nn.Module) -> bool:
    return any(not is_plain(p) and p.is_floating_point() for p in model.parameters())


@_into(STRUCTURE)
def quantised(model: Any, draw: random.Random) -> None:
    """An attention's maps, by optimum-quanto where it is installed."""
    if importlib.util.find_spec("optimum.quanto") is None or not isinstance(model, LayAlignForCausalLM):
        return
    from optimum import quanto

    chosen = draw.choice([each for each in model.llm.modules() if decoders.key_value_maps(each) is not None])
    if all(type(each) is nn.Linear and not parametrize.is_parametrized(each) for each in chosen.children()):
        quanto.quantize(chosen, weights=quanto.qint8)
        quanto.freeze(chosen)


# LoRA


def _layers(model: Any) -> list[Any]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return []
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@_into(STRUCTURE)
def lora(model: Any, draw: random.Random) -> None:
    """On, merged, unmerged, switched off and on, into the weights, taken away: whatever may come next."""
    if not isinstance(model, LayAlignForCausalLM):
        return
    if not (layers := _layers(model)):
        plain = [each for each in maps(model.llm) if type(each) is nn.Linear]
        if len(plain) >= 4 * model.llm.config.num_hidden_layers:
            names = draw.choice([["k_proj"], ["k_proj", "v_proj"], ["q_proj", "o_proj"], ["v_proj"]])
            model.add_lora(dict(r=2, target_modules=names, init_lora_weights=False))
        return
    what = draw.choice(["merge", "merge", "unmerge", "off", "on", "scale", "into the weights", "delete"])
    if what == "off":
        model.disable_adapters()
    elif what == "on":
        model.enable_adapters()
    elif what == "delete":
        with contextlib.suppress(ValueError):  # transformers wants a peft that is not out yet
            model.delete_adapter("default")
    for layer in layers:
        if what in ("merge", "into the weights") and not layer.merged:
            layer.merge()
        elif what == "unmerge" and layer.merged:
            layer.unmerge()
        elif what == "scale":
            layer.scale_layer(1.5)
    if what == "into the weights":
        for parent, name, child in _parents(model, lambda each: any(each is one for one in layers)):
            parent._modules[name] = child.get_base_layer()  # type: ignore[operator]


# Other objects for the same model


@_into(OBJECTS)
def deep_copied(model: Any, draw: random.Random) -> Any:
    for module in model.modules():  # what hangs in a graph cannot be copied
        if isinstance(states := module.__dict__.get("adapter_states"), tuple):
            module.adapter_states = tuple(state.detach() for state in states)
    return copy.deepcopy(model)


@_into(OBJECTS)
def pickled(model: Any, draw: random.Random) -> Any:
    return pickle.loads(pickle.dumps(model))


@_into(OBJECTS)
def torch_saved(model: Any, draw: random.Random) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@_into(OBJECTS)
def another_on_the_same_llm(model: Any, draw: random.Random) -> Any:
    """Refused while it is attached; detached and joined by another, then given back."""
    if not isinstance(model, LayAlignForCausalLM):
        return model
    try:
        LayAlignForCausalLM.from_encoder_and_llm(model.encoder, model.llm)
    except ArgumentError:
        return model
    raise AssertionError("an attached LLM was attached again")


# Of the process


@_into(WORLD)
def threads(model: Any, draw: random.Random) -> None:
    torch.set_num_threads(draw.choice([1, 2]))


@_into(WORLD)
def deterministic(model: Any, draw: random.Random) -> None:
    torch.use_deterministic_algorithms(draw.random() < 0.5, warn_only=True)


@_into(WORLD)
def edited_class(model: Any, draw: random.Random) -> None:
    cls, name, edited = draw.choice(EDITS)
    setattr(cls, name, edited if getattr(cls, name) is _ORIGINALS[cls, name] else _ORIGINALS[cls, name])


def tanh_forward(self: Any, query: Any, key: Any, value: Any, residual: Any = None, **rest: Any) -> Tensor:
    return _ORIGINALS[GatedCrossAttention, "forward"](self, query, key, value, residual, **rest).tanh()


def _larger_states(self: Any, hidden: Any) -> Tensor:
    return _ORIGINALS[WeightedLinearProjector, "forward"](self, hidden) * 1.25


def _other_pairs(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    pairs = _ORIGINALS[EncoderAligner, "forward"](self, hidden)
    return tuple((value, key) for key, value in pairs)


EDITS: list[tuple[type, str, Any]] = [
    (GatedCrossAttention, "forward", tanh_forward),
    (GatedCrossAttention, "effective_gate", tanh_gate),
    (WeightedLinearProjector, "forward", _larger_states),
    (EncoderAligner, "forward", _other_pairs),
]
_ORIGINALS: dict[tuple[type, str], Any] = {(cls, name): getattr(cls, name) for cls, name, _ in EDITS}


@contextlib.contextmanager
def same_world_afterwards() -> Iterator[None]:
    """Undo what changes of the process have left."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
        for (cls, name), original in _ORIGINALS.items():
            if getattr(cls, name) is not original:
                setattr(cls, name, original)


# The model built afresh


_CACHED = [(module, "computes_the_reference") for module in (aligner, cross_attention)]
_IMPORTED = [(passes, "computes_the_reference")]


@contextlib.contextmanager
def never_called() -> Iterator[None]:
    """As in a process in which nothing was called so far; and every call is a full one."""
    puts: list[tuple[Any, str, Any]] = []
    for module, name in _CACHED:
        puts.append((module, name, functools.cache(getattr(module, name).__wrapped__)))
    for module, name in _IMPORTED:
        puts.append((module, name, puts[1][2]))
    puts.append((cached_launch, "possible", lambda: False))
    before = [(module, name, getattr(module, name)) for module, name, _ in puts]
    try:
        for module, name, value in puts:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


_NOT_OFFLOADED = {*STRUCTURE, *OBJECTS} - {"train", "evaluate", "settings", "hooks_off", "other_attention"}


class Case:
    """A model under change.

    Args:
        build: makes it, the same at every call.
        prepare: is called with the model before its first call.
        bring: is called with a fresh model and this one, last.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        prepare: Callable[[Any], Any] | None = None,
        bring: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self._build, self._bring, self._log = build, bring, list[tuple[Change, int]]()
        MEMORY.forget()
        self.model = build()
        for parameter in self.model.parameters():
            parameter.data = MEMORY.take(parameter)
        if prepare is not None:
            prepare(self.model)
        self.done: list[str] = []

    def change(self, name: str, seed: int) -> bool:
        """Make a change; whether the model is another object now."""
        self.done.append(f"{name}({seed})")
        before = self.model
        for table in (CHANGES, STRUCTURE, OBJECTS, WORLD):
            if name in table:
                change = table[name]
                if is_offloaded(self.model) and name in _NOT_OFFLOADED:
                    break  # accelerate's own forwards are bound to the modules that they were put into
                found = self._applied(change, self.model, seed)
                if table is STRUCTURE:
                    self._log.append((change, seed))
                self.model = found if table is OBJECTS else self.model
        return self.model is not before

    @staticmethod
    def _applied(change: Change, model: Any, seed: int) -> Any:
        torch.default_generator.manual_seed(seed)
        return change(model, random.Random(seed))

    def fresh(self) -> Any:
        """A model that has never been called, of the same structure and values."""
        model = self._build()
        for change, seed in self._log:
            self._applied(change, model, seed)
        give(model, tensors(self.model))
        if isinstance(model, LayAlignForCausalLM):  # as if it were built of its parts now
            found = decoders.attention_modules(model.llm)
            model._attentions = tuple(found[layer][1] for layer in model.config.language_layers)
            model.last_layer = LastLayer(model.llm, model.last_layer.choice)
        if self._bring is not None:
            self._bring(model, self.model)
        return model
