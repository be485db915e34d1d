"""Tiny frozen parts with random weights, built from configurations: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from layalign import LayAlignForCausalLM

VOCABULARY = 64

_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
    attention_dropout=0.0,
)

LLMS = {
    "llama": dict(_DECODER),
    "llama_gqa_wide_heads": dict(_DECODER, model_type="llama", num_key_value_heads=2, head_dim=12),
    "mistral": dict(_DECODER, num_key_value_heads=2, sliding_window=5, head_dim=8),
    "qwen2": dict(_DECODER, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(_DECODER, num_key_value_heads=2, head_dim=16),
    "gemma2": dict(_DECODER, num_key_value_heads=2, head_dim=16, sliding_window=5, query_pre_attn_scalar=24),
    "gemma3_text": dict(_DECODER, num_key_value_heads=2, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
    "olmo2": dict(_DECODER, num_key_value_heads=2),
    "phi3": dict(_DECODER, num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "gpt_neox": dict(_DECODER),
    "gpt2": dict(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    ),
}  # fmt: skip

_T5 = dict(vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=32, num_layers=4, num_decoder_layers=1, num_heads=4)
_BERT = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=1,
)

ENCODERS = {
    "mt5": dict(_T5),
    "t5": dict(_T5),
    "umt5": dict(_T5),
    "m2m_100": dict(
        vocab_size=VOCABULARY, d_model=24, encoder_layers=4, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
    ),
    "xlm-roberta": dict(_BERT),
    "bert": dict(_BERT),
    "modernbert": dict(_BERT, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3),
    "qwen2": dict(_DECODER, hidden_size=24, num_hidden_layers=4, num_key_value_heads=4),
}  # fmt: skip

# What transformers itself cannot do, by its minor version: a later version that fails again fails the tests.
MINOR = int(transformers.__version__.split(".")[1])
REFUSED = {
    "gpt2": (range(3), "transformers 5.0 to 5.2: GPT2LMHeadModel keeps keyword arguments from its layers"),
}
compiles = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="torch below 2.11: whole models in one graph are not supported (2.6 refuses the bare LLM too)",
)


def tiny_llm(name: str = "llama", seed: int = 0, attention: str = "sdpa", **changes) -> PreTrainedModel:
    attention = "eager" if name == "gemma2" else attention  # transformers has no sdpa for it
    if name in REFUSED and MINOR in REFUSED[name][0]:
        pytest.skip(REFUSED[name][1])
    settings = {**LLMS[name], **changes}
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    torch.manual_seed(seed)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # weights large enough that attention patterns matter, no two norms alike
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return llm


def tiny_encoder(name: str = "mt5", seed: int = 1, **changes) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModel.from_config(AutoConfig.for_model(name, **{**ENCODERS[name], **changes})).eval()


def tiny_model(
    encoder: str = "mt5", llm: str = "llama", attention: str = "sdpa", seed: int = 2, **config
) -> LayAlignForCausalLM:
    """A model with gates far from zero, in eval mode."""
    parts = tiny_encoder(encoder), tiny_llm(llm, attention=attention)
    torch.manual_seed(seed)
    model = LayAlignForCausalLM.from_encoder_and_llm(*parts, **config)
    open_gates(model)
    return model.eval()


def tiny_folders(folder: Path) -> tuple[str, str]:
    """(encoder, LLM) on disk: frozen parts with names."""
    tiny_encoder().save_pretrained(folder / "encoder")
    tiny_llm(num_key_value_heads=2).save_pretrained(folder / "llm")
    return str(folder / "encoder"), str(folder / "llm")


def open_gates(model: LayAlignForCausalLM) -> None:
    with torch.no_grad():
        for index, module in enumerate(model.cross_attention):
            module.adaption_gate.fill_(0.7 - 0.5 * index)
        if model.mapping is not None:
            model.mapping.end_boundary.normal_()


def batch(
    sources: tuple[int, ...] = (6, 3, 5),
    prompts: tuple[int, ...] = (2, 4, 0),
    targets: tuple[int, ...] | None = (3, 1, 4),
    model: LayAlignForCausalLM | None = None,
    seed: int = 3,
) -> dict[str, torch.Tensor]:
    """Encoder ids (right-padded) and the packed LLM input for sources, prompts and targets of the given lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()

    rows = [ids(length) for length in sources]
    texts = [ids(length) for length in prompts]
    labels = None if targets is None else [ids(length) for length in targets]
    width = max(max(sources), 1)
    encoder_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in sources])
    assert model is not None
    packed = model.build_inputs(mask, texts, labels)
    return dict(packed, encoder_input_ids=encoder_ids, encoder_attention_mask=mask)


def row(inputs: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """One sample of a batch, without any padding."""
    source = inputs["encoder_attention_mask"][index].bool()
    text = inputs["attention_mask"][index].bool()
    return {
        name: tensor[index][source if name.startswith("encoder") else text][None] for name, tensor in inputs.items()
    }


def named_model(parts: tuple[str, str], **config) -> LayAlignForCausalLM:
    model = LayAlignForCausalLM.from_encoder_and_llm(*parts, **config)
    open_gates(model)
    return model.eval()


def logits(model: LayAlignForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model=model, targets=None)).logits
