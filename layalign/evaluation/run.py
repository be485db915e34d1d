"""Evaluation: generate an answer to every test question, read it, count; or measure translations and likelihoods.

Scores are those of the published code: the last number within 0.001 for math, the whole answer equal to the label
otherwise. What is generated does not depend on the order: batches are sorted by length, results come in file order.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from layalign.data.collator import LayAlignCollator
from layalign.data.examples import Example
from layalign.data.readers import Spec, by_language
from layalign.evaluation.answering import (
    ModelAnswers,
    evaluation_mode,
    model_fingerprint,
    settings_fingerprint,
)
from layalign.evaluation.config import EvalConfig
from layalign.evaluation.likelihood import LABELS, Likelihoods, longest_first
from layalign.evaluation.measures import check_measures, require_groups
from layalign.evaluation.result import EvaluationResult
from layalign.evaluation.scoring import LIKELIHOODS, Translated, score, score_translations, scoring_of, sentences_of
from layalign.evaluation.store import OutputStore
from layalign.evaluation.tasks import Task, find_task, read_examples
from layalign.evaluation.translation import METRICS, metric_of
from layalign.modeling.tokenization import tokenizers_hash
from layalign.utils.errors import ArgumentError, NonFiniteError, refuse, shown
from layalign.utils.files import write_whole
from layalign.utils.processes import Processes

logger = logging.getLogger(__name__)

Answers = Callable[[Sequence[Example]], Sequence[str | None]]


def evaluate(
    model: Any,
    encoder_tokenizer: Any,
    llm_tokenizer: Any,
    task: str | Path,
    data: Spec | Sequence[Example] | Any,
    output_dir: str | Path,
    config: EvalConfig | None = None,
    **changes: Any,
) -> EvaluationResult:
    """Evaluate a model, or anything that answers, on a task in every language.

    With a process group (torch.distributed) all its processes call this and share the questions; the files and the
    result are those of one process.

    Args:
        model: a `LayAlignForCausalLM`, an object with the same `generate` and ids in its `config`, or a function from
            a list of examples to their answers (see `llm_alone`), None for an answer that failed. Likelihoods are
            measured of a `LayAlignForCausalLM` and of what `llm_alone` returns.
        encoder_tokenizer, llm_tokenizer: the model's tokenizers; None for a function.
        task: one of `TASKS`, which `register_task` adds to; or a Python file (".py") that registers one, which is run.
        data: what to read (a folder, a file, or any spec of `layalign.data.readers`), or the examples themselves. A
            task with its own reader gets whatever stands here, unless it is examples.
        output_dir: gets `predictions/<language>.json`, `scores.json` and `scores.tsv`; and, while it runs,
            `predictions/<language>.jsonl` and `settings.json`, from which a rerun goes on.
        config: how to ask, judge and measure; None is `EvalConfig()`.
        **changes: fields of `EvalConfig`, in place of those of `config`.

    Raises:
        NonFiniteError: logits were not finite; the text names the example. The answers before it are kept.
        ArgumentError: an argument is none of those expected, `output_dir` holds the outputs of another run, or another
            run writes into it. Or the scorer of a task raises, or says neither True nor False.
        DataError: no data, or a malformed line.
        BackendError: sacrebleu is not installed, which chrF and BLEU need.
    """
    if not isinstance(config, EvalConfig | None):
        refuse("config", "an EvalConfig or None", config)
    config = (config or EvalConfig()).changed(changes)
    if not isinstance(output_dir, str | Path) or not str(output_dir).isprintable():
        refuse("output_dir", "a folder", output_dir)
    name, kind = find_task(task)
    given = {key: getattr(config, key) for key in ("scorer", "stage", "max_new_tokens")}
    kind = replace(kind, **{key: value for key, value in given.items() if value is not None})
    measures = _measures(kind, config.measures)
    generates = not measures or not set(METRICS).isdisjoint(measures)
    by_likelihood = [measure for measure in measures if measure not in METRICS]
    processes = Processes()
    # One process reads for all: a reader from outside might give each another order.
    read = functools.partial(read_examples, name, kind, data, config.languages, config.limit, config.skip_bad)
    examples, report = processes.all_get(read)
    groups = by_language(examples)
    require_groups(measures, {language: len(group) for language, group in groups.items()})
    answer, likelihoods = _answerers(model, encoder_tokenizer, llm_tokenizer, kind, config, by_likelihood)
    settings = {"task": name, **_settings(model, encoder_tokenizer, llm_tokenizer, kind, config)}
    result = EvaluationResult(name, {}, report, Path(output_dir))
    translations: dict[str, Translated] = {}
    with (
        processes.all_held(output_dir),
        evaluation_mode(model),
        torch.no_grad(),
        _bar(config.progress and processes.main, len(examples) * (generates + len(by_likelihood))) as advance,
    ):
        store = processes.all_get(lambda: OutputStore(Path(output_dir), settings, config.resume))
        asking = _Asking(answer, likelihoods, config, store, processes, advance)
        for language, group in groups.items():
            done = processes.all_get(functools.partial(store.begin, language, group))
            outputs = asking.outputs(language, group, done) if generates else [None] * len(group)
            for measure in by_likelihood:
                asking.measure(measure, language, group)
            if kind.scorer == "translation":
                translate = functools.partial(score_translations, store, language, group, outputs, measures)
                translations[language] = processes.all_get(translate)
                result.failed += generates * outputs.count(None)
            else:
                judge = functools.partial(score, name, kind, config.label_match, store, language, group, outputs)
                result.scores[language], result.outcomes[language] = processes.all_get(judge)
        result.scoring = scoring_of(kind, config.label_match)
        if translations:
            result.scoring = {"scorer": "translation", **next(iter(translations.values())).signatures}
            result.measures = {measure: sentences_of(translations, measure).scores(name) for measure in measures}
        result.cut = processes.all_get(store.count_cut)
        processes.all_get(lambda: _write(result, store.folder))
    if processes.main and any(result.cut.values()):
        said = ", ".join(f"{count} of {what}" for what, count in result.cut.items() if count)
        logger.warning("cut, of %d questions: %s", len(examples), said)
    return result


def _measures(kind: Task, measures: Any) -> tuple[str, ...]:
    """What is measured beside right answers: of translation the measures, of labels their likelihoods."""
    if kind.scorer == "translation":
        names = check_measures(measures)
        for name in names:
            if name in METRICS:
                metric_of(name)  # raises now where sacrebleu is missing
        return names
    if measures is not None:
        refuse("measures", f"none for the scorer {kind.scorer}", measures)
    return (LABELS,) if kind.scorer in LIKELIHOODS else ()


def _answerers(
    model: Any, encoder_tokenizer: Any, llm_tokenizer: Any, task: Task, config: EvalConfig, measures: Sequence[str]
) -> tuple[Answers, Likelihoods | None]:
    """Who answers the questions, and who gives likelihoods where some are measured."""
    if hasattr(model, "generate"):
        collator = functools.partial(
            LayAlignCollator.from_model, model, encoder_tokenizer, llm_tokenizer, stage=task.stage,
            max_source_length=config.max_source_length, max_prompt_length=config.max_prompt_length,
        )  # fmt: skip
        answers = ModelAnswers(model, collator(with_targets=False), task.max_new_tokens, config.generation)
        return answers, Likelihoods(model, collator(), config.batch_size) if measures else None
    if not callable(model) or isinstance(model, type):
        raise ArgumentError(f"model: expected something with generate, or a function, got {type(model).__name__}")
    if not measures:
        return model, None
    if hasattr(model, "llm") and hasattr(model, "collator"):
        return model, Likelihoods(model.llm, model.collator, config.batch_size)
    found = getattr(model, "__qualname__", type(model).__name__)
    raise ArgumentError(f"model: expected a LayAlign model or llm_alone(...) for {measures[0]}, got {found}")


def _settings(model: Any, encoder_tokenizer: Any, llm_tokenizer: Any, task: Task, config: EvalConfig) -> dict[str, Any]:
    """What decides the outputs, besides the task's name and the questions; a rerun with other ones is refused."""
    settings = {
        "stage": task.stage,
        "max_new_tokens": task.max_new_tokens,
        "max_source_length": config.max_source_length,
        "max_prompt_length": config.max_prompt_length,
        "generation": {key: repr(value) for key, value in sorted((config.generation or {}).items())},
        "model": config.model_name or model_fingerprint(model),
        # Only where padding is attended do outputs depend on the batch.
        "batch_size": None
        if getattr(getattr(model, "config", None), "mask_encoder_padding", True)
        else config.batch_size,
    }
    if hasattr(model, "generate"):
        settings["tokenizers"] = tokenizers_hash(encoder_tokenizer, llm_tokenizer)[:16]
        settings["model_settings"] = settings_fingerprint(model)
    return settings


