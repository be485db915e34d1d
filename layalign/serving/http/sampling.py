"""The next token of each row: greedy, or sampled with the row's own temperature, top-p and random generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from layalign.utils.errors import ArgumentError

# Unsupported fields of a generation configuration that change greedy answers, with the value that has no effect.
_NEUTRAL = {
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "min_length": 0,
    "min_new_tokens": 0, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None,
    "sequence_bias": None, "guidance_scale": None, "remove_invalid_values": False, "stop_strings": None,
    "watermarking_config": None,
}  # fmt: skip

COLDEST = 1e-6  # dividing logits by less overflows


def repetition_penalty(generation_config: Any) -> float:
    """The repetition penalty of the model's generation configuration (1.0: none).

    Raises:
        ArgumentError: the generation configuration asks for something that is not supported.
    """
    for name, neutral in _NEUTRAL.items():
        value = getattr(generation_config, name, neutral)
        if value not in (None, neutral, [], {}):
            raise ArgumentError(f"generation_config: expected {name}={neutral!r}, got {value!r} (not supported)")
    return float(getattr(generation_config, "repetition_penalty", None) or 1.0)


@dataclass
class Chooser:
    """Selects the tokens of one request.

    Args:
        temperature: 0 (and anything below 1e-6) takes the most likely token.
        top_p: sample from the most likely tokens whose probabilities sum to this.
        seed: seed of this request's random generator; None for a random seed.
        penalty: repetition penalty of the model's generation configuration.
        ids: tokens that the penalty counts: the LLM's prompt without the source's slots, and each new token.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    penalty: float = 1.0
    ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._processors, self._generator = LogitsProcessorList(), None
        if self.penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(self.penalty))
        if self.temperature > COLDEST:
            self._generator = torch.Generator()
            if self.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.seed)
            self._processors.append(TemperatureLogitsWarper(self.temperature))
            if self.top_p < 1:
                self._processors.append(TopPLogitsWarper(self.top_p))

    @property
    def plain(self) -> bool:
        """Whether the token is the most likely one."""
        return not self._processors

    def __call__(self, logits: Tensor) -> int:
        """The next token from float32 logits (1, V)."""
        scores = self._processors(torch.tensor([self.ids], dtype=torch.long, device=logits.device), logits)
        if self._generator is None:
            return int(scores.argmax(-1))
        # On the CPU, so that a seed gives the same random numbers on every device.
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self._generator))


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[int | None]:
    """The next token of every row, None for a row whose logits are not finite.

    Args:
        logits: (B, V), float32.
        choosers: one per row.
    """
    best, ids = logits.max(-1)
    tokens: list[int | None] = ids.tolist()
    finite = best.isfinite().tolist()  # max returns NaN if the row contains one
    for row, chooser in enumerate(choosers):
        if not finite[row]:
            tokens[row] = None
            continue
        if not chooser.plain:
            tokens[row] = chooser(logits[row : row + 1])
        if chooser.penalty != 1.0:
            chooser.ids.append(int(tokens[row] or 0))
    return tokens
