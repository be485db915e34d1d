"""Tiny LLMs that multiply their embeddings or their logits by a number, and one that does not."""

from __future__ import annotations

import torch
from tiny import VOCABULARY, open_gates, tiny_encoder
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layalign import LayAlignForCausalLM

_DECODER = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False, attention_dropout=0.0,
)  # fmt: skip
_GRANITE = dict(
    _DECODER, embedding_multiplier=6.0, logits_scaling=3.0, residual_multiplier=0.5, attention_multiplier=0.3
)
_MOE = dict(num_local_experts=2, num_experts_per_tok=1)

# Settings, and the factor by which soft tokens are multiplied on their way into the first layer.
LLMS = {
    "llama": (_DECODER, 1.0),
    "gemma": (_DECODER, 1.0),
    "gemma2": (dict(_DECODER, sliding_window=5, query_pre_attn_scalar=24), 1.0),
    "gemma3_text": (dict(_DECODER, sliding_window=5, query_pre_attn_scalar=16), 1.0),
    "vaultgemma": (dict(_DECODER, sliding_window=5, query_pre_attn_scalar=16), 1.0),
    "granite": (_GRANITE, 6.0),
    "granitemoe": (dict(_GRANITE, **_MOE), 6.0),
    "granitemoeshared": (dict(_GRANITE, **_MOE, shared_intermediate_size=16), 6.0),
    "cohere": (dict(_DECODER, logit_scale=0.25), 1.0),
    "cohere2": (dict(_DECODER, logit_scale=0.25, sliding_window=5), 1.0),
    "afmoe": (
        dict(_DECODER, mup_enabled=True, moe_intermediate_size=16, num_experts=2, num_dense_layers=2, sliding_window=5),
        32**0.5,
    ),
    "minicpm3": (
        dict(
            _DECODER, scale_emb=6.0, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
            qk_rope_head_dim=4, v_head_dim=8,
        ),
        1.0,
    ),
}  # fmt: skip
LLMS = {name: case for name, case in LLMS.items() if name in CONFIG_MAPPING}  # some came with a later transformers


def scaling_llm(name: str) -> PreTrainedModel:
    attention = "eager" if name in ("gemma2", "vaultgemma") else "sdpa"
    config = AutoConfig.for_model(name, **LLMS[name][0])
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return llm


def scaling_model(name: str, **config) -> LayAlignForCausalLM:
    llm = scaling_llm(name)
    torch.manual_seed(2)
    if name == "minicpm3":  # its attention has no key and value maps to attend through: the adapter alone
        config["language_layers"] = []
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), llm, **config)
    open_gates(model)
    return model.eval()
