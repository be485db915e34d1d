"""A bare language model for one source: it is given text alone, and reads slots, source and all anew at every step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny import row
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput


class TextOnly(PreTrainedModel, GenerationMixin):
    """transformers' own `generate` over it is what a LayAlign model's must equal: no cache, no embeddings, no slots.

    Args:
        model: a LayAlign model.
        inputs: its inputs.
        index: of the sample.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], index: int = 0) -> None:
        config = copy.deepcopy(model.llm.config)
        config._attn_implementation_internal = "eager"  # it has no attention of its own
        super().__init__(config)
        self.model, self.sample = [model], row(inputs, index)  # in a list: no child module
        self.head = nn.Parameter(torch.zeros(()))
        self.generation_config = model.generation_config
        packed, source = self.sample["input_ids"], self.sample["encoder_input_ids"]
        bos = int(model.config.llm_bos_token_id is not None)
        self.slots = packed[:, bos : bos + source.shape[1] + 1] if model.mapping is not None else packed[:, :0]
        self.bos = bos
        self.text = torch.cat([packed[:, :bos], packed[:, bos + self.slots.shape[1] :]], dim=1)

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **kwargs: Any) -> CausalLMOutput:
        """(B, T) text ids -> (B, T + slots, vocabulary) logits."""
        own = input_ids[:, : self.bos], self.slots.expand(len(input_ids), -1), input_ids[:, self.bos :]
        packed = torch.cat(own, dim=1)
        source = {
            name: tensor.expand(len(packed), -1) for name, tensor in self.sample.items() if name.startswith("encoder")
        }
        mask = torch.ones_like(packed)
        return CausalLMOutput(
            logits=self.model[0](input_ids=packed, attention_mask=mask, use_cache=False, **source).logits
        )

    def new_tokens(self, **settings: Any) -> Tensor:
        """What transformers generates from the text, without the prompt."""
        settings = {"pad_token_id": 0, "do_sample": False, **settings}
        found = self.generate(self.text, attention_mask=torch.ones_like(self.text), use_cache=False, **settings)
        return found[:, self.text.shape[1] :]


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 4 to 63 are one character each."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *(chr(65 + n) for n in range(60))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
