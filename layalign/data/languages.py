"""Language names and codes, and the source-language code that an encoder's tokenizer wants.

`languages.csv` has every language of M2M100 (100) and of NLLB-200, and those of the public pair collections that are
often used for the translation stage. Where one code names a group of languages (sw, zh, ar, ne, ...), its usual member
is in the same row, so that "swa" and "swh" are both Swahili. An empty field means that there is no such code.

Source: the ISO 639 tables; the lists of codes in transformers' M2M100 and NLLB tokenizers; the Unicode CLDR for the
decimal commas; for the classes see `layalign.evaluation.levels`. "Flemish" and not "Dutch" is the name that the
published LayAlign code uses for nl.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from layalign.utils.errors import ArgumentError, refuse

# Scripts that NLLB knows besides the one in the table.
_NLLB_OTHER_SCRIPTS = ("ace_Arab", "bjn_Arab", "kas_Deva", "knc_Arab", "taq_Tfng", "zho_Hant")
# Where a language is written in another script than the one in the table.
_REGION_SCRIPTS = {
    "zh-TW": "zh-Hant", "zh-HK": "zh-Hant", "zh-MO": "zh-Hant", "zho-TW": "zh-Hant", "zho-HK": "zh-Hant",
    "zho-MO": "zh-Hant", "pa-PK": "pa-Arab", "sd-IN": "sd-Deva", "uz-AF": "uz-Arab", "az-IR": "az-Arab",
    "kk-CN": "kk-Arab", "ky-CN": "ky-Arab", "mn-CN": "mn-Mong", "ug-KZ": "ug-Cyrl", "sr-ME": "sr-Latn",
    "ku-IQ": "ku-Arab", "ku-IR": "ku-Arab", "tg-PK": "tg-Arab",
}  # fmt: skip
_M2M_TOKENIZERS = {"M2M100Tokenizer"}
_NLLB_TOKENIZERS = {"NllbTokenizer", "NllbTokenizerFast"}


@dataclass(frozen=True)
class Language:
    """One language. A code is None where the language has none.

    Attributes:
        name: English name, as the published code spells it ("Flemish" for nl).
        alpha2: ISO 639-1 code.
        alpha3: ISO 639-3 code (639-2 for the few groups that have no other).
        m2m100: code of the M2M100 tokenizer.
        nllb: code of the NLLB-200 tokenizer.
        aliases: other names and codes that `language_of` takes.
        resource_class: class of Joshi et al. (2020), from 0 (no data) to 5; None where their list lacks the language.
        decimal_comma: by what a language that writes a decimal comma parts its thousands, "points" or "spaces".
    """

    name: str
    alpha2: str | None
    alpha3: str
    m2m100: str | None
    nllb: str | None
    aliases: tuple[str, ...] = ()
    resource_class: int | None = None
    decimal_comma: str | None = None


@lru_cache(maxsize=1)
def _index() -> tuple[dict[str, Language], dict[str, Language]]:
    """Languages by exact key and by lower-case key. Exact wins: "ga" is Irish, "Ga" is Ga."""
    exact: dict[str, Language] = {}
    folded: dict[str, Language] = {}
    for language in languages():
        for key in (language.name, language.alpha2, language.alpha3, language.m2m100, language.nllb, *language.aliases):
            if key:
                exact.setdefault(key, language)
    for key, language in exact.items():
        folded.setdefault(key.casefold(), language)
    return exact, folded


@lru_cache(maxsize=1)
def languages() -> tuple[Language, ...]:
    """Every language of the table, by name."""
    lines = (resources.files("layalign.data") / "languages.csv").read_text(encoding="utf-8").splitlines()
    found = []
    for name, alpha2, alpha3, m2m100, nllb, number, comma, aliases in csv.reader(lines[1:]):
        names = tuple(aliases.split("; ")) if aliases else ()
        codes = alpha2 or None, alpha3, m2m100 or None, nllb or None
        found.append(Language(name, *codes, names, int(number) if number else None, comma or None))
    return tuple(found)


def _variant(text: str) -> Language | None:
    """A language in another script or country: "pa-Arab", "Punjabi (Arab)", "de-AT"."""
    text = _REGION_SCRIPTS.get(text.replace("_", "-"), text)
    match = re.fullmatch(r"(.+?)(?:[-_]| \()([A-Z][a-z]{3}|[A-Z]{2}|\d{3})\)?", text)
    base = _lookup(match[1]) if match else None
    if match is None or base is None or len(match[2]) < 4:
        return base
    script = match[2]
    codes = [code for code in (base.nllb, *_NLLB_OTHER_SCRIPTS) if code]
    members = {base.alpha3, *base.aliases, base.nllb.split("_")[0] if base.nllb else base.alpha3}
    nllb = next((code for code in codes if code.split("_")[0] in members and code.endswith("_" + script)), None)
    # M2M100 has one code for a language, whose script is the one that NLLB has in the table.
    m2m100 = base.m2m100 if nllb is not None and nllb == base.nllb else None
    return Language(f"{base.name} ({script})", None, base.alpha3, m2m100, nllb, (), base.resource_class)


def _lookup(text: str) -> Language | None:
    exact, folded = _index()
    return exact.get(text) or folded.get(text.casefold())


@lru_cache(maxsize=4096)
def find_language(text: str) -> Language | None:
    """Like `language_of`, but None for a text that names no known language."""
    text = text.strip()
    return _lookup(text) or _variant(text)


def language_of(text: str | Language) -> Language:
    """The language that a name or code stands for.

    Args:
        text: an English name ("Swahili", "Dutch"), an ISO 639-1 or 639-3 code ("sw", "swh"), an M2M100 or NLLB code
            ("ns", "swh_Latn"), or a code with script or country ("pa-Arab", "zh-TW"). A `Language` is returned as is.

    Raises:
        ArgumentError: no such language in the table.
    """
    if isinstance(text, Language):
        return text
    language = find_language(text) if isinstance(text, str) else None
    if language is None:
        refuse("language", "an English name or a language code such as 'Swahili', 'sw' or 'swh'", text)
    return language


def tokenizer_source_language(tokenizer: Any, language: str | Language) -> str | None:
    """The code to put into `tokenizer.src_lang` for a source text, or None where the tokenizer wants none.

    Args:
        tokenizer: any tokenizer. Those of M2M100 and NLLB (by class name) mark the language of a text with a token.
        language: anything `language_of` takes; not looked at for other tokenizers.

    Raises:
        ArgumentError: the tokenizer marks languages and does not know this one.
    """
    kinds = {kind.__name__ for kind in type(tokenizer).__mro__}
    if kinds & _M2M_TOKENIZERS:
        found = language_of(language)
        code, family = found.m2m100, "M2M100"
        known = code in tokenizer.lang_code_to_token
    elif kinds & _NLLB_TOKENIZERS:
        found = language_of(language)
        code, family = found.nllb, "NLLB"
        known = code is not None and tokenizer.convert_tokens_to_ids(code) not in (None, tokenizer.unk_token_id)
    else:
        return None
    if code is None or not known:
        why = "the model was not trained on it" if code is None else f"this tokenizer lacks its code {code!r}"
        raise ArgumentError(f"language: expected one that the {family} tokenizer marks, got {found.name} ({why})")
    return code
