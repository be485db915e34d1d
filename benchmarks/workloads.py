"""The workloads: the same work as a call without arguments, for each model by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Models
from shapes import Work
from torch import Tensor

from layalign import reference
from layalign.modeling.llm_inputs import IGNORE_INDEX
from layalign.modeling.loss import label_loss
from layalign.nn.rows import Rows, only_rows

Call = Callable[[], Any]

OURS, BARE, FEW_LOGITS = "layalign", "bare LLM", "bare LLM, logits where labels are"
PUBLISHED, REFERENCE, PROMPT = "published", "reference.py", "peft adaption_prompt"
ACCELERATED = "published, accelerated"


class Data:
    """Random ids of one :class:`Work`; without padding, published and default masking agree."""

    def __init__(self, models: Models, work: Work, labels: bool) -> None:
        generator = torch.Generator().manual_seed(3)

        def ids(length: int) -> Tensor:
            found = torch.randint(4, models.size.vocabulary, (work.batch, length), generator=generator)
            return found.to(models.device)

        self.source, self.target = ids(work.source), ids(work.length)
        self.mask, self.target_mask = torch.ones_like(self.source), torch.ones_like(self.target)
        if work.padded:
            lengths = torch.linspace(work.source / 4, work.source, work.batch).long().to(models.device)
            self.mask = (torch.arange(work.source, device=models.device) < lengths[:, None]).long()
        self.packed = models.ours.build_inputs(self.mask, targets=self.target.tolist() if labels else None)
        tokens = self.packed["input_ids"]
        self.attention = self.packed["attention_mask"]
        with torch.no_grad():
            embeds = models.ours._begin(tokens, self.attention, self.source, self.mask)[2]
        self.embeds = embeds.clone()

    @property
    def encoder(self) -> dict[str, Tensor]:
        """Keyword arguments of our model."""
        return {"encoder_input_ids": self.source, "encoder_attention_mask": self.mask}


def reference_of(models: Models, call: Call) -> Call:
    """``call`` of ours with all operations computed by reference.py."""

    def run() -> Any:
        with models.as_reference():
            return call()

    return run


def encoded(models: Models, data: Data) -> Any:
    """The encoder's forward, which both sides of a comparison include."""
    with torch.no_grad():
        return models.encoder(input_ids=data.source, attention_mask=data.mask, output_hidden_states=True)


def generate_calls(models: Models, work: Work) -> dict[str, Call]:
    """Greedy, ``work.length`` new tokens. Each returns the new ids (B, new)."""
    data = Data(models, work, labels=False)
    options: dict[str, Any] = dict(max_new_tokens=work.length, do_sample=False, pad_token_id=0)
    prompted = models.prompted(work.source)

    def ours() -> Tensor:
        return models.ours.generate(**data.encoder, **options)[:, -work.length :]

    def published(model: Any) -> Call:
        @torch.no_grad()
        def run() -> Tensor:
            model.config.max_gen_len = work.length
            return model(data.source, data.mask)

        return run

    def plain(llm: Any) -> Call:
        def run() -> Tensor:
            encoded(models, data)
            return llm.generate(inputs_embeds=data.embeds, attention_mask=data.attention, **options)

        return run

    calls = {OURS: ours, BARE: plain(models.bare), PUBLISHED: published(models.published)}
    calls |= {REFERENCE: reference_of(models, ours), ACCELERATED: published(models.accelerated)}
    return calls if prompted is None else {**calls, PROMPT: plain(prompted)}


def decode_calls(models: Models, work: Work) -> dict[str, Call]:
    """One decoding step after [bos][source][boundary] and ``work.length`` tokens; the cache is cropped again each time.

    Each call returns the logits (B, 1, vocabulary). The encoder does not run.
    """
    data = Data(models, work, labels=False)
    new = data.target[:, :1]
    with torch.no_grad():
        tail = models.bare.get_input_embeddings()(data.target)
    embeds = torch.cat([data.embeds, tail], dim=1)
    mask = torch.cat([data.attention, data.target_mask], dim=1)
    longer = torch.cat([mask, mask[:, :1]], dim=1)
    with torch.no_grad():
        models.published._source(data.source, data.mask)
        models.accelerated._source(data.source, data.mask)

    def step(model: Any, past: Any) -> Call:
        @torch.no_grad()
        def run() -> Tensor:
            output = model(input_ids=new, attention_mask=longer, past_key_values=past, use_cache=True)
            past.crop(-1)
            return output.logits

        return run

    def filled(model: Any) -> Any:
        with torch.no_grad():
            return model(inputs_embeds=embeds, attention_mask=mask, use_cache=True).past_key_values

    @torch.no_grad()
    def filled_with_source() -> Any:
        output = models.ours(**data.encoder, use_cache=True)
        return models.ours(inputs_embeds=tail, attention_mask=mask, past_key_values=output.past_key_values)

    prompted = models.prompted(work.source)
    others = {BARE: models.bare, PUBLISHED: models.published.model_llm, ACCELERATED: models.accelerated.model_llm}
    if prompted is not None:
        others[PROMPT] = prompted
    calls = {name: step(model, filled(model)) for name, model in others.items()}
    # Separate caches, because a step of ours stores data for its backend there.
    ours, plain = (step(models.ours, filled_with_source().past_key_values) for _ in range(2))
    return {OURS: ours, **calls, REFERENCE: reference_of(models, plain)}


