"""Every encoder and every decoder family: right numbers, cache, padding, checkpointing."""

from __future__ import annotations

import importlib

import pytest
import torch
from tiny import ENCODERS, LLMS, batch, row, tiny_encoder, tiny_llm, tiny_model

from layalign import ArgumentError, LayAlignConfig, LayAlignForCausalLM, reference
from layalign.modeling.llm_inputs import real_positions

ROTARY = [name for name in LLMS if name not in ("phi3", "gpt2", "gpt_neox")]
BOTH = [
    (name, attention) for name in LLMS for attention in ("sdpa", "eager") if (name, attention) != ("gemma2", "sdpa")
]


class PublishedStyle:
    """The gated term as the published code adds it: by hooks around each attention module, query computed again."""

    def __init__(self, model: LayAlignForCausalLM, source) -> None:
        self.llm = model.llm
        self.handles = []
        for slot, layer in enumerate(source.layers):
            attention = self.llm.model.layers[layer].self_attn
            state = source.keys[slot], source.values[slot], model.cross_attention[slot].adaption_gate, source.mask
            hook = lambda module, args, kwargs, output, state=state: self.add(module, args, kwargs, output, *state)  # noqa: E731
            self.handles.append(attention.register_forward_hook(hook, with_kwargs=True))

    def add(self, module, args, kwargs, output, key, value, gate, mask):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs.get("position_embeddings") or args[1]
        rotate = importlib.import_module(type(module).__module__).apply_rotary_pos_emb
        query = module.q_proj(hidden)
        norm = getattr(module, "q_norm", None)
        whole = norm is not None and norm.weight.numel() == query.shape[-1]
        query = (norm(query) if whole else query).view(*hidden.shape[:-1], -1, module.head_dim)
        query = (norm(query) if norm is not None and not whole else query).transpose(1, 2)
        query, _ = rotate(query, query, cos, sin)
        repeat = query.shape[1] // key.shape[1]
        scores = query.double() @ key.double().repeat_interleave(repeat, 1).mT * module.scaling
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        term = gate.double() * scores.softmax(-1) @ value.double().repeat_interleave(repeat, 1)
        term = module.o_proj(term.transpose(1, 2).flatten(2).to(hidden.dtype))
        return (output[0] + term, *output[1:])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_published_style_hooks(name: str, attention: str) -> None:
    model = tiny_model(llm=name, attention=attention)
    inputs = batch(model=model, targets=None)
    with torch.no_grad():
        ours = model(**inputs).logits
        _, mask, embeds, source = model._begin(**inputs)
        model.unload()
        with PublishedStyle(model, source):
            theirs = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=real_positions(mask)).logits
        bare = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=real_positions(mask)).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=2e-5, atol=2e-5)
    assert (ours - bare)[real].abs().max() > 1e-2  # the term is there at all


