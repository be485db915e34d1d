"""Languages, prompts, readers and the collator: text in, padded batches out."""

from layalign.data.collator import LayAlignCollator
from layalign.data.examples import Example, ReadReport, SkippedLine
from layalign.data.languages import Language, language_of, languages, tokenizer_source_language
from layalign.data.readers import FORMATS, by_language, load_examples

__all__ = [
    "FORMATS",
    "Example",
    "Language",
    "LayAlignCollator",
    "ReadReport",
    "SkippedLine",
    "by_language",
    "language_of",
    "languages",
    "load_examples",
    "tokenizer_source_language",
]