def _write(result: EvaluationResult, folder: Path) -> None:
    write_whole(
        folder / "scores.json", json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_whole(folder / "scores.tsv", result.to_tsv())


class _Asking:
    """Gets what is not in the store yet, batch by batch; the main process keeps each batch before the next."""

    def __init__(
        self,
        answer: Answers,
        likelihoods: Likelihoods | None,
        config: EvalConfig,
        store: OutputStore,
        processes: Processes,
        advance: Callable[[str, int], None],
    ) -> None:
        self.answer, self.likelihoods, self.config = answer, likelihoods, config
        self.store, self.processes, self.advance = store, processes, advance

    def outputs(self, language: str, examples: Sequence[Example], done: Mapping[int, str | None]) -> list[str | None]:
        """An answer to every example, in their order, None for one that failed. `done` are those that are there."""
        keep_failed = self.config.non_finite == "fail"
        found = {i: text for i, text in done.items() if keep_failed or text is not None}
        self.advance(language, len(found))
        rest = [i for i in range(len(examples)) if i not in found]
        lengths = [len(examples[i].source) + len(examples[i].prompt) for i in rest]
        batches = [[rest[i] for i in own] for own in longest_first(lengths, self.config.batch_size)]
        for gathered in self._in_rounds(batches, lambda own: self._answered(own, examples)):
            failed = [] if keep_failed else sorted(i for i, (text, _) in gathered.items() if text is None)
            new = {i: text for i, (text, _) in gathered.items() if i not in failed}
            cut = {i: gathered[i][1] for i in new}
            self.processes.all_get(functools.partial(self.store.append, language, new, cut))
            found.update(new)
            self.advance(language, len(new))
            if failed:
                _refuse_failed(language, examples, failed, "; non_finite='fail' counts such answers as wrong")
        return [found[i] for i in range(len(examples))]

    def _answered(self, own: Sequence[int], examples: Sequence[Example]) -> dict[int, tuple[str | None, Sequence[str]]]:
        """(answer, what was cut) of a batch, by the examples' numbers."""
        texts = list(self.answer([examples[i] for i in own]))
        if len(texts) != len(own) or not all(isinstance(text, str | None) for text in texts):
            raise ArgumentError(f"model: expected {len(own)} texts, one per example, got {len(texts)}")
        # Half of a surrogate pair cannot stand in a file.
        texts = [text and text.encode("utf-8", errors="replace").decode("utf-8") for text in texts]
        # Whoever answers may say what was cut.
        cut = dict(zip(own, getattr(self.answer, "last_cut", ()), strict=False))
        return {i: (text, cut.get(i, ())) for i, text in zip(own, texts, strict=True)}

    def measure(self, name: str, language: str, examples: Sequence[Example]) -> None:
        """Put into the store what is measured of every example by likelihood."""
        assert self.likelihoods is not None
        done = self.processes.all_get(lambda: set(self.store.values[language].get(name, {})))
        self.advance(language, len(done))
        units = self.likelihoods.units(name, examples, done)
        for gathered in self._in_rounds(units, functools.partial(self.likelihoods, name, examples)):
            good = {i: values for i, values in gathered.items() if all(map(isfinite, values))}
            self.processes.all_get(functools.partial(self.store.append_values, language, name, good))
            self.advance(language, len(good))
            if len(good) < len(gathered):
                _refuse_failed(language, examples, sorted(set(gathered) - set(good)), "")

    def _in_rounds(
        self, units: Sequence[Sequence[int]], work: Callable[[Sequence[int]], dict[int, Any]]
    ) -> Iterator[dict[int, Any]]:
        """What `work` gives for the units of each round; every process works on one of them."""
        rank = self.processes.rank
        for together in self.processes.deal(units):
            # Without one of its own a process works on the first one too: the weights may be spread over all of them.
            found = self.processes.all_gather(work(together[rank if rank < len(together) else 0]))
            yield {i: value for part in found[: len(together)] for i, value in part.items()}


def _refuse_failed(language: str, examples: Sequence[Example], failed: Sequence[int], hint: str) -> None:
    example, others = examples[failed[0]], f" and {len(failed) - 1} more" if failed[1:] else ""
    raise NonFiniteError(
        f"model: expected finite logits, got NaN or infinity for {language} example {failed[0] + 1} of "
        f"{len(examples)} (id {example.id!r}, {shown(example.source)}){others}{hint}"
    )


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[str, int], None]]:
    """A function that advances a progress bar, or does nothing."""
    if not shown:
        yield lambda language, count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda language, count: bar.update(task, advance=count, description=language)
