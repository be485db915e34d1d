"""A LayAlign model in EleutherAI's lm-evaluation-harness, under the name "layalign".

Importing this module makes the name known to `lm_eval`. The harness has no entry points for models of other packages,
so its own command does not find the name: `layalign lm-eval` is that command after this import, with the same
arguments. Needs `pip install 'layalign[lm-eval]'`.

Source: the rules of the harness's `HFLM` for splitting tokens, cutting on the left and stop strings.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from layalign.data.collator import STAGES, LayAlignCollator
from layalign.data.examples import Example
from layalign.data.languages import find_language, language_of, tokenizer_source_language
from layalign.evaluation.answering import _generate, evaluation_mode
from layalign.evaluation.likelihood import longest_first
from layalign.modeling.tokenization import encode_texts
from layalign.nn.inspection import device_of
from layalign.utils.errors import ArgumentError, NonFiniteError, one_of, shown

try:
    import lm_eval.models  # noqa: F401  # a registry that holds our name no longer loads the others by itself
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("lm_eval: not installed; pip install 'layalign[lm-eval]'") from error

logger = logging.getLogger(__name__)
SOURCES = ("context", "question")
DEFAULT_DEVICE = "cuda:0"  # given to every model where --device is not


@dataclass
class _Row:
    """One forward pass: what the encoder reads, what the LLM reads, and the continuations whose last token it scores.

    Requests that differ only in the last token of their continuation share a row.
    """

    source: list[int]
    tokens: list[int]
    continuations: list[tuple[int, list[int]]] = field(default_factory=list)  # number of the request, its tokens


@register_model("layalign")
class LayAlignLM(TemplateLM):
    """A LayAlign model that answers the harness's requests.

    The LLM gets [bos] [encoder tokens] [boundary] and the request's context; it scores or writes what follows. An empty
    context needs no prefix token: the first token follows the boundary.

    Args:
        checkpoint: folder or hub name of a trained model.
        model, encoder_tokenizer, llm_tokenizer: instead of a checkpoint, what was loaded.
        source: what the encoder reads. "context" is the whole context, as in LayAlign's XNLI, XCOPA and X-CSQA data;
            "question" is the text of the document's `source_field`, as in its math data.
        source_field: with "question": name of a field of the task's documents; several with "+" between are joined by
            line breaks.
        stage: "task" gives the LLM the context, "translation" only the encoder's tokens.
        language: of the sources, for encoders of the M2M100 and NLLB families: a name or code, or "task", the language
            code at the end of the task's name (xnli_sw).
        batch_size: requests per forward pass, or rows generated together.
        max_batch_size: the harness passes it; not used, for there is no automatic batch size.
        max_length: longest input of the LLM, encoder tokens included; None is the model's own.
        max_source_length: longest encoder input. A longer context loses its start, a longer question its end.
        max_gen_toks: longest answer where the task has no limit of its own.
        device, dtype: as for `layalign evaluate`.

    Raises:
        ArgumentError: an argument is none of those expected.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        model: Any = None,
        encoder_tokenizer: Any = None,
        llm_tokenizer: Any = None,
        source: str = "context",
        source_field: str | None = None,
        stage: str = "task",
        language: str = "task",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_source_length: int = 512,
        max_gen_toks: int = 256,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        super().__init__()
        if (checkpoint is None) == (model is None):
            raise ArgumentError("checkpoint: expected either a checkpoint or a model with its tokenizers")
        one_of("source", source, SOURCES)
        one_of("stage", stage, STAGES)
        if (source == "question") != (source_field is not None):
            raise ArgumentError(f"source_field: expected with source=question and only there, got {source_field!r}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ArgumentError(f"batch_size: expected a number >= 1 ('auto' is not offered), got {batch_size!r}")
        self.language = language if language == "task" else language_of(language).name
        if checkpoint is not None:
            from layalign.modeling.loading import load_model

            if device == DEFAULT_DEVICE and not torch.cuda.is_available():
                logger.warning("device: %s, the harness's default, is not here; the model runs on the CPU", device)
                device = None
            model, encoder_tokenizer, llm_tokenizer = load_model(checkpoint, device, dtype)
        self.model, self.tokenizer = model, llm_tokenizer
        self.source, self.source_field, self.stage = source, source_field, stage
        self.batch_size, self.max_gen_toks = int(batch_size), max_gen_toks
        self.collator = LayAlignCollator.from_model(
            model, encoder_tokenizer, llm_tokenizer, max_source_length=max_source_length, with_targets=False
        )
        config = model.config.get_text_config()
        self.max_length = int(max_length or getattr(config, "max_position_embeddings", None) or 2048)
        self._device = device_of(model.get_input_embeddings())
        self.cut: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        """The LLM's end-of-sequence token."""
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids without special tokens, also for a text that looks like one."""
        return encode_texts(self.tokenizer, [string])[0].ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy search would write it.

        Args:
            requests: `Instance`s with arguments (context, continuation).
            disable_tqdm: no progress bar.

        Raises:
            ArgumentError: a continuation has no token or does not fit, or a document lacks the source field.
            NonFiniteError: the logits of a document are NaN or infinite; the text names it.
        """
        pairs = []
        for context, continuation in (request.args for request in requests):
            split = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            pairs.append(((context, continuation), *split))
        with _naming(requests):
            return self._loglikelihood_tokens(pairs, disable_tqdm, self._sources(requests))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, sources: list[list[int]] | None = None, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """As `TemplateLM` has it; `sources` are the encoder's token ids, None reads the contexts."""
        if sources is None:
            sources = self._encode([("" if text is None else text[0], self._named("")) for text, _, _ in requests])
        if not self._reads_context:
            requests = [(text, [], continuation) for text, _, continuation in requests]
        return self._log_probabilities(requests, sources, disable_tqdm)

    def _log_probabilities(
        self, requests: Sequence[Any], sources: Sequence[list[int]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        rows: dict[tuple[tuple[int, ...], tuple[int, ...]], _Row] = {}
        for number, ((_, prompt, continuation), source) in enumerate(zip(requests, sources, strict=True)):
            if not continuation:
                raise ArgumentError("continuation: expected at least one token, got an empty text")
            if not prompt and self._room(source) == self.max_length:
                raise ArgumentError("context: expected a text, this model has neither a first token nor an adapter")
            # The last token is only scored, not read.
            tokens = self._cut(prompt + continuation[:-1], self._room(source), len(continuation) - 1)
            row = rows.setdefault((tuple(source), tuple(tokens)), _Row(source, tokens))
            row.continuations.append((number, continuation))
        found: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(list(rows.values()), "loglikelihood", disable_tqdm):
            for number, answer in self._score(batch):
                if isnan(answer[0]):
                    raise NonFiniteError(f"model: expected finite logits, got NaN for request {number}", [number])
                found[number] = answer
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows where it is longer than the LLM's input.

        The encoder reads nothing (its special tokens alone): it must not see what is to be predicted.

        Args:
            requests: `Instance`s with arguments (text,).
            disable_tqdm: no progress bar.

        Raises:
            NonFiniteError: as for `loglikelihood`.
        """
        sources = self._encode([("", self._named(request.task_name)) for request in requests])
        windows, owners = [], []
        for owner, (request, source) in enumerate(zip(requests, sources, strict=True)):
            self._cut([], self._room(source), 1)
            # The prefix (-1) stands for the boundary, which is in the input already.
            for pair in get_rolling_token_windows(self.tok_encode(request.args[0]), -1, self._room(source), 1):
                context, predicted = make_disjoint_window(pair)
                windows.append((None, [token for token in context if token >= 0], predicted))
                owners.append(owner)
        totals = [0.0] * len(requests)
        with _naming([requests[owner] for owner in owners]):
            answers = self._log_probabilities(windows, [sources[owner] for owner in owners], disable_tqdm)
        for owner, (value, _) in zip(owners, answers, strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, cut at the first stop string.

        Args:
            requests: `Instance`s with arguments (context, generation settings): until, max_gen_toks, do_sample,
                temperature and further arguments of `generate`. Greedy without do_sample or a temperature above 0.
            disable_tqdm: no progress bar.

        Raises:
            ArgumentError: sampling at temperature 0, or an answer of the length asked for does not fit.
            NonFiniteError: as for `loglikelihood`.
        """
        sources = self._sources(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=repr), []).append(number)
        found: dict[int, str] = {}
        for members in groups.values():
            until, longest, options = self._settings(requests[members[0]].args[1])
            rows = []
            for number in members:
                prompt = self.tok_encode(requests[number].args[0]) if self._reads_context else []
                room = self._room(sources[number]) - longest
                if room < 0:
                    raise ArgumentError(f"max_gen_toks: expected at most {longest + room} here, got {longest}")
                rows.append(_Row(sources[number], self._cut(prompt, room, 0), [(number, [])]))
            for batch in self._batches(rows, "generate_until", disable_tqdm):
                for row, text in zip(batch, self._write(batch, until, longest, options), strict=True):
                    number = row.continuations[0][0]
                    if text is None:
                        raise _not_finite(requests[number])
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [found[number] for number in range(len(requests))]

    @property
    def _reads_context(self) -> bool:
        # A model may have been made without a prompt beside the encoder's tokens.
        return self.stage == "task" and getattr(self.model.config, "use_prompt", True)

    def _sources(self, requests: Sequence[Any]) -> list[list[int]]:
        """The encoder's token ids for each request."""
        texts = []
        for request in requests:
            text = request.args[0]
            if self.source_field is not None:
                missing = [name for name in self.source_field.split("+") if name not in request.doc]
                if missing:
                    found = ", ".join(map(str, request.doc))
                    raise ArgumentError(f"source_field: expected fields among {found}, got {missing[0]!r}")
                text = "\n".join(str(request.doc[name]) for name in self.source_field.split("+"))
            texts.append((text, self._named(request.task_name)))
        return self._encode(texts)

    def _named(self, task: str | None) -> str:
        """The language of a task's sources; any will do where the encoder's tokenizer does not mark it."""
        if self.language != "task":
            return self.language
        if tokenizer_source_language(self.collator.encoder_tokenizer, "English") is None:
            return "English"
        parts = (task or "").split("_")
        found = find_language("_".join(parts[-2:])) or find_language(parts[-1])
        if found is None:
            raise ArgumentError(f"language: expected one for this encoder, the task {task!r} names none at its end")
        return found.name

    def _encode(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Encoder token ids of (text, language), equal ones encoded once."""
        tokenizer, limit = self.collator.encoder_tokenizer, self.collator.max_source_length
        known: dict[tuple[str, str], list[int]] = {}
        examples = []
        for text, language in dict.fromkeys(texts):
            if text or tokenizer("")["input_ids"]:
                examples.append(Example(text, "", language))
            elif tokenizer.eos_token_id is not None:
                known[text, language] = [tokenizer.eos_token_id]
            else:
                raise ArgumentError("context: expected a text, the encoder's tokenizer has no token for an empty one")
        rows = self.collator.encode_sources(examples, side="left" if self.source == "context" else "right")
        for example, row, cut in zip(examples, rows, self.collator.last_cut, strict=True):
            known[example.source, example.language] = row
            self._tell("source", bool(cut), f"max_source_length={limit}")
        return [known[text] for text in texts]

    def _room(self, source: list[int]) -> int:
        """How many tokens the LLM can read after a source."""
        config = self.model.config
        slots = len(source) + 1 if getattr(config, "use_adapter", True) else 0
        return self.max_length - (config.llm_bos_token_id is not None) - slots

    def _cut(self, tokens: list[int], room: int, needed: int) -> list[int]:
        """The last `room` tokens; `needed` of them must be there."""
        if room < needed or room < 0:
            found = f"{self.max_length - room} and {needed} for a length of {self.max_length}"
            raise ArgumentError(f"max_length: expected room for encoder tokens and what is scored, got {found}")
        self._tell("context", len(tokens) > room, f"max_length={self.max_length}")
        return tokens[max(0, len(tokens) - room) :]

    def _tell(self, what: str, cut: bool, limit: str) -> None:
        self.cut[what] += cut
        if cut and self.cut[what] == 1:
            logger.warning("a %s was cut to fit %s; said only once", what, limit)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: how many texts were cut, and answers that came to no end."""
        return {"cut": dict(self.cut)}

    def _batches(self, rows: list[_Row], what: str, quiet: bool) -> Iterator[list[_Row]]:
        with tqdm(total=len(rows), disable=quiet, desc=what) as bar:
            for own in longest_first([len(row.source) + len(row.tokens) for row in rows], self.batch_size):
                yield [rows[i] for i in own]
                bar.update(len(own))

    def _batch(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        sources = self.collator.padded_sources([row.source for row in rows])
        packed = self.model.build_inputs(sources["encoder_attention_mask"], [row.tokens for row in rows])
        return {name: tensor.to(self._device) for name, tensor in {**packed, **sources}.items()}

    def _score(self, rows: Sequence[_Row]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(number of the request, (log-probability, whether greedy)) for every continuation of some rows."""
        keep = max(len(tokens) for row in rows for _, tokens in row.continuations)
        with evaluation_mode(self.model), torch.no_grad():
            logits = self.model(**self._batch(rows), logits_to_keep=keep, use_cache=False).logits  # (B, keep, V)
        # Padding is on the left: the last position of every row predicts the last token of its continuations.
        scores = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
        greedy = scores.argmax(dim=-1)
        for i, row in enumerate(rows):
            for number, tokens in row.continuations:
                wanted = torch.tensor(tokens, device=scores.device)
                own = scores[i, -len(tokens) :].gather(1, wanted[:, None])
                yield number, (float(own.sum()), bool((greedy[i, -len(tokens) :] == wanted).all()))

    def _settings(self, given: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """(stop strings, longest answer, arguments of `generate`)."""
        options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until, longest = [text for text in options.pop("until") if text], options.pop("max_gen_toks")
        if not options["do_sample"]:
            # They say nothing about greedy search, and transformers warns of them.
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        elif options.get("temperature", 1.0) <= 0:
            raise ArgumentError(f"temperature: expected > 0 with do_sample, got {options['temperature']}")
        return until, longest, options

    def _write(self, rows: Sequence[_Row], until: list[str], longest: int, options: dict[str, Any]) -> list[str | None]:
        with evaluation_mode(self.model), torch.no_grad():
            answers = _generate(self.model, self.tokenizer, self._batch(rows), longest, options, until=until)
        self.cut["answer"] += sum(not answer.ended for answer in answers)
        return [text and postprocess_generated_text(text, until, None) for text, _, _ in answers]


@contextmanager
def _naming(requests: Sequence[Any]) -> Iterator[None]:
    """Add the document to an error about logits that are not finite."""
    try:
        yield
    except NonFiniteError as error:
        raise _not_finite(requests[error.rows[0]]) from None


def _not_finite(request: Any) -> NonFiniteError:
    return NonFiniteError(
        f"model: expected finite logits, got NaN or infinity for document {request.doc_id} of {request.task_name} "
        f"({shown(request.args[0])})"
    )


def main(arguments: Sequence[str]) -> None:
    """The harness's own command, with this model in its registry.

    Args:
        arguments: as for `lm_eval`.
    """
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
