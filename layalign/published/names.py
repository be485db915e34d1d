"""The published code's parameter names, over our model's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layalign.modeling import decoders
from layalign.modeling.model import LayAlignForCausalLM
from layalign.ops.checks import describe, is_floating
from layalign.utils.errors import CheckpointError, first_line

LLM_PREFIX = "model_llm.model."
EMBEDDING = "llm_embedding_layer.weight"  # the published module registers the LLM's embedding a second time


def published_names(model: LayAlignForCausalLM) -> dict[str, str]:
    """Our state-dict name -> published name, for every entry of the model's state dict.

    The published code wraps the attention of each language layer: its weights sit one level deeper (``.model.``), its
    gate (``adaption_gate``) beside them.
    """
    found = decoders.attention_modules(model.llm)
    wrapped = [found[layer][0] for layer in model.config.language_layers]
    names = {}
    for name in model.state_dict():
        part, rest = name.split(".", 1)
        if part == "encoder":
            names[name] = f"encoder_mt.{rest}"
        elif part == "cross_attention":
            slot, leaf = rest.split(".", 1)
            names[name] = f"{LLM_PREFIX}{wrapped[int(slot)]}.{leaf}"
        elif part == "llm":
            inside = next((prefix for prefix in wrapped if rest.startswith(prefix + ".")), None)
            names[name] = LLM_PREFIX + (rest if inside is None else f"{inside}.model.{rest[len(inside) + 1 :]}")
        else:
            names[name] = name
    return names


def embedding_name(model: LayAlignForCausalLM) -> str:
    """Our name of the LLM's input embedding."""
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def to_published(model: LayAlignForCausalLM, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under published names, complete with the second entry of the embedding."""
    names = published_names(model)
    renamed = {names[name]: tensor for name, tensor in state.items()}
    renamed[EMBEDDING] = state[embedding_name(model)]
    return renamed


def from_published(model: LayAlignForCausalLM, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names; names that are not the model's stay as they are."""
    ours = {published: name for name, published in published_names(model).items()}
    return {ours.get(name, name): tensor for name, tensor in state.items() if name != EMBEDDING}


def published_parameters(model: LayAlignForCausalLM) -> Iterator[tuple[str, nn.Parameter]]:
    """(published name, parameter) for every parameter that trains."""
    names = published_names(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield names[name], parameter


def load_bin(path: Any) -> dict[str, Tensor]:
    """A published ``pytorch_model.bin``, read without executing anything it may contain.

    Raises:
        CheckpointError: the file is not there, damaged, or holds more than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, EOFError, ...
        raise CheckpointError(f"{path}: not a readable checkpoint of tensors: {first_line(error)}") from error
    state = state.get("model_state_dict", state) if isinstance(state, dict) else state
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors by name, got {type(state).__name__}")
    for name, tensor in state.items():
        if not is_floating(tensor) and tensor.dtype not in (torch.int64, torch.int32, torch.bool):  # buffers
            raise CheckpointError(f"{path}: {name}: expected plain floating numbers, got {describe(tensor)}")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
