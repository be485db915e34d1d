"""Prompts, equal byte for byte to those the published checkpoints were trained with (odd spacing included).

Source: the published LayAlign code (`tools/read_datasets.py`); the math prompt goes back to Alpaca. Only
`few_shot_prompt` and `xcopa_prompt` are ours. No prompt ends in a space or newline: the LLM's tokenizer starts the
answer on its own.
"""

from __future__ import annotations

from collections.abc import Sequence


def math_prompt(question: str) -> str:
    """Prompt of MetaMath, for MGSM, MSVAMP and the math training data."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{question}\n\n### Response: Let's think step by step."
    )


def few_shot_prompt(
    examples: Sequence[tuple[str, str]], sentence: str, source_language: str, target_language: str = "English"
) -> str:
    """Prompt for translation by an LLM that was trained on no prompt: some translations, then the sentence. Ours.

    Args:
        examples: pairs of a sentence and its translation.
        sentence: to be translated; it and the pairs are put on one line each.
        source_language, target_language: English names.
    """
    blocks = [f"{source_language}: {one_line(a)}\n{target_language}: {one_line(b)}\n\n" for a, b in examples]
    return "".join(blocks) + f"{source_language}: {one_line(sentence)}\n{target_language}:"


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def xnli_prompt(premise: str, hypothesis: str) -> str:
    """Prompt of LLaMAX2-XNLI; the answer is entailment, neutral or contradiction."""
    return f"Premise: {premise}\nHypothesis: {hypothesis}\nLabel:"


def x_csqa_prompt(question: str, choices: Sequence[str]) -> str:
    """Prompt of LLaMAX2-X-CSQA; the answer is the letter of one of the choices (A, B, ...)."""
    options = "\t".join(f"{letter}. {text}" for letter, text in zip(choice_letters(len(choices)), choices, strict=True))
    return f"{question}\nOptions:{options}\nAnswer:"


def xcopa_prompt(premise: str, question: str, choices: Sequence[str]) -> str:
    """Prompt for XCOPA, ours, in the form of the X-CSQA one; the answer is A or B.

    Args:
        premise: the sentence.
        question: "cause" or "effect".
        choices: the two sentences to choose from.
    """
    asked = {"cause": "What was the cause?", "effect": "What happened as a result?"}[question]
    return x_csqa_prompt(f"{premise} {asked}", choices)


def choice_letters(count: int) -> tuple[str, ...]:
    """("A", "B", ...), one per choice."""
    return tuple(chr(ord("A") + i) for i in range(count))
