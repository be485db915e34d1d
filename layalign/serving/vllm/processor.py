"""What vLLM makes of a request: the source's token ids, for the encoder, and the LLM's prompt with slots for them.

A source is a modality of its own. One item of it is a text, a list of the encoder's token ids, or a mapping with the
fields of `layalign.serving.vllm.source_prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseProcessingInfo,
    EncDecMultiModalProcessor,
    PromptReplacement,
)

from layalign.modeling.encoders import encoder_from_config
from layalign.modeling.llm_inputs import build_inputs
from layalign.modeling.tokenization import eos_ids, load_tokenizers
from layalign.serving.http.messages import ApiError
from layalign.serving.http.preparing import Preparer
from layalign.serving.vllm import MODALITY

FIELDS = ("text", "language", "task", "llm_prompt")


def refused(message: str, field: str) -> VLLMValidationError:
    """vLLM's error for a bad request, answered with status 400."""
    return VLLMValidationError(message, parameter=field)


class Read(dict[str, Any]):
    """A source that was checked: the encoder's token ids ("ids"), and the LLM's prompt ("prompt")."""


class SourceItems(ProcessorBatchItems):
    """The sources of a request, each a :class:`Read`."""

    def __init__(self, data: Any) -> None:
        super().__init__(data, MODALITY)


class SourceParser(MultiModalDataParser):
    """Tokenizes the sources of requests, and checks them.

    Args:
        info: of the model.
    """

    def __init__(self, info: SourceInfo) -> None:
        super().__init__()
        self.info = info

    def _parse(self, data: Any) -> SourceItems | None:
        if data is None:
            return None
        if isinstance(data, str | Mapping) or (isinstance(data, Sequence) and all(type(each) is int for each in data)):
            data = [data]
        if not isinstance(data, Sequence) or len(data) != 1:
            raise refused(f"{MODALITY}: expected one source", MODALITY)
        return SourceItems([self.info.read(data[0])])

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {MODALITY: self._parse}


class SourceInfo(BaseProcessingInfo):
    """Limits and tokenizers of a model."""

    @cached_property
    def preparer(self) -> Preparer:
        """Makes model inputs of texts, as the server of this library does."""
        config = self.get_hf_config()
        with torch.device("meta"):
            model = SimpleNamespace(config=config, encoder=encoder_from_config(config.encoder_config), llm=None)
        tokenizers = load_tokenizers(self.ctx.model_config.model, config=config)
        return Preparer(model, *tokenizers, config.serve_settings, self.ctx.model_config.max_model_len)

    @cached_property
    def slot_id(self) -> int:
        """What fills the slots where neither a first token nor a prompt does: no id that an answer may have to say."""
        ends = {*eos_ids(None, self.preparer.collators["task"].llm_tokenizer), self.get_hf_config().source_token_id}
        return next(i for i in reversed(range(self.get_hf_config().get_text_config().vocab_size)) if i not in ends)

    @property
    def max_source(self) -> int:
        """The longest source in tokens."""
        return self.preparer.collators["task"].max_source_length

    def read(self, source: Any) -> Read:
        """One source as :class:`SourceItems` hold it. "prompt" is None for a source without fields of its own."""
        if isinstance(source, Read):
            return source
        given = {"text": source} if isinstance(source, str) else source
        if isinstance(given, Mapping):
            unknown = sorted(map(str, set(given) - set(FIELDS)))
            text, *others = (given.get(name) for name in FIELDS)
            if unknown or not isinstance(text, str) or not all(isinstance(each, str | None) for each in others):
                raise refused(f"{MODALITY}: expected texts under text, and perhaps {', '.join(FIELDS[1:])}", MODALITY)
            try:
                "".join([text, *filter(None, others)]).encode()  # type: ignore[list-item]
                inputs = self.preparer.inputs(text, *others)  # type: ignore[arg-type]
            except UnicodeEncodeError:
                raise refused(f"{MODALITY}: expected valid text, got a lone surrogate", MODALITY) from None
            except ApiError as error:
                raise refused(error.detail, error.param or MODALITY) from None
            prompt = None if isinstance(source, str) else self.preparer.prompt(inputs)
            return Read(ids=list(inputs.source), prompt=prompt)
        if not isinstance(given, Sequence) or not all(type(token) is int for token in given):
            raise refused(f"{MODALITY}: expected a text, token ids of the encoder, or a mapping", MODALITY)
        most, count = self.max_source, self.get_hf_config().encoder_config.vocab_size
        if not 1 <= len(given) <= most or not all(0 <= token < count for token in given):
            raise refused(f"{MODALITY}: expected 1 to {most} token ids in 0..{count - 1}", MODALITY)
        return Read(ids=list(given), prompt=None)

    def packed(self, source_length: int, prompt: Sequence[int]) -> list[int]:
        """The LLM's input of a request, as `layalign.modeling.llm_inputs.build_inputs` lays it out.

        The slots are filled with a token that the text has in any case: penalties of vLLM count the whole prompt, and
        the library's do not count slots.
        """
        config = self.get_hf_config()
        first = config.llm_bos_token_id
        filling = first if first is not None else prompt[0] if prompt else self.slot_id
        inputs = build_inputs(
            [source_length], [prompt], bos_token_id=first, source_token_id=filling, slots=config.use_adapter
        )
        packed: list[int] = inputs["input_ids"][0].tolist()
        return packed

    # What vLLM asks

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """One source in a request."""
        return {MODALITY: 1}

    def get_data_parser(self) -> MultiModalDataParser:
        """Reads the sources of a request."""
        return SourceParser(self)

    def get_default_tok_params(self) -> Any:
        """The LLM's tokenizer adds nothing: packing adds the first token."""
        return super().get_default_tok_params().with_kwargs(add_special_tokens=False)

    @property
    def skip_prompt_length_check(self) -> bool:
        """The source is compared with its own limit here."""
        return True

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The longest source."""
        return {MODALITY: min(self.max_source, seq_len)}


class SourceDummy(BaseDummyInputsBuilder[SourceInfo]):
    """Requests with which vLLM measures its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """No text."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """The longest sources."""
        length = self.info.get_mm_max_tokens_per_item(seq_len, mm_counts)[MODALITY]
        return {MODALITY: [[0] * length] * mm_counts.get(MODALITY, 0)}


class SourceProcessor(EncDecMultiModalProcessor[SourceInfo]):
    """Lays a request out for the engine."""

    skip_decoder_start_token = True

    def create_encoder_prompt(self, prompt: list[int], mm_items: Any) -> list[int]:
        """What `_get_prompt_updates` replaces."""
        return [0]

    def create_decoder_prompt(self, prompt: Any, mm_items: Any) -> list[int]:
        """First token, slots and prompt: that of the source's own fields, else the request's."""
        source = mm_items[MODALITY].get(0)
        if source["prompt"] is not None and prompt:
            raise refused("prompt: expected none beside a source with task or llm_prompt", "prompt")
        own = source["prompt"] if source["prompt"] is not None else prompt
        return self.info.packed(len(source["ids"]), own)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        return BatchFeature({"encoder_input_ids": [torch.tensor(one["ids"]) for one in hf_data[f"{MODALITY}s"]]})

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        return {"encoder_input_ids": MultiModalFieldConfig.batched(MODALITY)}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        def replacement(index: int) -> list[int]:
            return [0] * len(mm_items[MODALITY].get(index)["ids"])

        return [PromptReplacement(modality=MODALITY, target=[0], replacement=replacement)]
