"""Pre-training and training on the generated text, as the demo and the controlled experiment do them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from layalign.experiments.made_up.data_files import MATH, TRANSLATION, tokenizer_texts
from layalign.experiments.made_up.pretraining import (
    Budget,
    Progress,
    encoder_config,
    llm_config,
    pretrain_encoder,
    pretrain_llm,
)
from layalign.experiments.made_up.vocabulary import train_encoder_tokenizer, train_llm_tokenizer
from layalign.training import TrainConfig, TrainSummary, train
from layalign.utils.files import give_usual_modes

Phase = Callable[[str], AbstractContextManager[Progress]]


def pretrain(
    folder: Path, settings: Any, weights: Mapping[str, float], vocabulary: int, seed: int, phase: Phase
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Train tokenizers, LLM and encoder from scratch, and save them to ``llm`` and ``encoder``.

    Args:
        folder: folder for both.
        settings: settings with the sizes and the budgets of the two models.
        weights: relative frequency of each language in the encoder's text.
        vocabulary: size of the encoder's vocabulary.
        seed: seed of texts and weights.
        phase: a context for each of "tokenizers", "llm" and "encoder"; it yields what is called after each step.

    Returns:
        The tokenizers of the LLM and of the encoder.
    """
    with phase("tokenizers"):
        llm_tokenizer = train_llm_tokenizer(tokenizer_texts("English", 2000, seed, answers=True))
        texts = [text for language in weights for text in tokenizer_texts(language, 800, seed)]
        encoder_tokenizer = train_encoder_tokenizer(texts, vocabulary)
    with phase("llm") as progress:
        shape = llm_config(llm_tokenizer, settings.llm_size, settings.llm_layers)
        llm = pretrain_llm(llm_tokenizer, settings.llm, seed, progress, shape)
    with phase("encoder") as progress:
        wide = encoder_config(encoder_tokenizer, settings.encoder_size, settings.encoder_layers)
        encoder = pretrain_encoder(encoder_tokenizer, settings.encoder, seed, progress, weights, wide)
    for name, model, tokenizer in (("llm", llm, llm_tokenizer), ("encoder", encoder, encoder_tokenizer)):
        model.save_pretrained(folder / name)
        give_usual_modes(folder / name)
        tokenizer.save_pretrained(folder / name)
    return llm_tokenizer, encoder_tokenizer


def train_stage(
    stage: str, budget: Budget, seed: int, callback: Any, *, parts: Path, data: Path, output: Path, before: Path | None,
    fields: Mapping[str, Any], **settings: Any,
) -> TrainSummary:  # fmt: skip
    """Train one stage.

    Args:
        stage, budget, seed, callback: what to train, and a callback of the Trainer.
        parts, data, output: the folders of the frozen parts, of the texts, and for the checkpoint.
        before: checkpoint of the stage before; None for the first stage.
        fields: fields of the model's configuration, for the first stage.
        settings: further settings of training.
    """
    start: dict[str, Any] = {"init_checkpoint": str(before)}
    if before is None:
        start = {"encoder": str(parts / "encoder"), "llm": str(parts / "llm"), **fields}
    config = TrainConfig(
        stage=stage, task="math", data=str(data / {"translation": TRANSLATION, "task": MATH}[stage]),
        output_dir=str(output), max_steps=budget.steps, batch_size=budget.batch, micro_batch_size=budget.batch,
        learning_rate=budget.learning_rate, adam_beta1=0.9, dev_size=0, eval_steps=0, save_steps=0,
        group_by_length=True, seed=seed, bf16=False, resume=False, progress="quiet", **start, **settings,
    )  # fmt: skip
    return train(config, callbacks=[callback])
