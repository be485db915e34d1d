"""A tiny mT5 encoder, a tiny Llama, their tokenizers and a few sentence pairs, written to a folder."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast

from layalign.training import TrainConfig, load_train_config
from layalign.training.checkpoints import MANIFEST, problem, publish
from layalign.training.record import FILE as RECORD

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
WORDS = {
    "German": {"one": "eins", "two": "zwei", "red": "rot", "blue": "blau", "cat": "Katze", "dog": "Hund"},
    "Swahili": {"one": "moja", "two": "mbili", "red": "nyekundu", "blue": "bluu", "cat": "paka", "dog": "mbwa"},
}
CODES = {"German": "de", "Swahili": "sw"}


@dataclass(frozen=True)
class TinyParts:
    """Folders of the tiny encoder, LLM and data."""

    encoder: str
    llm: str
    data: str


def byte_tokenizer(*, add_eos: bool) -> PreTrainedTokenizerFast:
    """One token per byte: every text in every script, no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def save_parts(folder: Path) -> TinyParts:
    """Write encoder, LLM and translation pairs (published layout) below `folder`."""
    torch.manual_seed(0)
    size = len(SPECIAL) + 256
    encoder = MT5ForConditionalGeneration(
        MT5Config(
            vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, dropout_rate=0.0, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2, max_position_embeddings=1024,
        )
    )  # fmt: skip
    for name, model, add_eos in (("encoder", encoder, True), ("llm", llm, False)):
        model.save_pretrained(folder / name)
        byte_tokenizer(add_eos=add_eos).save_pretrained(folder / name)
    write_data(folder / "datas")
    return TinyParts(str(folder / "encoder"), str(folder / "llm"), str(folder / "datas"))


def write_data(folder: Path, pairs: int = 24) -> None:
    """Bilingual pairs and math questions in the published layout."""
    draw = random.Random(0)
    questions = []
    for language, words in WORDS.items():
        code = CODES[language]
        english = [" ".join(draw.choices(sorted(words), k=2)) for _ in range(pairs)]
        foreign = [" ".join(words[word] for word in sentence.split()) for sentence in english]
        target = folder / "bilingual_pairs" / f"en-{code}"
        target.mkdir(parents=True)
        (target / f"train_100k.{code}").write_text("\n".join(foreign) + "\n", encoding="utf-8")
        (target / "train_100k.en").write_text("\n".join(english) + "\n", encoding="utf-8")
        for sentence in foreign[:12]:
            questions.append({"lang": language, "query": f"{sentence} + 1?", "response": "The answer is 7"})
        mgsm = folder / "evaluation" / "mgsm"
        mgsm.mkdir(parents=True, exist_ok=True)
        lines = [f"{sentence} + 2?\t{index}" for index, sentence in enumerate(foreign[:3])]
        (mgsm / f"mgsm_{code}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "query_translation").mkdir()
    (folder / "query_translation" / "metamath_615k.json").write_text(json.dumps(questions), encoding="utf-8")


def training_config(parts: TinyParts, output: Path, **changes: Any) -> TrainConfig:
    """A few steps of the translation stage on the tiny parts, the same on every processor."""
    values: dict[str, Any] = {
        "encoder": parts.encoder, "llm": parts.llm, "data": parts.data, "output_dir": str(output), "batch_size": 8,
        "dev_size": 8, "max_steps": 6, "learning_rate": 5e-3, "logging_steps": 1, "eval_steps": 0, "save_steps": 0,
        "progress": False, "use_cpu": True, "bf16": False, "dev_cut": "position",
    }  # fmt: skip
    return load_train_config(values | changes)


def without_record(run: Path) -> None:
    """As an earlier layalign left it."""
    (run / RECORD).unlink()
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / RECORD).unlink(missing_ok=True)
        (checkpoint / MANIFEST).unlink()
        publish(checkpoint.rename(run / "old"), checkpoint)
        assert problem(checkpoint) is None
