"""Hidden states of a model's LLM for sentences: one vector per sentence and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from layalign.data.collator import LayAlignCollator
from layalign.data.examples import Example
from layalign.modeling.tokenization import encode_texts
from layalign.nn.inspection import device_of

Advance = Callable[[int], None]


@dataclass
class Reader:
    """Reads sentences in batches.

    Attributes:
        model: a LayAlign model in eval mode.
        encoder_tokenizer, llm_tokenizer: its tokenizers.
        batch_size: sentences per batch.
        max_length: maximum length of a sentence in tokens; longer ones are truncated.
        advance: called with the number of sentences read.
        cut: (what, text) of every truncated text: "source", "prompt" or "target" of a batch, "text" for the LLM alone.
    """

    model: Any
    encoder_tokenizer: Any
    llm_tokenizer: Any
    batch_size: int = 8
    max_length: int = 256
    advance: Advance = lambda count: None
    cut: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        # [bos] [source] [boundary] [target] must fit into the LLM's positions, the source into the encoder's.
        llm, encoder = self.model.config.get_text_config(), self.model.config.encoder_config
        positions = getattr(llm, "max_position_embeddings", None) or getattr(llm, "n_positions", None)
        limits = [self.max_length, (positions - 2) // 2 if isinstance(positions, int) else self.max_length]
        positions = getattr(encoder, "max_position_embeddings", None)
        self.max_length = max(1, min([*limits, positions - 2] if isinstance(positions, int) else limits))

    @property
    def device(self) -> torch.device:
        """Device of the LLM's input."""
        return device_of(self.model.get_input_embeddings())

    def collator(self, *, targets: bool) -> LayAlignCollator:
        """A collator for [source] and, with targets, [English], as in the translation stage.

        Without an adapter the LLM's input has no soft tokens. The LLM then reads the text itself, as in the task stage,
        unless a target can follow the first token directly.
        """
        soft = self.model.mapping is not None
        alone = targets and self.model.config.llm_bos_token_id is not None
        longest = {f"max_{part}_length": self.max_length for part in ("source", "prompt", "target")}
        return LayAlignCollator.from_model(
            self.model,
            self.encoder_tokenizer,
            self.llm_tokenizer,
            stage="translation" if soft or alone else "task",
            with_targets=targets,
            **longest,
        )

    def batches(
        self, examples: Sequence[Example], *, targets: bool
    ) -> Iterator[tuple[list[int], dict[str, Tensor], dict[str, Tensor]]]:
        """Batches of similar length: (indices of the examples, batch for the model, the same with labels)."""
        collate = self.collator(targets=targets)
        for places in self._places([len(example.source) + len(example.target) for example in examples]):
            chosen = [replace(examples[i], prompt=examples[i].source) for i in places]
            batch = {name: tensor.to(self.device) for name, tensor in collate(chosen).items()}
            for example, kinds in zip(chosen, collate.last_cut, strict=True):
                self.cut |= {(kind, example.target if kind == "target" else example.source) for kind in kinds}
            yield places, {name: tensor for name, tensor in batch.items() if name != "labels"}, batch
            self.advance(len(places))

    def _places(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        return (order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size))

    @torch.no_grad()
    def through_encoder(self, examples: Sequence[Example]) -> Tensor:
        """The LLM's states while the model reads each source through encoder, adapter and aligner.

        Returns:
            (N, layers + 1, D_l) float32 on the CPU: means over the soft tokens, or over the text without an adapter.
        """
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        config, soft = self.model.config, self.model.mapping is not None
        for places, batch, _ in self.batches(examples, targets=False):
            output = self.model(**batch, output_hidden_states=True, use_cache=False, logits_to_keep=1)
            lengths = batch["encoder_attention_mask"].sum(dim=1) if soft else None
            mask = source_positions(batch["attention_mask"], config.llm_bos_token_id is not None, lengths)
            for place, pooled in zip(places, _pooled(output.hidden_states, mask), strict=True):
                found[place] = pooled
        return torch.stack(found)

    @torch.no_grad()
    def llm_alone(self, texts: Sequence[str]) -> Tensor:
        """The LLM's states while it reads each text itself, without encoder, gates and LoRA.

        Returns:
            (N, layers + 1, D_l) float32 on the CPU: means over the text's tokens.
        """
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        first = self.model.config.llm_bos_token_id
        with without_lora(self.model):
            for places in self._places([len(text) for text in texts]):
                read = encode_texts(self.llm_tokenizer, [texts[i] for i in places], longest=self.max_length)
                self.cut |= {("text", texts[i]) for i, text in zip(places, read, strict=True) if text.cut}
                rows = [([] if first is None else [first]) + text.ids for text in read]
                width = max(map(len, rows))
                # Padded on the right: a causal LLM does not attend to it and needs no position ids.
                batch = {
                    "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
                    "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
                }
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                output = self.model.llm(
                    **batch, output_hidden_states=True, use_cache=False, logits_to_keep=1, return_dict=True
                )
                mask = source_positions(batch["attention_mask"], first is not None)
                for place, pooled in zip(places, _pooled(output.hidden_states, mask), strict=True):
                    found[place] = pooled
                self.advance(len(places))
        return torch.stack(found)


def source_positions(attention_mask: Tensor, has_first: bool, lengths: Tensor | None = None) -> Tensor:
    """The positions that come from the source.

    Args:
        attention_mask: (B, T), 1 where a token is real; padding on either side.
        has_first: whether a first token (bos) comes before them.
        lengths: (B,) numbers of soft tokens; None for all real positions except the first token.

    Returns:
        (B, T) bool.
    """
    place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    place = place - attention_mask.argmax(dim=1, keepdim=True) - int(has_first)
    real = attention_mask.bool() & (place >= 0)
    return real if lengths is None else real & (place < lengths.to(place.device)[:, None])


def _pooled(hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Means of each layer's states (B, T, D) over a mask (B, T): (B, layers, D), float32 on the CPU."""
    counts = mask.sum(dim=1, keepdim=True).clamp(min=1)
    means = []
    for states in hidden:
        inside = mask.to(states.device)[..., None]
        total = states.float().masked_fill(~inside, 0.0).sum(dim=1)
        means.append((total / counts.to(states.device)).cpu())
    return torch.stack(means, dim=1)


@contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """Disable the LLM's LoRA within the block."""
    if model.config.lora is None:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Not with the LLM's own methods: transformers 5.24 requires an unreleased peft for them.
    layers = [module for module in model.llm.modules() if isinstance(module, BaseTunerLayer)]
    flags = {name: parameter.requires_grad for name, parameter in model.llm.named_parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, parameter in model.llm.named_parameters():
            parameter.requires_grad_(flags[name])


@contextmanager
def untrained(model: Any, seed: int) -> Iterator[None]:
    """Reset the model to its untrained state within the block: new adapter and aligner, initial gates, no LoRA."""
    own = [part for part in (model.mapping, model.encoder_aligner, model.cross_attention) if part is not None]
    kept = [(parameter, parameter.detach().clone()) for part in own for parameter in part.parameters()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            for part in own:
                for module in part.modules():
                    model._init_weights(module)
        with without_lora(model):
            yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)