def trained(model: Any) -> list[Tensor]:
    """The trained parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: Any) -> Any:
    """AdamW as in transformers' Trainer, with rate 0: it changes no weight, but takes time and invalidates folds."""
    return torch.optim.AdamW(trained(model), lr=0.0, weight_decay=0.0, fused=True)


def passes(loss: Call, parameters: list[Tensor], mode: str, optimizer: Any = None) -> Call:
    """``loss`` as "forward" (without gradients), "forward and backward", or "training step" (and the optimizer's).

    A training step sets the gradients to None at its end.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return loss()

    def both() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        found = loss()
        found.backward()
        if mode == "training step":
            if optimizer is not None:
                optimizer.step()
            for parameter in parameters:
                parameter.grad = None
        return found.detach()

    return forward if mode == "forward" else both


def bare_losses(models: Models, data: Data) -> tuple[Tensor, dict[str, Call]]:
    """The leaf for the LLM's input, and the bare LLM's loss with all logits and with only the labelled ones."""
    leaf = data.embeds.clone().requires_grad_()
    labels = data.packed["labels"]
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    labelled = Rows(targets != IGNORE_INDEX)

    def whole() -> Tensor:
        encoded(models, data)
        return models.bare(inputs_embeds=leaf, attention_mask=data.attention, labels=labels, use_cache=False).loss

    def labelled_only() -> Tensor:
        encoded(models, data)
        with only_rows([models.bare.get_output_embeddings()], labelled, spread=False):
            logits = models.bare(inputs_embeds=leaf, attention_mask=data.attention, use_cache=False).logits
        return label_loss(logits, labelled.select(targets[..., None]), None)

    return leaf, {BARE: whole, FEW_LOGITS: labelled_only}


def loss_calls(models: Models, work: Work, mode: str) -> dict[str, Call]:
    """The loss over T labels of every model, as :func:`passes` runs it; each call returns the loss."""
    data = Data(models, work, labels=True)
    labels = data.packed["labels"]
    prompted = models.prompted(work.source)

    def ours() -> Tensor:
        return models.ours(**data.packed, **data.encoder).loss

    def published(model: Any) -> Call:
        def loss() -> Tensor:
            return model(data.source, data.mask, labels=data.target, mask_label=data.target_mask)

        return passes(loss, trained(model), mode, optimizer_of(model))

    def prompt() -> Tensor:
        encoded(models, data)
        return prompted(inputs_embeds=leaf, attention_mask=data.attention, labels=labels, use_cache=False).loss

    leaf, bare = bare_losses(models, data)
    own = passes(ours, trained(models.ours), mode, optimizer_of(models.ours))
    others = {name: passes(loss, [leaf], mode) for name, loss in bare.items()}
    calls = {OURS: own, **others, PUBLISHED: published(models.published), REFERENCE: reference_of(models, own)}
    calls[ACCELERATED] = published(models.accelerated)
    if prompted is not None:
        calls[PROMPT] = passes(prompt, [leaf, *trained(prompted)], mode, optimizer_of(prompted))
    return calls


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of aligner and adapter after the last backward, by name."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in found.items() if name.startswith(("mapping", "encoder_aligner"))}


@torch.no_grad()
def zeros(models: Models, work: Work) -> float:
    """The share of zeros in the output of the aligner's ReLU."""
    hidden = encoded(models, Data(models, work, labels=False)).hidden_states
    layers = [hidden[layer] for layer in models.ours.config.encoder_layers]
    mix = models.ours.encoder_aligner.projector.fc1
    return float((reference.layer_mix(layers, mix.weight, mix.bias) == 0).float().mean())


def source_calls(models: Models, work: Work) -> dict[str, Call]:
    """From the encoder's states to keys and values: each call returns (keys, values) of all layers.

    Ours is what ``encode_source`` calls, with the folding that it chooses; folded weights are kept while the weights do
    not change, as in inference. That of reference.py is its projection, then the LLM's key and value modules.
    """
    data = Data(models, work, labels=False)
    hidden = encoded(models, data).hidden_states
    layers = [hidden[layer] for layer in models.ours.config.encoder_layers]
    dtype = models.bare.dtype

    def ours() -> Any:
        with torch.no_grad():
            return models.ours._source_states(layers, dtype)

    def published() -> Any:
        with torch.no_grad():
            pairs = models.published.encoder_aligner(layers)
            wrappers = [layer.self_attn for layer in models.published.model_llm.model.model.layers]
            heads = [
                (w._heads(w.model.k_proj(k)), w._heads(w.model.v_proj(v)))
                for w, (k, v) in zip(wrappers, pairs, strict=True)
            ]
            return [key for key, _ in heads], [value for _, value in heads]

    return {OURS: ours, REFERENCE: reference_of(models, ours), PUBLISHED: published}
