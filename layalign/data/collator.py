"""The collator: examples in, one padded batch for the encoder and one packed batch for the LLM out."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from layalign.data.examples import Example
from layalign.data.languages import tokenizer_source_language
from layalign.data.lengths import known_limit, positions
from layalign.modeling.llm_inputs import IGNORE_INDEX, build_inputs
from layalign.modeling.llm_pass import predicted
from layalign.modeling.tokenization import encode_texts
from layalign.nn.rows import Rows
from layalign.utils.errors import ArgumentError, one_of, refuse, whole_number

logger = logging.getLogger(__name__)
STAGES = ("translation", "task")
_COUNTED = ("examples", "source", "prompt", "target", "context")


class LayAlignCollator:
    """Turns a list of `Example` into a batch for `LayAlignForCausalLM`.

    Texts are text: what looks like a special token in them is none (`layalign.modeling.tokenization.encode_texts`).

    Args:
        encoder_tokenizer: tokenizer of the multilingual encoder. Its own special tokens are kept; M2M100 and NLLB
            tokenizers get each text's language.
        llm_tokenizer: tokenizer of the LLM. It adds nothing; the end-of-sequence token is appended to targets here.
        bos_token_id: first token of the LLM's input, or None.
        source_token_id: id that fills the slots of the encoder's tokens and the padding.
        stage: "translation" (no prompt) or "task" (the example's prompt follows the encoder's tokens).
        max_source_length, max_prompt_length, max_target_length: longest encoder input, prompt and target in tokens,
            special tokens included; what is longer is cut at its end, and a cut target keeps its end-of-sequence token.
            A source is never longer than the encoder's tokenizer (`model_max_length`) and positions allow.
        with_targets: append targets and give labels; False for generation.
        slots: False for a model without an adapter: no slots for the encoder's tokens.
        prompt: False for a model whose LLM reads the encoder's tokens in place of the prompt, in the task stage too.
        encoder_positions: most tokens that the encoder can read; None is no limit.
        llm_positions: most tokens that the LLM was made for; None is no limit.
        llm_positions_end: whether that is a hard limit (a table of positions), so that more tokens are refused.

    Attributes:
        max_source_length: the limit for sources that holds.
        last_cut: what was cut of each example of the last batch: some of "source", "prompt", "target", and "context"
            where all of it together is longer than `llm_positions`.
        cuts: how many examples each of these happened to so far, and under "examples" how many there were; with
            `share_memory` in all workers of a DataLoader together.
        quiet: log nothing of what is cut, for a caller that looks at `last_cut`.

    Raises:
        ArgumentError: an option is none of those expected, or the LLM's tokenizer cannot serve.
    """

    def __init__(
        self,
        encoder_tokenizer: Any,
        llm_tokenizer: Any,
        *,
        bos_token_id: int | None,
        source_token_id: int,
        stage: str = "translation",
        max_source_length: int = 512,
        max_prompt_length: int = 512,
        max_target_length: int = 512,
        with_targets: bool = True,
        slots: bool = True,
        prompt: bool = True,
        encoder_positions: int | None = None,
        llm_positions: int | None = None,
        llm_positions_end: bool = False,
    ) -> None:
        one_of("stage", stage, STAGES)
        for name, tokenizer in (("encoder_tokenizer", encoder_tokenizer), ("llm_tokenizer", llm_tokenizer)):
            if not callable(tokenizer) or not hasattr(tokenizer, "pad_token_id" if name[0] == "e" else "eos_token_id"):
                raise ArgumentError(f"{name}: expected a tokenizer of transformers, got {type(tokenizer).__name__}")
        if bos_token_id is not None:
            whole_number("bos_token_id", bos_token_id, least=0)
        whole_number("source_token_id", source_token_id, least=0)
        for name, length in (
            ("max_source_length", max_source_length),
            ("max_prompt_length", max_prompt_length),
            ("max_target_length", max_target_length),
        ):
            if whole_number(name, length) < 1:
                raise ArgumentError(f"{name}: expected a number >= 1, got {length}")
        if with_targets and llm_tokenizer.eos_token_id is None:
            raise ArgumentError("llm_tokenizer: expected an eos_token, with which every target ends; it has none")
        added = llm_tokenizer("", add_special_tokens=False)["input_ids"]
        if len(added):
            raise ArgumentError(f"llm_tokenizer: expected no tokens for an empty text, got {list(added)}")
        self.encoder_tokenizer = encoder_tokenizer
        self.llm_tokenizer = llm_tokenizer
        self.bos_token_id = bos_token_id
        self.source_token_id = source_token_id
        self.stage = stage
        limits = {
            max_source_length: "max_source_length",
            known_limit(encoder_tokenizer): "the model_max_length of the encoder's tokenizer",
            encoder_positions: "the encoder's positions",
        }
        self.max_source_length = min(limit for limit in limits if limit is not None)
        self._source_limit = limits[self.max_source_length]
        self.max_prompt_length = max_prompt_length
        self.max_target_length = max_target_length
        self.with_targets = with_targets
        self.slots, self.prompt = slots, prompt
        self.llm_positions, self.llm_positions_end = llm_positions, llm_positions_end
        self.last_cut: list[tuple[str, ...]] = []
        self._counts = torch.zeros(len(_COUNTED), dtype=torch.long)
        self.quiet = False
        self._told: set[str] = set()

    @classmethod
    def from_model(cls, model: Any, encoder_tokenizer: Any, llm_tokenizer: Any, **kwargs: Any) -> LayAlignCollator:
        """A collator with the ids of a model's configuration; `kwargs` as for the constructor."""
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "llm_bos_token_id") or not hasattr(config, "source_token_id"):
            raise ArgumentError(f"model: expected a LayAlign model with its config, got {type(model).__name__}")
        kwargs.setdefault("bos_token_id", config.llm_bos_token_id)
        kwargs.setdefault("source_token_id", config.source_token_id)
        kwargs.setdefault("slots", getattr(config, "use_adapter", True))
        kwargs.setdefault("prompt", getattr(config, "use_prompt", True))
        encoder = getattr(model, "encoder", None), getattr(config, "encoder_config", None)
        kwargs.setdefault("encoder_positions", positions(*encoder)[0])
        most, end = positions(getattr(model, "llm", None), config)
        kwargs.setdefault("llm_positions", most)
        kwargs.setdefault("llm_positions_end", end)
        return cls(encoder_tokenizer, llm_tokenizer, **kwargs)

    @property
    def cuts(self) -> Counter[str]:
        """See the class."""
        return +Counter(dict(zip(_COUNTED, self._counts.tolist(), strict=True)))

    def share_memory(self) -> None:
        """Count in memory that the workers of a DataLoader share with this process."""
        self._counts.share_memory_()

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Make a batch of B examples.

        Returns:
            int64 tensors on the CPU: `encoder_input_ids`, `encoder_attention_mask` (B, S), padded on the right;
            `input_ids`, `attention_mask` (B, T), padded on the left; with targets `labels` (B, T), -100 where nothing
            is predicted, and `encoder_token_index` (N,) and `loss_index` (M,), by which the model need not wait for a
            GPU to count them.

        Raises:
            ArgumentError: no examples, a source without any token, a task example without a prompt, or one for which
                the LLM's table of positions is too short.
        """
        if not isinstance(examples, Sequence) or not all(hasattr(example, "source") for example in examples):
            refuse("examples", "a list of Example", examples)
        if not examples:
            raise ArgumentError("examples: expected at least one, got none")
        sources, cut = self._encode_sources(examples)
        prompts = None
        if self.stage == "task" and self.prompt:
            for example in examples:
                if not example.prompt:
                    raise ArgumentError(f"examples: {_which(example)} has no prompt, expected one for stage='task'")
            prompts = self._llm_ids([example.prompt for example in examples], self.max_prompt_length, "prompt", cut)
        targets = None
        if self.with_targets:
            ids = self._llm_ids([example.target for example in examples], self.max_target_length - 1, "target", cut)
            targets = [[*row, self.llm_tokenizer.eos_token_id] for row in ids]
        packed = build_inputs(
            [len(row) for row in sources],
            prompts,
            targets,
            bos_token_id=self.bos_token_id,
            source_token_id=self.source_token_id,
            slots=self.slots,
        )
        self._check_context(examples, packed["attention_mask"].sum(dim=1).tolist(), cut)
        self._count(cut)
        self._tell(cut)
        batch = {**self.padded_sources(sources), **packed}
        if targets is not None:
            batch["encoder_token_index"] = Rows(batch["encoder_attention_mask"]).index
            batch["loss_index"] = Rows(predicted(batch["labels"]) != IGNORE_INDEX).index
        return batch

    def contexts(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The batch up to where the targets begin: as a call with `with_targets=False`, which has the same errors."""
        bare = copy.copy(self)
        bare.with_targets = False
        batch = bare(examples)
        self.last_cut = bare.last_cut
        return batch

    def continuations(self, example: Example, texts: Sequence[str]) -> list[list[int]]:
        """LLM token ids of each text as a target of `example`: cut like one, and with the end-of-sequence token."""
        found = encode_texts(self.llm_tokenizer, texts, longest=self.max_target_length - 1)
        self._tell([["target"] if text.cut else [] for text in found])
        return [[*text.ids, self.llm_tokenizer.eos_token_id] for text in found]

    def encode_sources(self, examples: Sequence[Example], *, side: str = "right") -> list[list[int]]:
        """Encoder token ids of each source, special tokens included, cut to `max_source_length`, not padded.

        `last_cut` says which were cut.

        Args:
            examples: whose sources.
            side: where a source that is too long is cut, "right" or "left".
        """
        rows, cut = self._encode_sources(examples, side)
        self._count(cut)
        return rows

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """How many tokens the LLM reads of each example, first token and boundary not counted; for batches of a length.

        A text that is cut counts as cut; nothing is logged.
        """
        found = []
        for start in range(0, len(examples), 1024):  # as many as fit well into the tokenizers' threads
            group = examples[start : start + 1024]
            unsaid: list[list[str]] = [[] for _ in group]
            rows = [len(row) for row in self._encode_sources(group)[0]] if self.slots else [0] * len(group)
            texts = []
            if self.stage == "task" and self.prompt:
                texts.append(("prompt", self.max_prompt_length))
            if self.with_targets:
                texts.append(("target", self.max_target_length - 1))
            for kind, longest in texts:
                ids = self._llm_ids([getattr(example, kind) for example in group], longest, kind, unsaid)
                rows = [row + len(each) for row, each in zip(rows, ids, strict=True)]
            found += rows
        return found

    def _encode_sources(
        self, examples: Sequence[Example], side: str = "right"
    ) -> tuple[list[list[int]], list[list[str]]]:
        """(ids, what was cut) of each example."""
        codes = [tokenizer_source_language(self.encoder_tokenizer, example.language) for example in examples]
        rows: list[list[int]] = [[] for _ in examples]
        cut: list[list[str]] = [[] for _ in examples]
        for code in dict.fromkeys(codes):
            places = [i for i, other in enumerate(codes) if other == code]
            with _source_language(self.encoder_tokenizer, code):
                found = encode_texts(
                    self.encoder_tokenizer,
                    [examples[i].source for i in places],
                    special=True,
                    longest=self.max_source_length,
                    side=side,
                )
            for i, text in zip(places, found, strict=True):
                rows[i] = text.ids
                cut[i] += ["source"] * text.cut
        for example, row in zip(examples, rows, strict=True):
            if not row:
                raise ArgumentError(f"examples: {_which(example)} has no encoder tokens, expected a source text")
        return rows, cut

    def _llm_ids(self, texts: list[str], longest: int, what: str, cut: list[list[str]]) -> list[list[int]]:
        found = encode_texts(self.llm_tokenizer, texts, longest=longest)
        for kinds, text in zip(cut, found, strict=True):
            kinds += [what] * text.cut
        return [text.ids for text in found]

    def _check_context(self, examples: Sequence[Example], lengths: list[int], cut: list[list[str]]) -> None:
        most = self.llm_positions
        for example, length, kinds in zip(examples, lengths, cut, strict=True):
            if most is not None and length > most:
                if self.llm_positions_end:
                    raise ArgumentError(
                        f"examples: {_which(example)} takes {length} tokens of the LLM, expected at most its {most} "
                        "positions; lower max_source_length, max_prompt_length or max_target_length"
                    )
                kinds.append("context")

    def _count(self, cut: list[list[str]]) -> None:
        self.last_cut = [tuple(kinds) for kinds in cut]
        found = Counter(kind for kinds in cut for kind in kinds)
        self._counts += torch.tensor([len(cut), *(found[kind] for kind in _COUNTED[1:])])

    def _tell(self, cut: list[list[str]]) -> None:
        """Log the first cut of each kind of text."""
        found = Counter(kind for kinds in cut for kind in kinds)
        limits = {
            "source": f"cut to {self.max_source_length} tokens ({self._source_limit})",
            "prompt": "cut to max_prompt_length",
            "target": "cut to max_target_length",
            "context": f"longer than the LLM's {self.llm_positions} positions",
        }
        for kind, count in found.items():
            if kind not in self._told and not self.quiet:
                self._told.add(kind)
                logger.warning("%d %s(s) of a batch %s; said only once", count, kind, limits[kind])

    def padded_sources(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """`encoder_input_ids` and `encoder_attention_mask` of token ids: (B, S) int64, padded on the right."""
        # Without a pad token any id does: the mask hides it.
        pad = self.encoder_tokenizer.pad_token_id
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        return {
            "encoder_input_ids": pad_sequence(ids, batch_first=True, padding_value=0 if pad is None else pad),
            "encoder_attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def _which(example: Example) -> str:
    return f"the {example.language} example {example.id!r}"


@contextmanager
def _source_language(tokenizer: Any, code: str | None) -> Iterator[None]:
    """Set a tokenizer's source language for a while."""
    if code is None:
        yield
        return
    before = tokenizer.src_lang
    tokenizer.src_lang = code
    try:
        yield
    finally:
        tokenizer.src_lang = before
