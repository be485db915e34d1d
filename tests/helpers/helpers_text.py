"""Tiny tokenizers and files for the tests of text handling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import NllbTokenizer, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")


def byte_tokenizer(bos: bool = False, eos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, so that every text comes back; ids 0..2 are pad, bos, eos, which it adds itself if asked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = " ".join((["<s>"] if bos else []) + ["$A"] + (["</s>"] if eos else []))
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if pad:
        names["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def nllb_tokenizer() -> NllbTokenizer:
    """An NLLB tokenizer over the letters a..z."""
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"])}
    return NllbTokenizer(vocab=vocab, merges=[])


def m2m100_tokenizer(folder: Path) -> Any:
    """An M2M100 tokenizer over a sentencepiece model trained on a few words."""
    import sentencepiece
    from transformers import M2M100Tokenizer

    text = folder / "text.txt"
    text.write_text("habari ya asubuhi\nhujambo dunia\nthe quick brown fox jumps\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=40, minloglevel=2, hard_vocab_limit=False
    )
    model = sentencepiece.SentencePieceProcessor(str(folder / "spm.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    tokens = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *(piece for piece in pieces if not model.is_control(pieces.index(piece))),
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "spm.model"))


def write_lines(path: Path, *lines: str) -> Path:
    """A UTF-8 file of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
    return path


def write_json_lines(path: Path, *records: Any) -> Path:
    """A file of one JSON value per line."""
    return write_lines(path, *(json.dumps(record, ensure_ascii=False) for record in records))
