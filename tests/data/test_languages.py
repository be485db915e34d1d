import pytest
from helpers_text import byte_tokenizer, m2m100_tokenizer, nllb_tokenizer
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB

from layalign.data import language_of, languages, tokenizer_source_language
from layalign.utils.errors import ArgumentError

# What the published code writes into `tokenizer.src_lang`; its Telugu entry is no code of M2M100.
PUBLISHED_M2M = {
    "English": "en", "Swahili": "sw", "Chinese": "zh", "Bengali": "bn", "German": "de", "Spanish": "es", "French": "fr",
    "Japanese": "ja", "Russian": "ru", "Thai": "th", "Greek": "el", "Arabic": "ar", "Bulgarian": "bg", "Croatian": "hr",
    "Hungarian": "hu", "Italian": "it", "Lithuanian": "lt", "Macedonian": "mk", "Polish": "pl", "Portuguese": "pt",
    "Albanian": "sq", "Serbian": "sr", "Turkish": "tr", "Vietnamese": "vi", "Hindi": "hi", "Urdu": "ur",
    "Flemish": "nl",
}  # fmt: skip
PUBLISHED_NLLB = {
    "English": "eng_Latn", "Swahili": "swh_Latn", "Chinese": "zho_Hans", "Bengali": "ben_Beng", "German": "deu_Latn",
    "Spanish": "spa_Latn", "French": "fra_Latn", "Japanese": "jpn_Jpan", "Russian": "rus_Cyrl", "Thai": "tha_Thai",
}  # fmt: skip


def test_published_codes():
    assert {name: language_of(name).m2m100 for name in PUBLISHED_M2M} == PUBLISHED_M2M
    assert {name: language_of(name).nllb for name in PUBLISHED_NLLB} == PUBLISHED_NLLB


@pytest.mark.parametrize(
    "text, name",
    [
        ("Swahili", "Swahili"), ("swahili", "Swahili"), ("sw", "Swahili"), ("swa", "Swahili"), ("swh", "Swahili"),
        ("swh_Latn", "Swahili"), ("Dutch", "Flemish"), ("nl", "Flemish"), ("cmn", "Chinese"), ("zho-CN", "Chinese"),
        ("zh", "Chinese"), ("arb", "Arabic"), ("te", "Telugu"), ("tel", "Telugu"), ("qu", "Quechua"),
        ("et", "Estonian"), ("quy", "Quechua"), ("est_Latn", "Estonian"),
        ("ht", "Haitian Creole"), ("Haitian", "Haitian Creole"), ("id", "Indonesian"), ("ta", "Tamil"),
        ("ns", "Northern Sotho"),
        ("ga", "Irish"), ("Ga", "Ga"), ("gaa", "Ga"), ("fa-AF", "Dari"), ("de-AT", "German"), (" th ", "Thai"),
    ],
)  # fmt: skip
def test_names_and_codes(text, name):
    assert language_of(text).name == name


def test_scripts_are_languages_of_their_own():
    traditional = language_of("zh-TW")
    assert (traditional.name, traditional.nllb) == ("Chinese (Hant)", "zho_Hant")
    assert language_of(traditional.name) == traditional
    assert language_of("ks-Deva").nllb == "kas_Deva"
    assert language_of("pa-Arab").nllb is None
    assert language_of("kas_Arab").name == "Kashmiri"


def test_table_covers_the_tokenizers_and_contradicts_itself_nowhere():
    codes = {language.m2m100 for language in languages()} - {None}
    assert codes == set(M2M["m2m100"])
    known = {language_of(code).nllb for code in NLLB}
    assert known == set(NLLB)
    seen = {}
    for language in languages():
        keys = {language.alpha2, language.alpha3, language.m2m100, language.nllb, *language.aliases} - {None}
        for key in keys | {language.name}:
            assert seen.setdefault(key, language) is language, key
            assert language_of(key) is language


@pytest.mark.parametrize("text", ["Klingon", "", "xx", "sw-", "zz-Latn", None, 3])
def test_unknown_language(text):
    with pytest.raises(ArgumentError, match="language: expected an English name or a language code"):
        language_of(text)


def test_codes_for_tokenizers(tmp_path):
    m2m, nllb = m2m100_tokenizer(tmp_path), nllb_tokenizer()
    assert tokenizer_source_language(m2m, "Swahili") == "sw"
    assert tokenizer_source_language(nllb, "Swahili") == "swh_Latn"
    assert tokenizer_source_language(nllb, "Telugu") == "tel_Telu"
    assert tokenizer_source_language(byte_tokenizer(), "no such language") is None
    with pytest.raises(ArgumentError, match="M2M100 tokenizer marks, got Telugu .the model was not trained on it"):
        tokenizer_source_language(m2m, "Telugu")
    with pytest.raises(ArgumentError, match="NLLB tokenizer marks, got Cornish"):
        tokenizer_source_language(nllb, "kw")


def test_tokenizer_that_lacks_a_code():
    from transformers import NllbTokenizer

    small = NllbTokenizer(vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, additional_special_tokens=["eng_Latn"])
    assert tokenizer_source_language(small, "en") == "eng_Latn"
    with pytest.raises(ArgumentError, match="this tokenizer lacks its code 'swh_Latn'"):
        tokenizer_source_language(small, "sw")


@pytest.mark.parametrize(
    "code, m2m100, nllb",
    [
        ("zh-MO", None, "zho_Hant"), ("zh-SG", "zh", "zho_Hans"), ("pa-PK", None, None), ("pa-IN", "pa", "pan_Guru"),
        ("sd-IN", None, None), ("sr-ME", None, None), ("sr-RS", "sr", "srp_Cyrl"), ("sr-Cyrl", "sr", "srp_Cyrl"),
        ("sr-Latn", None, None), ("zh_Hans", "zh", "zho_Hans"), ("uz-Latn", "uz", "uzn_Latn"), ("uz-AF", None, None),
        ("es-419", "es", "spa_Latn"), ("az-IR", None, None),
    ],
)  # fmt: skip
def test_a_country_or_a_script_of_its_own_gives_no_code_of_another_script(code, m2m100, nllb):
    language = language_of(code)
    assert (language.m2m100, language.nllb) == (m2m100, nllb)
