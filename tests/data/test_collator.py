import logging

import pytest
import torch
from helpers_text import byte_tokenizer, m2m100_tokenizer, nllb_tokenizer

from layalign.data import Example, LayAlignCollator
from layalign.utils.errors import ArgumentError

LLM = byte_tokenizer(bos=True, eos=True)  # as Llama's: adds both unless told not to
BOS, EOS, SLOT = 1, 2, 0
SHORT = Example("ab", "x", "Swahili", prompt="p?")
LONG = Example("abcdé", "yes", "Thai", prompt="question?")


def collator(encoder=None, **options):
    options = {"bos_token_id": BOS, "source_token_id": SLOT, **options}
    return LayAlignCollator(encoder or byte_tokenizer(eos=True), LLM, **options)


def text_of(ids, tokenizer=LLM):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_translation_batch():
    batch = collator()([SHORT, LONG])
    ids = {"encoder_input_ids", "encoder_attention_mask", "input_ids", "attention_mask", "labels"}
    assert set(batch) == ids | {"encoder_token_index", "loss_index"}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    # Encoder: own end-of-sequence token, padded on the right ("é" is two bytes).
    assert batch["encoder_attention_mask"].tolist() == [[1] * 3 + [0] * 4, [1] * 7]
    assert text_of(batch["encoder_input_ids"][0]) == "ab</s>" + "<pad>" * 4
    assert text_of(batch["encoder_input_ids"][1]) == "abcdé</s>"
    # LLM: [bos][source slots][boundary slot][target][eos], padded on the left, no prompt.
    assert batch["attention_mask"].tolist() == [[0] * 6 + [1] * 7, [1] * 13]
    assert batch["input_ids"][1].tolist()[:9] == [BOS] + [SLOT] * 8
    assert text_of(batch["input_ids"][1][9:]) == "yes</s>"
    assert text_of(batch["input_ids"][0][11:]) == "x</s>"
    assert batch["labels"][0].tolist() == [-100] * 11 + batch["input_ids"][0, 11:].tolist()
    # What the model would have to wait for: the places of real tokens and those before a label, in the flattened batch.
    assert batch["encoder_token_index"].tolist() == [0, 1, 2, *range(7, 14)]
    assert batch["loss_index"].tolist() == [10, 11, *range(13 + 8, 13 + 12)]


def test_task_batch_has_the_prompt_and_no_label_on_it():
    batch = collator(stage="task")([SHORT, LONG])
    row = batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist()
    assert row[:5] == [BOS] + [SLOT] * 4
    assert text_of(row[5:]) == "p?x</s>"
    assert (batch["labels"][0] != -100).sum() == 2
    assert text_of(batch["labels"][1][batch["labels"][1] != -100]) == "yes</s>"


def test_generation_batch_has_no_targets():
    batch = collator(stage="task", with_targets=False)([SHORT])
    assert "labels" not in batch
    assert text_of(batch["input_ids"][0][5:]) == "p?"


def test_without_a_bos_token():
    assert collator(bos_token_id=None)([SHORT])["input_ids"][0].tolist()[:4] == [SLOT] * 4


def test_lengths_are_cut_and_the_ends_kept(caplog):
    cut = collator(stage="task", max_source_length=3, max_prompt_length=4, max_target_length=2)
    with caplog.at_level(logging.WARNING, logger="layalign"):
        batch = cut([LONG])
        cut([LONG])
    assert text_of(batch["encoder_input_ids"][0]) == "ab</s>"
    assert text_of(batch["input_ids"][0][5:]) == "quesy</s>"
    assert [record.getMessage() for record in caplog.records] == [
        "1 source(s) of a batch cut to 3 tokens (max_source_length); said only once",
        "1 prompt(s) of a batch cut to max_prompt_length; said only once",
        "1 target(s) of a batch cut to max_target_length; said only once",
    ]


def test_a_sample_does_not_depend_on_its_batch():
    both, alone = collator(stage="task")([SHORT, LONG]), collator(stage="task")([SHORT])
    for ids, mask in (("input_ids", "attention_mask"), ("encoder_input_ids", "encoder_attention_mask")):
        assert torch.equal(both[ids][0][both[mask][0] == 1], alone[ids][0])


def test_nllb_marks_every_text_with_its_language():
    tokenizer = nllb_tokenizer()
    examples = [Example(text, "x", name) for text, name in (("abc", "Swahili"), ("de", "Thai"), ("f", "Swahili"))]
    batch = collator(tokenizer)(examples)
    first = tokenizer.convert_ids_to_tokens(batch["encoder_input_ids"][:, 0].tolist())
    assert first == ["swh_Latn", "tha_Thai", "swh_Latn"]
    tokens = tokenizer.convert_ids_to_tokens(batch["encoder_input_ids"][1][batch["encoder_attention_mask"][1] == 1])
    assert tokens == ["tha_Thai", "▁", "d", "e", "</s>"]
    assert tokenizer.src_lang == "eng_Latn"  # as it was


def test_m2m100_marks_every_text_with_its_language(tmp_path):
    tokenizer = m2m100_tokenizer(tmp_path)
    batch = collator(tokenizer)([Example("habari", "x", "Swahili"), Example("the fox", "x", "English")])
    first = batch["encoder_input_ids"][:, 0].tolist()
    assert first == [tokenizer.get_lang_id("sw"), tokenizer.get_lang_id("en")]
    with pytest.raises(ArgumentError, match="got Telugu"):
        collator(tokenizer)([Example("habari", "x", "Telugu")])


def test_encoder_tokenizer_without_pad_token_that_pads_on_the_left():
    tokenizer = byte_tokenizer(pad=False)
    tokenizer.padding_side = "left"
    batch = collator(tokenizer)([SHORT, LONG])
    assert batch["encoder_attention_mask"].tolist() == [[1] * 2 + [0] * 4, [1] * 6]


def test_empty_source():
    empty = Example("", "x", "Swahili", id="7")
    assert collator()([empty])["encoder_input_ids"].tolist() == [[EOS]]  # this tokenizer adds an end
    with pytest.raises(ArgumentError, match="the Swahili example '7' has no encoder tokens"):
        collator(byte_tokenizer())([SHORT, empty])


def test_errors():
    with pytest.raises(ArgumentError, match="examples: expected at least one"):
        collator()([])
    with pytest.raises(ArgumentError, match="has no prompt, expected one for stage='task'"):
        collator(stage="task")([Example("a", "b", "Thai")])
    with pytest.raises(ArgumentError, match="stage: expected one of translation, task, got 'both'"):
        collator(stage="both")
    with pytest.raises(ArgumentError, match="max_target_length: expected a number >= 1, got 0"):
        collator(max_target_length=0)
    with pytest.raises(ArgumentError, match="model: expected a LayAlign model with its config, got int"):
        LayAlignCollator.from_model(3, LLM, LLM)


def test_llm_tokenizers_that_cannot_serve():
    class Stubborn:
        eos_token_id = 2

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1]}

    with pytest.raises(ArgumentError, match="llm_tokenizer: expected no tokens for an empty text"):
        LayAlignCollator(LLM, Stubborn(), bos_token_id=1, source_token_id=0)
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ArgumentError, match="llm_tokenizer: expected an eos_token"):
        LayAlignCollator(LLM, endless, bos_token_id=1, source_token_id=0)
    LayAlignCollator(LLM, endless, bos_token_id=1, source_token_id=0, with_targets=False)