@pytest.mark.parametrize("name", LLMS)
def test_zero_gates_leave_the_llm_unchanged(name: str) -> None:
    model = tiny_model(llm=name)
    for module in model.cross_attention:
        torch.nn.init.zeros_(module.adaption_gate)
    inputs = batch(model=model, targets=None)
    with torch.no_grad():
        ours = model(**inputs).logits
        _, mask, embeds, _ = model._begin(**inputs)
        llm = model.unload()
        bare = llm(inputs_embeds=embeds, attention_mask=mask, position_ids=real_positions(mask)).logits
    torch.testing.assert_close(ours[mask.bool()], bare[mask.bool()], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_cached_decoding_equals_full_forward(name: str, attention: str) -> None:
    model = tiny_model(llm=name, attention=attention)
    inputs = batch(model=model, targets=None)
    generated = model.generate(
        **inputs,
        max_new_tokens=7,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = generated.sequences.shape[1] - inputs["input_ids"].shape[1]
    full = dict(inputs, input_ids=generated.sequences)
    full["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    with torch.no_grad():
        logits = model(**full).logits[:, -new - 1 : -1]
    torch.testing.assert_close(torch.stack(generated.logits, 1), logits, rtol=1e-4, atol=1e-4)
    assert new == 7


@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_result_does_not_depend_on_batch_neighbours(name: str, attention: str) -> None:
    model = tiny_model(llm=name, attention=attention)
    inputs = batch(model=model, targets=None)
    with torch.no_grad():
        together = model(**inputs).logits
        for index in range(3):
            alone = model(**row(inputs, index)).logits[0]
            torch.testing.assert_close(together[index, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str) -> None:
    model = tiny_model(encoder=name)
    assert model.config.encoder_layers == [0, 1, 2, 3]
    inputs = batch(model=model)
    loss = model(**inputs).loss
    loss.backward()
    assert model.encoder_aligner.projector.fc1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    with torch.no_grad():  # encoder padding must not leak either
        together = model(**dict(inputs, labels=None)).logits
        for index in range(3):
            alone = model(**dict(row(inputs, index), labels=None)).logits[0]
            torch.testing.assert_close(together[index, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["xlm-roberta", "qwen2"])
def test_last_encoder_layer_is_reachable_and_counted_as_hidden_states(name: str) -> None:
    model = tiny_model(encoder=name, encoder_layers=[4, 0])
    inputs = batch(model=model, targets=None)
    ids, mask = inputs["encoder_input_ids"], inputs["encoder_attention_mask"]
    with torch.no_grad():
        hidden = model.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        fc1, fc2 = model.encoder_aligner.projector.fc1, model.encoder_aligner.projector.fc2
        expected = reference.layer_projection([hidden[4], hidden[0]], fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        _, source = model.encode_source(ids, mask)
        key = model.llm.model.layers[0].self_attn.k_proj(expected[0]).view(3, 6, 4, 8).transpose(1, 2)
    torch.testing.assert_close(source.keys[0], key * mask[:, None, :, None])  # padding is not computed: zeros


@pytest.mark.parametrize("name", LLMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model = tiny_model(llm=name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.encoder.eval()
    inputs = batch(model=model)
    model(**inputs).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**inputs).loss.backward()
    assert set(expected) == {n for n, p in model.named_parameters() if p.grad is not None}
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
            assert p.grad.abs().sum() > 0, n


def test_an_llm_outside_the_attention_interface_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    bloom = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ArgumentError, match="llm: BloomForCausalLM does not go through"):
        LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), bloom)


def test_an_llm_that_looks_up_its_layers_inputs_by_id_is_refused() -> None:
    sizes = dict(
        num_hidden_layers=2, hidden_size=16, intermediate_size=16, vocab_size=40, vocab_size_per_layer_input=40
    )
    llm = {"model_type": "gemma3n_text", "hidden_size_per_layer_input": 8, **sizes}
    with pytest.raises(ArgumentError, match="llm_config: expected a decoder whose layers read embeddings alone"):
        LayAlignConfig(encoder_config=tiny_encoder().config, llm_config=llm)


def test_an_llm_that_drops_the_source_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm()
    layer = llm.model.layers[1].self_attn
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, layalign_source=None, **kwargs: original(*args, **kwargs))
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), llm)
    with pytest.raises(ArgumentError, match=r"did not hand the source to its layers \[1\]"):
        model(**batch(model=model))


def test_flash_attention_finds_its_kernel_by_its_own_name() -> None:
    """transformers' flash function reads the attention's name from the module's config; ours must not stand there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def stand_in(module, *args, **kwargs):
        seen.append((module.config._attn_implementation, module.layer_idx, module.config.hidden_size))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("flash_stand_in", stand_in)
    AttentionMaskInterface.register("flash_stand_in", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    expected = tiny_model()
    encoder, llm = tiny_encoder(), tiny_llm()
    llm.config._attn_implementation_internal = "flash_stand_in"
    model = LayAlignForCausalLM.from_encoder_and_llm(encoder, llm).eval()
    model.load_state_dict(expected.state_dict())
    inputs = batch(model=model, targets=None)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)
    assert seen == [("flash_stand_in", layer, 32) for layer in range(3)]
