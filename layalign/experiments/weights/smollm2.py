"""Reads SmolLM2-135M-Instruct from its 4-bit GGUF file into a LlamaForCausalLM, with the package gguf.

transformers reads the same file with the same result (:func:`layalign.modeling.encoders.load_llm`), five times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layalign.modeling import gguf_files
from layalign.utils.errors import CheckpointError, first_line

_PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def model_and_tokenizer(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The LLM of a GGUF file (Llama with tied embeddings), and its tokenizer.

    Raises:
        CheckpointError: the file is damaged or has another architecture; the text names it.
        ArgumentError: the package gguf is not installed.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    gguf_files.require_package("weights")
    head = gguf_files.read_head(path)
    config = LlamaConfig(**_settings(path, head))
    with torch.device("meta"):  # initializing weights would take seconds, and they are replaced below
        model = LlamaForCausalLM(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    state = dict(_tensors(path, head, config, wanted, dtype))
    model.load_state_dict(state, assign=True, strict=False)  # the head is tied to the embedding, stored once
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # tokenizers raises errors of any class
        raise CheckpointError(f"{path}: its tokenizer cannot be read: {first_line(error)}") from error
    return model, gguf_files.amend_tokenizer(tokenizer, path)


def _settings(path: Path, head: gguf_files.Head) -> dict[str, Any]:
    """The configuration in the file."""
    of_model = {
        "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "vocab_size": "vocab_size",
        "intermediate_size": "feed_forward_length", "max_position_embeddings": "context_length",
        "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "rope.dimension_count", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
    }  # fmt: skip
    of_tokens = {"bos_token_id": "bos", "eos_token_id": "eos", "unk_token_id": "unknown", "pad_token_id": "padding"}
    keys = {name: f"llama.{key}" for name, key in of_model.items()}
    keys |= {name: f"tokenizer.ggml.{key}_token_id" for name, key in of_tokens.items()}
    lacking = [key for key in keys.values() if not isinstance(head.metadata.get(key), int | float)]
    if head.architecture != "llama" or lacking or "output.weight" in head.tensors:
        what = f"no number {lacking[0]}" if lacking else f"architecture {head.architecture!r}, or an output head"
        raise CheckpointError(f"{path}: expected a Llama with tied embeddings, got one with {what}")
    found = {name: head.metadata[key] for name, key in keys.items()}
    rope = {"rope_type": "default", "rope_theta": found.pop("rope_theta")}
    return {**found, "rope_parameters": rope, "tie_word_embeddings": True}


def _tensors(
    path: Path, head: gguf_files.Head, config: Any, wanted: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and values of each parameter of the model."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(config.num_hidden_layers):
        for part, own in _PARTS.items():
            names[f"model.layers.{layer}.{own}.weight"] = f"blk.{layer}.{part}.weight"
    problems = set(names.values()) ^ set(head.tensors)
    if problems or set(names) != set(wanted):
        raise CheckpointError(f"{path}: expected the weights of its architecture; {min(problems or names)} is not both")
    content = np.memmap(path, np.uint8, "r")
    for own, name in names.items():
        place = head.tensors[name]
        if place.shape != wanted[own]:
            raise CheckpointError(f"{path}: {name}: expected shape {wanted[own]}, got {place.shape}")
        try:
            kind = GGMLQuantizationType(place.kind)
        except ValueError:
            raise CheckpointError(f"{path}: {name}: expected a kind that gguf can unpack, got {place.kind}") from None
        block, size = GGML_QUANT_SIZES[kind]
        if place.shape[-1] % block:
            raise CheckpointError(f"{path}: {name}: expected rows of whole blocks of {block}, got {place.shape[-1]}")
        end = place.start + prod(place.shape) // block * size
        if end > len(content):
            raise CheckpointError(f"{path}: {name}: reaches past the end of the file, which is truncated")
        rows = content[place.start : end].reshape(*place.shape[:-1], place.shape[-1] // block * size)
        numbers = torch.from_numpy(dequantize(rows, kind).astype(np.float32).reshape(place.shape))
        if not numbers.isfinite().all():
            raise CheckpointError(f"{path}: {name}: expected finite numbers, got NaN or infinity")
        if ".attn_q." in name or ".attn_k." in name:
            heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
            # RoPE: llama.cpp rotates pairs of neighbours, transformers the two halves of a head.
            numbers = numbers.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        yield own, numbers.to(dtype, copy=True).contiguous()
