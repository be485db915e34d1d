"""Pre-training of the demo's tiny LLM (English only) and tiny multilingual encoder, from scratch, on generated text.

The LLM is a Llama. It reads worked problems in the math prompt, arithmetic drills, and two kinds of text that teach a
small model what a large one learns from the web: problems and sentences stated twice (to copy earlier text), and
problems in English followed by a prompt of random letters (to answer from the readable part). It never reads another
language.

The encoder is the encoder half of an M2M100 that is trained to translate every language into English, with span
corruption mixed in. Masked language modelling alone (XLM-R) aligns languages slowly; translation aligns them within a
minute or two. It stands for the parallel web text that makes the real NLLB or mT5 multilingual. An mT5 with span
corruption was tried first; after 700 steps it had learnt templates but no names or numbers. That trial also had a
smaller initialization and no short sentences first, so it does not show which of the three was the cause.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from layalign.data.prompts import math_prompt
from layalign.experiments.made_up.problems import LANGUAGES, LOW_RESOURCE, generate_problems, generate_sentences
from layalign.modeling.tokenization import encode_texts
from layalign.utils.errors import finite_number, refuse, whole_number

IGNORE = -100
_DENOISING = 0.15  # share of the encoder's examples that are span corruption
# Called after every step with (step, steps, loss).
Progress = Callable[[int, int, float], None]
# Letters for unreadable text: Latin with accents, Cyrillic, Bengali, Chinese.
_LETTERS = ((0xE0, 0x17F), (0x430, 0x44F), (0x985, 0x9B9), (0x4E00, 0x9FA5))
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """How much a pre-training run reads: `steps` batches of `batch` texts, with a peak learning rate."""

    steps: int
    batch: int
    learning_rate: float

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            whole_number(name, getattr(self, name), least=1)
        if not 0 < finite_number("learning_rate", self.learning_rate, "a number above 0 and below 1") < 1:
            refuse("learning_rate", "a number above 0 and below 1", self.learning_rate)


def drill(rng: random.Random) -> str:
    """One arithmetic fact in the range that the problems need."""
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(2, 25), rng.randint(2, 10)
        return f" {a} + {b} = {a + b}."
    if kind == 1:
        a = rng.randint(4, 20)
        b = rng.randint(2, min(a - 1, 10))
        return f" {a} - {b} = {a - b}."
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f" {a} * {b} = {a * b}." if kind == 2 else f" {a * b} / {b} = {a}."


def garble(text: str, rng: random.Random) -> str:
    """The text with every word replaced by random letters of one script, and some dropped; numbers stay."""
    low, high = rng.choice(_LETTERS)
    words = []
    for word in text.split():
        letters = "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4)))
        words.append(word if word[0].isdigit() else letters)
    return " ".join(word for word in words if word[0].isdigit() or rng.random() < 0.6)


def llm_documents(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[list[int]]:
    """`count` English documents as token ids, `<s>` first and `</s>` last."""
    rng = random.Random(f"documents {seed}")
    problems = iter(generate_problems("train", count, "English", seed))
    sentences = iter(generate_sentences(count, "English", seed))
    texts: list[list[str]] = []
    for kind in rng.choices(("worked", "stated", "unreadable", "twice", "drills"), (32, 8, 20, 22, 18), k=count):
        if kind == "drills":
            texts.append(["".join(drill(rng) for _ in range(10)).strip()])
        elif kind == "twice":
            text = next(problems).question if rng.random() < 0.5 else next(sentences).text
            texts.append([text, "\n", text])
        else:
            problem = next(problems)
            before = [] if kind == "worked" else [problem.question, "\n"]
            asked = garble(problem.question, rng) if kind == "unreadable" else problem.question
            texts.append([*before, math_prompt(asked), problem.answer])
    parts = iter(encode_texts(tokenizer, [part for text in texts for part in text]))
    return [
        [tokenizer.bos_token_id, *(token for _ in text for token in next(parts).ids), tokenizer.eos_token_id]
        for text in texts
    ]


def _by_length(count: int, batch: int, length: Callable[[int], int], rng: random.Random) -> Iterator[list[int]]:
    """Batches of indices of similar length, in random order: little padding and no curriculum."""
    order = list(range(count))
    rng.shuffle(order)
    pool = batch * 4
    batches = []
    for start in range(0, count, pool):
        part = sorted(order[start : start + pool], key=length)
        groups = [part[i : i + batch] for i in range(0, len(part), batch)]
        rng.shuffle(groups)
        batches += groups
    yield from batches


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pad rows on the right: (B, longest), int64."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def fit(model: nn.Module, batches: Iterator[Batch], budget: Budget, progress: Progress) -> None:
    """Train on `budget.steps` batches with AdamW, a short warm-up and cosine decay."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=budget.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=budget.learning_rate,
        total_steps=budget.steps + 1,
        pct_start=0.08,
        cycle_momentum=False,
        final_div_factor=20,
    )
    model.train()
    for step in range(budget.steps):
        loss = model(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, budget.steps, loss.item())
    model.eval()


