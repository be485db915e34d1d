"""Results of an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layalign.experiments.pages import terminal_table

METRICS = {
    "cosine": "centred cosine",
    "cka": "linear CKA",
    "to_english": "retrieval X -> English",
    "from_english": "retrieval English -> X",
}


@dataclass(frozen=True)
class Similarity:
    """X and English, per hidden state of the LLM (0 is the embeddings): lists of layers + 1 numbers.

    Attributes:
        cosine: :func:`layalign.experiments.analysis.centred_cosine`.
        cka: :func:`layalign.experiments.analysis.linear_cka`.
        to_english, from_english: :func:`layalign.experiments.analysis.retrieval_accuracy` in both directions; chance is
            1 / N.
        shuffled_cka: linear CKA of sentences paired at random, which is its value without alignment.
    """

    cosine: list[float]
    cka: list[float]
    to_english: list[float]
    from_english: list[float]
    shuffled_cka: list[float]


@dataclass(frozen=True)
class Projection:
    """One view's sentence vectors of one layer in two dimensions.

    Attributes:
        pca, tsne: per language (and English) its N points (x, y).
        explained: share of the variance on each of the two PCA axes.
        perplexity: perplexity of the t-SNE.
    """

    pca: dict[str, list[list[float]]]
    tsne: dict[str, list[list[float]]]
    explained: list[float]
    perplexity: float


@dataclass(frozen=True)
class AttentionMap:
    """Attention from the LLM's tokens to one sentence's source tokens.

    Attributes:
        language, source: the sentence and its language.
        answer: the text that the LLM reads after it.
        generated: whether the LLM generated that text.
        rows, columns: T labels of LLM tokens, S labels of source tokens.
        weights: (L, T, S), mean over heads; rows sum to 1.
    """

    language: str
    source: str
    answer: str
    generated: bool
    rows: list[str]
    columns: list[str]
    weights: list[list[list[float]]]


@dataclass
class AnalysisResult:
    """All measurements.

    Attributes:
        sentences: number of sentences per language.
        settings: the model's settings and those of the analysis.
        language_layers: the L LLM layers that attend to the source, in the order of the numbers below.
        encoder_layers: the E encoder layers that are mixed, in the order of the numbers below.
        mix: weights (L, E) under "keys" and "values"; None without an aligner.
        gates: L numbers; None without an aligner.
        gate_history: {"step", "gates"} of each logged training step; None if the checkpoint has no such record.
        contribution: L mean contribution norms under "mean" and under each language; None without an aligner.
        similarity: by view ("LLM alone", "LayAlign", ...) and language.
        layer: the hidden state that the projections show.
        projections: by view.
        attention: the maps of one sentence; None without an aligner.
        output_dir: where the report was written, or None.
    """

    sentences: dict[str, int]
    settings: dict[str, Any]
    language_layers: list[int]
    encoder_layers: list[int]
    mix: dict[str, list[list[float]]] | None
    gates: list[float] | None
    gate_history: list[dict[str, Any]] | None
    contribution: dict[str, list[float]] | None
    similarity: dict[str, dict[str, Similarity]]
    layer: int
    projections: dict[str, Projection]
    attention: AttentionMap | None
    output_dir: Path | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, numbers rounded to six decimals."""
        found = asdict(self)
        del found["output_dir"]
        return _rounded(found)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnalysisResult:
        """The inverse of `to_dict`; "attention" may be missing."""
        made = dict(values)
        made["similarity"] = {
            view: {language: Similarity(**each) for language, each in found.items()}
            for view, found in values["similarity"].items()
        }
        made["projections"] = {view: Projection(**found) for view, found in values["projections"].items()}
        shown = values.get("attention")
        made["attention"] = None if shown is None else AttentionMap(**shown)
        return cls(**made)

    def averages(self, view: str, metric: str) -> list[float]:
        """A metric of `METRICS` per layer, averaged over the languages."""
        rows = [getattr(found, metric) for found in self.similarity[view].values()]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def table(self) -> Any:
        """A `rich` table for the terminal: similarity to English at the chosen layer, by language and view."""
        views = list(self.similarity)
        title = f"X and English in hidden state {self.layer} of the LLM: {' / '.join(views)}"
        rows = [["language", *METRICS.values()]]
        for language in self.sentences:
            cells = []
            for metric in METRICS:
                numbers = [getattr(self.similarity[view][language], metric)[self.layer] for view in views]
                cells.append(" / ".join(f"{number:.2f}" for number in numbers))
            rows.append([language, *cells])
        return terminal_table(title, rows)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
