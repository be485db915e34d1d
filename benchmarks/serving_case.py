"""A tiny model to serve, questions for it, and the answer to each as a single request, which a server must give."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel, PreTrainedTokenizerFast

from layalign import LayAlignForCausalLM
from layalign.data import Example, LayAlignCollator
from layalign.data.records import PROMPTS
from layalign.modeling.tokenization import save_tokenizers

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
SIZE = len(SPECIAL) + 256
WORDS = [
    "moja",
    "mbili",
    "tatu",
    "nne",
    "tano",
    "sita",
    "saba",
    "nane",
    "tisa",
    "kumi",
    "paka",
    "mbwa",
    "nyumba",
    "数学",
    "প্রশ্ন",
    "वह",
    "كتاب",
    "вопрос",
    "été",
    "größer",
    "😀",
]
MARGIN = 1e-4  # with a smaller lead over the second token, rounding in another batch shape may change a greedy token


@dataclass(frozen=True)
class Question:
    """A request and its answer."""

    prompt: str
    task: str
    language: str
    max_tokens: int
    stop: str | None
    text: str
    reason: str
    margin: float

    def body(self) -> dict[str, Any]:
        """The fields of the request."""
        names = ("prompt", "task", "language", "max_tokens", "stop")
        return {name: value for name, value in asdict(self).items() if name in names and value is not None}


def byte_tokenizer(*, add_eos: bool) -> PreTrainedTokenizerFast:
    """One token per byte, so that characters of other scripts are several tokens."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def tiny_model(ends: bool = True) -> LayAlignForCausalLM:
    """A model with random weights, large enough and with open gates, so that all answers differ."""
    torch.manual_seed(0)
    encoder = MT5EncoderModel(
        MT5Config(
            vocab_size=SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, dropout_rate=0.0, pad_token_id=0,
            eos_token_id=1,
        )
    )  # fmt: skip
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SIZE, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2, max_position_embeddings=8192,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        # Mostly letters, since incomplete characters all decode to the same text. And an end token now and then.
        letters = byte_tokenizer(add_eos=False)("".join(map(chr, range(32, 127))))["input_ids"]
        llm.lm_head.weight[sorted(set(range(len(SPECIAL), SIZE)) - set(letters))] *= 0.5
        llm.lm_head.weight[1] *= 1.15 if ends else 0.0
    model = LayAlignForCausalLM.from_encoder_and_llm(encoder, llm)
    with torch.no_grad():
        for index, module in enumerate(model.cross_attention):
            module.adaption_gate.fill_(0.9 - 0.5 * index)
        assert model.mapping is not None
        model.mapping.end_boundary.normal_()
    return model.eval()


def write_checkpoint(folder: Path, ends: bool = True) -> tuple[LayAlignForCausalLM, Any, Any]:
    """Save the model with its frozen parts and tokenizers; returns (model, encoder tokenizer, LLM tokenizer)."""
    model, tokenizers = tiny_model(ends), (byte_tokenizer(add_eos=True), byte_tokenizer(add_eos=False))
    model.save_pretrained(folder, save_frozen=True)
    save_tokenizers(folder, *tokenizers)
    return model, *tokenizers


def questions(model: Any, encoder_tokenizer: Any, llm_tokenizer: Any, count: int, seed: int = 0) -> list[Question]:
    """Questions of many lengths, each with the answer of `model.generate` to it as a single request."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        prompt = " ".join(draw.choices(WORDS, k=draw.choice((1, 2, 3, 5, 8, 13, 21))))
        task, language = draw.choice(sorted(PROMPTS)), draw.choice(("Swahili", "bn", "deu"))
        longest = draw.choice((2, 8, 16, 16, 24, 32, 48, 64))
        text, reason, margin = single_answer(model, encoder_tokenizer, llm_tokenizer, prompt, task, longest)
        stop = None
        if len(text) > 3 and draw.random() < 0.2:  # a stop text that occurs
            begin = draw.randrange(1, len(text) - 1)
            stop = text[begin : begin + 2]
            text, reason = text[: text.index(stop)], "stop"
        found.append(Question(prompt, task, language, longest, stop, text, reason, margin))
    return found


@torch.no_grad()
def single_answer(
    model: Any, encoder_tokenizer: Any, llm_tokenizer: Any, prompt: str, task: str, longest: int
) -> tuple[str, str, float]:
    """(text, reason for its end, smallest lead of a chosen token's logit) of a greedy answer to a single question."""
    filled = PROMPTS[task](prompt)
    collator = LayAlignCollator.from_model(
        model, encoder_tokenizer, llm_tokenizer, stage="task" if filled else "translation", with_targets=False,
        max_prompt_length=1024,
    )  # fmt: skip
    batch = collator([Example(prompt, "", "Swahili", filled)])
    output = model.generate(
        **batch, max_new_tokens=longest, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    ids = output.sequences[0, batch["input_ids"].shape[1] :].tolist()
    leads = [float(-step[0].topk(2).values.diff()) for step in output.logits]
    end = llm_tokenizer.eos_token_id
    ended = end in ids
    ids = ids[: ids.index(end)] if ended else ids
    text = llm_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text, "stop" if ended else "length", min(leads)