def llm_config(tokenizer: PreTrainedTokenizerFast, size: int, layers: int) -> LlamaConfig:
    """The tiny LLM: a Llama with grouped-query attention, like large ones."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=size * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pretrain_llm(
    tokenizer: PreTrainedTokenizerFast, budget: Budget, seed: int, progress: Progress, config: LlamaConfig
) -> LlamaForCausalLM:
    """A Llama trained from scratch on English."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    documents = llm_documents(tokenizer, budget.steps * budget.batch, seed)
    rng = random.Random(f"llm {seed}")

    def batches() -> Iterator[Batch]:
        for index in _by_length(len(documents), budget.batch, lambda i: len(documents[i]), rng):
            rows = [documents[i] for i in index]
            labels = pad(rows, IGNORE)
            yield {
                "input_ids": pad(rows, tokenizer.pad_token_id),
                "attention_mask": (labels != IGNORE).long(),
                "labels": labels,
            }

    fit(model, batches(), budget, progress)
    return model


def encoder_config(tokenizer: PreTrainedTokenizerFast, size: int, layers: int) -> M2M100Config:
    """The tiny M2M100: its encoder is used, its shallow decoder only serves to train it."""
    return M2M100Config(
        vocab_size=len(tokenizer),
        d_model=size,
        encoder_layers=layers,
        decoder_layers=2,
        encoder_ffn_dim=size * 5 // 2,
        decoder_ffn_dim=size * 5 // 2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_position_embeddings=256,
        init_std=0.15,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )


def demo_weights(low_resource_share: float) -> dict[str, float]:
    """Relative frequency of each of the demo's languages in the encoder's pre-training; 1 unless low-resource."""
    return {language: low_resource_share if language in LOW_RESOURCE else 1.0 for language in LANGUAGES}


def encoder_pairs(count: int, seed: int, weights: Mapping[str, float], *, short: bool) -> list[tuple[str, str]]:
    """`count` pairs (text in any language, its English original).

    Args:
        count: number of pairs.
        seed: seed of the draws.
        weights: relative frequency of each language.
        short: one short sentence per pair; otherwise four fifths are problems and one fifth are two short sentences.
    """
    rng = random.Random(f"pairs {seed} {short}")
    drawn = rng.choices(list(weights), list(weights.values()), k=count)
    pairs: list[tuple[str, str]] = []
    for number, language in enumerate(weights):
        share = drawn.count(language)
        stream = seed * 1000 + (100 if short else 200) + number
        questions = [] if short else generate_problems("train", share - share // 5, language, stream)
        pairs += [(problem.question, problem.english) for problem in questions]
        size = 1 if short else 2
        rest = share - len(questions)
        sentences = generate_sentences(rest * size, language, stream)
        rng.shuffle(sentences)
        for start in range(0, rest * size, size):
            group = sentences[start : start + size]
            pairs.append((" ".join(s.text for s in group), " ".join(s.english for s in group)))
    rng.shuffle(pairs)
    return pairs


def corrupt(tokens: list[int], sentinels: list[int], end: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Span corruption as in T5: (text with spans replaced by sentinels, the sentinels each followed by its span)."""
    source: list[int] = []
    target: list[int] = []
    used, i = 0, 0
    while i < len(tokens):
        if used < len(sentinels) and rng.random() < 0.08:
            span = rng.randint(1, 3)
            source.append(sentinels[used])
            target += [sentinels[used], *tokens[i : i + span]]
            used, i = used + 1, i + span
        else:
            source.append(tokens[i])
            i += 1
    return [*source, end], [*target, end]


def pretrain_encoder(
    tokenizer: PreTrainedTokenizerFast,
    budget: Budget,
    seed: int,
    progress: Progress,
    weights: Mapping[str, float],
    config: M2M100Config,
) -> M2M100ForConditionalGeneration:
    """An M2M100 trained to translate the languages of `weights` into English.

    Some of its examples are span corruption instead. It reads short sentences for the first 40% of its
    steps, because words are easy to align in them.
    """
    torch.manual_seed(seed + 1)
    model = M2M100ForConditionalGeneration(config)
    rng = random.Random(f"encoder {seed}")
    end = tokenizer.eos_token_id
    sentinels = [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(8)]
    first = budget.steps * 2 // 5

    def phase(steps: int, short: bool) -> Iterator[Batch]:
        pairs = encoder_pairs(steps * budget.batch, seed, weights, short=short)
        sources = encode_texts(tokenizer, [source for source, _ in pairs])
        targets = encode_texts(tokenizer, [target for _, target in pairs])
        rows = [
            corrupt(source.ids, sentinels, end, rng)
            if rng.random() < _DENOISING
            else ([*source.ids, end], [*target.ids, end])
            for source, target in zip(sources, targets, strict=True)
        ]
        for index in _by_length(len(rows), budget.batch, lambda i: len(rows[i][0]) + len(rows[i][1]), rng):
            ids = pad([rows[i][0] for i in index], tokenizer.pad_token_id)
            labels = pad([rows[i][1] for i in index], IGNORE)
            yield {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}

    fit(model, chain(phase(first, True), phase(budget.steps - first, False)), budget, progress)
    return model
