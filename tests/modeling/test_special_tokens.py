"""What stands in a text is text, also where it looks like a special token, for every kind of tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers_text import byte_tokenizer, m2m100_tokenizer, nllb_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from layalign.data import Example, LayAlignCollator
from layalign.modeling.tokenization import Prompt, encode_texts
from layalign.utils.errors import ArgumentError

LETTERS = "abcdefghijklmnopqrstuvwxyz<>/_[]|0123456789 é"
CHAT = ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}


def made(tokenizer: Tokenizer, names: dict[str, str] = NAMES, **options) -> PreTrainedTokenizerFast:
    end = names["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names['bos_token']} $A {end}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (names["bos_token"], end)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def unigram():
    """As T5's and XLM-R's: the special tokens are pieces of the model, with the best score of all."""
    pieces = [(name, 0.0) for name in NAMES.values()]
    pieces += [("▁", -2.0), *((letter, -3.0) for letter in LETTERS if letter != " "), ("▁ab", -4.0), ("</", -3.5)]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in range(4)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return made(tokenizer, additional_special_tokens=[f"<extra_id_{i}>" for i in range(4)])


def metaspace_bpe(scheme: str):
    """As Llama 2's: special tokens are in the vocabulary, and merges of characters lead to one of them."""
    vocab = [*NAMES.values(), "▁", *(letter for letter in LETTERS if letter != " "), "</", "s>", "ab", *CHAT]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(vocab)}, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made(tokenizer, additional_special_tokens=CHAT)


def byte_level():
    """As GPT-2's, Qwen's and Llama 3's: special tokens stand behind the vocabulary, some words that are not too."""
    tokenizer = byte_tokenizer(bos=True, eos=True)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in CHAT], special_tokens=True)
    tokenizer.add_tokens(["oranges", "<tool>"])
    return tokenizer


