"""`layalign generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layalign.cli.common import Checkpoint, Device, Dtype

if TYPE_CHECKING:
    from layalign.data import Example, LayAlignCollator


def generate(
    checkpoint: Checkpoint,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", "-s", help="Text for the encoder; may be repeated. Default: each line of stdin."),
    ] = None,
    language: Annotated[
        str, typer.Option("--language", "-l", help="Language of the source, as a name or code (M2M and NLLB need it).")
    ] = "English",
    prompt: Annotated[
        str | None,
        typer.Option(help="Text for the LLM, after the soft tokens; {source} is replaced by the source."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Prompt to use: math (the published one) or source (the source itself).")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they are generated.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 256,
    num_beams: Annotated[int, typer.Option(min=1, help="Beam search with this many beams.")] = 1,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample tokens instead of taking the most likely one.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=1e-6, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="With --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="With --sample; 0 is no limit.")] = 0,
    num_return_sequences: Annotated[int, typer.Option(min=1, help="Answers per source.")] = 1,
    seed: Annotated[int | None, typer.Option(help="With --sample: seed, for repeatable answers.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sources per batch.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer: source, answer.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Generate an answer for each source text, or for each line of stdin."""
    import json

    from layalign.utils.errors import ArgumentError

    if prompt is not None and task is not None:
        raise ArgumentError("prompt: give either --prompt or --task, not both")
    if stream and (num_beams > 1 or num_return_sequences > 1 or as_json):
        raise ArgumentError("stream: expected one greedy or sampled answer, got beams, several answers or --json")
    if num_return_sequences > 1 and not sample and num_return_sequences > num_beams:
        raise ArgumentError("num_return_sequences: expected --sample, or at least as many --num-beams")
    examples = _examples(source, language, prompt, task)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": sample}
    options["num_return_sequences"] = num_return_sequences
    if sample:
        options.update(temperature=temperature, top_p=top_p, top_k=top_k)
    from layalign.modeling.loading import load_model

    model, *tokenizers = load_model(checkpoint, device, dtype)
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    from layalign.data import LayAlignCollator

    stage = "task" if prompt or task else "translation"
    run = _Run(model, LayAlignCollator.from_model(model, *tokenizers, stage=stage, with_targets=False), options)
    if stream:
        for example in examples:
            run.stream(example)
        return
    for example, answer in run.answers(examples, batch_size):
        pair = {"source": example.source, "answer": answer}
        typer.echo(json.dumps(pair, ensure_ascii=False) if as_json else answer)


def _examples(source: list[str] | None, language: str, prompt: str | None, task: str | None) -> Iterator[Example]:
    from layalign.data import Example, language_of
    from layalign.data.prompts import math_prompt
    from layalign.modeling.tokenization import Prompt
    from layalign.utils.errors import ArgumentError

    if task not in (None, "math", "source"):
        raise ArgumentError(f"task: expected math or source, got {task!r}")
    name = language_of(language).name
    if source is None and sys.stdin.isatty():
        typer.echo("reading sources from the keyboard, one per line; end with Ctrl-D", err=True)

    def build() -> Iterator[Example]:
        for text in source if source is not None else sys.stdin:
            text = text.strip()
            if not text:
                if source is not None:
                    raise ArgumentError("source: expected a text, got an empty one")
                continue
            filled = Prompt.fill(prompt, text) if prompt is not None else ""
            if task is not None:
                filled = math_prompt(text) if task == "math" else text
            yield Example(source=text, target="", language=name, prompt=filled)

    return build()


@dataclass
class _Run:
    """A model, what makes its batches, and the options of `generate`."""

    model: Any
    collator: LayAlignCollator
    options: dict[str, Any]

    def inputs(self, batch: list[Example]) -> dict[str, Any]:
        from layalign.nn.inspection import device_of

        device = device_of(self.model.get_input_embeddings())
        return {key: tensor.to(device) for key, tensor in self.collator(batch).items()}

    def answers(self, examples: Iterator[Example], batch_size: int) -> Iterator[tuple[Example, str]]:
        from layalign.utils.errors import NonFiniteError

        while batch := list(islice(examples, batch_size)):
            inputs, failed = self.inputs(batch), tuple[int, ...]()
            try:
                tokens = self.model.generate(**inputs, **self.options)
            except NonFiniteError as error:
                tokens, failed = error.output, error.rows
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            texts = self.collator.llm_tokenizer.batch_decode(tokens, skip_special_tokens=True)
            copies = len(texts) // len(batch)
            for index, text in enumerate(texts):
                if index // copies not in failed:
                    yield batch[index // copies], text.strip()
            if failed:
                raise self.refused(batch[failed[0]])

    def stream(self, example: Example) -> None:
        from transformers import TextStreamer

        from layalign.utils.errors import NonFiniteError

        streamer = TextStreamer(self.collator.llm_tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            self.model.generate(**self.inputs([example]), **self.options, streamer=streamer)
        except NonFiniteError:
            raise self.refused(example) from None

    @staticmethod
    def refused(example: Example) -> Exception:
        from layalign.utils.errors import NonFiniteError, shown

        return NonFiniteError(f"model: expected finite logits, got NaN or infinity for {shown(example.source)}")
