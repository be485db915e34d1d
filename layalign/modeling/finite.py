"""Notices NaN and infinite logits in generation, where an answer made of them would look like any other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from layalign.utils.errors import NonFiniteError

_INPUTS = ("encoder_input_ids", "input_ids", "inputs", "inputs_embeds")


class _Largest(LogitsProcessor):
    """Keeps the largest score of every row and step on its device, so that nothing waits for it before the end."""

    packed_ids = True  # all rows of a step at once: see `layalign.modeling.text_only`

    def __init__(self, sampling: bool) -> None:
        self.sampling = sampling
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.amax(-1))  # a NaN anywhere in a row is its largest score
        if not self.sampling:
            return scores
        # Sampling from a NaN ends a GPU's process. The row is lost, whatever is sampled.
        return scores.masked_fill(~self.steps[-1].isfinite()[:, None], 0.0)

    def rows(self, tokens: Tensor, ends: Any, single: bool) -> Tensor:
        """Which rows of the steps were not finite before their end, bool.

        Args:
            tokens: (R, T), what ``generate`` returns.
            ends: ids that end a row.
            single: whether row r of the steps is row r of ``tokens``, as without beams.
        """
        bad = ~torch.stack([step.to(tokens.device) for step in self.steps], dim=1).isfinite()
        if single and bad.shape[0] == len(tokens) and bad.shape[1] <= tokens.shape[1]:
            new = tokens[:, -bad.shape[1] :]
            ended = torch.isin(new, torch.tensor(ends, device=new.device)).cumsum(1)
            bad[:, 1:] &= ended[:, :-1] == 0
        return bad.any(1)


def generate_finite(generate: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``generate`` of a transformers model, and check at the end whether the logits were finite.

    Args:
        generate: called with the other arguments and one more logits processor.
        config: the model's generation configuration.

    Raises:
        NonFiniteError: the largest logit of a row was NaN or infinite, before the row ended. Its ``rows`` are the
            indices of the samples, its ``output`` is what was generated, valid for the other samples.
    """
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")

    def setting(name: str) -> Any:
        values = (kwargs.get(name), getattr(given, name, None), getattr(config, name, None))
        return next((value for value in values if value is not None), None)

    largest = _Largest(bool(setting("do_sample")))
    before = args[2] if len(args) > 2 else kwargs.pop("logits_processor", None)
    processors = LogitsProcessorList([largest, *(before or ())])
    if len(args) > 2:
        output = generate(*args[:2], processors, *args[3:], **kwargs)
    else:
        output = generate(*args, logits_processor=processors, **kwargs)
    tokens = output if isinstance(output, Tensor) else output.sequences
    if not largest.steps:
        return output
    ends = setting("eos_token_id")
    ends = [] if ends is None else ends.tolist() if isinstance(ends, Tensor) else ends
    bad = largest.rows(tokens, ends if isinstance(ends, list) else [ends], (setting("num_beams") or 1) == 1)
    if bool(bad.any()):
        inputs = (args[0] if args else None, *(kwargs.get(name) for name in _INPUTS))
        samples = next((len(tensor) for tensor in inputs if tensor is not None), len(bad))
        rows = bad.view(samples, -1).any(1).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"generate: expected finite logits, got NaN or infinity for row {', '.join(map(str, rows))} of {samples}",
            rows,
            output,
        )
    return output


def finite(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a model's ``generate``: :func:`generate_finite` calls it."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return generate_finite(functools.partial(method, self), self.generation_config, *args, **kwargs)

    return checked