def word_piece():
    vocab = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *LETTERS.replace(" ", ""), *("##" + x for x in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return made(tokenizer, names, mask_token="[MASK]")


def word_level():
    """Words as they stand between spaces; "</s>" is one of them."""
    vocab = [*NAMES.values(), "habari", "yako", "<", "a"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made(tokenizer)


KINDS = {
    "byte level": byte_level, "unigram": unigram, "metaspace, always": lambda: metaspace_bpe("always"),
    "metaspace, first": lambda: metaspace_bpe("first"), "word pieces": word_piece, "words": word_level,
    "NLLB": nllb_tokenizer, "ByT5": lambda: ByT5Tokenizer(extra_ids=4), "M2M100": m2m100_tokenizer,
}  # fmt: skip
# Where every text of LETTERS comes back from its tokens.
LOSSLESS = ("byte level", "unigram", "metaspace, always", "metaspace, first", "ByT5")


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind, tmp_path: Path):
    return m2m100_tokenizer(tmp_path) if kind == "M2M100" else KINDS[kind]()


def special_of(tokenizer) -> dict[str, int]:
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return found | {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def drawn(tokenizer, draw: random.Random) -> str:
    """Letters and words with special tokens anywhere among them."""
    names = [*special_of(tokenizer), "</s>", "<s>", "<pad>", "<mask>", "<extra_id_0>", *CHAT]
    parts = ["ab", "a", " ", "é", "<", ">", "/", "</", "s>", "oranges", "habari"]
    return "".join(draw.choice(names if draw.random() < 0.4 else parts) for _ in range(draw.randrange(1, 9)))


def test_no_text_has_a_special_token(kind, tokenizer):
    draw, special = random.Random(f"special {kind}"), special_of(tokenizer)
    texts = [*special, *(f"a {name} b" for name in special), *(drawn(tokenizer, draw) for _ in range(80))]
    # An unknown character has no token but this one.
    ids = set(special.values()) - {tokenizer.unk_token_id}
    around = tokenizer("a", add_special_tokens=True)["input_ids"]
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(around)) if around[i : i + len(inside)] == inside)
    before, after = around[:start], around[start + len(inside) :]
    assert before or after
    alone, whole = (encode_texts(tokenizer, texts, special=added) for added in (False, True))
    for text, one, other in zip(texts, alone, whole, strict=True):
        assert ids.isdisjoint(one.ids), (text, tokenizer.convert_ids_to_tokens(one.ids))
        assert other.ids == [*before, *one.ids, *after], text
        assert not one.cut and not other.cut
        if kind in LOSSLESS:
            back = tokenizer.decode(one.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert back.strip() == text.strip(), (text, back)


def test_texts_without_special_tokens_are_read_as_ever(kind, tokenizer):
    texts = ["", "ab", "a b", "habari ya asubuhi", "é < > a", "oranges and more oranges", "\u6f22"]
    for added in (False, True):
        expected = tokenizer(texts, add_special_tokens=added)["input_ids"]
        assert [row.ids for row in encode_texts(tokenizer, texts, special=added)] == expected


def test_a_text_is_cut_within_the_tokens_around_it(kind, tokenizer):
    text = "ab ab ab ab ab" if kind != "words" else "a a a a a a"
    (whole,) = encode_texts(tokenizer, [text], special=True)
    around = len(whole.ids) - len(encode_texts(tokenizer, [text])[0].ids)
    for longest in range(around + 1, len(whole.ids) + 1):
        (right,) = encode_texts(tokenizer, [text], special=True, longest=longest)
        assert right.ids == tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        assert right.cut == (longest < len(whole.ids)) and len(right.ids) == longest
        (left,) = encode_texts(tokenizer, [text], special=True, longest=longest, side="left")
        assert (left.ids[-1], len(left.ids), left.cut) == (whole.ids[-1], longest, right.cut)
        assert around == 1 or left.ids[0] == whole.ids[0]
    with pytest.raises(ArgumentError, match="side: expected one of right, left, got 'both'"):
        encode_texts(tokenizer, [text], side="both")


def test_tokens_that_are_not_special_stay_tokens():
    for tokenizer in (byte_level(), ByT5Tokenizer(extra_ids=4)):
        tokenizer.add_tokens(["oranges", "<tool>"])
        (found,) = encode_texts(tokenizer, ["oranges </s> <tool>"])
        ids = [tokenizer.convert_tokens_to_ids(word) for word in ("oranges", "<tool>")]
        assert [i for i in found.ids if i in ids] == ids and tokenizer.eos_token_id not in found.ids


def test_tokens_made_special_later_are_seen():
    tokenizer = byte_level()
    assert tokenizer.eos_token_id not in encode_texts(tokenizer, ["</s> <stop>"])[0].ids
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    assert tokenizer.eos_token_id not in encode_texts(tokenizer, ["a <stop>"])[0].ids
    assert tokenizer.decode(encode_texts(tokenizer, ["a <stop>"])[0].ids) == "a <stop>"


def test_a_character_that_was_made_special_is_still_written():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "!"
    assert tokenizer.decode(encode_texts(tokenizer, ["a!</s>"])[0].ids) == "a!</s>"


@pytest.mark.parametrize("name", ["byte level", "metaspace, always", "metaspace, first", "ByT5"])
def test_a_template_has_markers_and_the_text_in_it_has_none(name):
    tokenizer = KINDS[name]()
    if name == "ByT5":
        tokenizer.add_special_tokens({"additional_special_tokens": CHAT})
    template = "<|im_start|>say {source}<|im_end|> <|im_start|>"
    start, end = (tokenizer.convert_tokens_to_ids(marker) for marker in CHAT[:2])
    (clean,) = encode_texts(tokenizer, [Prompt.fill(template, "ab")])
    assert clean.ids == tokenizer(template.replace("{source}", "ab"), add_special_tokens=False)["input_ids"]
    (found,) = encode_texts(tokenizer, [Prompt.fill(template, "ab<|im_end|></s>")])
    marked = [i for i in found.ids if i in special_of(tokenizer).values()]
    assert marked == [start, end, start]
    text = tokenizer.decode(found.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "ab<|im_end|></s>" in text
    assert not {start, end} & set(encode_texts(tokenizer, [template])[0].ids)  # a plain text has no markers


def test_sources_prompts_and_targets_of_a_batch():
    encoder, llm = unigram(), metaspace_bpe("always")
    example = Example("a</s>b<extra_id_0>", "the </s> end", "Swahili", "say </s> it")
    batch = LayAlignCollator(encoder, llm, bos_token_id=0, source_token_id=0, stage="task")([example])
    source = batch["encoder_input_ids"][0].tolist()
    assert [i for i in source if i in encoder.all_special_ids] == [encoder.bos_token_id, encoder.eos_token_id]
    labels = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert labels.index(llm.eos_token_id) == len(labels) - 1
    text = batch["input_ids"][0][1 + len(source) + 1 : -1].tolist()
    assert not set(text) & set(llm.all_special_ids) and llm.decode(text) == "say </s> it the </s> end"


def test_nllb_keeps_the_language_it_puts_before_a_text():
    tokenizer = nllb_tokenizer()
    batch = LayAlignCollator(tokenizer, byte_level(), bos_token_id=1, source_token_id=0)(
        [Example("a tha_Thai </s> b", "x", "Swahili"), Example("b", "x", "Thai")]
    )
    tokens = tokenizer.convert_ids_to_tokens(batch["encoder_input_ids"][0].tolist())
    assert (tokens[0], tokens[-1]) == ("swh_Latn", "</s>")
    assert not {"tha_Thai", "</s>", "swh_Latn"} & set(tokens[1:-1])
    assert tokenizer.convert_ids_to_tokens(int(batch["encoder_input_ids"][1, 0])) == "tha_Thai"
