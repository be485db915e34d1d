"""Resizing the vocabulary of a model's LLM: both embeddings and the configurations, or on an error none of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from layalign.modeling.attention_interface import own_configs
from layalign.nn.sharding import reason_whole_is_not_here
from layalign.utils.errors import MAX_SIZE, ArgumentError, whole_number

if TYPE_CHECKING:
    from layalign.modeling.model import LayAlignForCausalLM


def resize(model: LayAlignForCausalLM, size: int | None, multiple: int | None, mean_resizing: bool) -> nn.Embedding:
    """transformers' ``resize_token_embeddings`` for the model's LLM, and for the copies of its vocabulary size."""
    llm, before = model.llm, model.llm.get_input_embeddings()
    if size is None and multiple is None:
        return before
    _require_resizable(llm)
    wanted = before.num_embeddings if size is None else whole_number("new_num_tokens", size, 1, MAX_SIZE)
    if multiple is not None:
        multiple = whole_number("pad_to_multiple_of", multiple, 1, MAX_SIZE)
        wanted = -(-wanted // multiple) * multiple
    for name in ("llm_bos_token_id", "source_token_id"):
        token = getattr(model.config, name)
        if token is not None and token >= wanted:
            raise ArgumentError(f"new_num_tokens: expected more than {name} {token} of the configuration, got {wanted}")
    with _all_or_nothing(llm):
        resized = llm.resize_token_embeddings(wanted, mean_resizing=mean_resizing)
    assert model.config.llm_config is not None
    for config in (model.config.llm_config, *own_configs(llm)):
        config.get_text_config(decoder=True).vocab_size = wanted
    return resized


def _require_resizable(llm: Any) -> None:
    kinds: dict[str, Any] = {"input": nn.Embedding, "output": (nn.Linear, nn.Embedding)}
    for name, embeddings in (("input", llm.get_input_embeddings()), ("output", llm.get_output_embeddings())):
        weight = getattr(embeddings, "weight", None)
        if not isinstance(embeddings, kinds[name]) or not isinstance(weight, nn.Parameter):
            problem = f"they are a {type(embeddings).__name__}"
        elif not weight.is_floating_point():
            problem = "they are quantised"
        elif weight.is_meta:
            problem = "their weight is offloaded"
        elif (against := reason_whole_is_not_here(weight)) is not None:
            problem = against
        else:
            continue
        raise ArgumentError(f"resize_token_embeddings: expected plain {name} embeddings of the LLM: {problem}")


@contextmanager
def _all_or_nothing(llm: Any) -> Iterator[None]:
    """An error within the block leaves the LLM's embeddings as they were."""
    old = llm.get_input_embeddings(), llm.get_output_embeddings()
    saved = [(module, dict(module.__dict__), dict(module._parameters)) for module in old]
    parameters = [each for _, _, own in saved for each in own.values() if each is not None]
    data = [(parameter, parameter.data) for parameter in parameters]
    size = llm.config.get_text_config(decoder=True).vocab_size
    try:
        yield
    except BaseException:
        for module, attributes, own in saved:
            module.__dict__.update(attributes, _parameters=own)
        for parameter, values in data:
            parameter.data = values
        llm.set_input_embeddings(old[0])
        llm.set_output_embeddings(old[1])
        llm.config.get_text_config(decoder=True).vocab_size = size
        raise
