"""The demo's two tokenizers, trained with `tokenizers` and saved as ordinary Hugging Face folders.

Both separate runs of digits from everything else and have a token for every number up to 99, which makes arithmetic
easier. Both fall back to bytes, so no script is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from layalign.data.prompts import math_prompt

_NUMBERS = [str(number) for number in range(100)]
# The BPE trainer reads each number this often, so that all of them become tokens.
_NUMBER_COPIES = 2000


def prompt_pieces() -> tuple[str, str]:
    """The fixed text of the math prompt before and after the question."""
    before, after = math_prompt("\0").split("\0")
    return before, after


def _with_numbers(texts: Iterable[str]) -> Iterator[str]:
    yield from texts
    for _ in range(_NUMBER_COPIES):
        yield from _NUMBERS


def _byte_level_bpe(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d+|\p{Han}| ?[\p{L}\p{M}]+| ?[^\s\d\p{L}\p{M}]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_numbers(texts), trainer)
    return tokenizer


def train_llm_tokenizer(texts: Iterable[str], vocab_size: int = 700) -> PreTrainedTokenizerFast:
    """The LLM's tokenizer, from English text; each fixed part of the math prompt is one token."""
    tokenizer = _byte_level_bpe(texts, vocab_size, ["<s>", "</s>", "<pad>"])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in prompt_pieces()])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def train_encoder_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The encoder's tokenizer, from text in all languages; `</s>` ends every text, as in M2M100."""
    sentinels = [f"<extra_id_{i}>" for i in range(8)]
    tokenizer = _byte_level_bpe(texts, vocab_size, ["<pad>", "</s>", *sentinels])
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
