"""The analysis: measures everything on parallel text, then writes a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from layalign.data import Example
from layalign.data.languages import find_language
from layalign.evaluation.answering import evaluation_mode
from layalign.experiments.analysis import fusion, measure
from layalign.experiments.analysis.measure import UNTRAINED
from layalign.experiments.analysis.pairs import Pairs, read_pairs
from layalign.experiments.analysis.reading import Reader
from layalign.experiments.analysis.result import AnalysisResult
from layalign.experiments.progress import Phases
from layalign.modeling.configuration import number_of_layers
from layalign.training.gates import gate_values, read_gates
from layalign.utils import lock
from layalign.utils.errors import ArgumentError, refuse, whole_number

LIMIT = 200


def analyze(
    model: Any,
    encoder_tokenizer: Any,
    llm_tokenizer: Any,
    pairs: Pairs,
    output_dir: str | Path | None = None,
    *,
    languages: Sequence[str] | None = None,
    limit: int | None = LIMIT,
    batch_size: int = 8,
    max_length: int = 256,
    before: Any = None,
    layer: int | None = None,
    sentence: int = 1,
    sentence_language: str | None = None,
    generate: int = 0,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AnalysisResult:
    """Measure what the aligner, the gates and the LLM's hidden states of a model do on parallel text.

    Args:
        model: a `LayAlignForCausalLM`, with or without an aligner.
        encoder_tokenizer, llm_tokenizer: its tokenizers.
        pairs: files of lines `source<TAB>english`; see :func:`layalign.experiments.analysis.read_pairs`.
        output_dir: folder for `report.html`, `analysis.json` and the plots as PNG; None writes nothing.
        languages: names or codes of the languages to use; None is all.
        limit: maximum number of sentences per language; None is all.
        batch_size: sentences per batch.
        max_length: maximum length of a sentence in tokens; reduced if the model has too few positions.
        before: a second LayAlign model with the same tokenizers to compare with, or "untrained" for this model with new
            weights. The LLM alone is always compared with.
        layer: hidden state for PCA and t-SNE, 0 being the embeddings; None is the middle one.
        sentence: number, from 1, of the sentence whose attention is shown.
        sentence_language: its language; None is the first.
        generate: show the attention of a generated answer of at most so many tokens; 0 shows that of the English
            translation.
        checkpoint: the model's folder, for the gates over training.
        seed: seed of t-SNE, of the shuffled pairs and of untrained weights.
        progress: show a progress bar.

    Returns:
        All measurements.

    Raises:
        ArgumentError: an argument is invalid, or another run is writing into `output_dir`.
        DataError: a file of `pairs` has a malformed line.
    """
    _check(model, before, batch_size, max_length, generate)
    whole_number("seed", seed, least=0)
    for name, path in (("output_dir", output_dir), ("checkpoint", checkpoint)):
        if not isinstance(path, str | Path | None):
            refuse(name, "a folder or None", path)
    place = _layer(model, layer)
    data = read_pairs(pairs, languages=languages, limit=limit)
    example = _example(data, sentence, sentence_language)
    other = before if before is not None and before != UNTRAINED else model
    phases, amount = Phases(shown=progress), _amount(model, data, before)
    with nullcontext() if output_dir is None else lock.held(output_dir):
        similarity, projections = {}, {}
        with evaluation_mode(model), evaluation_mode(other), phases.counting("reading", amount) as advance:
            reader = Reader(model, encoder_tokenizer, llm_tokenizer, batch_size, max_length, advance)
            for name, read, held in measure.views(reader, before, seed):
                with held:
                    similarity[name], projections[name] = measure.read_view(read, data, place, seed)
            contribution = measure.contributions(reader, data)
            attention = measure.attention(reader, example, generate)
        mix = fusion.mix_weights(model)
        result = AnalysisResult(
            sentences={name: len(found) for name, found in data.items()},
            settings=_settings(model, reader, before, seed, checkpoint),
            language_layers=list(model.config.language_layers),
            encoder_layers=list(model.config.encoder_layers),
            mix=None if mix is None else {"keys": mix[0].tolist(), "values": mix[1].tolist()},
            gates=gate_values(model) or None,
            gate_history=_history(model, checkpoint),
            contribution=contribution,
            similarity=similarity,
            layer=place,
            projections=projections,
            attention=attention,
        )
        if output_dir is not None:
            from layalign.experiments.analysis.report import write_report

            write_report(result, Path(output_dir))
            result.output_dir = Path(output_dir)
        return result


def _check(model: Any, before: Any, batch_size: int, max_length: int, generate: int) -> None:
    if not hasattr(model, "cross_attention") or not hasattr(getattr(model, "config", None), "language_layers"):
        raise ArgumentError(f"model: expected a LayAlign model, got {type(model).__name__}")
    for name, number, least in (
        ("batch_size", batch_size, 1),
        ("max_length", max_length, 1),
        ("generate", generate, 0),
    ):
        if whole_number(name, number) < least:
            raise ArgumentError(f"{name}: expected a number >= {least}, got {number}")
    if before is None or (isinstance(before, str) and before == UNTRAINED):
        return
    if isinstance(before, str) or not hasattr(before, "cross_attention"):
        found = repr(before) if isinstance(before, str) else type(before).__name__
        raise ArgumentError(f"before: expected 'untrained' or a LayAlign model, got {found}")
    for part in ("encoder", "llm"):
        sizes = [getattr(one.config, f"{part}_config").get_text_config().vocab_size for one in (model, before)]
        if sizes[0] != sizes[1]:
            raise ArgumentError(f"before: expected the {part} vocabulary of the model, {sizes[0]}, got {sizes[1]}")
    depths = [number_of_layers(one.config.get_text_config()) for one in (model, before)]
    if depths[0] != depths[1]:
        raise ArgumentError(f"before: expected an LLM of {depths[0]} layers like the model's, got {depths[1]}")


def _layer(model: Any, layer: int | None) -> int:
    last = number_of_layers(model.config.get_text_config())
    if layer is not None and not 0 <= whole_number("layer", layer) <= last:
        raise ArgumentError(f"layer: expected 0 (embeddings) to {last}, got {layer}")
    return (last + 1) // 2 if layer is None else layer


def _example(data: dict[str, list[Example]], sentence: int, language: str | None) -> Example:
    if not isinstance(language, str | None):
        refuse("sentence_language", f"one of {', '.join(data)}", language)
    found = None if language is None else find_language(language)
    name = next(iter(data)) if language is None else (found.name if found else language)
    if name not in data:
        raise ArgumentError(f"sentence_language: expected one of {', '.join(data)}, got {language!r}")
    if not 1 <= whole_number("sentence", sentence) <= len(data[name]):
        raise ArgumentError(f"sentence: expected 1 to {len(data[name])}, the sentences of {name}, got {sentence}")
    return data[name][sentence - 1]


def _history(model: Any, checkpoint: str | Path | None) -> list[dict[str, Any]] | None:
    """The recorded gates of the checkpoint's folder, without entries for another number of layers."""
    found = [] if checkpoint is None else read_gates(checkpoint)
    return [entry for entry in found if len(entry["gates"]) == len(model.cross_attention)] or None


def _settings(model: Any, reader: Reader, before: Any, seed: int, checkpoint: str | Path | None) -> dict[str, Any]:
    config = model.config
    return {
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "encoder": config.encoder_name_or_path,
        "llm": config.llm_name_or_path,
        "structure": config.structure,
        "mix": getattr(config, "mix", "layer-wise"),
        "adapter": model.mapping is not None,
        "lora": config.lora is not None,
        "llm_layers": number_of_layers(config.get_text_config()),
        "before": before if before is None or isinstance(before, str) else "another checkpoint",
        "max_length": reader.max_length,
        "cut": dict(Counter(kind for kind, _ in sorted(reader.cut))),
        "seed": seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _amount(model: Any, data: dict[str, list[Example]], before: Any) -> int:
    """Number of sentences to read in total."""
    sources = sum(len(rows) for rows in data.values())
    with_aligner = sources + 1 if model.encoder_aligner is not None else 0
    return (2 if before is None else 3) * (sources + len(measure.english_of(data))) + with_aligner
